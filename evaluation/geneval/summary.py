"""GenEval's scores, its folder of images, and the results that a detector's judgement leaves for each image.

Scores:
- A task's score is the mean over its images, the overall score the mean over the tasks that there are, whatever tags
  the lines have, as in the official code.
- Intervals are of the bootstrap over a task's prompts, each with all its images. They say how far another set of
  prompts of the same kind could have moved the score. They are a function of the results, in whatever order.

The folder has a folder for each prompt, in the prompts' order:

    00000/metadata.jsonl      the prompt, one line
    00000/samples/0000.png    its images
    00000/grid.png            all of them in one

In a folder that others made, any digits may name a folder or image, and numbers may be missing. Images may not: a
folder that lacks some would get a score that looks like that of a whole one.

Source: Ghosh et al., "GenEval" (2023), and its evaluation/summary_scores.py and evaluation/evaluate_images.py.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.decode import decode_file
from data.errors import UserError, first_of
from data.files import atomic_write, name_in_errors, sha256, write_json, write_png
from data.listing import is_image
from data.randomness import key
from evaluation.geneval.prompts import TASKS, Metadata, read_one, to_lines
from evaluation.geneval.rules import Detector, Image, Verdict, judge
from evaluation.sampling_job import begin_or_resume
from evaluation.stats import LEVEL, RESAMPLES, Floats, bootstrap, interval

Result = dict[str, Any]
"""A line of results.jsonl: filename, tag, prompt, correct, reason, and metadata and details as strings of JSON."""


def counted(metadata: Metadata, correct: bool) -> Result:
    """Those fields of an image's line that `summarize` reads."""
    return {"tag": metadata["tag"], "metadata": json.dumps(metadata), "correct": correct}


def summarize(results: Sequence[Result], seed: int = 0) -> dict[str, Any]:
    """The scores, 0 to 1, with intervals [low, high] of 95 %; `seed` is the bootstrap's.

    Returns:
        "overall", "overall_interval"; "tasks": for each with images "score", "interval", "prompts", "images";
        "absent_tasks": GenEval's tasks without images; "correct_images"; "correct_prompts": with any image correct;
        "prompts"; "images"; "bootstrap": how the intervals were made. In JSON's types.

    Raises:
        UserError: there are no results.
    """
    if not results:
        raise UserError("there are no results to summarize: at least one image has to be scored")
    others = sorted({line["tag"] for line in results} - set(TASKS))
    # As in the official code, lines of equal metadata are of one prompt. Sorted, so that their order means nothing.
    outcomes: dict[str, dict[str, list[bool]]] = {task: defaultdict(list) for task in (*TASKS, *others)}
    for line in sorted(results, key=lambda line: line["metadata"]):
        outcomes[line["tag"]][line["metadata"]].append(line["correct"])
    tasks: dict[str, dict[str, Any]] = {}
    resampled: list[Floats] = []
    for task, of_prompts in outcomes.items():
        if of_prompts:
            resampled.append(bootstrap(list(of_prompts.values()), key(seed, "geneval", "bootstrap", task)))
            images = [correct for of_prompt in of_prompts.values() for correct in of_prompt]
            tasks[task] = {
                "score": _mean(images),
                "interval": list(interval(resampled[-1])),
                "prompts": len(of_prompts),
                "images": len(images),
            }
    prompts = [any(of_prompt) for of_prompts in outcomes.values() for of_prompt in of_prompts.values()]
    return {
        "overall": _mean([task["score"] for task in tasks.values()]),
        "overall_interval": list(interval(np.mean(resampled, axis=0))),
        "tasks": tasks,
        "absent_tasks": [task for task in TASKS if task not in tasks],
        "correct_images": _mean([line["correct"] for line in results]),
        "correct_prompts": _mean(prompts),
        "prompts": len(prompts),
        "images": len(results),
        "bootstrap": {"resamples": RESAMPLES, "seed": seed, "level": LEVEL, "unit": "prompts of a task"},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class PromptImages:
    """A prompt and its images.

    Attributes:
        folder: the prompt's own, such as 00000.
        metadata: of the prompt, GenEval's.
        images: the files, in the order of their numbers.
    """

    folder: Path
    metadata: Metadata
    images: tuple[Path, ...]


def image_path(root: Path, prompt: int, image: int) -> Path:
    """The file of an image by its prompt's number and its own, both from 0."""
    return root / f"{prompt:05d}" / "samples" / f"{image:04d}.png"


def begin_folder(root: Path, prompts: Sequence[Metadata]) -> None:
    """Make the prompts' folders with their metadata.jsonl; what is there already stays.

    Raises:
        UserError: they cannot be made.
    """
    with name_in_errors(str(root)):
        for number, metadata in enumerate(prompts):
            samples = image_path(root, number, 0).parent
            samples.mkdir(parents=True, exist_ok=True)
            line = samples.with_name("metadata.jsonl")
            if not line.exists():
                atomic_write(line, to_lines([metadata]))


def read_image(path: Path) -> Image:
    """An image, uint8 (H, W, 3).

    Raises:
        UserError: it cannot be read as an image.
    """
    return np.ascontiguousarray(decode_file(path).transpose(1, 2, 0))


def write_grid(prompt: PromptImages) -> None:
    """Write grid.png of a prompt's images, row by row in a grid that is as nearly square as can be."""
    images = [read_image(path) for path in prompt.images]
    height, width = images[0].shape[:2]
    columns = math.ceil(math.sqrt(len(images)))
    grid = np.zeros((-(-len(images) // columns) * height, columns * width, 3), np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        grid[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    write_png(prompt.folder / "grid.png", grid)


def read_folder(root: Path) -> list[PromptImages]:
    """All prompts of a folder, in the order of their numbers.

    Raises:
        UserError: it has another layout, or something is missing from it.
    """
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder of images")
    folders = _numbered((path.name, path) for path in root.iterdir() if path.is_dir())
    if not folders:
        raise UserError(f"{root}: must hold a folder for each prompt: 00000/metadata.jsonl and 00000/samples/0000.png")
    found = [_read_prompt(folder) for folder in folders]
    usual, _ = Counter(len(prompt.images) for prompt in found).most_common(1)[0]
    for prompt in found:
        if len(prompt.images) != usual:
            raise UserError(
                f"{prompt.folder}: holds {len(prompt.images)} images where others hold {usual}: complete it"
            )
    return found


def _read_prompt(folder: Path) -> PromptImages:
    line = folder / "metadata.jsonl"
    if not line.exists():
        raise UserError(f"{folder}: has no metadata.jsonl, which says what its images must show")
    samples = folder / "samples"
    files = sorted(samples.iterdir()) if samples.is_dir() else []
    images = _numbered((path.stem, path) for path in files if is_image(path.name))
    if not images:
        others = f", but {first_of([path.name for path in files], 3)}" if files else ""
        raise UserError(f"{folder}: has no image samples/0000.png{others}")
    return PromptImages(folder, read_one(line), tuple(images))


def _numbered(paths: Iterable[tuple[str, Path]]) -> list[Path]:
    """The paths whose names, given before them, are numbers, in order; others are left out, as in the official code.

    Raises:
        UserError: two have the same number.
    """
    found: dict[int, Path] = {}
    for name, path in sorted(paths):
        if name.isdecimal() and (first := found.setdefault(int(name), path)) is not path:
            raise UserError(f"{path.parent}: {first.name} and {path.name} have the same number: remove one")
    return [found[number] for number in sorted(found)]


@dataclass(frozen=True)
class ImageResult:
    """An image and its result."""

    digest: str
    """SHA-256 of its file."""
    height: int
    width: int
    result: Result
    """Its line of results.jsonl; the file's name is relative to the job's folder."""


class Verdicts:
    """A detector's verdicts on a folder's images: a file for each prompt in verdicts/, whole or absent.

    A verdict is kept with the hash of its image's file, so that an image that has changed is judged again.
    """

    def __init__(self, out: Path, prompts: Sequence[PromptImages], detector: Detector) -> None:
        self._folder = out / "verdicts"
        self._out, self._prompts, self._detector = out, prompts, detector

    def begin(self) -> list[int]:
        """Make the folder or resume in it; the numbers of the prompts whose images are still to be judged.

        Raises:
            UserError: it holds verdicts of another detector, or cannot be written.
        """
        settings = {"detector": self._detector.identity, "thresholds": asdict(self._detector.thresholds)}
        what, where = "verdicts of another detector", f"--out {self._out}: {self._folder}"
        begin_or_resume(self._folder / "settings.json", settings, what=what, advice="remove it", where=where)
        return [number for number in range(len(self._prompts)) if not self._is_known(number)]

    def judge(self, numbers: Iterable[int], advance: Callable[[], object]) -> None:
        """Judge the images of these prompts; `advance` is called after each prompt.

        Raises:
            UserError: an image cannot be read.
        """
        for number in numbers:
            prompt = self._prompts[number]
            results = [self._judge(path, prompt.metadata) for path in prompt.images]
            write_json(self._path(number), [asdict(image) for image in results])
            advance()

    def read(self) -> list[list[ImageResult]]:
        """For each prompt the results of its images, all of which have been judged."""
        return [self._read(number) for number in range(len(self._prompts))]

    def _judge(self, path: Path, metadata: Metadata) -> ImageResult:
        image = read_image(path)
        verdict = judge(metadata, image, self._detector)
        height, width = image.shape[:2]
        return ImageResult(sha256(path), height, width, _line(self._name(path), metadata, verdict))

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self._out)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.json"

    def _read(self, number: int) -> list[ImageResult]:
        return [ImageResult(**fields) for fields in json.loads(self._path(number).read_text())]

    def _is_known(self, number: int) -> bool:
        if not self._path(number).exists():
            return False
        prompt = self._prompts[number]
        known = [(image.result["filename"], image.result["metadata"], image.digest) for image in self._read(number)]
        return known == [(self._name(path), json.dumps(prompt.metadata), sha256(path)) for path in prompt.images]


def _line(filename: str, metadata: Metadata, verdict: Verdict) -> Result:
    """An image's line of results.jsonl; details are (x0, y0, x1, y1, score) of all objects that count, by class."""
    details: dict[str, list[list[float]]] = {}
    for found in verdict.used:
        details.setdefault(found.label, []).append([float(value) for value in (*found.box, found.score)])
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": verdict.correct,
        "reason": verdict.reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(details),
    }
