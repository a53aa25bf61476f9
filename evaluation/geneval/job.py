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

What a GenEval job hands in: results.jsonl, summary.json, report.html and a table.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import atomic_write
from evaluation.geneval.page import write_page
from evaluation.geneval.prompts import CLASSES, OFFICIAL_MD5, Metadata, digest, essentials, official, read, to_lines
from evaluation.geneval.rules import Detector
from evaluation.geneval.summary import Judged, Prompted, begin_folder, image_path, read_folder, summarise, write_grid
from evaluation.sampling_job import begin_or_go_on, read_speed, unfinished_batches, write_json, write_png
from t2i.config.train import SamplingConfig
from t2i.pipeline import Pipeline, pictures_of

OFFICIAL = 553
"""GenEval's prompts."""
EACH = 4
"""Images a prompt, in GenEval."""


def kind_of(prompts: Sequence[Metadata]) -> tuple[str, str]:
    """What prompts are, and in words which part of it; empty: all.

    "official": GenEval's, in any order, whatever fields others have added; "reworded": all of them, in their order, in
    other words; "other".
    """
    if digest(prompts) == OFFICIAL_MD5:
        return "official", ""
    asked = [essentials(it) for it in prompts]
    if any(item["class"] not in CLASSES for it in asked for item in it.get("include", ())):
        return "other", ""
    theirs = official()
    if all(it in theirs for it in asked) and len({it["prompt"] for it in asked}) == len(asked):
        return "official", "" if len(asked) == OFFICIAL else f"{len(asked)} of the {OFFICIAL} official"
    reworded = [{**it, "prompt": ""} for it in asked] == [{**it, "prompt": ""} for it in theirs]
    return "reworded" if reworded else "other", ""


def notes_on(kind: str, choice: str, each: int, detector: Mapping[str, Any]) -> list[str]:
    """Sentences on why the scores are not GenEval's, as published ones are.

    Args:
        kind: of the file of prompts, as `kind_of` has it.
        choice: which of its prompts were scored, in words; empty: all.
        each: images a prompt.
        detector: its identity.
    """
    notes = []
    if kind == "reworded":
        notes.append(
            "The prompts are GenEval's in other words: their scores do not compare with those of the official."
        )
    elif kind == "other":
        notes.append(f"The prompts are not GenEval's official {OFFICIAL}: their scores compare with no published ones.")
    if choice:
        notes.append(f"A part of the prompts was scored: {choice}.")
    if each != EACH:
        notes.append(f"Images a prompt: {each}, where GenEval has {EACH}.")
    others = [it["file"] for it in detector.values() if isinstance(it, Mapping) and it.get("pinned") is False]
    if others:
        notes.append(f"The detector's weights are not those of published scores: {', '.join(others)}.")
    return notes


_HELD_OUT = (
    "Held out are captions that training never saw if its scenes were packed as those of make prove, with "
    "--heldout_captions 0.1; to other models they are as any."
)


def name_of(notes: Sequence[str], detector: Mapping[str, Any]) -> str:
    """What a score may be called: the benchmark's name is for what compares with published ones.

    Args:
        notes: as `notes_on` has them.
        detector: its identity.
    """
    if detector["name"] == "shapes":
        return "Proving ground"
    return "GenEval's rules" if notes else "GenEval"


def finish(
    out: Path, judged: Sequence[Sequence[Judged]], detector: Detector, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write everything, and return the summary.

    Args:
        out: the job's folder.
        judged: for each prompt its images.
        detector: who judged.
        about: what is known of the images: "prompts" (`kind`, `choice`, `file`, `md5`), "drawn" (what they were made
            with); of the proving ground "bounds", too.
    """
    images = [image for of_prompt in judged for image in of_prompt]
    sizes = sorted({(image.height, image.width) for image in images})
    each = len(judged[0])
    prompts = about["prompts"]
    results = [image.result for image in images]
    held_out = [it for it in results if json.loads(it["metadata"]).get("heldout") is True]
    notes = notes_on(prompts["kind"], prompts["choice"], each, detector.identity)
    summary = {
        "name": name_of(notes, detector.identity),
        **summarise(results),
        # Of the proving ground: the same for its held-out captions.
        **({"held_out": summarise(held_out)} if held_out else {}),
        **({"bounds": about["bounds"]} if "bounds" in about else {}),
        "notes": [*notes, *([_HELD_OUT] if held_out else [])],
        "images_per_prompt": each,
        "size": sizes[0] if len(sizes) == 1 else "several",
        "prompt_file": prompts,
        "drawn": about["drawn"],
        "images_sha256": hashlib.sha256("".join(image.digest for image in images).encode()).hexdigest(),
        "detector": detector.identity,
        "thresholds": asdict(detector.thresholds),
    }
    atomic_write(out / "results.jsonl", ((json.dumps(it) + "\n").encode() for it in results))
    write_page(out / "report.html", _name(about), summary, judged)
    write_json(out / "summary.json", summary)  # the last: where it is, the others are
    return summary


def _name(about: Mapping[str, Any]) -> str:
    drawn = about["drawn"]
    return f"{drawn['model']}, {drawn['which']} weights" if "model" in drawn else f"images in {drawn['images']}"


def table(summary: Mapping[str, Any]) -> str:
    """The scores as lines for a terminal."""
    rows = {task.replace("_", " "): (it, it["score"], it["interval"]) for task, it in summary["tasks"].items()}
    rows["overall"] = (summary, summary["overall"], summary["overall_interval"])
    if it := summary.get("held_out"):
        rows["held out"] = (it, it["overall"], it["overall_interval"])
    lines = [f"{summary['name']:15}   score   95 % interval   prompts   images"]
    for name, (it, score, (low, high)) in rows.items():
        lines.append(f"{name:15}   {score:5.3f}  {low:5.3f} to {high:5.3f} {it['prompts']:9,} {it['images']:8,}")
    bounds = summary.get("bounds", {})
    beside = [f"{name.replace('_', ' ')}: {score:.3f}" for name, score in bounds.items() if score is not None]
    return "\n".join([*lines, *([", ".join(beside)] if beside else []), *summary["notes"]])


Number = tuple[int, int]
"""An image: its prompt's number and its own under it, both from 0."""


def choose(prompts: Sequence[Metadata], tasks: Collection[str], limit: int | None) -> tuple[list[int], str]:
    """Leave out prompts.

    Args:
        tasks: those whose prompts stay; none: all.
        limit: how many of each task stay, the first; None: all.

    Returns:
        Numbers of those that stay, and in words what was chosen; empty: they are all.

    Raises:
        UserError: none stay.
    """
    seen, kept = Counter[str](), []
    for number, metadata in enumerate(prompts):
        seen[metadata["tag"]] += 1
        if (not tasks or metadata["tag"] in tasks) and (limit is None or seen[metadata["tag"]] <= limit):
            kept.append(number)
    if not kept:
        raise UserError(f"--tasks {' '.join(tasks)}: there is no prompt of these")
    if len(kept) == len(prompts):
        return kept, ""
    said = [f"the first {limit} of each task"] if limit else []
    return kept, ", ".join([*said, *([f"of {', '.join(tasks)} alone"] if tasks else [])])


def compare(prompted: Sequence[Prompted], prompts: Sequence[Metadata], where: str) -> None:
    """Refuse images of other prompts than those of a file, of which they may be a part.

    Raises:
        UserError: naming the first that differs; `where` names the file.
    """
    for it in prompted:
        number = int(it.folder.name)
        if number >= len(prompts):
            raise UserError(
                f"{where} has {len(prompts)} prompts, and there is a folder {it.folder.name}: give the file that the "
                "images were drawn from"
            )
        if essentials(it.metadata) != essentials(prompts[number]):
            raise UserError(
                f"{it.folder}/metadata.jsonl is not prompt {it.folder.name} of {where}, {prompts[number]['prompt']!r}: "
                "give the file that the images were drawn from"
            )


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

    def begin(self, fingerprint: dict[str, Any], beside: dict[str, Any]) -> list[Sequence[Number]]:
        """Begin in the folder, which is held, or see that what is there is of the same images.

        Args:
            fingerprint: what else the images depend on, in JSON's types.
            beside: what else is worth knowing of them.

        Returns:
            The batches from which images are missing.

        Raises:
            UserError: it holds anything else, or cannot be written to.
        """
        settings = {
            **fingerprint,
            "prompts": digest(self.prompts),
            "images_per_prompt": self.each,
            "size": self.size,
            "sampling": self.sampling.model_dump(mode="json"),
        }
        begin_or_go_on(self.out / "images.json", settings, beside, "images made otherwise")
        atomic_write(self.out / "prompts.jsonl", to_lines(self.prompts))
        begin_folder(self.out / "images", self.prompts)
        missing = set(missing_images(self.out, len(self.prompts), self.each))
        numbers = [(prompt, image) for prompt in range(len(self.prompts)) for image in range(self.each)]
        return unfinished_batches(numbers, self.sampling.batch_size, missing.__contains__)

    def draw(self, pipeline: Pipeline, mine: Sequence[Number], drawn: Callable[[int], object]) -> None:
        """Draw these images, whole batches, and tell of each that it is one more; those that are there stay."""
        every = pictures_of([metadata["prompt"] for metadata in self.prompts], self.each)
        pictures = [every[prompt * self.each + image] for prompt, image in mine]
        batches = pipeline.draw_batches(pictures, self.sampling, self.size)
        for (prompt, image), pixels in zip(mine, chain.from_iterable(batches), strict=True):
            if not (path := image_path(self.out / "images", prompt, image)).exists():
                write_png(path, pixels.permute(1, 2, 0).numpy())
            drawn(1)

    def prompted(self) -> list[Prompted]:
        """The prompts with their images, once all are there."""
        return read_folder(self.out / "images")


def missing_images(out: Path, prompts: int, each: int) -> list[Number]:
    """The images that a job has not drawn yet."""
    numbers = ((prompt, image) for prompt in range(prompts) for image in range(each))
    return [number for number in numbers if not image_path(out / "images", *number).exists()]


def drawn_images(out: Path) -> tuple[list[Prompted], dict[str, Any]]:
    """The images that a job has drawn, and what is known of them, "prompts" and "drawn", for `outcome.finish`.

    Raises:
        UserError: it has drawn none, or not all.
    """
    note = out / "images.json"
    if not note.exists():
        raise UserError(f"--out {out}: holds no images of this job: draw them, or give those of others as --images")
    drawn = json.loads(note.read_text())
    prompts, each = read(out / "prompts.jsonl"), drawn.pop("images_per_prompt")
    if missing := missing_images(out, len(prompts), each):
        raise UserError(
            f"--out {out}: lacks {len(missing)} of {len(prompts) * each} images: go on drawing them before they are "
            "scored"
        )
    about = {name: drawn.pop(name) for name in ("file", "kind", "choice")} | {"md5": drawn.pop("prompts")}
    del drawn["size"]  # the images tell
    drawn["speed"] = read_speed(out)
    return read_folder(out / "images"), {"prompts": about, "drawn": drawn}


def complete_grids(prompted: Iterable[Prompted]) -> None:
    """Write the grids that are not there yet."""
    for it in prompted:
        if not (it.folder / "grid.png").exists():
            write_grid(it)
