"""The page of a GenEval job: every image, the objects found in it, and why it failed.

Images are loaded by relative path as they come into view, and nothing else is loaded from anywhere. Boxes are inline
SVG over the images, in thousandths of an image's width. Prompts, reasons and labels are foreign text, and escaped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from data.files import atomic_write
from evaluation.geneval.prompts import Metadata
from evaluation.geneval.summary import ImageResult

_UNIT = 1000
_COLOURS = 3  # for a prompt's classes
_LABEL = 66  # height
_SMALL = 128  # images narrower than this are shown with each pixel as a square


def write_page(path: Path, name: str, summary: Mapping[str, Any], judged: Sequence[Sequence[ImageResult]]) -> None:
    """Write the page.

    Args:
        path: file names of images are relative to its folder.
        name: what was scored, in a few words.
        summary: as summary.json has it.
        judged: for each prompt its images.
    """
    template = files("evaluation.geneval").joinpath("page.html").read_text(encoding="utf-8")
    tasks = {"all": "all tasks"} | {task: _words(task) for task in summary["tasks"]}
    verdicts = {"all": "right and wrong", "right": "right", "wrong": "wrong"}
    page = Template(template).substitute(
        title=escape(summary["name"]),
        name=escape(name),
        cards=_cards(summary),
        notes="".join(f"<aside>{escape(note)}</aside>" for note in summary["notes"]),
        tasks=_choices("task", tasks),
        verdicts=_choices("verdict", verdicts),
        prompts="".join(_prompt(number, images) for number, images in enumerate(judged)),
        settings="".join(
            f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in _settings(summary)
        ),
        footer=time.strftime("Written %Y-%m-%d %H:%M UTC.", time.gmtime()),
    )
    atomic_write(path, page.encode())


def _words(task: str) -> str:
    return task.replace("_", " ")


def _cards(summary: Mapping[str, Any]) -> str:
    cards = [_card("overall", summary["overall"], summary["overall_interval"], "mean of the tasks", " class=overall")]
    for task, scores in summary["tasks"].items():
        count = f"{scores['prompts']:,} prompts, {scores['images']:,} images"
        cards.append(_card(_words(task), scores["score"], scores["interval"], count))
    if scores := summary.get("held_out"):
        count = f"{scores['prompts']:,} held-out captions"
        cards.append(_card("held out", scores["overall"], scores["overall_interval"], count))
    notes = {"drawn_scenes": "the best possible score", "shuffled_prompts": "chance"}
    for name, score in summary.get("bounds", {}).items():
        if score is not None:
            cards.append(_card(_words(name), score, None, notes[name]))
    return "".join(cards)


def _card(label: str, score: float, interval: Sequence[float] | None, note: str, kind: str = "") -> str:
    shown = f"<small>95 %: {100 * interval[0]:.1f} to {100 * interval[1]:.1f}</small>" if interval else ""
    return (
        f'<div{kind}><span>{escape(label)}</span><b>{100 * score:.1f} %</b><meter value="{score:.4f}"></meter>'
        f"{shown}<small>{escape(note)}</small></div>"
    )


def _choices(name: str, labels: Mapping[str, str]) -> str:
    return "".join(
        f'<label><input type=radio name={name} value="{escape(value)}"{" checked" if value == "all" else ""}>'
        f"{escape(label)}</label>"
        for value, label in labels.items()
    )


def _prompt(number: int, images: Sequence[ImageResult]) -> str:
    metadata: Metadata = json.loads(images[0].result["metadata"])
    wanted = list(dict.fromkeys(item["class"] for item in metadata.get("include", [])))
    right = sum(image.result["correct"] for image in images)
    about = f"{number:05d} · {_words(metadata['tag'])} · {right} of {len(images)} right"
    figures = "".join(_figure(image, wanted) for image in images)
    return (
        f'<article id="p{number:05d}" data-task="{escape(metadata["tag"])}"><h3>{escape(metadata["prompt"])}</h3>'
        f'<p>{about}</p><div class="row">{figures}</div></article>'
    )


def _figure(image: ImageResult, wanted: Sequence[str]) -> str:
    result, height = image.result, round(_UNIT * image.height / image.width)
    verdict, word = ("right", "Right") if result["correct"] else ("wrong", "Wrong")
    details: dict[str, list[list[float]]] = json.loads(result["details"])
    found = [(label, box) for label, boxes in details.items() for box in boxes]
    found.sort(key=lambda item: item[0] in wanted)  # wanted objects are on top
    boxes = "".join(_box(label, box, wanted, _UNIT / image.width) for label, box in found)
    reason = f"\n{escape(result['reason'])}" if result["reason"] else ""
    nothing = "" if found else "\nnothing was found"
    small = " small" if image.width < _SMALL else ""
    return (
        f'<figure class="{verdict}" tabindex=0><div class="view{small}">'
        f'<img src="{quote(result["filename"])}" width="{image.width}" height="{image.height}" loading=lazy alt="">'
        f'<svg viewBox="0 0 {_UNIT} {height}" aria-hidden=true>{boxes}</svg></div>'
        f"<figcaption><b>{word}</b>{reason}{nothing}</figcaption></figure>"
    )


def _box(label: str, box: Sequence[float], wanted: Sequence[str], scale: float) -> str:
    x0, y0, x1, y1 = (round(edge * scale) for edge in box[:4])
    kind = f"o{wanted.index(label) % _COLOURS}" if label in wanted else "other"
    baseline = y0 - 14 if y0 >= _LABEL else y0 + _LABEL - 8
    return (
        f'<g class="{kind}"><rect x="{x0}" y="{y0}" width="{x1 - x0}" height="{y1 - y0}"/>'
        f'<text x="{x0 + 8}" y="{baseline}">{escape(label)} {box[4]:.2f}</text></g>'
    )


_SCORES = ("name", "overall", "overall_interval", "tasks", "absent_tasks", "notes", "held_out")


def _settings(summary: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """All but the scores, by dotted name in summary.json."""
    found: list[tuple[str, str]] = []
    for name, value in summary.items():
        if not prefix and name in _SCORES:
            continue
        if isinstance(value, Mapping):
            found += _settings(value, f"{prefix}{name}.")
        elif value is not None:
            found.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)))
    return found
