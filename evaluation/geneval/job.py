"""The parts of a GenEval job: choose prompts, generate their images, and write the results.

The job's folder holds

    prompts.jsonl    the prompts, as GenEval's own file has them
    images/          GenEval's folder of images; images.json says what they are made from
    verdicts/        what the detector found in each prompt's images; settings.json says which detector
    results.jsonl    a line an image, with GenEval's fields
    summary.json     scores and everything that they depend on
    report.html      every image with what was found in it
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import atomic_write, write_json
from data.tables import format_table
from evaluation.geneval.page import write_page
from evaluation.geneval.prompts import CLASSES, OFFICIAL_MD5, Metadata, digest, essentials, official, read, to_lines
from evaluation.geneval.rules import Detector
from evaluation.geneval.summary import ImageResult, PromptImages, begin_folder, image_path, read_folder, summarize
from evaluation.sampling_job import SamplingJob, from_pipeline, read_speed
from t2i.config.train import SamplingConfig
from t2i.pipeline import Pipeline, pictures_of

OFFICIAL = 553
"""Number of GenEval's prompts."""
EACH = 4
"""Images per prompt in GenEval."""


def kind_of(prompts: Sequence[Metadata]) -> tuple[str, str]:
    """What prompts are, and which part of that in words, empty if they are all.

    "official": GenEval's, in any order, whatever fields others have added; "reworded": all of them, in their order, in
    other words; "other".
    """
    if digest(prompts) == OFFICIAL_MD5:
        return "official", ""
    asked = [essentials(metadata) for metadata in prompts]
    if any(item["class"] not in CLASSES for metadata in asked for item in metadata.get("include", ())):
        return "other", ""
    theirs = official()
    if all(metadata in theirs for metadata in asked) and len({metadata["prompt"] for metadata in asked}) == len(asked):
        return "official", "" if len(asked) == OFFICIAL else f"{len(asked)} of the {OFFICIAL} official"
    same_scenes = [{**metadata, "prompt": ""} for metadata in asked] == [{**other, "prompt": ""} for other in theirs]
    return "reworded" if same_scenes else "other", ""


def choose(prompts: Sequence[Metadata], tasks: Collection[str], limit: int | None) -> tuple[list[int], str]:
    """The numbers of the first `limit` prompts of each of these tasks, and the choice in words, empty if it is all.

    Without tasks, all of them; without a limit, all their prompts.

    Raises:
        UserError: no prompt is left.
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
    first = [f"the first {limit} of each task"] if limit else []
    return kept, ", ".join([*first, *([f"of {', '.join(tasks)} alone"] if tasks else [])])


def check_prompts_of(found: Sequence[PromptImages], prompts: Sequence[Metadata], where: str) -> None:
    """Refuse images of other prompts than those of a file, which `where` names; they may be of a part of it.

    Raises:
        UserError: naming the first that differs.
    """
    for prompt in found:
        number = int(prompt.folder.name)
        advice = "give the file that the images were generated from"
        if number >= len(prompts):
            raise UserError(f"{where} has {len(prompts)} prompts, and there is a folder {prompt.folder.name}: {advice}")
        if essentials(prompt.metadata) != essentials(prompts[number]):
            raise UserError(
                f"{prompt.folder}/metadata.jsonl is not prompt {prompt.folder.name} of {where}, "
                f"{prompts[number]['prompt']!r}: {advice}"
            )


def sampling_job(
    out: Path,
    prompts: Sequence[Metadata],
    each: int,
    size: tuple[int, int],
    sampling: SamplingConfig,
    pipeline: Pipeline,
    fingerprint: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> SamplingJob:
    """The job that generates `each` images per prompt; those of prompts with the same words are different, too.

    Args:
        fingerprint, metadata: what else the images depend on, and what else their manifest says.
    """

    def prepare() -> None:
        atomic_write(out / "prompts.jsonl", to_lines(prompts))
        begin_folder(out / "images", prompts)

    settings = {
        **fingerprint,
        "prompts": digest(prompts),
        "images_per_prompt": each,
        "size": size,
        "sampling": sampling.model_dump(mode="json"),
    }
    samples = pictures_of([prompt["prompt"] for prompt in prompts], each)
    return SamplingJob(
        out / "images.json",
        settings,
        metadata,
        _image_paths(out, len(prompts), each),
        sampling.batch_size,
        from_pipeline(pipeline, samples, sampling, size),
        prepare,
    )


def _image_paths(out: Path, prompts: int, each: int) -> list[Path]:
    return [image_path(out / "images", prompt, image) for prompt in range(prompts) for image in range(each)]


def generated_images(out: Path) -> tuple[list[PromptImages], dict[str, Any]]:
    """The images that a job has generated, and what is known of them, for `finish`.

    Raises:
        UserError: it has generated none, or not all.
    """
    manifest = out / "images.json"
    if not manifest.exists():
        raise UserError(f"--out {out}: holds no images of this job: generate them, or give those of others as --images")
    made = json.loads(manifest.read_text())
    prompts, each = read(out / "prompts.jsonl"), made.pop("images_per_prompt")
    paths = _image_paths(out, len(prompts), each)
    if missing := sum(not path.exists() for path in paths):
        raise UserError(f"--out {out}: lacks {missing} of {len(paths)} images: generate them before they are scored")
    about = {name: made.pop(name) for name in ("file", "kind", "choice")} | {"md5": made.pop("prompts")}
    del made["size"]  # the summary has the images' own
    made["speed"] = read_speed(out)
    return read_folder(out / "images"), {"prompts": about, "generated_with": made}


def notes_on(kind: str, choice: str, each: int, detector: Mapping[str, Any]) -> list[str]:
    """Sentences on why the scores do not compare with published ones.

    Args:
        kind: of the file of prompts, see `kind_of`.
        choice: which of its prompts were scored, in words, empty if all.
        each: images per prompt.
        detector: its identity.
    """
    notes = []
    if kind == "reworded":
        notes.append("The prompts are GenEval's in other words: their scores do not compare with the official ones'.")
    elif kind == "other":
        notes.append(f"The prompts are not GenEval's official {OFFICIAL}: the scores compare with no published ones.")
    if choice:
        notes.append(f"A part of the prompts was scored: {choice}.")
    if each != EACH:
        notes.append(f"Images per prompt: {each}, where GenEval has {EACH}.")
    others = [part["file"] for part in detector.values() if isinstance(part, Mapping) and part.get("pinned") is False]
    if others:
        notes.append(f"The detector's weights are not those of published scores: {', '.join(others)}.")
    return notes


def name_of(notes: Sequence[str], detector: Mapping[str, Any]) -> str:
    """The name of a score: the benchmark's own only if it compares with published ones."""
    if detector["name"] == "shapes":
        return "Proving ground"
    return "GenEval's rules" if notes else "GenEval"


_HELD_OUT = (
    "Held out are captions that training never saw if its scenes were packed as those of make prove, with "
    "--heldout_captions 0.1; to other models they are like any others."
)


def finish(
    out: Path, judged: Sequence[Sequence[ImageResult]], detector: Detector, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write results.jsonl, report.html and summary.json, and return the summary.

    Args:
        judged: for each prompt its images.
        about: "prompts" (`kind`, `choice`, `file`, `md5`), "generated_with", and on the proving ground "bounds".
    """
    images = [image for of_prompt in judged for image in of_prompt]
    sizes = sorted({(image.height, image.width) for image in images})
    each, prompts, made = len(judged[0]), about["prompts"], about["generated_with"]
    results = [image.result for image in images]
    held_out = [line for line in results if json.loads(line["metadata"]).get("heldout") is True]
    notes = notes_on(prompts["kind"], prompts["choice"], each, detector.identity)
    summary = {
        "name": name_of(notes, detector.identity),
        **summarize(results),
        **({"held_out": summarize(held_out)} if held_out else {}),
        **({"bounds": about["bounds"]} if "bounds" in about else {}),
        "notes": [*notes, *([_HELD_OUT] if held_out else [])],
        "images_per_prompt": each,
        "size": sizes[0] if len(sizes) == 1 else "several",
        "prompt_file": prompts,
        "generated_with": made,
        "images_sha256": hashlib.sha256("".join(image.digest for image in images).encode()).hexdigest(),
        "detector": detector.identity,
        "thresholds": asdict(detector.thresholds),
    }
    name = f"{made['model']}, {made['which']} weights" if "model" in made else f"images in {made['images']}"
    atomic_write(out / "results.jsonl", ((json.dumps(line) + "\n").encode() for line in results))
    write_page(out / "report.html", name, summary, judged)
    write_json(out / "summary.json", summary)  # the last: where it is, the others are
    return summary


def format_summary(summary: Mapping[str, Any]) -> str:
    """The scores as lines for a terminal."""
    scores = {
        task.replace("_", " "): (scored, scored["score"], scored["interval"])
        for task, scored in summary["tasks"].items()
    }
    scores["overall"] = (summary, summary["overall"], summary["overall_interval"])
    if held_out := summary.get("held_out"):
        scores["held out"] = (held_out, held_out["overall"], held_out["overall_interval"])
    rows = [[summary["name"], "score", "95 % interval", "prompts", "images"]]
    for name, (about, score, (low, high)) in scores.items():
        rows.append([name, f"{score:.3f}", f"{low:.3f} to {high:.3f}", f"{about['prompts']:,}", f"{about['images']:,}"])
    known = [(name, score) for name, score in summary.get("bounds", {}).items() if score is not None]
    bounds = ", ".join(f"{name.replace('_', ' ')}: {score:.3f}" for name, score in known)
    return "\n".join([*format_table(rows), *([bounds] if bounds else []), *summary["notes"]])
