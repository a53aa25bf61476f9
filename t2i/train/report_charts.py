"""A chart of the report as HTML: a legend, curves as inline SVG, a note.

Colours and fonts are the page's (`--c0`..`--c3` for curves, `--t0`..`--t4` for bands of t), so the curves
follow the reader's light or dark theme. The legend is HTML, so it wraps on a phone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Piece = tuple[Array, Array]  # steps since the run's start, values: what one stage has of a curve

_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 336, 24, 164  # the plot inside a view of 340 x 178
_POINTS = 600  # points a curve keeps (the extremes of each bin, so no spike is lost)
_FEW = 12  # a piece with at most so many points shows them as dots


@dataclass(frozen=True)
class Line:
    """A curve, a piece a stage; `raw` lies light beneath it."""

    label: str
    pieces: list[Piece]
    raw: list[Piece]


def chart(
    title: str,
    note: str,
    lines: list[Line],
    colours: list[str],
    stages: dict[str, int],
    end: int,
    from_zero: bool,
) -> str:
    """One chart.

    Args:
        colours: the page's variables for the lines, e.g. "c0".
        stages: steps of all stages before each one.
        end: steps of all stages.
        from_zero: the vertical axis begins at 0; else it is logarithmic where values span more than 12 times.
    """
    values = np.concatenate([y for line in lines for _, y in line.raw or line.pieces])
    low, high = float(min(0.0, values.min()) if from_zero else values.min()), float(values.max())
    log = bool(low > 0 and high > 12 * low)
    bottom, top = np.log10([low, high]) if log else (low, high)
    margin = 0.05 * (top - bottom) or 0.05 * abs(top) or 1.0
    bottom, top = (bottom if from_zero else bottom - margin), top + margin
    right = max(end, 1) * 1.01

    def across(x: Array) -> Array:
        return _LEFT + x / right * (_RIGHT - _LEFT)

    def up(y: Array) -> Array:
        share: Array = ((np.log10(y) if log else y) - bottom) / (top - bottom)
        return _BOTTOM - share * (_BOTTOM - _TOP)

    parts = _stages({stage: float(across(np.array(start))) for stage, start in stages.items()})
    for tick in _log_ticks(low, high) if log else _ticks(bottom, top):
        y = up(np.array(tick))
        parts.append(f'<path class="rule" d="M{_LEFT},{y:.1f}H{_RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{_tick(tick)}</text>')
    for tick in _ticks(0, right):
        if tick == int(tick):
            x = across(np.array(tick))
            parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 11}" text-anchor="middle">{_tick(tick)}</text>')
    keys = []
    for line, colour in zip(lines, colours, strict=False):
        parts.append(f'<g style="--c:var(--{colour})">')
        drawn = [("raw", piece) for piece in line.raw] + [("line", piece) for piece in line.pieces]
        for css, (steps, ys) in drawn:
            x, y = _thin(across(steps), up(ys))
            points = [f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)]
            parts.append(f'<path class="{css}" d="M{" ".join(points)}"/>')
            if css == "line" and len(points) <= _FEW:
                parts.append(f'<path class="dots" d="{"".join(f"M{point}h0" for point in points)}"/>')
        parts.append("</g>")
        last = f"{line.pieces[-1][1][-1]:.4g}"
        keys.append(f'<span style="--c:var(--{colour})">{escape(line.label)} <b>{last}</b></span>')
    svg = f'<svg viewBox="0 0 340 178" role="img" aria-label="{title}">{"".join(parts)}</svg>'
    head = f'<h3>{title}</h3><div class="keys">{"".join(keys)}</div>'
    return f'<figure class="chart">{head}{svg}<figcaption>{note}</figcaption></figure>'


def _stages(starts: dict[str, float]) -> list[str]:
    """Each stage's beginning as a vertical line with its name; a name that would cover another goes above."""
    parts, occupied = [], 0.0
    for i, (stage, x) in enumerate(starts.items()):
        until = [*starts.values(), _RIGHT][i + 1]
        if i % 2:
            size = f'width="{until - x:.1f}" height="{_BOTTOM - _TOP}"'
            parts.append(f'<rect x="{x:.1f}" y="{_TOP}" {size}/>')
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
    """Powers of ten, and three times them where the range is short."""
    factors = (1, 3) if high < 1e3 * low else (1,)
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
