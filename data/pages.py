"""Parts of HTML pages: tables, cards, images, charts as inline SVG, and the page around them.

Colors are CSS variables of the page (`--c0`.. for curves, `--t0`.. for bands of t), so they follow the reader's light
or dark theme. Legends are HTML, so they wrap on a phone.
"""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from data.files import atomic_write

Array = npt.NDArray[np.float64]
Piece = tuple[Array, Array]  # one stage's part of a curve: steps or hours since the run's start, and values

_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 336, 24, 164  # the plot inside a view of 340 x 178
_POINTS = 600  # points of a curve (the extremes of each bin, so no spike is lost)
_FEW = 12  # a piece with at most this many points shows them as dots


@dataclass(frozen=True)
class Chart:
    """A chart of metrics of one kind: `lines`, or metrics that begin with `bands`, or all metrics except `beside`."""

    title: str
    note: str
    kind: str
    lines: dict[str, str] = field(default_factory=dict)  # legend: metric
    bands: str = ""  # prefix of a band of t
    beside: tuple[str, ...] = ()
    from_zero: bool = False  # else the axis fits the values, and is logarithmic if they span a factor over 12
    over: Literal["steps", "hours"] = "steps"


@dataclass(frozen=True)
class Line:
    """A curve with a piece for each stage; `raw` is drawn faintly below it. `colour` is a CSS variable, e.g. "c0"."""

    label: str
    colour: str
    pieces: list[Piece]
    raw: list[Piece]


@dataclass(frozen=True)
class _Axes:
    """Maps steps (or hours) and values to the view. `bottom` and `top` are logarithms if `log`."""

    right: float
    bottom: float
    top: float
    log: bool

    def across(self, x: Array | float) -> Array:
        return np.asarray(_LEFT + x / self.right * (_RIGHT - _LEFT))

    def up(self, values: Array | float) -> Array:
        share = ((np.log10(values) if self.log else values) - self.bottom) / (self.top - self.bottom)
        return np.asarray(_BOTTOM - share * (_BOTTOM - _TOP))


def draw(chart: Chart, lines: list[Line], starts: Mapping[str, float], end: float) -> str:
    """HTML of a chart with at least one line, over `end` steps or hours; `starts` are those at which stages begin."""
    axes = _fit(lines, end, chart.from_zero)
    marks = _stages({stage: float(axes.across(start)) for stage, start in starts.items()})
    parts = "".join([*marks, *_grid(axes, whole=chart.over == "steps"), *(_curve(line, axes) for line in lines)])
    svg = f'<svg viewBox="0 0 340 178" role="img" aria-label="{chart.title}">{parts}</svg>'
    latest = [(line.colour, escape(line.label), line.pieces[-1][1][-1]) for line in lines]
    keys = "".join(f'<span style="--c:var(--{c})">{label} <b>{last:.4g}</b></span>' for c, label, last in latest)
    head = f'<h3>{chart.title}</h3><div class="keys">{keys}</div>'
    return f'<figure class="chart">{head}{svg}<figcaption>{chart.note}</figcaption></figure>'


def _fit(lines: list[Line], end: float, from_zero: bool) -> _Axes:
    values = np.concatenate([y for line in lines for _, y in line.raw or line.pieces])
    low, high = float(min(0.0, values.min()) if from_zero else values.min()), float(values.max())
    log = low > 0 and high > 12 * low
    bottom, top = (math.log10(low), math.log10(high)) if log else (low, high)
    margin = 0.05 * (top - bottom) or 0.05 * abs(top) or 1.0
    return _Axes((end or 1) * 1.01, bottom if from_zero else bottom - margin, top + margin, log)


def _grid(axes: _Axes, whole: bool) -> list[str]:
    """Rules and ticks; those of the lower axis at integers only if `whole`."""
    parts = []
    for tick in _log_ticks(10**axes.bottom, 10**axes.top) if axes.log else _ticks(axes.bottom, axes.top):
        y = axes.up(tick)
        parts.append(f'<path class="rule" d="M{_LEFT},{y:.1f}H{_RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{_tick(tick)}</text>')
    for tick in _ticks(0, axes.right):
        if not whole or tick == int(tick):
            x = axes.across(tick)
            parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 11}" text-anchor="middle">{_tick(tick)}</text>')
    return parts


def _curve(line: Line, axes: _Axes) -> str:
    parts = []
    for css, (steps, values) in [("raw", piece) for piece in line.raw] + [("line", piece) for piece in line.pieces]:
        x, y = _thin(axes.across(steps), axes.up(values))
        points = [f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)]
        parts.append(f'<path class="{css}" d="M{" ".join(points)}"/>')
        if css == "line" and len(points) <= _FEW:
            parts.append(f'<path class="dots" d="{"".join(f"M{point}h0" for point in points)}"/>')
    return f'<g style="--c:var(--{line.colour})">{"".join(parts)}</g>'


def _stages(starts: dict[str, float]) -> list[str]:
    """Each stage's start as a vertical line with its name; a name that would cover another is moved up."""
    parts, occupied, ends = [], 0.0, [*starts.values(), float(_RIGHT)][1:]
    for i, ((stage, x), until) in enumerate(zip(starts.items(), ends, strict=True)):
        if i % 2:
            parts.append(f'<rect x="{x:.1f}" y="{_TOP}" width="{until - x:.1f}" height="{_BOTTOM - _TOP}"/>')
        if i:
            parts.append(f'<path class="stage" d="M{x:.1f},{_TOP}V{_BOTTOM}"/>')
        name = stage if len(stage) <= 16 else stage[:15] + "…"
        at = min(x, _RIGHT - 4.8 * len(name))
        parts.append(f'<text x="{at:.1f}" y="{20 if at >= occupied else 11}">{escape(name)}</text>')
        occupied = max(occupied, at + 4.8 * len(name))
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 5)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and three times those if the range is short."""
    factors = (1, 3) if high < 1e4 * low else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]


def _tick(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:.4g}"


def _thin(x: Array, y: Array) -> Piece:
    """At most about `_POINTS` points: the lowest and the highest of each bin."""
    if len(x) <= _POINTS:
        return x, y
    bins = np.array_split(np.arange(len(x)), _POINTS // 2)
    keep = np.unique([b[f(y[b])] for b in bins for f in (np.argmin, np.argmax)])
    return x[keep], y[keep]


def number(value: float) -> str:
    """A number as text, with about four digits."""
    for size, unit in ((1e9, " B"), (1e6, " M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as hours and minutes."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def absent(sentence: str) -> str:
    """HTML in place of what is not there."""
    return f'<p class="absent">{sentence}</p>'


def cards(rows: Sequence[tuple[str, str, str]]) -> str:
    """HTML of (label, value, note), all plain text."""
    return "".join(
        f"<div><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>"
        for label, value, note in rows
    )


def table(head: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """HTML of a table. Cells are plain text; columns after the first `text_columns` are numbers, aligned right."""

    def row(cells: list[str], tag: str) -> str:
        tags = [tag if column < text_columns else f"{tag} class=n" for column in range(len(cells))]
        return "".join(f"<{opening}>{escape(cell)}</{tag}>" for opening, cell in zip(tags, cells, strict=True))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{row(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(image: Image.Image, side: int, caption: str) -> str:
    """HTML of an image, scaled down to sides of at most `side` pixels, with a caption (plain text)."""
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    source = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    size, caption = f'width="{image.width}" height="{image.height}"', escape(caption)
    element = f'<img {size} alt="{caption}" loading=lazy src="{source}">'
    return f"<figure>{element}<figcaption>{caption}</figcaption></figure>"


def smooth(values: Array, half_width: int) -> Array:
    """Centred moving average, applied twice, so that a steep start is not shifted; the window is cut at the ends."""
    index = np.arange(len(values))
    low, high = np.maximum(index - half_width, 0), np.minimum(index + half_width + 1, len(values))
    for _ in range(2):
        total = np.concatenate([[0.0], np.cumsum(values)])
        values = (total[high] - total[low]) / (high - low)
    return values


def smooth_pieces(pieces: list[Piece]) -> list[Piece]:
    """Pieces of a noisy curve, smoothed over about a fiftieth of its points."""
    half_width = sum(len(x) for x, _ in pieces) // 100
    return [(x, smooth(values, half_width)) for x, values in pieces]


def linked_sections(sections: Mapping[str, str]) -> tuple[str, str]:
    """HTML of the links to some sections, and of the sections, given as HTML by title."""
    anchors = [(title, title.lower().replace(" ", "-")) for title in sections]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for title, anchor in anchors)
    body = "".join(f'<section id="{a}"><h2>{title}</h2>{sections[title]}</section>' for title, a in anchors)
    return links, body


def written_at() -> str:
    """A page's footer."""
    return time.strftime("Written %Y-%m-%d %H:%M UTC.", time.gmtime())


def write_page(
    path: Path, title: str, kind: str, subtitle: str, cards: str, notes: list[str], sections: dict[str, str]
) -> Path:
    """Write a page, or replace an old one, and return its path.

    `title`, `kind` (what page it is, for the browser's tab) and `subtitle` are plain text; `cards`, `notes` (shown
    first) and `sections` (by title) are HTML.
    """
    links, body = linked_sections(sections)
    template = files("data").joinpath("report_page.html").read_text(encoding="utf-8")
    page = Template(template).substitute(
        title=escape(title),
        kind=escape(kind),
        subtitle=escape(subtitle),
        cards=cards,
        notes="".join(f'<aside role="note">{html}</aside>' for html in notes),
        links=links,
        sections=body,
        footer=written_at(),
    )
    atomic_write(path, page.encode())
    return path
