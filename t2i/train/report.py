"""The page about a run: `write_report(run_dir)` reads a run directory and writes `run_dir/report.html`.

- One file: pictures are data URIs, curves are inline SVG, nothing is loaded from anywhere.
- The directory may belong to a running or a killed run: whatever is missing becomes a sentence that says so.
- All text that comes from files is escaped; the page replaces the old one by an atomic rename.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import time
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from t2i.train.report_charts import Array, Line, Piece, chart

Record = dict[str, Any]

_STRIP_GRIDS = 16  # thumbnails a stage shows, evenly spread, the first and the last among them
_TILE_SIDE, _THUMBNAIL_SIDE = 640, 480  # pixels
_PAUSE_S = 3600.0  # a longer silence in metrics.jsonl is a run that was down, not a slow step

# Title, note, kind of record, and its metrics as {legend: key}, or the prefix that a band of t follows.
_CHARTS: list[tuple[str, str, str, dict[str, str] | str]] = [
    ("Training loss", "What is minimised: all terms with their weights.", "train", {"total": "loss"}),
    ("Terms of the loss", "Each term of the training loss by itself.", "train",
     {"flow matching": "loss_fm", "LPIPS": "loss_lpips", "P-DINO": "loss_pdino", "REPA": "loss_repa"}),
    ("Validation loss", "On images the model never trains on; lower is better.", "validation",
     {"held-out": "loss"}),
    ("Training loss by t", "The flow-matching term by band of t: 0 is pure noise, 1 the finished image.",
     "train", "loss_fm_t"),
    ("Validation loss by t", "Held-out loss by band of t: 0 is pure noise, 1 the finished image.",
     "validation", "loss_t"),
    ("Gradient norm", "Global norm at each update; a lasting climb is a warning.", "train",
     {"norm": "grad_norm"}),
    ("Learning rate", "As the optimizer used it.", "train", {"rate": "lr"}),
    ("Images per second", "Over all devices.", "train", {"images": "images_per_s"}),
    ("Data wait", "Seconds of a step spent waiting for images; near zero when loading keeps up.", "train",
     {"seconds": "data_wait_s"}),
    ("Utilisation", "MFU: model FLOPs as a share of the peak.", "train", {"share": "mfu"}),
]  # fmt: skip
_FROM_ZERO = ("Learning rate", "Images per second", "Data wait", "Utilisation")


@dataclass
class Run:
    """What a run directory says. Stages are in the order of their first record."""

    directory: Path
    environment: Record
    records: dict[str, dict[str, list[Record]]] = field(  # kind -> stage -> records
        default_factory=lambda: {"train": {}, "validation": {}, "counters": {}}
    )
    start: dict[str, int] = field(default_factory=dict)  # steps of all stages before this one
    end: int = 0  # steps of all stages
    seconds: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[tuple[int, Path]]] = field(default_factory=dict)
    unreadable_lines: int = 0

    def last(self, stage: str) -> Record:
        return (self.records["train"][stage] or [{}])[-1]

    def images(self, stage: str) -> int:
        last = self.last(stage)
        return int(last.get("step", 0) * (_finite(last.get("batch_size")) or 0))

    def progress(self, stage: str) -> float:
        last = self.last(stage)
        return float(last.get("step", 0)) / (_finite(last.get("total_steps")) or math.inf)

    def series(self, kind: str, key: str) -> dict[str, Piece]:
        """The finite values of a metric, by stage, over the steps since the run's start."""
        result = {}
        for stage, rows in self.records[kind].items():
            found = [(r["step"], value) for r in rows if (value := _finite(r.get(key))) is not None]
            if found:
                steps, values = np.array(found, dtype=float).T
                result[stage] = (self.start[stage] + steps, values)
        return result


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir/report.html` from what the run has left so far and returns its path.

    Raises FileNotFoundError if `run_dir` is not a directory. Missing or torn files inside it are not errors.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"run_dir: {run_dir} is not a directory")
    run = _read_run(run_dir)
    sections = {
        "Latest samples": _latest_samples(run), "Curves": _curves(run), "Samples over time": _strips(run),
        "Stages": _stage_table(run), "Passed over": _counters(run), "Configuration": _config(run),
        "Environment": _environment(run), "Data": _data(run),
    }  # fmt: skip
    anchors = [(title, title.lower().replace(" ", "-")) for title in sections]
    torn = f" {run.unreadable_lines} unreadable line(s) of metrics.jsonl were left out."
    notices = [escape(str(notice)) for notice in run.environment.get("notices") or []]
    template = files("t2i.train").joinpath("report_page.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        name=escape(run_dir.resolve().name),
        cards=_cards(run),
        notices="".join(f'<aside role="note"><b>Stand-in</b><span>{n}</span></aside>' for n in notices),
        links="".join(f'<a href="#{a}">{t}</a>' for t, a in anchors),
        sections="".join(f'<section id="{a}"><h2>{t}</h2>{sections[t]}</section>' for t, a in anchors),
        footer=time.strftime("Written %Y-%m-%d %H:%M UTC from the run directory.", time.gmtime())
        + torn * bool(run.unreadable_lines),
    )
    path = run_dir / "report.html"
    aside = path.with_name(f".report.{os.getpid()}.html")
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, path)
    return path


def _read_run(directory: Path) -> Run:
    run = Run(directory, _read_json(directory / "environment.json"))
    before: float | None = None
    for record in _read_metrics(run):
        kind, stage, step = record.get("kind"), record.get("stage"), record.get("step")
        if kind not in run.records or not isinstance(stage, str) or not isinstance(step, int):
            continue
        for other, stages in run.records.items():  # a resumed run repeats steps: the lost ones do not count
            rows = stages.setdefault(stage, [])
            while kind in ("train", other) and rows and rows[-1]["step"] >= step + (kind != other):
                rows.pop()
        run.records[kind][stage].append(record)
        run.seconds.setdefault(stage, 0.0)
        if (now := _finite(record.get("time"))) is not None:
            gap = (_finite(record.get("step_s")) or 0.0) if before is None else now - before
            run.seconds[stage] += gap if 0 <= gap <= _PAUSE_S else 0.0
            before = now
    for stage in run.seconds:
        run.start[stage] = run.end
        rows = run.records["train"][stage] + run.records["validation"][stage]
        run.end += max((r["step"] for r in rows), default=0)
        paths = (directory / stage / "samples").glob("step_*.png")
        run.samples[stage] = sorted((int(p.stem[5:]), p) for p in paths if p.stem[5:].isdecimal())
    return run


def _read_metrics(run: Run) -> list[Record]:
    """The records in the order written. A killed writer leaves a torn line at the end or mid-way."""
    path, records = run.directory / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            run.unreadable_lines += bool(line.strip())
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _read_json(path: Path) -> Record:
    """The object in `path`; empty when the file is missing or half written."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _number(value: Any) -> str:
    value = _finite(value)
    if value is None:
        return "–"
    for size, unit in ((1e9, " B"), (1e6, " M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _absent(sentence: str) -> str:
    return f'<p class="absent">{sentence}</p>'


def _table(head: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """Cells are HTML already; columns after `text_columns` are numbers and align right."""

    def line(cells: list[str], tag: str) -> str:
        styles = ["" if i < text_columns else " class=n" for i in range(len(cells))]
        return "".join(f"<{tag}{style}>{cell}</{tag}>" for cell, style in zip(cells, styles, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    head_row = f"<thead><tr>{line(head, 'th')}</tr></thead>"
    return f'<div class="scroll"><table>{head_row}<tbody>{body}</tbody></table></div>'


def _cards(run: Run) -> str:
    stages = run.records["train"]
    under_way = [f"{s} at {100 * run.progress(s):.0f} %" for s in stages if 0 < run.progress(s) < 1]
    cards = [
        ("Stages done", f"{sum(run.progress(s) >= 1 for s in stages)} of {len(stages)}",
         ", ".join(under_way) or "of those begun"),
        ("Images seen", _number(sum(map(run.images, stages))), "repeats counted"),
        ("Wall time", _duration(sum(run.seconds.values())), "pauses of over an hour left out"),
        ("Parameters", _number(run.environment.get("parameters")), "of the trained network"),
    ]  # fmt: skip
    for stage, (_, losses) in run.series("validation", "loss").items():
        cards.append((f"Validation loss, {stage}", _number(losses[-1]), f"first {_number(losses[0])}"))
    return "".join(
        f"<div><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>"
        for label, value, note in cards
    )


def _open(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # being written, or torn by a kill: the next report shows it
        return None


def _figure(image: Image.Image, side: int, caption: str) -> str:
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    size, caption = f'width="{image.width}" height="{image.height}"', escape(caption)
    picture = f'<img {size} alt="{caption}" loading=lazy src="{source}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _latest_samples(run: Run) -> str:
    for stage in reversed(run.samples):
        for step, path in reversed(run.samples[stage]):
            if (grid := _open(path)) is None:
                continue
            about = _read_json(path.with_suffix(".json"))
            words = {"solver": "solver", "steps": "steps", "guidance_scale": "guidance", "weights": "weights"}
            made = [f"{label} {about[key]}" for key, label in words.items() if key in about]
            columns, rows = int(about.get("columns") or 1), int(about.get("rows") or 1)
            width, height = grid.width // columns, grid.height // rows
            tiles = []
            for i, prompt in enumerate((about.get("prompts") or [""])[: columns * rows]):
                x, y = i % columns * width, i // columns * height
                tiles.append(_figure(grid.crop((x, y, x + width, y + height)), _TILE_SIDE, str(prompt)))
            lead = escape(" · ".join([f"{stage}, step {step:,}", *made]))
            return f'<p class="lead">{lead}</p><div class="grid">{"".join(tiles)}</div>'
    return _absent("No samples yet: the first grid appears here once a stage has drawn one.")


def _strips(run: Run) -> str:
    parts = []
    for stage, grids in run.samples.items():
        keep = sorted({round(i) for i in np.linspace(0, len(grids) - 1, min(len(grids), _STRIP_GRIDS))})
        shown = [(grids[i][0], image) for i in keep if (image := _open(grids[i][1])) is not None]
        figures = "".join(_figure(image, _THUMBNAIL_SIDE, f"{stage}, step {step:,}") for step, image in shown)
        strip = f'<div class="strip" tabindex=0>{figures}</div>'
        parts.append(strip if figures else _absent(f"{escape(stage)}: This stage has drawn no samples yet."))
    return "".join(parts) or _absent("No samples yet.")


def _smooth(values: Array, half_width: int) -> Array:
    """Centred moving average, twice: a steep start is not shifted. The window is cut off at the ends."""
    index = np.arange(len(values))
    low, high = np.maximum(index - half_width, 0), np.minimum(index + half_width + 1, len(values))
    for _ in range(2):
        total = np.concatenate([[0.0], np.cumsum(values)])
        values = (total[high] - total[low]) / (high - low)
    return values


def _curves(run: Run) -> str:
    drawn, missing = [], []
    for title, note, kind, keys in _CHARTS:
        colours = ["c0", "c1", "c2", "c3"]
        by_t = isinstance(keys, str)
        if isinstance(keys, str):
            prefix, seen = keys, {key for rows in run.records[kind].values() for r in rows for key in r}
            bands = sorted(key for key in seen if key.startswith(prefix))
            keys = {"t " + key.removeprefix(prefix).replace("-", "–"): key for key in bands}
            colours = [f"t{round(i)}" for i in np.linspace(0, 4, len(bands))]
        lines = []
        for label, key in keys.items():
            raw = list(run.series(kind, key).values())
            noisy = kind == "train" and key != "lr"
            half_width = sum(len(steps) for steps, _ in raw) // 100 if noisy else 0
            pieces = [(steps, _smooth(values, half_width)) for steps, values in raw]
            if pieces:
                lines.append(Line(label, pieces, raw if noisy and not by_t else []))
        if lines:
            drawn.append(chart(title, note, lines, colours, run.start, run.end, title in _FROM_ZERO))
        else:
            missing.append(title.lower())
    lead = "All stages on one axis: batches since the run began. Beside each name, its latest value."
    html = f'<p class="lead">{lead}</p><div class="charts">{"".join(drawn)}</div>' if drawn else ""
    return html + (_absent(f"Not recorded in this run so far: {', '.join(missing)}.") if missing else "")


def _stage_table(run: Run) -> str:
    rows, held_out, speeds = [], run.series("validation", "loss"), run.series("train", "images_per_s")
    for stage in run.records["train"]:
        last = run.last(stage)
        losses = [_number(v) for v in held_out[stage][1][[0, -1]]] if stage in held_out else ["–", "–"]
        speed = _number(speeds[stage][1].mean()) if stage in speeds else "–"
        cells = [stage, f"{_number(last.get('step'))} / {_number(last.get('total_steps'))}",
                 f"{last.get('resolution', '–')} px", _number(last.get("batch_size")),
                 _number(run.images(stage)), *losses, speed, f"{run.seconds[stage] / 3600:.2f}",
                 _number(last.get("skipped_updates"))]  # fmt: skip
        rows.append([escape(cell) for cell in cells])
    head = ["Stage", "Steps", "Resolution", "Batch", "Images", "First val. loss", "Last val. loss",
            "Images/s", "Hours", "Skipped updates"]  # fmt: skip
    return _table(head, rows) if rows else _absent("No stage has written a metric yet.")


def _counters(run: Run) -> str:
    counted = {stage: rows[-1] for stage, rows in run.records["counters"].items() if rows}
    reasons = {key for last in counted.values() for key, value in last.items() if isinstance(value, int)}
    rows = [[escape(reason.replace("_", " ")), *(_number(last.get(reason, 0)) for last in counted.values())]
            for reason in sorted(reasons - {"step", "time"})]  # fmt: skip
    if not rows:
        return _absent("The loader has reported no sample passed over.")
    lead = "Samples left out of training, by reason; the next one of the same lane took the place."
    return f'<p class="lead">{lead}</p>' + _table(["Reason", *map(escape, counted)], rows)


def _config(run: Run) -> str:
    path = run.directory / "config.yaml"
    if not path.is_file():
        return _absent("The run directory has no config.yaml.")
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"<details><summary>config.yaml, as resolved</summary><pre>{text}</pre></details>"


def _environment(run: Run) -> str:
    versions = dict(run.environment.get("versions") or {})
    about = {key: run.environment.get(key) for key in ("device", "world_size", "git")} | versions
    rows = [[escape(str(key)).replace("_", " "), escape(str(value))] for key, value in about.items() if value]
    absent = _absent("The run directory has no readable environment.json.")
    return _table(["", ""], rows, text_columns=2) if rows else absent


def _data(run: Run) -> str:
    rows = []
    for source in run.environment.get("data") or []:
        name, url = escape(str(source.get("name", "–"))), str(source.get("url") or "")
        if url.startswith(("https://", "http://")):  # a link is followed by a click only; nothing is loaded
            name = f'<a rel="noreferrer" href="{escape(url)}">{name}</a>'
        cells = [escape(str(source.get(key) or "–")) for key in ("licence", "credit")]
        rows.append([name, *cells, _number(source.get("samples"))])
    absent = _absent("environment.json names no data source.")
    return _table(["Source", "Licence", "Credit", "Samples"], rows, text_columns=3) if rows else absent
