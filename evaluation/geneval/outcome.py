"""What a GenEval job hands in: results.jsonl, summary.json, report.html and a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.files import atomic_write
from evaluation.geneval.detection import Detector
from evaluation.geneval.page import write_page
from evaluation.geneval.prompts import CLASSES, OFFICIAL_MD5, Metadata, digest, essentials, official
from evaluation.geneval.summary import summarise
from evaluation.geneval.verdicts import Judged
from evaluation.parts import write_json

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
