"""The page about a run: `write_report(run_dir)` reads a run directory and writes `run_dir/report.html`.

- One file: pictures are data URIs, curves are inline SVG, nothing is loaded from anywhere.
- matplotlib draws in placeholder colours (`_INK`); the page replaces them by CSS variables, so the curves
  follow the reader's light or dark theme. Legends are HTML, so they wrap on a phone.
- The directory may belong to a running or a killed run: whatever is missing becomes a sentence that says so.
- All text that comes from files is escaped; the page replaces the old one by an atomic rename.
"""

import base64
import io
import json
import math
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

Record = dict[str, Any]
Series = dict[str, tuple[np.ndarray, np.ndarray]]  # stage -> (steps since the run's start, values)

_RAW_POINTS = 600  # points a raw curve keeps (the extremes of each bin, so no spike is lost)
_STRIP_GRIDS = 16  # thumbnails a stage shows, evenly spread, the first and the last among them
_TILE_SIDE, _THUMBNAIL_SIDE = 640, 480  # pixels
_PAUSE_S = 3600.0  # a longer silence in metrics.jsonl is a run that was down, not a slow step
_INK = {"#010101": "ink", "#020202": "muted", "#030303": "line", "#040404": "band"}
_INK |= {f"#0a0a0{i}": f"c{i}" for i in range(4)} | {f"#0b0b{i:02x}": f"t{i}" for i in range(5)}
_COLOURS = [f"#0a0a0{i}" for i in range(4)]
_BAND_COLOURS = [f"#0b0b{i:02x}" for i in range(5)]  # from noise to image
_TERMS = {"flow_matching": "loss_fm", "LPIPS": "loss_lpips", "P-DINO": "loss_pdino", "REPA": "loss_repa"}


@dataclass
class Run:
    """What a run directory says. Stages are in the order of their first record."""

    directory: Path
    environment: Record
    train: dict[str, list[Record]] = field(default_factory=dict)
    validation: dict[str, list[Record]] = field(default_factory=dict)
    counters: dict[str, list[Record]] = field(default_factory=dict)
    start: dict[str, int] = field(default_factory=dict)  # steps of all stages before this one
    end: int = 0  # steps of all stages
    seconds: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[tuple[int, Path]]] = field(default_factory=dict)
    unreadable_lines: int = 0

    def last(self, stage: str) -> Record:
        return self.train[stage][-1] if self.train[stage] else {}

    def images(self, stage: str) -> int:
        return int(self.last(stage).get("step", 0) * (_finite(self.last(stage).get("batch_size")) or 0))

    def progress(self, stage: str) -> float:
        return self.last(stage).get("step", 0) / (_finite(self.last(stage).get("total_steps")) or math.inf)


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
    anchors = {title: title.lower().replace(" ", "-") for title in sections}
    torn = run.unreadable_lines
    footer = time.strftime("Written %Y-%m-%d %H:%M UTC from the run directory.", time.gmtime())
    page = _PAGE.substitute(
        name=escape(run_dir.resolve().name), css=_CSS, subtitle=_subtitle(run), cards=_cards(run),
        notices=_notices(run), links="".join(f'<a href="#{a}">{t}</a>' for t, a in anchors.items()),
        sections="\n".join(f'<section id="{a}"><h2>{t}</h2>{sections[t]}</section>'
                           for t, a in anchors.items()),
        footer=footer + f" {torn} unreadable line(s) of metrics.jsonl were left out." * bool(torn),
    )  # fmt: skip
    path = run_dir / "report.html"
    aside = path.with_name(f".report.{os.getpid()}.html")
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, path)
    return path


# ---- reading -----------------------------------------------------------------------------------------------


def _read_run(directory: Path) -> Run:
    run = Run(directory, _read_json(directory / "environment.json"))
    kinds = {"train": run.train, "validation": run.validation, "counters": run.counters}
    before: float | None = None
    for record in _read_metrics(run):
        kind, stage, step = record.get("kind"), record.get("stage"), record.get("step")
        if kind not in kinds or not isinstance(stage, str) or not isinstance(step, int):
            continue
        if stage not in run.seconds:
            run.seconds[stage] = 0.0
            for rows in kinds.values():
                rows[stage] = []
        for other, rows in kinds.items():  # a resumed run repeats steps: what it overtakes no longer counts
            overtaken = step + (kind != other)
            while kind in ("train", other) and rows[stage] and rows[stage][-1]["step"] >= overtaken:
                rows[stage].pop()
        kinds[kind][stage].append(record)
        step_s, wait, mfu = (_finite(record.get(key)) for key in ("step_s", "data_wait_s", "mfu"))
        record["data_wait_percent"] = 100 * wait / step_s if wait is not None and step_s else None
        record["mfu_percent"] = None if mfu is None else 100 * mfu
        if (now := _finite(record.get("time"))) is not None:
            gap = now - before if before is not None else min(step * (step_s or 0.0), _PAUSE_S)
            run.seconds[stage] += gap if 0 <= gap <= _PAUSE_S else 0.0
            before = now
    for stage in run.seconds:
        run.start[stage] = run.end
        run.end += max((r["step"] for r in run.train[stage] + run.validation[stage]), default=0)
        for path in (directory / stage / "samples").glob("step_*.png"):
            if match := re.fullmatch(r"step_(\d+)", path.stem):
                run.samples.setdefault(stage, []).append((int(match[1]), path))
        run.samples.setdefault(stage, []).sort()
    return run


def _read_metrics(run: Run) -> Iterable[Record]:
    """The records in the order written. A killed writer leaves a torn line at the end or mid-way."""
    path = run.directory / "metrics.jsonl"
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                run.unreadable_lines += bool(line.strip())
                continue
            if isinstance(record, dict):
                yield record


def _read_json(path: Path) -> Record:
    """The object in `path`; empty when the file is missing or half written."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _series(run: Run, records: dict[str, list[Record]], key: str) -> Series:
    result = {}
    for stage, rows in records.items():
        points = [(run.start[stage] + r["step"], v) for r in rows if (v := _finite(r.get(key))) is not None]
        if points:
            steps, values = np.array(points, dtype=float).T
            result[stage] = (steps, values)
    return result


# ---- words and numbers -------------------------------------------------------------------------------------


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
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    return " ".join([f"{hours} h"] * bool(hours) + [f"{minutes} min"] * bool(minutes))


def _absent(sentence: str) -> str:
    return f'<p class="absent">{sentence}</p>'


def _table(head: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """Cells are HTML already; columns after `text_columns` are numbers and align right."""
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(
            f"<{tag}{' class=n' if i >= text_columns else ''}>{c}</{tag}>" for i, c in enumerate(cells)
        ) + "</tr>"  # fmt: skip

    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def _subtitle(run: Run) -> str:
    about, parts = run.environment, ["A text-to-image model trained in pixels"]
    if "world_size" in about:
        parts.append(f"{about['world_size']} × {about.get('device', 'device')}")
    if isinstance(about.get("git"), str):
        parts.append(f"commit {about['git'][:12]}")
    return escape(" · ".join(parts))


def _cards(run: Run) -> str:
    done = sum(run.progress(s) >= 1 for s in run.train)
    under_way = [f"{s} at {100 * run.progress(s):.0f} %" for s in run.train if 0 < run.progress(s) < 1]
    facts = [
        ("Stages done", f"{done} of {len(run.train)}", ", ".join(under_way) or "of those begun"),
        ("Images seen", _number(sum(map(run.images, run.train))), "repeats counted"),
        ("Wall time", _duration(sum(run.seconds.values())), f"pauses over {_duration(_PAUSE_S)} left out"),
        ("Parameters", _number(run.environment.get("parameters")), "of the trained network"),
    ]
    losses = [
        (f"Validation loss, {stage}", _number(y[-1]), f"first {_number(y[0])}")
        for stage, (_, y) in _series(run, run.validation, "loss").items()
    ]
    return "".join(
        '<div class="cards">' + "".join(
            f"<div><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>"
            for label, value, note in group
        ) + "</div>"
        for group in (facts, losses) if group
    )  # fmt: skip


def _notices(run: Run) -> str:
    return "".join(
        f'<aside role="note"><b>Stand-in</b><span>{escape(str(n))}</span></aside>'
        for n in run.environment.get("notices") or []
    )


# ---- pictures ----------------------------------------------------------------------------------------------


def _picture(image: Image.Image, side: int, alt: str, lazy: bool = True) -> str:
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img {size} alt="{escape(alt)}"{" loading=lazy" * lazy} src="data:image/webp;base64,{data}">'


def _open(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # being written, or torn by a kill: the next report shows it
        return None


def _latest_samples(run: Run) -> str:
    for stage in reversed(run.samples):
        for step, path in reversed(run.samples[stage]):
            image, about = _open(path), _read_json(path.with_suffix(".json"))
            if image is None:
                continue
            words = {"solver": "solver", "steps": "steps", "guidance_scale": "guidance", "weights": "weights"}
            made = [f"{label} {about[key]}" for key, label in words.items() if key in about]
            intro = escape(" · ".join([f"{stage}, step {step:,}", *made]))
            return f'<p class="lead">{intro}</p><div class="grid">{_tiles(image, about)}</div>'
    return _absent("No samples yet: the first grid appears here once a stage has drawn one.")


def _tiles(grid: Image.Image, about: Record) -> str:
    columns, rows = int(about.get("columns") or 1), int(about.get("rows") or 1)
    width, height = grid.width / columns, grid.height / rows
    prompts = [str(p) for p in about.get("prompts") or [""]]
    figures = []
    for i, prompt in enumerate(prompts[: columns * rows]):
        x, y = i % columns * width, i // columns * height
        box = (round(x), round(y), round(x + width), round(y + height))
        tile = _picture(grid.crop(box), _TILE_SIDE, prompt)
        figures.append(f"<figure>{tile}<figcaption>{escape(prompt)}</figcaption></figure>")
    return "".join(figures)


def _strips(run: Run) -> str:
    parts = []
    for stage, grids in run.samples.items():
        keep = sorted({round(i) for i in np.linspace(0, len(grids) - 1, min(len(grids), _STRIP_GRIDS))})
        figures = []
        for step, path in (grids[i] for i in keep):
            if (image := _open(path)) is not None:
                picture = _picture(image, _THUMBNAIL_SIDE, f"{stage}, step {step:,}")
                figures.append(f"<figure>{picture}<figcaption>step {step:,}</figcaption></figure>")
        if figures:
            shown = f" <small>{len(keep)} of {len(grids)} grids</small>" if len(keep) < len(grids) else ""
            strip = f'<div class="strip" tabindex=0>{"".join(figures)}</div>'
            parts.append(f"<h3>{escape(stage)}{shown}</h3>{strip}")
        else:
            parts.append(f"<h3>{escape(stage)}</h3>" + _absent("This stage has drawn no samples yet."))
    return "".join(parts) or _absent("No samples yet.")


# ---- curves ------------------------------------------------------------------------------------------------


def _smooth(values: np.ndarray, half_width: int) -> np.ndarray:
    """Centred moving average, twice: a steep start is not shifted. The window is cut off at the ends."""
    index = np.arange(len(values))
    low, high = np.maximum(index - half_width, 0), np.minimum(index + half_width + 1, len(values))
    for _ in range(2):
        total = np.concatenate([[0.0], np.cumsum(values)])
        values = (total[high] - total[low]) / (high - low)
    return values


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about `_RAW_POINTS` points: the lowest and the highest of each bin."""
    if len(x) <= _RAW_POINTS:
        return x, y
    bins = np.array_split(np.arange(len(x)), _RAW_POINTS // 2)
    keep = np.unique([b[f(y[b])] for b in bins for f in (np.argmin, np.argmax)])
    return x[keep], y[keep]


def _curve(run: Run, title: str, text: str, lines: dict[str, Series], colours: list[str], style: str) -> str:
    """One chart as HTML. `style`: "raw" (light, a smoothed line over it), "smoothed", "plain", "points"."""
    figure = Figure(figsize=(4.7, 2.5), layout="constrained")
    axes, legend, extremes = figure.add_subplot(), [], []
    for (label, series), colour in zip(lines.items(), colours, strict=False):
        half_width = sum(len(x) for x, _ in series.values()) // 100
        for x, y in series.values():
            mean = _smooth(y, half_width) if style in ("raw", "smoothed") else y
            if style == "raw":
                axes.plot(*_thin(x, y), color=colour, alpha=0.3, linewidth=0.7)
            marker = "o" if style == "points" or len(x) == 1 else None
            axes.plot(*_thin(x, mean), color=colour, linewidth=1.5, marker=marker, markersize=2.6)
            extremes += [y.min(), y.max()] if style == "raw" else [mean.min(), mean.max()]
        value = f"{escape(label)} <b>{_number(float(mean[-1]))}</b>"
        legend.append(f'<span style="--c:var(--{_INK[colour]})">{value}</span>')
    _dress(axes, run)
    if title.startswith(("Learning", "Images", "Data", "Utilisation")):
        axes.set_ylim(bottom=0)
    elif min(extremes) > 0 and max(extremes) > 12 * min(extremes):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if max(extremes) < 1e3 * min(extremes) else (1,)))
        axes.yaxis.set_major_formatter(_tick)
        axes.yaxis.set_minor_locator(NullLocator())
    head = f'<h3>{title}</h3><div class="keys">{"".join(legend)}</div>'
    return f'<figure class="chart">{head}{_svg(figure, title)}<figcaption>{text}</figcaption></figure>'


def _tick(value: float, _: int = 0) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:.4g}"


def _dress(axes: Axes, run: Run) -> None:
    """Axes in the page's colours, and each stage's beginning as a vertical line with its name."""
    right = max(run.end, 1) * 1.01
    axes.set_xlim(0, right)
    occupied = -1.0  # in shares of the width, like `at` and `until`
    for i, (stage, start) in enumerate(run.start.items()):
        if i % 2:
            axes.axvspan(start, [*run.start.values(), right][i + 1], color="#040404", linewidth=0, zorder=0)
        if i:
            axes.axvline(start, color="#020202", linewidth=0.8, linestyle=(0, (3, 3)))
        name = stage if len(stage) <= 16 else stage[:15] + "…"
        width = 0.024 * len(name)
        at = min(start / right, 1 - width)
        level = 1.02 if at > occupied else 1.1
        axes.text(at, level, name, transform=axes.transAxes, fontsize=7.5, color="#020202", parse_math=False)
        occupied = max(occupied, at + width)
    axes.grid(axis="y", color="#030303", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#030303")
    axes.tick_params(which="both", colors="#020202", labelsize=8, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(_tick)
    axes.yaxis.set_major_formatter(_tick)


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # matplotlib's names repeat from figure to figure
    opening = rf'<svg viewBox="\1" role="img" aria-label="{title}">'
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', opening, svg)
    return re.sub("|".join(_INK), lambda m: f"var(--{_INK[m[0]]})", svg).replace("xlink:href", "href")


def _bands(run: Run, records: dict[str, list[Record]], prefix: str) -> dict[str, Series]:
    keys = {k for rows in records.values() for r in rows for k in r if k.startswith(prefix)}
    return {"t " + k.removeprefix(prefix).replace("-", "–"): _series(run, records, k) for k in sorted(keys)}


def _curves(run: Run) -> str:
    def train(**keys: str) -> dict[str, Series]:
        return {label.replace("_", " "): _series(run, run.train, key) for label, key in keys.items()}

    t_note = "t = 0 is pure noise, t = 1 the finished image."
    charts = [
        ("Training loss", "What is minimised: all terms with their weights.", train(total="loss"), "raw"),
        ("Terms of the loss", "Each term of the training loss by itself.", train(**_TERMS), "raw"),
        ("Validation loss", "On images the model never trains on; lower is better.",
         {"held-out": _series(run, run.validation, "loss")}, "points"),
        ("Training loss by t", f"The flow-matching term by band of t. {t_note}",
         _bands(run, run.train, "loss_fm_t"), "smoothed"),
        ("Validation loss by t", f"Held-out loss by band of t. {t_note}",
         _bands(run, run.validation, "loss_t"), "points"),
        ("Gradient norm", "Global norm at each update; a lasting climb is a warning.",
         train(norm="grad_norm"), "raw"),
        ("Learning rate", "As the optimizer used it.", train(rate="lr"), "plain"),
        ("Images per second", "Over all devices.", train(images="images_per_s"), "raw"),
        ("Data wait", "Share of a step spent waiting for images; near zero when loading keeps up.",
         train(percent="data_wait_percent"), "raw"),
        ("Utilisation", "MFU: model FLOPs as a share of the peak.", train(percent="mfu_percent"), "raw"),
    ]  # fmt: skip
    drawn, missing = [], []
    for title, text, lines, style in charts:
        lines = {label: series for label, series in lines.items() if series}
        if lines:
            by_t = [_BAND_COLOURS[round(i)] for i in np.linspace(0, 4, len(lines))]
            drawn.append(_curve(run, title, text, lines, by_t if title.endswith("by t") else _COLOURS, style))
        else:
            missing.append(title.lower())
    lead = "All stages on one axis: batches since the run began. Beside each name, its latest value."
    html = f'<p class="lead">{lead}</p><div class="charts">{"".join(drawn)}</div>' if drawn else ""
    return html + (_absent(f"Not recorded in this run so far: {', '.join(missing)}.") if missing else "")


# ---- tables ------------------------------------------------------------------------------------------------


def _stage_table(run: Run) -> str:
    rows, held_out = [], _series(run, run.validation, "loss")
    speeds = _series(run, run.train, "images_per_s")
    for stage in run.train:
        last = run.last(stage)
        losses = [_number(v) for v in held_out[stage][1][[0, -1]]] if stage in held_out else ["–", "–"]
        resolution = f"{last['resolution']} px" if "resolution" in last else "–"
        speed = _number(float(f"{speeds[stage][1].mean():.3g}")) if stage in speeds else "–"
        cells = [stage, f"{_number(last.get('step'))} / {_number(last.get('total_steps'))}", resolution,
                 _number(last.get("batch_size")), _number(run.images(stage)), *losses, speed,
                 f"{run.seconds[stage] / 3600:.2f}", _number(last.get("skipped_updates"))]  # fmt: skip
        rows.append([escape(cell) for cell in cells])
    head = ["Stage", "Steps", "Resolution", "Batch", "Images", "First val. loss", "Last val. loss",
            "Images/s", "Hours", "Skipped updates"]  # fmt: skip
    return _table(head, rows) if rows else _absent("No stage has written a metric yet.")


def _counters(run: Run) -> str:
    counted = {stage: rows[-1] for stage, rows in run.counters.items() if rows}
    reasons = {key for last in counted.values() for key, value in last.items() if isinstance(value, int)}
    reasons -= {"step", "time"}
    if not reasons:
        return _absent("The loader has reported no sample passed over.")
    rows = [[escape(r.replace("_", " ")), *(_number(v.get(r, 0)) for v in counted.values())]
            for r in sorted(reasons)]  # fmt: skip
    lead = "Samples left out of training, by reason; the next one of the same lane took the place."
    return f'<p class="lead">{lead}</p>' + _table(["Reason", *map(escape, counted)], rows)


def _config(run: Run) -> str:
    path = run.directory / "config.yaml"
    if not path.is_file():
        return _absent("The run directory has no config.yaml.")
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"<details><summary>config.yaml, as resolved</summary><pre>{text}</pre></details>"


def _environment(run: Run) -> str:
    about = run.environment
    if not about:
        return _absent("The run directory has no readable environment.json.")
    labels = {"device": "Device", "world_size": "Processes", "parameters": "Parameters", "git": "Commit"}
    rows = [[label, f"{about[k]:,}" if isinstance(about[k], int) else str(about[k])]
            for k, label in labels.items() if about.get(k) is not None]  # fmt: skip
    versions = about.get("versions") or {}
    rows += [[name, str(version)] for name, version in sorted(versions.items())]
    return _table([], [[escape(cell) for cell in row] for row in rows], text_columns=2)


def _data(run: Run) -> str:
    rows = []
    for source in run.environment.get("data") or []:
        name, url = escape(str(source.get("name", "–"))), str(source.get("url") or "")
        if url.startswith(("https://", "http://")):  # a link is followed by a click only; nothing is loaded
            name = f'<a rel="noreferrer" href="{escape(url)}">{name}</a>'
        cells = [escape(str(source.get(k) or "–")) for k in ("licence", "credit")]
        rows.append([name, *cells, _number(source.get("samples"))])
    return _table(["Source", "Licence", "Credit", "Samples"], rows, text_columns=3) if rows else _absent(
        "environment.json names no data source.")  # fmt: skip


# ---- the page ----------------------------------------------------------------------------------------------

_CSS = """
:root{color-scheme:light dark;--paper:#faf9f6;--card:#fff;--ink:#1d2126;--muted:#69707a;--line:#e3e1da;
--band:#f4f2ec;--c0:#2563c9;--c1:#d9650d;--c2:#158463;--c3:#a63a9b;--accent:#2563c9;
--warn:#fff4d6;--warn-line:#e0a100;--t0:#5b3fa8;--t1:#2f6bb5;--t2:#118a85;--t3:#5c9a2b;--t4:#c78a00}
@media (prefers-color-scheme:dark){:root{--paper:#14161a;--card:#1c1f25;--ink:#e9e7e2;--muted:#9aa1ab;
--line:#31353d;--band:#22262d;--c0:#74a9ff;--c1:#ff9f56;--c2:#4fcfa2;--c3:#e28ad8;--accent:#8ab6ff;
--warn:#332a12;--warn-line:#d39e1c;--t0:#a58cf5;--t1:#6aa7f0;--t2:#48c9c2;--t3:#9ad45f;--t4:#f2c14a}}
*{box-sizing:border-box}html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Liberation Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:clamp(20px,5vw,56px) clamp(16px,4vw,40px)}
h1{font-size:clamp(30px,5vw,46px);line-height:1.1;letter-spacing:-.02em;margin:0 0 8px;overflow-wrap:anywhere}
h2{font-size:24px;letter-spacing:-.015em;margin:0 0 6px}h3{font-size:15px;margin:0}section{margin-top:56px}
.lead,.subtitle,.absent,footer{color:var(--muted);margin:0 0 18px}.absent{font-style:italic}
footer{margin-top:64px;border-top:1px solid var(--line);padding-top:16px;font-size:13px}
a{color:var(--accent)}nav{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:14px;margin-top:22px}
nav a{text-decoration:none}nav a:hover{text-decoration:underline}
.cards{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(148px,1fr));margin:12px 0}
.subtitle{margin-bottom:28px}
.cards div,.chart{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px}
.cards span,.cards small{display:block;color:var(--muted);font-size:13px;overflow-wrap:anywhere}
.cards b{display:block;font-size:23px;line-height:1.35;letter-spacing:-.015em;
font-variant-numeric:tabular-nums}
aside{display:flex;gap:14px;background:var(--warn);border-left:4px solid var(--warn-line);border-radius:6px;
padding:11px 16px;margin:10px 0;font-size:15px}aside b{white-space:nowrap}
figure{margin:0}img{display:block;max-width:100%;height:auto;border-radius:8px;background:var(--band)}
.grid{display:grid;gap:22px 16px;grid-template-columns:repeat(auto-fill,minmax(min(44%,230px),1fr))}
.grid img{width:100%}figcaption{color:var(--muted);font-size:13.5px;line-height:1.4;margin-top:8px;
overflow-wrap:anywhere}
.charts{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));margin-bottom:18px}
.chart{display:grid;grid-template-rows:subgrid;grid-row:span 4;gap:4px}.chart figcaption{margin:0}
.chart svg{width:100%;height:auto;display:block}.chart svg text{font-family:inherit!important}
.keys{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;color:var(--muted);min-height:20px}
.keys span::before{content:"";display:inline-block;width:14px;height:3px;margin-right:6px;
border-radius:2px;background:var(--c);vertical-align:middle}
.keys b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
#samples-over-time h3{margin:20px 0 10px}h3 small{color:var(--muted);font-weight:400}
.strip{display:flex;gap:14px;overflow-x:auto;padding-bottom:12px;scroll-snap-type:x proximity}
.strip figure{flex:none;width:min(240px,62vw);scroll-snap-align:start}.strip img{width:100%;cursor:zoom-in}
.strip figcaption{text-align:center;margin-top:6px;font-variant-numeric:tabular-nums}
dialog{border:0;padding:0;background:none;max-width:96vw}dialog::backdrop{background:#000c}
dialog img{width:min(92vmin,960px);cursor:zoom-out}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:9px 14px 9px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--muted);font-weight:500;font-size:13px;vertical-align:bottom}
.n{text-align:right;white-space:nowrap;padding-right:0;padding-left:14px}th.n{white-space:normal}
#environment td:first-child{color:var(--muted);width:12em}
summary{cursor:pointer}pre{overflow-x:auto;background:var(--card);
border:1px solid var(--line);border-radius:10px;padding:16px;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
@media print{section{break-inside:avoid}nav{display:none}}
"""

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>$name · training report</title><style>$css</style></head>
<body><main><header><h1>$name</h1><p class="subtitle">$subtitle</p>$cards
$notices<nav>$links</nav></header>
$sections
<footer>$footer</footer></main><dialog><img alt=""></dialog>
<script>
const box = document.querySelector("dialog"), large = box.firstChild;
for (const small of document.querySelectorAll(".strip img"))
  small.onclick = () => { large.src = small.src; large.alt = small.alt; box.showModal(); };
box.onclick = () => box.close();
</script></body></html>
""")
