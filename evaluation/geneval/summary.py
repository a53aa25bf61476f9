"""GenEval's scores: the lines of results.jsonl, a line an image, and what they come to.

- A task's score is the mean over its images, the overall score the mean over the tasks that there are: whatever tags
  the lines have, as in the official code.
- The intervals are of the bootstrap: the prompts of each task are drawn anew, with replacement, a prompt with all its
  images. Images of a prompt succeed and fail together, so to draw images would make the intervals too narrow. They tell
  how far another set of prompts of the same kind could have moved the score; where a task's prompts all did equally
  well, that is no width at all.
- Draws are a function of (seed, task), and lines may come in any order.

Source: Ghosh et al., "GenEval" (2023), and its evaluation/summary_scores.py; the percentile bootstrap: Efron and
Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3.

GenEval's folder of images, written and read.

    00000/metadata.jsonl      the prompt, one line
    00000/samples/0000.png    its images
    00000/grid.png            all of them in one

A folder for each prompt, in the prompts' order. Of what others made any digits may name a folder or image, and numbers
may be missing. Images may not: a folder that lacks some would get a score that looks like a whole one.

Source: Ghosh et al., "GenEval" (2023), and its evaluation/evaluate_images.py.

A detector's verdicts on a folder's images, kept so that a job that was killed goes on where it stood.

A file a prompt, whole or absent. Each verdict is kept with the hash of the image's file: an image that has changed is
judged again. All are of one detector; a folder with those of another is refused.
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
from numpy.typing import NDArray

from data.decode import decode_file
from data.errors import UserError
from data.files import atomic_write, sha256
from data.listing import is_image
from data.randomness import key, uniform
from evaluation.geneval.prompts import TASKS, Metadata, read_one, to_lines
from evaluation.geneval.rules import Detector, Image, Verdict, judge
from evaluation.sampling_job import check_or_write_manifest, write_json, write_png

Result = dict[str, Any]
"""A line of results.jsonl: filename, tag, prompt, correct, reason, and metadata and details as strings of JSON."""

RESAMPLES = 2000
_LEVEL = 0.95
_Floats = NDArray[np.float64]


def counted(metadata: Metadata, correct: bool) -> Result:
    """Of an image's line, what `summarise` reads."""
    return {"tag": metadata["tag"], "metadata": json.dumps(metadata), "correct": correct}


def summarise(results: Sequence[Result], seed: int = 0) -> dict[str, Any]:
    """The scores, as shares of 1, with intervals (low, high) of 95 %.

    Args:
        results: a line for each image.
        seed: of the bootstrap.

    Returns:
        "overall", "overall_interval"; "tasks": of each that there is "score", "interval", "prompts", "images";
        "absent_tasks": GenEval's that there are not; "correct_images"; "correct_prompts": with any image correct;
        "prompts"; "images"; "bootstrap": how the intervals were made. In JSON's types.

    Raises:
        UserError: there is no line.
    """
    if not results:
        raise UserError("there are no results to sum up: an image at least has to be scored")
    others = sorted({it["tag"] for it in results} - set(TASKS))
    # As in the official code, lines of equal metadata are of one prompt. Sorted, so that their order means nothing.
    outcomes: dict[str, dict[str, list[bool]]] = {task: defaultdict(list) for task in (*TASKS, *others)}
    for it in sorted(results, key=lambda it: it["metadata"]):
        outcomes[it["tag"]][it["metadata"]].append(it["correct"])
    tasks: dict[str, dict[str, Any]] = {}
    resampled: list[_Floats] = []
    for task, of_prompts in outcomes.items():
        if of_prompts:
            scores = bootstrap(list(of_prompts.values()), key(seed, "geneval", "bootstrap", task))
            resampled.append(scores)
            images = [correct for of_prompt in of_prompts.values() for correct in of_prompt]
            tasks[task] = {
                "score": _mean(images),
                "interval": interval(scores),
                "prompts": len(of_prompts),
                "images": len(images),
            }
    prompts = [any(of_prompt) for of_prompts in outcomes.values() for of_prompt in of_prompts.values()]
    return {
        "overall": _mean([task["score"] for task in tasks.values()]),
        "overall_interval": interval(np.mean(resampled, axis=0)),
        "tasks": tasks,
        "absent_tasks": [task for task in TASKS if task not in tasks],
        "correct_images": _mean([it["correct"] for it in results]),
        "correct_prompts": _mean(prompts),
        "prompts": len(prompts),
        "images": len(results),
        "bootstrap": {"resamples": RESAMPLES, "seed": seed, "level": _LEVEL, "unit": "prompts of a task"},
    }


def bootstrap(of_prompts: Sequence[Sequence[float]], key_: int) -> _Floats:
    """A task's score, (RESAMPLES,), each time with as many prompts, drawn with replacement.

    Args:
        of_prompts: each image's score, here whether it is correct, by prompts; none is empty.
    """
    correct = np.array([sum(of_prompt) for of_prompt in of_prompts])
    images = np.array([len(of_prompt) for of_prompt in of_prompts])
    n = len(images)
    drawn = (uniform(key_, np.arange(RESAMPLES * n)) * n).astype(np.int64).reshape(RESAMPLES, n)
    return np.asarray(correct[drawn].sum(1) / images[drawn].sum(1))


def interval(scores: _Floats) -> list[float]:
    """The middle 95 % of scores: their percentiles 2.5 and 97.5."""
    low, high = np.quantile(scores, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return [float(low), float(high)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Prompted:
    """One prompt and its images.

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
    """Make the folders and write each prompt's line; what is there already stays.

    Raises:
        UserError: they cannot be made.
    """
    try:
        for number, metadata in enumerate(prompts):
            samples = image_path(root, number, 0).parent
            samples.mkdir(parents=True, exist_ok=True)
            line = samples.with_name("metadata.jsonl")
            if not line.exists():
                atomic_write(line, to_lines([metadata]))
    except OSError as error:
        raise UserError(f"{root}: cannot be written to: {error.strerror}") from error


def read_image(path: Path) -> Image:
    """An image, uint8 (H, W, 3).

    Raises:
        UserError: it is no image, or a damaged one.
    """
    return np.ascontiguousarray(decode_file(path).transpose(1, 2, 0))


def write_grid(it: Prompted) -> None:
    """Write grid.png of a prompt's images, as nearly square as can be, row by row."""
    images = [read_image(path) for path in it.images]
    height, width = images[0].shape[:2]
    columns = math.ceil(math.sqrt(len(images)))
    grid = np.zeros((-(-len(images) // columns) * height, columns * width, 3), np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        grid[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
    write_png(it.folder / "grid.png", grid)


def read_folder(root: Path) -> list[Prompted]:
    """All prompts of a folder, in the order of their numbers.

    Raises:
        UserError: it is no such folder, or something is missing from it.
    """
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder of images")
    folders = _numbered((path.name, path) for path in root.iterdir() if path.is_dir())
    if not folders:
        raise UserError(f"{root}: must hold a folder for each prompt: 00000/metadata.jsonl and 00000/samples/0000.png")
    found = [_read_prompt(folder) for folder in folders]
    usual, _ = Counter(len(it.images) for it in found).most_common(1)[0]
    for it in found:
        if len(it.images) != usual:
            raise UserError(f"{it.folder}: holds {len(it.images)} images where others hold {usual}: complete it")
    return found


def _read_prompt(folder: Path) -> Prompted:
    line = folder / "metadata.jsonl"
    if not line.exists():
        raise UserError(f"{folder}: has no metadata.jsonl, which says what its images must show")
    samples = folder / "samples"
    files = sorted(samples.iterdir()) if samples.is_dir() else []
    images = _numbered((path.stem, path) for path in files if is_image(path.name))
    if not images:
        others = f", but {', '.join(path.name for path in files[:3])}" if files else ""
        raise UserError(f"{folder}: has no image samples/0000.png{others}")
    return Prompted(folder, read_one(line), tuple(images))


def _numbered(paths: Iterable[tuple[str, Path]]) -> list[Path]:
    """The paths whose names, given before them, are numbers, in their order; others are left out, as by the official
    code.

    Raises:
        UserError: two have the same number.
    """
    found: dict[int, Path] = {}
    for name, path in sorted(paths):
        if name.isdecimal() and (first := found.setdefault(int(name), path)) is not path:
            raise UserError(f"{path.parent}: {first.name} and {path.name} are of one number: remove one")
    return [found[number] for number in sorted(found)]


@dataclass(frozen=True)
class Judged:
    """An image and what became of it."""

    digest: str
    """SHA-256 of its file."""
    height: int
    width: int
    result: Result
    """Its line of results.jsonl; the file's name as seen from the job's folder."""


class Verdicts:
    """The verdicts of a detector on a folder's images.

    Args:
        out: the job's folder.
        prompted: what is judged.
        detector: who judges.
    """

    def __init__(self, out: Path, prompted: Sequence[Prompted], detector: Detector) -> None:
        self._folder = out / "verdicts"
        self._out, self._prompted, self._detector = out, prompted, detector

    def begin(self) -> list[int]:
        """Make the folder, or see that what is there is of the same detector.

        Returns:
            Numbers of the prompts whose images are not judged yet, or have changed since.

        Raises:
            UserError: it holds verdicts of another detector, or cannot be made.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            settings = {"detector": self._detector.identity, "thresholds": asdict(self._detector.thresholds)}
            differ = check_or_write_manifest(self._folder / "settings.json", settings)
        except OSError as error:
            raise UserError(f"--out {self._out}: cannot be written to: {error.strerror}") from error
        if differ:
            raise UserError(
                f"--out {self._out}: {self._folder} holds verdicts of another detector ({', '.join(differ)}): remove it"
            )
        return [number for number in range(len(self._prompted)) if not self._known(number)]

    def judge(self, mine: Iterable[int], judged: Callable[[], object]) -> None:
        """Judge the images of these prompts, and tell of each prompt.

        Raises:
            UserError: an image that cannot be read.
        """
        for number in mine:
            it = self._prompted[number]
            found = [self._judge(path, it.metadata) for path in it.images]
            write_json(self._path(number), [asdict(image) for image in found])
            judged()

    def read(self) -> list[list[Judged]]:
        """For each prompt the verdicts on its images. All have been judged."""
        return [self._read(number) for number in range(len(self._prompted))]

    def _judge(self, path: Path, metadata: Metadata) -> Judged:
        image = read_image(path)
        verdict = judge(metadata, image, self._detector)
        height, width = image.shape[:2]
        return Judged(sha256(path), height, width, _line(self._name(path), metadata, verdict))

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self._out)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.json"

    def _read(self, number: int) -> list[Judged]:
        return [Judged(**it) for it in json.loads(self._path(number).read_text())]

    def _known(self, number: int) -> bool:
        if not self._path(number).exists():
            return False
        it = self._prompted[number]
        known = [(image.result["filename"], image.result["metadata"], image.digest) for image in self._read(number)]
        return known == [(self._name(path), json.dumps(it.metadata), sha256(path)) for path in it.images]


def _line(filename: str, metadata: Metadata, verdict: Verdict) -> Result:
    """An image's line of results.jsonl; its details are (x0, y0, x1, y1, score) of all that counts, by class."""
    details: dict[str, list[list[float]]] = {}
    for it in verdict.used:
        details.setdefault(it.label, []).append([float(value) for value in (*it.box, it.score)])
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": verdict.correct,
        "reason": verdict.reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(details),
    }
