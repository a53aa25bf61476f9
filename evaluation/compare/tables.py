"""What differs between runs' settings, and what their stages cost and came to.

Tables of text that a terminal and a page can show.

Beside a cell stands its change against the first column: in percent, in points of a score, or that it is not the same.
What is not there is "-".

Scores side by side: those taken while training, and those of GenEval with what may be said of their differences.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from evaluation.compare.read import SHARED, Column, Flat, Member, Scores, differing, flatten
from evaluation.stats import Difference, Incomparable, over_seeds, paired_bootstrap
from t2i.train.run_dir import NO_SCORES, Stage

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


Pick = Callable[[Member], Scores | None]

_OUTCOMES = {"overall", "overall_interval", "tasks", "absent_tasks", "held_out", "correct_images", "correct_prompts"}
_OUTCOMES |= {"prompts", "images", "images_sha256", "bounds"}  # of a summary
_SPEED = "drawn.speed."  # of a summary, too: not how, but how fast
_JUDGE = ("detector", "thresholds")  # of a summary: what scores must share to be compared
_PLACES = ("model", "file")  # and of that, where weights were found: their hash tells which they are
_OVERALL, _HELD_OUT = "overall", "held out"
_SEEDS_NOTE = (
    "A paired interval speaks of these weights, over prompts; another seed of the same recipe may differ by more."
)
_STAR_NOTE = (
    "* the 95 % interval of the difference leaves out 0, that of Welch's t where both have several runs and else the "
    "paired one: by chance alone, one row in 20 does."
)


# --- while training ---


def score_tables(columns: Sequence[Column]) -> list[Table]:
    """Each stage's newest scores in metrics.jsonl that were not cut short, and its best overall one."""
    stages = union(member.stages for member in all_members(columns))
    found = [_score_table(columns, stage) for stage in stages]
    return [table for table in found if table is not None]


def _score_table(columns: Sequence[Column], name: str) -> Table | None:
    def newest(member: Member) -> dict[str, Any]:
        lines = member.stages[name].of("score") if name in member.stages else []
        return next((line for line in reversed(lines) if line.get("complete", True)), {})

    def value(score: str) -> Callable[[Member], float | None]:
        return lambda it: newest(it).get(score)

    scores = union((key for key in newest(it) if key not in NO_SCORES) for it in all_members(columns))
    if not scores:
        return None
    rows = [told("of step", columns, lambda it: f"{newest(it)['step']:,}" if newest(it) else None)]
    for score in scores:
        label = score.replace("_", " ")
        rows.append(measured(label, columns, value(score), ".3f", points=True))
    rows.append(measured("overall, best", columns, lambda it: _best(it.stages.get(name)), ".3f", points=True))
    return Table(f"Newest scores while training, stage {name}", rows)


def _best(stage: Stage | None) -> float | None:
    series = None if stage is None else stage.series("score", "overall")
    return None if series is None else float(series[1].max())


# --- GenEval ---


def geneval_tables(columns: Sequence[Column]) -> list[Table]:
    """GenEval scores; those in folders of the same name belong together, and where all have one, these do."""
    scored = [member.scores for member in all_members(columns) if member.scores]
    if not scored:
        return []
    if all(len(scores) == 1 for scores in scored):
        return _of_geneval(columns, "GenEval", lambda it: next(iter(it.scores.values()), None))
    return [table for it in union(scored) for table in _of_geneval(columns, f"GenEval, {it}", _of_folder(it))]


def _of_folder(folder: str) -> Pick:
    return lambda it: it.scores.get(folder)


def _of_geneval(columns: Sequence[Column], title: str, pick: Pick) -> list[Table]:
    how = _how(columns, pick)
    return [
        _geneval_table(columns, title, pick),
        *([Table(f"{title}: drawn and judged otherwise", how, words=True)] if how else []),
    ]


def _geneval_table(columns: Sequence[Column], title: str, pick: Pick) -> Table:
    found = [scores for member in all_members(columns) if (scores := pick(member)) is not None]
    tasks = union(scores.summary["tasks"] for scores in found)
    rows = {_OVERALL: _score_row(columns, _OVERALL, pick, _OVERALL)}
    rows |= {task: _score_row(columns, "  " + task.replace("_", " "), pick, task) for task in tasks}
    if any("held_out" in scores.summary for scores in found):
        rows[_HELD_OUT] = _score_row(columns, _HELD_OUT, pick, _HELD_OUT)
    notes = []
    for number, column in enumerate(columns[1:], 1):
        differences, said = _judge(columns[0], column, pick)
        notes += said
        for name in [name for name, it in differences.items() if it.significant and name in rows]:
            rows[name].cells[number] = replace(rows[name].cells[number], significant=True)
    if any(cell.significant for row in rows.values() for cell in row.cells):
        notes.append(_STAR_NOTE)
    if any(set(scores.summary["tasks"]) != set(tasks) for scores in found):
        notes.append("The overall scores are means of different tasks: they cannot be compared.")
    images = measured("images", columns, lambda it: _images(pick(it)), ",.0f")
    return Table(title, [*rows.values(), images], union([notes]))


def _score_row(columns: Sequence[Column], label: str, pick: Pick, name: str) -> Row:
    """A score, with its interval where the column is one run."""

    def entry(member: Member) -> dict[str, Any]:
        scores = pick(member)
        if scores is None:
            return {}
        if name not in (_OVERALL, _HELD_OUT):
            return scores.summary["tasks"].get(name, {})
        its = scores.summary if name == _OVERALL else scores.summary.get("held_out", {})
        return {"score": its.get("overall"), "interval": its.get("overall_interval")}

    row = measured(label, columns, lambda it: entry(it).get("score"), ".3f", points=True)
    for number, column in enumerate(columns):
        interval = entry(column.members[0]).get("interval")
        if interval and len(column.members) == 1:
            cell = row.cells[number]
            row.cells[number] = replace(cell, text=f"{cell.text} [{interval[0]:.3f}, {interval[1]:.3f}]")
    return row


def _images(scores: Scores | None) -> float | None:
    counts = [] if scores is None else [task.get("images") for task in scores.summary["tasks"].values()]
    return sum(counts) if counts and None not in counts else None


def _how(columns: Sequence[Column], pick: Pick) -> list[Row]:
    """What else differs in the summaries: how the pictures were drawn and judged."""

    def flat(member: Member) -> Flat:
        scores = pick(member)
        how = {} if scores is None else flatten({k: v for k, v in scores.summary.items() if k not in _OUTCOMES})
        return {name: value for name, value in how.items() if not name.startswith(_SPEED)}

    found = [flat(member) for member in all_members(columns) if pick(member) is not None]

    def setting(name: str) -> Callable[[Member], str | None]:
        return lambda it: worded(flat(it), name)

    return [told(name, columns, setting(name)) for name in differing(found)]


# --- what may be said of a difference ---


def _judge(first: Column, other: Column, pick: Pick) -> tuple[dict[str, Difference], list[str]]:
    """The differences of the overall and the tasks' scores, as far as something can be said of them, and sentences.

    Of several runs each they are those over runs: seeds differ by more than the paired interval of their pooled images.
    """
    sides = [[scores for it in column.members if (scores := pick(it))] for column in (first, other)]
    if not all(sides):
        return {}, []
    name = f"{other.name} less {first.name}"
    try:
        _same_judge([*sides[0], *sides[1]])
        paired = paired_bootstrap(_results(sides[0]), _results(sides[1]))
    except Incomparable as reason:
        return {}, [f"{name}: whether the difference is more than chance cannot be said: {reason}"]
    said = [f"{name}: {_words(paired.overall)} (paired bootstrap over {paired.prompts} prompts)"]
    over_runs = {}
    for row in (_OVERALL, *paired.tasks):
        with suppress(Incomparable):
            over_runs[row] = over_seeds(*(_values(side, row) for side in sides))
    if _OVERALL not in over_runs:
        return {_OVERALL: paired.overall} | paired.tasks, [*said, _SEEDS_NOTE]
    runs = " and ".join(str(len(_values(side, _OVERALL))) for side in sides)
    return over_runs, [*said, f"{name}: {_words(over_runs[_OVERALL])} (Welch's t over {runs} training runs)"]


def _values(side: Sequence[Scores], row: str) -> list[float]:
    """A score of each run that has it."""
    found = [it.overall if row == _OVERALL else it.summary["tasks"].get(row, {}).get("score") for it in side]
    return [value for value in found if value is not None]


def _same_judge(scores: Sequence[Scores]) -> None:
    judges = [flatten({key: it.summary.get(key) for key in _JUDGE}) for it in scores]
    if names := [name for name in differing(judges) if name.rpartition(".")[2] not in _PLACES]:
        raise Incomparable(f"they were not judged alike ({', '.join(names)})")


def _results(side: Sequence[Scores]) -> list[dict[str, Any]]:
    if missing := [it.folder for it in side if it.results is None]:
        raise Incomparable(f"{missing[0]} has no results.jsonl")
    return [line for it in side for line in it.results or []]


def _words(difference: Difference) -> str:
    low, high = difference.interval
    verdict = "significant" if difference.significant else "not significant"
    return f"overall {difference.value:+.3f} [{low:+.3f}, {high:+.3f}], {verdict}"


def all_tables(columns: Sequence[Column]) -> dict[str, list[Table]]:
    """All that there is to say, by section."""
    return {
        "What differs": [settings_table(columns)],
        "Scores": [*geneval_tables(columns), *score_tables(columns)],
        "Stages": stage_tables(columns),
    }


# --- settings ---


def settings_table(columns: Sequence[Column]) -> Table:
    """Every field of the configs, and of code, machine and data, that is not the same in all runs.

    Stages are held against those of the same name; a field that differs in all of them alike has one row.
    """
    runs = [member for member in all_members(columns) if member.config]
    title = "Settings that differ"
    if len(runs) < 2:
        return Table(title, [], ["There are not two runs with a config here."], words=True)
    rows = []
    stages = [[name for name in run.settings if name != SHARED] for run in runs]
    if any(names != stages[0] for names in stages):
        rows.append(told("stages", columns, lambda it: ", ".join(filter(None, it.settings)) or None))
    common = [name for name in stages[0] if all(name in names for names in stages)] or [SHARED]
    fields = {stage: differing([run.settings[stage] for run in runs]) for stage in common}
    for name in sorted(union(fields.values())):
        if all(run.settings[stage].get(name) == run.settings[common[0]].get(name) for run in runs for stage in common):
            rows.append(told(name, columns, _setting(common[0], name)))
        else:
            its = [stage for stage in common if name in fields[stage]]
            rows += [told(f"{stage}: {name}", columns, _setting(stage, name)) for stage in its]
    for name in differing([run.about for run in runs]):
        rows.append(told(f"environment: {name}", columns, _about(name)))
    none = "None: the runs differ in neither settings nor code, machine and data."
    return Table(title, rows, [] if rows else [none], words=True)


def _setting(stage: str, name: str) -> Callable[[Member], str | None]:
    return lambda it: worded(it.settings.get(stage, {}), name)


def _about(name: str) -> Callable[[Member], str | None]:
    return lambda it: worded(it.about, name)


# --- stages ---


def stage_tables(columns: Sequence[Column]) -> list[Table]:
    """What each stage cost and came to."""
    return [_stage_table(columns, name) for name in union(member.stages for member in all_members(columns))]


def _stage_table(columns: Sequence[Column], name: str) -> Table:
    found = [member.stages[name] for member in all_members(columns) if name in member.stages]

    def row(label: str, get: Callable[[Stage], float | None], form: str, unit: str = "") -> Row:
        return measured(label, columns, lambda it: get(it.stages[name]) if name in it.stages else None, form, unit)

    def words(label: str, get: Callable[[Stage], str | None]) -> Row:
        return told(label, columns, lambda it: get(it.stages[name]) if name in it.stages else None)

    second, unit = _time_unit(max(stage.seconds for stage in found))
    bands = sorted({key for stage in found for line in stage.of("validation") for key in line if "_t" in key})
    terms = union((key for key in stage.last if re.fullmatch("loss_[a-z]+", key)) for stage in found)
    rows = [
        words("steps", lambda it: f"{it.last['step']:,} of {it.last['total_steps']:,}"),
        row("images seen", lambda it: it.images, ",.0f"),
        row("wall time", lambda it: it.seconds / second, ",.1f", unit),
        row("images/s, median", _of(np.median, "train", "images_per_s"), ",.1f"),
        row("MFU, median", _of(lambda values: 100 * np.median(values), "train", "mfu"), ".1f", " %"),
        row("memory, peak", _of(np.max, "train", "memory_gib"), ".2f", " GiB"),
        row("skipped updates", lambda it: it.last.get("skipped_updates"), ",.0f"),
        row("validation loss, first", _of(_first, "validation", "loss"), "#.4g"),
        row("validation loss, last", _of(_last, "validation", "loss"), "#.4g"),
        *(row(f"  t {_band(band)}", _of(_last, "validation", band), "#.4g") for band in bands),
        row("validation loss, best", _of(np.min, "validation", "loss"), "#.4g"),
        words("  of step", _best_step),
        row("training loss, end", _of(_at_the_end, "train", "loss"), "#.4g"),
        *(row(f"  {term.removeprefix('loss_')}", _of(_at_the_end, "train", term), "#.4g") for term in terms),
    ]
    return Table(f"Stage {name}", rows)


def _of(reduce: Callable[[np.ndarray], float], kind: str, metric: str) -> Callable[[Stage], float | None]:
    """One number for a stage's values of a metric; None if it was never finite."""

    def get(stage: Stage) -> float | None:
        series = stage.series(kind, metric)
        return None if series is None else float(reduce(series[1]))

    return get


def _first(values: np.ndarray) -> float:
    return float(values[0])


def _last(values: np.ndarray) -> float:
    return float(values[-1])


def _at_the_end(values: np.ndarray) -> float:
    """The mean of the last tenth: a line is of one step, and noisy."""
    return float(values[-max(1, len(values) // 10) :].mean())


def _best_step(stage: Stage) -> str | None:
    series = stage.series("validation", "loss")
    return None if series is None else f"{series[0][series[1].argmin()] - stage.start:,.0f}"


def _band(metric: str) -> str:
    return metric.removeprefix("loss_t").replace("-", "–")


def _time_unit(longest: float) -> tuple[float, str]:
    """Seconds in the unit that a row of times is best given in, and its name."""
    if longest >= 7200:
        return 3600.0, " h"
    return (60.0, " min") if longest >= 600 else (1.0, " s")
