"""GenEval as a job that may be killed at any moment, on any number of processes: draw, judge, sum up.

In its folder it leaves

    prompts.jsonl    what was asked for, as GenEval's own file
    images/          GenEval's folder of images; images.json says what they are made from
    verdicts/        what the detector found in each prompt's images; settings.json says which detector
    results.jsonl    a line an image, with GenEval's fields
    summary.json     scores and everything they depend on
    report.html      every image with what was found in it

An image is a function of the weights, the sampler, the seed, its prompt and its number, and is there whole or absent.
A folder holds images of one kind; others are refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from data.errors import UserError
from evaluation.geneval.folder import Prompted, begin_folder, image_path, read_folder, write_grid, write_image
from evaluation.geneval.prompts import OFFICIAL_MD5, Metadata, digest, official, read, to_lines
from evaluation.parts import note_settings, write_aside
from t2i.config_sampling import SamplingConfig
from t2i.pipeline import Picture, Pipeline

OFFICIAL = 553
"""GenEval's prompts."""
EACH = 4
"""Images a prompt, in GenEval."""

Number = tuple[int, int]
"""An image: its prompt's number and its own under it, both from 0."""


@dataclass(frozen=True)
class Samples:
    """The images of a file of prompts in the making.

    Attributes:
        out: the job's folder.
        prompts: what to draw; where two have the same words, their images are different ones all the same.
        each: images a prompt.
        size: height and width of an image, in pixels.
        sampling: how they are drawn.
    """

    out: Path
    prompts: Sequence[Metadata]
    each: int
    size: tuple[int, int]
    sampling: SamplingConfig

    def begin(self, made_of: dict[str, Any], model: Path) -> list[Number]:
        """Make the folder, or see that what is there is of the same images.

        Args:
            made_of: what else the images depend on, in JSON's types.
            model: the model's folder, for the record.

        Returns:
            The images that are missing.

        Raises:
            UserError: it holds other images, or cannot be made.
        """
        note, root = self.out / "images.json", self.out / "images"
        if root.exists() and not note.exists():
            raise UserError(f"--out {self.out}: holds images/ that this job has not begun: give another name")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            settings = {
                **made_of,
                "prompts": digest(self.prompts),
                "images_per_prompt": self.each,
                "size": self.size,
                "sampling": self.sampling.model_dump(mode="json"),
            }
            differ = note_settings(note, settings, model=str(model))
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written to: {error.strerror}") from error
        if differ:
            raise UserError(f"--out {self.out}: holds images made otherwise ({', '.join(differ)}): give another name")
        write_aside(self.out / "prompts.jsonl", [to_lines(self.prompts)])
        begin_folder(root, self.prompts)
        return missing_images(self.out, len(self.prompts), self.each)

    def draw(self, pipeline: Pipeline, mine: Sequence[Number], drawn: Callable[[], object]) -> None:
        """Draw these images, and tell of each."""
        before: Counter[str] = Counter()
        first = []  # numbers of the pictures of its words that a prompt begins with
        for metadata in self.prompts:
            first.append(self.each * before[metadata["prompt"]])
            before[metadata["prompt"]] += 1
        pictures = [Picture(self.prompts[prompt]["prompt"], first[prompt] + image) for prompt, image in mine]
        batches = pipeline.draw_batches(pictures, self.sampling, self.size)
        for (prompt, image), pixels in zip(mine, chain.from_iterable(batches), strict=True):
            write_image(image_path(self.out / "images", prompt, image), pixels.permute(1, 2, 0).numpy())
            drawn()


def missing_images(out: Path, prompts: int, each: int) -> list[Number]:
    """The images that a job has not drawn yet."""
    numbers = ((prompt, image) for prompt in range(prompts) for image in range(each))
    return [number for number in numbers if not image_path(out / "images", *number).exists()]


def drawn_images(out: Path) -> tuple[list[Prompted], dict[str, Any]]:
    """The images that a job has drawn, and what they are made from.

    Raises:
        UserError: it has drawn none, or not all.
    """
    note = out / "images.json"
    if not note.exists():
        raise UserError(
            f"--out {out}: holds no images of this job: draw them first, or give those of others as --images"
        )
    about = json.loads(note.read_text())
    prompts = read(out / "prompts.jsonl")
    if missing := missing_images(out, len(prompts), about["images_per_prompt"]):
        whole = len(prompts) * about["images_per_prompt"]
        raise UserError(
            f"--out {out}: lacks {len(missing)} of {whole} images: go on drawing them before they are scored"
        )
    return read_folder(out / "images"), about


def complete_grids(prompted: Iterable[Prompted]) -> None:
    """Write the grids that are not there yet."""
    for it in prompted:
        if not (it.folder / "grid.png").exists():
            write_grid(it)


def notes_on(prompts: Sequence[Metadata], each: int, choice: str) -> list[str]:
    """Sentences on why scores compare with no published ones; none: they may.

    Args:
        prompts: what was scored.
        each: images a prompt.
        choice: how they were chosen from a larger file, in words; empty: they are all of it.
    """
    notes = []
    if choice:
        notes.append(f"Only a part of the prompts was scored: {choice}.")
    elif digest(prompts) != OFFICIAL_MD5:
        kind = "GenEval's in other words" if _reworded(prompts) else f"not GenEval's official {OFFICIAL}"
        notes.append(f"The prompts are {kind}: their scores compare with none that are published for those.")
    if each != EACH:
        notes.append(f"Each prompt has {each} images, where GenEval has {EACH}.")
    return notes


def _reworded(prompts: Sequence[Metadata]) -> bool:
    """Whether they ask for what GenEval's ask for."""
    if len(prompts) != OFFICIAL:
        return False
    return [{**it, "prompt": ""} for it in prompts] == [{**it, "prompt": ""} for it in official()]
