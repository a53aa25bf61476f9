"""The page: the tables, all runs' curves in the same axes, and their last sample grids prompt by prompt.

It is made of what reports are made of (`data/pages.py`), and like them it is one file that loads nothing.

The tables for a terminal: aligned columns, at most 120 characters wide where a cell can be shortened.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from data.errors import UserError
from data.pages import Chart, Line, Piece, absent, cards, draw, figure, smooth_pieces, table, write_page
from evaluation.compare.read import Column, Member, common_length
from evaluation.compare.tables import ABSENT, Table, all_members
from t2i.train.run_dir import Stage, read_grid

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


_COLOURS = 7  # that the page has for curves
_TILE_SIDE = 320  # pixels

_CHARTS = [
    Chart("Training loss", "What is minimised: all terms with their weights.", "train", {"": "loss"}),
    Chart("Validation loss", "On images never trained on; lower is better.", "validation", {"": "loss"}),
    Chart("Score while training", "The overall score; higher is better.", "score", {"": "overall"}),
    Chart("Images per second", "Over all devices.", "train", {"": "images_per_s"}, from_zero=True),
]


def check_columns(columns: Sequence[Column]) -> None:
    """Refuse what a page cannot show.

    Raises:
        UserError: there are more columns than colours.
    """
    if len(columns) > _COLOURS:
        raise UserError(f"out: a page tells {_COLOURS} curves apart, not {len(columns)}: give fewer runs, or no out")


def write_comparison(folder: Path, columns: Sequence[Column], sections: dict[str, list[Table]]) -> Path:
    """Write `compare.html` into the folder and return its path.

    Raises:
        UserError: the folder cannot be written.
    """
    names = [column.name for column in columns]
    shown = {title: _tables(names, tables) for title, tables in sections.items()}
    last = shown.pop("Stages")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return write_page(
            folder / "compare.html",
            title=" · ".join(names),
            kind="comparison",
            subtitle=f"Runs side by side. {reading(columns)}",
            cards=cards([(column.name, *_headline(column)) for column in columns]),
            notes=[f"<span>{escape(line)}</span>" for line in described(columns)],
            sections={**shown, "Curves": _curves(columns), "Samples": _samples(columns), "Stages": last},
        )
    except OSError as error:
        raise UserError(f"out is {folder}: it cannot be written: {error.strerror}") from error


def _headline(column: Column) -> tuple[str, str]:
    """The one number to know of a column, and what it is."""
    scored = [scores.overall for it in column.members for scores in list(it.scores.values())[:1]]
    overall = [value for value in scored if value is not None]
    if overall:
        return f"{np.mean(overall):.3f}", "GenEval, overall"
    losses = [
        series[1][-1]
        for it in column.members
        for stage in list(it.stages.values())[-1:]
        if (series := stage.series("validation", "loss"))
    ]
    return (f"{np.mean(losses):.4g}", "validation loss, last") if losses else ("–", "not measured yet")


def _tables(names: list[str], tables: list[Table]) -> str:
    parts = []
    for it in tables:
        marked = [any(row.cells[i].change for row in it.rows) for i in range(len(names))]
        head = [""]
        for name, has_changes in zip(names, marked, strict=True):
            head += [name, "change"] if has_changes else [name]
        rows = []
        for row in it.rows:
            cells = [row.label]
            for cell, has_changes in zip(row.cells, marked, strict=True):
                cells += [cell.text, cell.change + " *" * cell.significant] if has_changes else [cell.text]
            rows.append(cells)
        parts.append(f"<h3>{escape(it.title)}</h3>" + (table(head, rows, len(head) if it.words else 1) if rows else ""))
        parts += [f'<p class="lead">{escape(note)}</p>' for note in it.notes]
    return "".join(parts) or absent("There is nothing to compare yet.")


# --- curves ---


def _curves(columns: Sequence[Column]) -> str:
    """Each chart against steps and, beside it, against wall time."""
    stages = [stage for member in all_members(columns) for stage in member.stages.values()]
    ends = {
        "steps": max((float(stage.start + stage.end) for stage in stages), default=0.0),
        "hours": max((stage.start_s + stage.seconds for stage in stages), default=0.0) / 3600,
    }
    drawn, missing = [], []
    for chart in _CHARTS:
        for over in ("steps", "hours"):
            its = replace(chart, title=f"{chart.title} by {over}", over=over)
            found = [_line(column, f"c{number}", its) for number, column in enumerate(columns)]
            lines = [line for line in found if line.pieces]
            marks = _common_starts(columns) if over == "steps" else {}
            drawn += [draw(its, lines, marks, ends[over])] if lines else []
        missing += [] if lines else [chart.title.lower()]
    lead = (
        "All stages on one axis: batches, or hours without pauses, since a run began. Beside a name, its latest value."
    )
    html = f'<p class="lead">{lead}</p><div class="charts">{"".join(drawn)}</div>' if drawn else ""
    return html + (absent(f"Recorded in none of the runs: {', '.join(missing)}.") if missing else "")


def _common_starts(columns: Sequence[Column]) -> dict[str, int]:
    """The steps before each stage, if they are the same in all runs: else marks would say something wrong of some."""
    starts = [
        {name: it.start for name, it in member.stages.items()} for member in all_members(columns) if member.stages
    ]
    return starts[0] if starts and all(it == starts[0] for it in starts) else {}


def _line(column: Column, colour: str, chart: Chart) -> Line:
    """A column's curve: of several runs the mean, each of them light beneath it."""
    (metric,) = chart.lines.values()
    several, noisy = len(column.members) > 1, chart.kind == "train"
    pieces = list(_pieces(column.members, chart, metric))
    each = [list(_pieces([member], chart, metric)) for member in column.members]
    if noisy and several:
        each = [smooth_pieces(its) for its in each]
    beneath = [piece for its in each for piece in its] if noisy or several else []
    return Line(column.name, colour, smooth_pieces(pieces) if noisy else pieces, beneath)


def _pieces(members: Sequence[Member], chart: Chart, metric: str) -> Iterator[Piece]:
    """The mean over runs, at the steps that all of them have, stage by stage."""
    for name in members[0].stages:
        stages = [member.stages[name] for member in members if name in member.stages]
        if len(stages) == len(members) and (piece := _mean(stages, chart, metric)) is not None:
            yield piece


def _mean(stages: Sequence[Stage], chart: Chart, metric: str) -> Piece | None:
    series = [(stage.series(chart.kind, metric), stage.series(chart.kind, metric, chart.over)) for stage in stages]
    known = [(steps[0], piece) for steps, piece in series if steps is not None and piece is not None]
    if len(known) < len(stages):
        return None
    common = reduce(np.intersect1d, [steps for steps, _ in known])
    shared = [np.stack(piece)[:, np.isin(steps, common)] for steps, piece in known]
    x, y = np.mean(shared, axis=0)
    return (x, y) if len(common) else None


# --- pictures ---


def _samples(columns: Sequence[Column]) -> str:
    """The last grids: a prompt's pictures beside each other."""
    grids: list[dict[tuple[str, int], Image.Image]] = []
    leads = []
    for column in columns:
        drawn = [stage for member in column.members for stage in list(member.stages.values())[::-1] if stage.grids]
        if not drawn:
            grids.append({})
            leads.append(f"{column.name}: no samples yet")
            continue
        step, path = drawn[0].grids[-1]
        about, pictures = read_grid(path)
        grids.append(dict(zip(_numbered(about["prompts"]), pictures, strict=True)))
        how = f"solver {about['solver']} · steps {about['steps']} · guidance {about['guidance_scale']}"
        seed = f", of {path.parents[2].name}" if len(column.members) > 1 else ""
        leads.append(f"{column.name}{seed}: {drawn[0].name}, step {step:,} · {how} · weights {about['weights']}")
    prompts = list(dict.fromkeys(key for grid in grids for key in grid))
    if not prompts:
        return absent("None of the runs has drawn samples yet.")
    lead = "".join(f'<p class="lead">{escape(line)}</p>' for line in leads)
    return f'{lead}<div class="charts">{"".join(_side_by_side(columns, grids, key) for key in prompts)}</div>'


def _numbered(prompts: Sequence[str]) -> list[tuple[str, int]]:
    """A prompt that comes twice is told apart by how often it came before."""
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        keys.append((prompt, seen[prompt]))
        seen[prompt] += 1
    return keys


def _side_by_side(
    columns: Sequence[Column], grids: Sequence[dict[tuple[str, int], Image.Image]], key: tuple[str, int]
) -> str:
    tiles = []
    for column, grid in zip(columns, grids, strict=True):
        nothing = f"<figure><figcaption>{escape(column.name)}: not drawn</figcaption></figure>"
        tiles.append(figure(grid[key], _TILE_SIDE, column.name) if key in grid else nothing)
    return f'<div><h3>{escape(key[0])}</h3><div class="beside">{"".join(tiles)}</div></div>'
