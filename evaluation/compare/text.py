"""The tables for a terminal: aligned columns, at most 120 characters wide where a cell can be shortened."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from evaluation.compare.cells import ABSENT, Table, all_members
from evaluation.compare.read import Column, common_length

_WIDTH = 120
_NARROWEST = 12
_LEAD = 8  # characters kept of what cells have in common, where they are shortened


def as_text(columns: Sequence[Column], sections: dict[str, list[Table]]) -> str:
    """All tables, headed by the columns' names, and before them what each column is."""
    head = [textwrap.fill(line, _WIDTH, subsequent_indent="  ") for line in [*described(columns), reading(columns)]]
    parts = [_table([column.name for column in columns], table) for tables in sections.values() for table in tables]
    return "\n\n".join(["\n".join(head), *parts])


def described(columns: Sequence[Column]) -> list[str]:
    """A line a column: what it is made of."""
    lines = []
    for column in columns:
        several = f"{len(column.members)} runs that differ in the seed alone, as mean ± standard deviation: "
        paths = ", ".join(str(member.path) for member in column.members)
        lines.append(f"{column.name}: {several if len(column.members) > 1 else ''}{paths}")
    return lines


def reading(columns: Sequence[Column]) -> str:
    """How the tables are to be read."""
    changes = f"Changes are against {columns[0].name}. " if len(columns) > 1 else ""
    apart = " --seeds apart shows each run by itself." if len(columns) < len(all_members(columns)) else ""
    return f'{changes}"{ABSENT}" is what is not there.{apart}'


def _table(names: list[str], table: Table) -> str:
    label = max(len(text) for text in [table.title, *("  " + row.label for row in table.rows)])
    changes = _changes(names, table)
    wides = [max(len(row[i]) for row in changes) for i in range(len(names))]
    room = _WIDTH - label - sum(2 + (2 + width if width else 0) for width in wides)
    texts = [_shortened(row, max(_NARROWEST, room // len(names))) for row in _texts(names, table)]
    widths = [max(len(row[i]) for row in texts) for i in range(len(names))]
    lines = []
    for head, row, marks in zip(_labels(table), texts, changes, strict=True):
        line = head.ljust(label)
        for text, mark, width, wide in zip(row, marks, widths, wides, strict=True):
            line += (
                "  "
                + (text.ljust(width) if table.words else text.rjust(width))
                + ("  " + mark.rjust(wide) if wide else "")
            )
        lines.append(line.rstrip())
    rule = "-" * max(map(len, lines))
    notes = [textwrap.fill(note, _WIDTH, initial_indent="  ", subsequent_indent="    ") for note in table.notes]
    return "\n".join([lines[0], rule, *lines[1:], *notes])


def _labels(table: Table) -> list[str]:
    return [table.title, *("  " + row.label for row in table.rows)]


def _texts(names: list[str], table: Table) -> list[list[str]]:
    return [names, *([cell.text for cell in row.cells] for row in table.rows)]


def _changes(names: list[str], table: Table) -> list[list[str]]:
    """A change known to be more than chance has a star, and the others room for it."""
    starred = [any(row.cells[i].significant for row in table.rows) for i in range(len(names))]
    rows = [
        [
            cell.change + (" *" if cell.significant else "  " if has_stars else "")
            for cell, has_stars in zip(row.cells, starred, strict=True)
        ]
        for row in table.rows
    ]
    return [[""] * len(names), *rows]


def _shortened(texts: list[str], width: int) -> list[str]:
    """Texts cut to a width, about the place where they begin to differ."""
    if max(map(len, texts)) <= width:
        return texts
    there = set(texts) - {ABSENT}
    start = max(0, common_length(list(there)) - _LEAD) if len(there) > 1 else 0
    shown = ["…" + text[start:] if start and text != ABSENT else text for text in texts]
    return [text if len(text) <= width else text[: width - 1] + "…" for text in shown]
