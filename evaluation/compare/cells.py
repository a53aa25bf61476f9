"""Tables of text that a terminal and a page can show.

Beside a cell stands its change against the first column: in percent, in points of a score, or that it is not the same.
What is not there is "-".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from evaluation.compare.read import Column, Member
from evaluation.compare.settings import Flat

ABSENT = "-"
OTHER = "≠"


@dataclass(frozen=True)
class Cell:
    """What a column has, and its change against the first column's."""

    text: str
    change: str = ""
    significant: bool = False
    """Whether the change is known to be more than chance."""


@dataclass(frozen=True)
class Row:
    """A cell a column."""

    label: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """Rows, and sentences below them."""

    title: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    words: bool = False
    """Its cells are words, not numbers."""


def measured(
    label: str,
    columns: Sequence[Column],
    get: Callable[[Member], float | None],
    form: str,
    unit: str = "",
    points: bool = False,
) -> Row:
    """A number: of several runs the mean and the sample standard deviation.

    Args:
        label: what it is.
        columns: of what.
        get: a run's number; None if it has none.
        form: how it is written, as `format` takes it.
        unit: what follows it.
        points: changes are differences, else in percent.
    """
    means: list[float | None] = []
    texts = []
    for column in columns:
        values = [value for member in column.members if (value := get(member)) is not None]
        means.append(float(np.mean(values)) if values else None)
        texts.append(_spread(values, len(column.members), form, unit))
    return Row(label, [Cell(it, _change(means[0], mean, points)) for it, mean in zip(texts, means, strict=True)])


def _spread(values: list[float], members: int, form: str, unit: str) -> str:
    """The deviation has the mean's decimals; values that are all the same have none."""
    if not values:
        return ABSENT
    shown = format(float(np.mean(values)), form)
    if len(set(values)) > 1:
        shown += f" ± {np.std(values, ddof=1):,.{len(shown.partition('.')[2])}f}"
    shown += unit
    return shown if len(values) == members else f"{shown} ({len(values)} of {members})"


def _change(first: float | None, other: float | None, points: bool) -> str:
    if first is None or other is None or first == other:
        return ""
    if points:
        return f"{other - first:+z.3f}"
    return f"{100 * (other - first) / abs(first):+z.1f} %" if first else OTHER


def told(label: str, columns: Sequence[Column], get: Callable[[Member], str | None]) -> Row:
    """Words: those of several runs, each once."""
    texts = []
    for column in columns:
        said = [value for member in column.members if (value := get(member)) is not None]
        texts.append(", ".join(dict.fromkeys(said)) or ABSENT)
    return Row(label, [Cell(it, OTHER if it != texts[0] and ABSENT not in (it, texts[0]) else "") for it in texts])


def worded(flat: Flat, name: str) -> str | None:
    """A setting as text; None if it is not there."""
    if name not in flat:
        return None
    return flat[name] if isinstance(flat[name], str) else json.dumps(flat[name], ensure_ascii=False)


def union(names: Iterable[Iterable[str]]) -> list[str]:
    """Each name once, as first met."""
    return list(dict.fromkeys(name for some in names for name in some))


def all_members(columns: Sequence[Column]) -> list[Member]:
    """The runs of all columns."""
    return [member for column in columns for member in column.members]
