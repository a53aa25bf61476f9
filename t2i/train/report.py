"""The page about a run: `write_report(run_dir)` reads a run directory and writes `run_dir/report.html`.

- One file: pictures are data URIs, curves are inline SVG, nothing is loaded from anywhere.
- The run may go on or be killed: a section that has nothing to show yet says so.
- All text that comes from files is escaped; the page replaces the old one by an atomic rename.
"""

from __future__ import annotations

import base64
import io
import json
import time
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from t2i.train.observe import JsonLines
from t2i.train.report_charts import Array, Chart, Line, Piece, draw

_STRIP_GRIDS = 16  # thumbnails a stage shows, evenly spread, the first and the last among them
_TILE_SIDE, _THUMBNAIL_SIDE = 640, 480  # pixels
_PAUSE_S = 3600.0  # a longer silence in metrics.jsonl is a run that was down, not a slow step

_CHARTS = [
    Chart("Training loss", "What is minimised: all terms with their weights.", "train", {"total": "loss"}),
    Chart(
        "Terms of the loss",
        "Each term of the training loss by itself.",
        "train",
        {"flow matching": "loss_fm", "LPIPS": "loss_lpips", "P-DINO": "loss_pdino", "REPA": "loss_repa"},
    ),
    Chart("Validation loss", "On images never trained on; lower is better.", "validation", {"held-out": "loss"}),
    Chart(
        "Score",
        "Of pictures of prompts, by task; higher is better. A score that was cut short is left out.",
        "score",
        beside=("kind", "stage", "step", "time", "prompts", "images", "complete", "held_s"),
        from_zero=True,
    ),
    Chart("Training loss by t", "Flow matching: t is 0 in pure noise, 1 in the image.", "train", bands="loss_fm_t"),
    Chart("Validation loss by t", "Held-out: t is 0 in pure noise, 1 in the image.", "validation", bands="loss_t"),
    Chart("Gradient norm", "Of each update; a lasting climb is a warning.", "train", {"norm": "grad_norm"}),
    Chart("Learning rate", "As the optimizers used it.", "train", {"AdamW": "lr", "Muon": "lr_muon"}, from_zero=True),
    Chart("Images per second", "Over all devices.", "train", {"images": "images_per_s"}, from_zero=True),
    Chart("Data wait", "Near zero when loading keeps up.", "train", {"seconds": "data_wait_s"}, from_zero=True),
    Chart("Utilisation", "MFU: model FLOPs as a share of the peak.", "train", {"share": "mfu"}, from_zero=True),
]
_COLOURS = 7  # of curves
_EXACT = ("lr", "lr_muon")  # of the metrics of training, those that need no smoothing


@dataclass(frozen=True)
class Stage:
    """A stage of the run that has trained a step."""

    name: str
    start: int  # steps of all stages before it
    lines: list[dict[str, Any]]  # its metrics
    grids: list[tuple[int, Path]]  # step and picture
    done: bool  # whether its model is there: its score may have ended it before its last step

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def last(self) -> dict[str, Any]:
        """The last line of training."""
        return self.of("train")[-1]

    @property
    def progress(self) -> float:
        return 1.0 if self.done else float(self.last["step"] / self.last["total_steps"])

    @property
    def images(self) -> int:
        return int(self.last["step"] * self.last["batch_size"])

    @property
    def seconds(self) -> float:
        """Time between its lines, and an estimate of that before the first."""
        first = self.lines[0]
        gaps = np.diff([line["time"] for line in self.lines])
        return float(first["step"] * first.get("step_s", 0.0) + gaps[gaps <= _PAUSE_S].sum())

    def series(self, kind: str, metric: str) -> Piece | None:
        """A metric over the steps since the run's start, where it was finite and complete; None if it never was."""
        lines = [line for line in self.of(kind) if line.get(metric) is not None and line.get("complete", True)]
        if not lines:
            return None
        return np.array([self.start + line["step"] for line in lines], float), np.array([x[metric] for x in lines])


@dataclass(frozen=True)
class Run:
    """What a run directory says. Stages are in the order in which they began."""

    environment: dict[str, Any]
    stages: list[Stage]
    end: int  # steps of all stages


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir/report.html` from what the run has left so far and returns its path.

    Raises FileNotFoundError if `run_dir` has no environment.json or no config.yaml.
    """
    run = _read_run(run_dir)
    sections = {
        "Latest samples": _latest_samples(run),
        "Curves": _curves(run),
        "Samples over time": _strips(run),
        "Stages": _stage_table(run),
        "Passed over": _counters(run),
        "Configuration": _config(run_dir / "config.yaml"),
        "Environment": _environment(run),
        "Data": _data(run),
    }
    anchors = [(title, title.lower().replace(" ", "-")) for title in sections]
    stand_ins = [f"<b>Stand-in</b><span>{escape(sentence)}</span>" for sentence in run.environment["stand_ins"]]
    template = files("t2i.train").joinpath("report_page.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        name=escape(run_dir.resolve().name),
        cards=_cards(run),
        stand_ins="".join(f'<aside role="note">{html}</aside>' for html in stand_ins),
        links="".join(f'<a href="#{anchor}">{title}</a>' for title, anchor in anchors),
        sections="".join(f'<section id="{a}"><h2>{title}</h2>{sections[title]}</section>' for title, a in anchors),
        footer=time.strftime("Written %Y-%m-%d %H:%M UTC from the run directory.", time.gmtime()),
    )
    partial = run_dir / ".report.html.partial"
    partial.write_text(page, encoding="utf-8")
    return partial.rename(run_dir / "report.html")


def _read_run(directory: Path) -> Run:
    for name in ("environment.json", "config.yaml"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} has no {name}: a report needs the folder of a run that has begun")
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in JsonLines(directory / "metrics.jsonl").lines():
        lines.setdefault(line["stage"], []).append(line)
    stages: list[Stage] = []
    end = 0
    for name, own in lines.items():
        if any(line["kind"] == "train" for line in own):
            folder = directory / name
            stages.append(Stage(name, end, own, _grids(folder / "samples"), (folder / "model").exists()))
            end += own[-1]["step"]
    return Run(json.loads((directory / "environment.json").read_text(encoding="utf-8")), stages, end)


def _grids(folder: Path) -> list[tuple[int, Path]]:
    """Step and picture of each grid that is whole: its description is written after it."""
    described = [path.with_suffix(".png") for path in folder.glob("step_*.json")]
    return sorted((int(path.stem.removeprefix("step_")), path) for path in described)


def _number(value: float) -> str:
    for size, unit in ((1e9, " B"), (1e6, " M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _absent(sentence: str) -> str:
    return f'<p class="absent">{sentence}</p>'


def _table(head: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """Cells are text; columns after `text_columns` are numbers and align right."""

    def row(cells: list[str], tag: str) -> str:
        tags = [tag if column < text_columns else f"{tag} class=n" for column in range(len(cells))]
        return "".join(f"<{opening}>{escape(cell)}</{tag}>" for opening, cell in zip(tags, cells, strict=True))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{row(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def _cards(run: Run) -> str:
    done = sum(stage.progress >= 1 for stage in run.stages)
    under_way = [f"{stage.name} at {100 * stage.progress:.0f} %" for stage in run.stages if stage.progress < 1]
    cards = [
        ("Stages done", f"{done} of {len(run.stages)}", ", ".join(under_way) or "of those begun"),
        ("Images seen", _number(sum(stage.images for stage in run.stages)), "repeats counted"),
        ("Wall time", _duration(sum(stage.seconds for stage in run.stages)), "pauses of over an hour left out"),
        ("Parameters", _number(run.environment["parameters"]), "of the trained network"),
    ]
    for stage in run.stages:
        if losses := stage.series("validation", "loss"):
            first, last = losses[1][[0, -1]]
            cards.append((f"Validation loss, {stage.name}", _number(last), f"first {_number(first)}"))
        if scores := stage.series("score", "overall"):
            steps, values = scores
            best = int(values.argmax())
            note = f"best {_number(values[best])}, at step {_number(steps[best] - stage.start)}"
            cards.append((f"Score, {stage.name}", _number(values[-1]), note))
    return "".join(
        f"<div><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>"
        for label, value, note in cards
    )


def _figure(image: Image.Image, side: int, caption: str) -> str:
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    size, caption = f'width="{image.width}" height="{image.height}"', escape(caption)
    picture = f'<img {size} alt="{caption}" loading=lazy src="{source}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _latest_samples(run: Run) -> str:
    drawn = [stage for stage in run.stages if stage.grids]
    if not drawn:
        return _absent("No samples yet: the first grid appears here once a stage has drawn one.")
    step, path = drawn[-1].grids[-1]
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    made = f"solver {about['solver']} · steps {about['steps']} · guidance {about['guidance_scale']}"
    lead = escape(f"{drawn[-1].name}, step {step:,} · {made} · weights {about['weights']}")
    grid = Image.open(path)
    width, height = grid.width // about["columns"], grid.height // about["rows"]
    tiles = []
    for i, prompt in enumerate(about["prompts"]):
        x, y = i % about["columns"] * width, i // about["columns"] * height
        tiles.append(_figure(grid.crop((x, y, x + width, y + height)), _TILE_SIDE, prompt))
    return f'<p class="lead">{lead}</p><div class="grid">{"".join(tiles)}</div>'


def _strips(run: Run) -> str:
    parts = []
    for stage in run.stages:
        count = len(stage.grids)
        shown = [stage.grids[round(i)] for i in np.linspace(0, count - 1, min(count, _STRIP_GRIDS))]
        figures = [_figure(Image.open(path), _THUMBNAIL_SIDE, f"{stage.name}, step {step:,}") for step, path in shown]
        strip = f'<div class="strip" tabindex=0>{"".join(figures)}</div>'
        parts.append(strip if figures else _absent(f"{escape(stage.name)}: this stage has drawn no samples yet."))
    return "".join(parts) or _absent("No samples yet.")


def _smooth(values: Array, half_width: int) -> Array:
    """Centred moving average, twice: a steep start is not shifted. The window is cut off at the ends."""
    index = np.arange(len(values))
    low, high = np.maximum(index - half_width, 0), np.minimum(index + half_width + 1, len(values))
    for _ in range(2):
        total = np.concatenate([[0.0], np.cumsum(values)])
        values = (total[high] - total[low]) / (high - low)
    return values


def _lines(run: Run, chart: Chart) -> list[Line]:
    """The curves of a chart that the run has; smoothed where each step is a sample, which then lies beneath."""
    metrics, colours = chart.lines, [f"c{i}" for i in range(len(chart.lines))]
    names = list(dict.fromkeys(name for stage in run.stages for line in stage.of(chart.kind) for name in line))
    if chart.beside:
        metrics = {name.replace("_", " "): name for name in names if name not in chart.beside}
        colours = [f"c{i % _COLOURS}" for i in range(len(metrics))]
    if chart.bands:
        bands = sorted(name for name in names if name.startswith(chart.bands))
        metrics = {"t " + name.removeprefix(chart.bands).replace("-", "–"): name for name in bands}
        colours = [f"t{round(i)}" for i in np.linspace(0, 4, len(bands))]
    lines = []
    for (label, metric), colour in zip(metrics.items(), colours, strict=True):
        noisy = chart.kind == "train" and metric not in _EXACT
        raw = [piece for stage in run.stages if (piece := stage.series(chart.kind, metric))]
        half_width = sum(len(steps) for steps, _ in raw) // 100 if noisy else 0
        pieces = [(steps, _smooth(values, half_width)) for steps, values in raw]
        if pieces:
            lines.append(Line(label, colour, pieces, raw if noisy and not chart.bands else []))
    return lines


def _curves(run: Run) -> str:
    starts = {stage.name: stage.start for stage in run.stages}
    found = [(chart, _lines(run, chart)) for chart in _CHARTS]
    drawn = "".join(draw(chart, lines, starts, run.end) for chart, lines in found if lines)
    missing = ", ".join(chart.title.lower() for chart, lines in found if not lines)
    lead = "All stages on one axis: batches since the run began. Beside each name, its latest value."
    html = f'<p class="lead">{lead}</p><div class="charts">{drawn}</div>' if drawn else ""
    return html + (_absent(f"Not recorded in this run so far: {missing}.") if missing else "")


def _sides(resolution: int | list[int]) -> str:
    """As `data.resolution` has it: one side of squares, or height and width."""
    return "×".join(map(str, resolution)) if isinstance(resolution, list) else str(resolution)


def _stage_table(run: Run) -> str:
    if not run.stages:
        return _absent("No stage has trained a step yet.")
    rows = []
    for stage in run.stages:
        last, held_out = stage.last, stage.series("validation", "loss")
        first_loss, last_loss = (_number(x) for x in held_out[1][[0, -1]]) if held_out else ("–", "–")
        rows.append(
            {
                "Stage": stage.name,
                "Steps": f"{_number(last['step'])} / {_number(last['total_steps'])}",
                "Resolution": f"{_sides(last['resolution'])} px",
                "Batch": _number(last["batch_size"]),
                "Images": _number(stage.images),
                "First val. loss": first_loss,
                "Last val. loss": last_loss,
                "Images/s": _number(np.mean([line["images_per_s"] for line in stage.of("train")])),
                "Hours": f"{stage.seconds / 3600:.2f}",
                "Skipped updates": _number(last["skipped_updates"]),
            }
        )
    return _table(list(rows[0]), [list(row.values()) for row in rows])


def _counters(run: Run) -> str:
    counted = {stage.name: counters[-1] for stage in run.stages if (counters := stage.of("counters"))}
    reasons = {reason for counters in counted.values() for reason in counters}
    rows = [
        [reason.replace("_", " "), *(_number(counters.get(reason, 0)) for counters in counted.values())]
        for reason in sorted(reasons - {"kind", "stage", "step", "time", "samples"})
    ]
    if not rows:
        return _absent("The loader has reported no sample passed over.")
    lead = "Samples left out of training, by reason; the next one of the same lane took the place."
    return f'<p class="lead">{lead}</p>' + _table(["Reason", *counted], rows)


def _config(path: Path) -> str:
    text = escape(path.read_text(encoding="utf-8"))
    return f"<details><summary>config.yaml, as resolved</summary><pre>{text}</pre></details>"


def _environment(run: Run) -> str:
    about = {key: run.environment[key] for key in ("device", "world_size", "git")} | run.environment["versions"]
    rows = [[key.replace("_", " "), str(value)] for key, value in about.items() if value]
    return _table(["", ""], rows, text_columns=2)


def _data(run: Run) -> str:
    rows = [
        [source["name"], source["licence"] or "–", source["credit"] or "–", _number(source["samples"])]
        for source in run.environment["data"]
    ]
    return _table(["Source", "Licence", "Credit", "Samples"], rows, text_columns=3)
