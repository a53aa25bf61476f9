"""What a job of edits hands in: results.jsonl, summary.json, edits.html and a table.

The intervals are of the bootstrap over images, each with all its edits: edits of one image share its background.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.decode import decode_file
from data.files import atomic_write
from data.randomness import key
from evaluation.drawing import read_speed
from evaluation.editing.background import METRICS
from evaluation.geneval.summary import RESAMPLES, bootstrap, interval
from evaluation.parts import write_json
from t2i.editing import EditSettings
from t2i.train.report_parts import cards, figure, number, table, write_page

Line = dict[str, Any]
"""Of results.jsonl; `EditJob` makes it."""

_TITLES = {"mse": "MSE", "ssim": "SSIM", "ssim_replaced": "SSIM, inside replaced"}
_SIDE = 320
"""Pixels of a picture on the page, at most."""


def summarise(lines: Sequence[Line], seed: int = 0) -> dict[str, Any]:
    """The means over all edits that were measured.

    Returns:
        "edits", "images", "measured": how many; "not_measured": how many by reason; "background": of each metric "mean"
        and "interval", empty if none was measured; "bootstrap": how the intervals were made. In JSON's types.
    """
    by_image: dict[int, list[dict[str, float]]] = defaultdict(list)
    for line in lines:
        if line["background"] is not None:
            by_image[line["entry"]].append(line["background"])
    measured = [scores for of_image in by_image.values() for scores in of_image]
    background = {}
    for metric in METRICS if measured else ():
        drawn = bootstrap(
            [[scores[metric] for scores in of_image] for of_image in by_image.values()],
            key(seed, "editing", "bootstrap"),
        )
        mean = float(np.mean([scores[metric] for scores in measured]))
        background[metric] = {"mean": mean, "interval": interval(drawn)}
    return {
        "edits": len(lines),
        "images": len({line["entry"] for line in lines}),
        "measured": len(measured),
        "not_measured": dict(Counter(line["not_measured"] for line in lines if line["not_measured"])),
        "background": background,
        "bootstrap": {"resamples": RESAMPLES, "seed": seed, "unit": "images with their edits"},
    }


def finish(
    out: Path,
    lines: Sequence[Line],
    made_of: Mapping[str, Any],
    settings: EditSettings,
    detector: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write everything, and return the summary.

    Args:
        out: the job's folder.
        lines: of all edits.
        made_of: what the edits were made with.
        settings: how.
        detector: who found the regions that are not given.
    """
    summary = {
        **summarise(lines),
        "settings": settings.model_dump(),
        "made_of": {**made_of, "speed": read_speed(out)},
        "detector": detector,
    }
    atomic_write(out / "results.jsonl", ((json.dumps(line) + "\n").encode() for line in lines))
    _write_page(out, lines, summary)
    write_json(out / "summary.json", summary)  # the last: where it is, the others are
    return summary


def as_text(summary: Mapping[str, Any]) -> str:
    """The means as lines for a terminal."""
    lines = [f"{summary['edits']} edits of {summary['images']} images, {summary['measured']} with a region"]
    for metric, it in summary["background"].items():
        low, high = it["interval"]
        lines.append(f"background {_TITLES[metric]:22} {it['mean']:.6f}   95 %: {low:.6f} to {high:.6f}")
    return "\n".join([*lines, *(f"{count} not measured: {why}" for why, count in summary["not_measured"].items())])


def _write_page(out: Path, lines: Sequence[Line], summary: Mapping[str, Any]) -> None:
    background = summary["background"]
    rows = [("edits", str(summary["edits"]), f"of {summary['images']} images")]
    for metric, it in background.items():
        low, high = it["interval"]
        rows.append((f"background {_TITLES[metric]}", number(it["mean"]), f"95 %: {number(low)} to {number(high)}"))
    told = {**summary["settings"], **summary["made_of"], "detector": summary["detector"]}
    settings = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in told.items()]
    write_page(
        out / "edits.html",
        title="Edits",
        kind="editing",
        subtitle=f"{summary['made_of']['model']}, {summary['made_of']['which']} weights",
        cards=cards(rows),
        notes=[f"<span>{count} not measured: {escape(why)}.</span>" for why, count in summary["not_measured"].items()],
        sections={
            "Images": f'<div class="charts">{"".join(_pair(out, line) for line in lines)}</div>',
            "Made with": table(["", ""], settings, text_columns=2),
        },
    )


def _pair(out: Path, line: Line) -> str:
    """An image beside its edit."""
    scores = line["background"]
    about = (
        " · ".join(f"{_TITLES[name]} {number(scores[name])}" for name in METRICS) if scores else line["not_measured"]
    )
    before, after = (_shown(out / line[name]) for name in ("source_file", "file"))
    figures = figure(before, _SIDE, line["source_prompt"]) + figure(after, _SIDE, line["target_prompt"])
    name = " ".join([Path(line["file"]).stem, line["target_code"]]).strip()
    return f'<div><h3>{escape(name)}</h3><div class="beside">{figures}</div><small>{escape(about)}</small></div>'


def _shown(path: Path) -> Image.Image:
    """A picture for the page: small ones by their pixels."""
    image = Image.fromarray(decode_file(path).transpose(1, 2, 0))
    times = max(1, _SIDE // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
