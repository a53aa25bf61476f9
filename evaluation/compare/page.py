"""The comparison as text for a terminal and as a page: tables, curves, and the last sample grids prompt by prompt.

The text is at most 120 characters wide where cells can be shortened. The page is one file that loads nothing.
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
from data.files import name_in_errors
from data.pages import Chart, Line, Piece, absent, cards, draw, figure, smooth_pieces, table, write_page
from data.tables import format_table
from evaluation.compare.read import Run, RunGroup, common_length
from evaluation.compare.tables import ABSENT, Table, all_runs
from t2i.train.run_dir import Stage, read_grid

_WIDTH = 120
_NARROWEST = 12
_LEAD = 8  # characters kept of what cells have in common, where they are shortened


def format_comparison(groups: Sequence[RunGroup], sections: dict[str, list[Table]]) -> str:
    """All tables, after a description of each group."""
    head = [textwrap.fill(line, _WIDTH, subsequent_indent="  ") for line in [*describe_groups(groups), legend(groups)]]
    parts = [_table([group.name for group in groups], table) for tables in sections.values() for table in tables]
    return "\n\n".join(["\n".join(head), *parts])


def describe_groups(groups: Sequence[RunGroup]) -> list[str]:
    """A line for each group: its runs."""
    lines = []
    for group in groups:
        several = f"{len(group.runs)} runs that differ in the seed alone, as mean ± standard deviation: "
        paths = ", ".join(str(run.path) for run in group.runs)
        lines.append(f"{group.name}: {several if len(group.runs) > 1 else ''}{paths}")
    return lines


def legend(groups: Sequence[RunGroup]) -> str:
    """How to read the tables."""
    changes = f"Changes are against {groups[0].name}. " if len(groups) > 1 else ""
    apart = " --seeds apart shows each run separately." if len(groups) < len(all_runs(groups)) else ""
    return f'{changes}"{ABSENT}" means not available.{apart}'


def _table(names: list[str], table: Table) -> str:
    labels = [table.title, *("  " + row.label for row in table.rows)]
    changes = _changes(names, table)
    wides = [max(len(row[i]) for row in changes) for i in range(len(names))]
    room = _WIDTH - max(map(len, labels)) - sum(2 + (2 + width if width else 0) for width in wides)
    texts = [names, *([cell.text for cell in row.cells] for row in table.rows)]
    texts = [_shortened(row, max(_NARROWEST, room // len(names))) for row in texts]
    rows = [[head] for head in labels]
    left = {0}
    for i, wide in enumerate(wides):
        if table.words:
            left.add(len(rows[0]))
        for row, text, change in zip(rows, texts, changes, strict=True):
            row += [text[i], change[i]] if wide else [text[i]]
    lines = format_table(rows, left)
    rule = "-" * max(map(len, lines))
    notes = [textwrap.fill(note, _WIDTH, initial_indent="  ", subsequent_indent="    ") for note in table.notes]
    return "\n".join([lines[0], rule, *lines[1:], *notes])


def _changes(names: list[str], table: Table) -> list[list[str]]:
    """A change that is more than chance has a star, and the others of its column room for one."""
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
    """Texts cut to a width around the place where they begin to differ."""
    if max(map(len, texts)) <= width:
        return texts
    there = set(texts) - {ABSENT}
    start = max(0, common_length(list(there)) - _LEAD) if len(there) > 1 else 0
    shown = ["…" + text[start:] if start and text != ABSENT else text for text in texts]
    return [text if len(text) <= width else text[: width - 1] + "…" for text in shown]


_COLOURS = 7  # for curves
_TILE_SIDE = 320  # pixels

_CHARTS = [
    Chart("Training loss", "The sum of all terms with their weights.", "train", {"": "loss"}),
    Chart("Validation loss", "On images that training never sees; lower is better.", "validation", {"": "loss"}),
    Chart("Score while training", "The overall score; higher is better.", "score", {"": "overall"}),
    Chart("Images per second", "Over all devices.", "train", {"": "images_per_s"}, from_zero=True),
]


def check_groups(groups: Sequence[RunGroup]) -> None:
    """Raise a UserError if a page has fewer colours than there are groups."""
    if len(groups) > _COLOURS:
        raise UserError(
            f"--out: a page has {_COLOURS} colours for curves, not {len(groups)}: give fewer runs, or leave it out"
        )


def write_comparison(folder: Path, groups: Sequence[RunGroup], sections: dict[str, list[Table]]) -> Path:
    """Write `compare.html` into the folder and return its path; a UserError if that cannot be written."""
    names = [group.name for group in groups]
    shown = {title: _tables(names, tables) for title, tables in sections.items()}
    last = shown.pop("Stages")
    with name_in_errors(f"--out {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        return write_page(
            folder / "compare.html",
            title=" · ".join(names),
            kind="comparison",
            subtitle=f"Runs side by side. {legend(groups)}",
            cards=cards([(group.name, *_headline(group)) for group in groups]),
            notes=[f"<span>{escape(line)}</span>" for line in describe_groups(groups)],
            sections={**shown, "Curves": _curves(groups), "Samples": _samples(groups), "Stages": last},
        )


def _headline(group: RunGroup) -> tuple[str, str]:
    """A group's most telling number, and what it is."""
    scored = [scores.overall for run in group.runs for scores in list(run.scores.values())[:1]]
    overall = [value for value in scored if value is not None]
    if overall:
        return f"{np.mean(overall):.3f}", "GenEval, overall"
    losses = [
        series[1][-1]
        for run in group.runs
        for stage in list(run.stages.values())[-1:]
        if (series := stage.series("validation", "loss"))
    ]
    return (f"{np.mean(losses):.4g}", "validation loss, last") if losses else ("–", "not measured yet")


def _tables(names: list[str], tables: list[Table]) -> str:
    parts = []
    for shown in tables:
        marked = [any(row.cells[i].change for row in shown.rows) for i in range(len(names))]
        head = [""]
        for name, has_changes in zip(names, marked, strict=True):
            head += [name, "change"] if has_changes else [name]
        rows = []
        for row in shown.rows:
            cells = [row.label]
            for cell, has_changes in zip(row.cells, marked, strict=True):
                cells += [cell.text, cell.change + " *" * cell.significant] if has_changes else [cell.text]
            rows.append(cells)
        parts.append(
            f"<h3>{escape(shown.title)}</h3>" + (table(head, rows, len(head) if shown.words else 1) if rows else "")
        )
        parts += [f'<p class="lead">{escape(note)}</p>' for note in shown.notes]
    return "".join(parts) or absent("There is nothing to compare yet.")


# --- curves ---


def _curves(groups: Sequence[RunGroup]) -> str:
    """Each chart over steps and, beside it, over hours."""
    stages = [stage for run in all_runs(groups) for stage in run.stages.values()]
    ends = {
        "steps": max((float(stage.start + stage.end) for stage in stages), default=0.0),
        "hours": max((stage.start_s + stage.seconds for stage in stages), default=0.0) / 3600,
    }
    drawn, missing = [], []
    for chart in _CHARTS:
        for over in ("steps", "hours"):
            its = replace(chart, title=f"{chart.title} by {over}", over=over)
            found = [_line(group, f"c{number}", its) for number, group in enumerate(groups)]
            lines = [line for line in found if line.pieces]
            marks = _common_starts(groups) if over == "steps" else {}
            drawn += [draw(its, lines, marks, ends[over])] if lines else []
        missing += [] if lines else [chart.title.lower()]
    lead = (
        "All stages on one axis: batches, or hours without pauses, since the run began. Each name has its latest value."
    )
    html = f'<p class="lead">{lead}</p><div class="charts">{"".join(drawn)}</div>' if drawn else ""
    return html + (absent(f"Recorded in none of the runs: {', '.join(missing)}.") if missing else "")


def _common_starts(groups: Sequence[RunGroup]) -> dict[str, int]:
    """The steps before each stage if they are the same in all runs; else marks would be wrong for some."""
    starts = [{name: stage.start for name, stage in run.stages.items()} for run in all_runs(groups) if run.stages]
    return starts[0] if starts and all(other == starts[0] for other in starts) else {}


def _line(group: RunGroup, colour: str, chart: Chart) -> Line:
    """A group's curve: the mean of its runs, and each run light beneath it."""
    (metric,) = chart.lines.values()
    several, noisy = len(group.runs) > 1, chart.kind == "train"
    pieces = list(_pieces(group.runs, chart, metric))
    each = [list(_pieces([run], chart, metric)) for run in group.runs]
    if noisy and several:
        each = [smooth_pieces(its) for its in each]
    beneath = [piece for its in each for piece in its] if noisy or several else []
    return Line(group.name, colour, smooth_pieces(pieces) if noisy else pieces, beneath)


def _pieces(runs: Sequence[Run], chart: Chart, metric: str) -> Iterator[Piece]:
    """The mean over runs at the steps that all of them have, stage by stage."""
    for name in runs[0].stages:
        stages = [run.stages[name] for run in runs if name in run.stages]
        if len(stages) == len(runs) and (piece := _mean(stages, chart, metric)) is not None:
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


# --- samples ---


def _samples(groups: Sequence[RunGroup]) -> str:
    """The last grids: a prompt's images beside each other."""
    grids: list[dict[tuple[str, int], Image.Image]] = []
    leads = []
    for group in groups:
        drawn = [stage for run in group.runs for stage in list(run.stages.values())[::-1] if stage.grids]
        if not drawn:
            grids.append({})
            leads.append(f"{group.name}: no samples yet")
            continue
        step, path = drawn[0].grids[-1]
        about, pictures = read_grid(path)
        grids.append(dict(zip(_numbered(about["prompts"]), pictures, strict=True)))
        how = f"solver {about['solver']} · steps {about['steps']} · guidance {about['guidance_scale']}"
        seed = f", of {path.parents[2].name}" if len(group.runs) > 1 else ""
        leads.append(f"{group.name}{seed}: {drawn[0].name}, step {step:,} · {how} · weights {about['weights']}")
    prompts = list(dict.fromkeys(key for grid in grids for key in grid))
    if not prompts:
        return absent("None of the runs has samples yet.")
    lead = "".join(f'<p class="lead">{escape(line)}</p>' for line in leads)
    return f'{lead}<div class="charts">{"".join(_side_by_side(groups, grids, key) for key in prompts)}</div>'


def _numbered(prompts: Sequence[str]) -> list[tuple[str, int]]:
    """Each prompt with how often it came before, so that equal prompts differ."""
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        keys.append((prompt, seen[prompt]))
        seen[prompt] += 1
    return keys


def _side_by_side(
    groups: Sequence[RunGroup], grids: Sequence[dict[tuple[str, int], Image.Image]], key: tuple[str, int]
) -> str:
    tiles = []
    for group, grid in zip(groups, grids, strict=True):
        nothing = f"<figure><figcaption>{escape(group.name)}: no sample</figcaption></figure>"
        tiles.append(figure(grid[key], _TILE_SIDE, group.name) if key in grid else nothing)
    return f'<div><h3>{escape(key[0])}</h3><div class="beside">{"".join(tiles)}</div></div>'
