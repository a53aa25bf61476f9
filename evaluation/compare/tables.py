"""The tables: settings that differ, scores, and what stages cost and reached.

A cell has its change against the first group beside it: in percent, in points of a score, or that it is not the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from evaluation.compare.read import SHARED, Flat, Run, RunGroup, Scores, differing
from evaluation.stats import Difference, Incomparable, over_seeds, paired_bootstrap
from t2i.config.loading import fields_of
from t2i.train.run_dir import NO_SCORES, Stage

ABSENT = "-"
OTHER = "≠"


@dataclass(frozen=True)
class Cell:
    """A group's value as text, and its change against the first group's."""

    text: str
    change: str = ""
    significant: bool = False
    """Whether the change is more than chance."""


@dataclass(frozen=True)
class Row:
    """A row of a table, with a cell for each group."""

    label: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """A table with notes below it."""

    title: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    words: bool = False
    """Whether its cells are words rather than numbers."""


def number_row(
    label: str,
    groups: Sequence[RunGroup],
    get: Callable[[Run], float | None],
    form: str,
    unit: str = "",
    points: bool = False,
) -> Row:
    """A row of numbers; of several runs the mean and the sample standard deviation.

    Args:
        get: a run's number, or None if it has none.
        form: as for `format`.
        points: whether changes are differences rather than percentages.
    """
    means: list[float | None] = []
    texts = []
    for group in groups:
        values = [value for run in group.runs if (value := get(run)) is not None]
        means.append(float(np.mean(values)) if values else None)
        texts.append(_spread(values, len(group.runs), form, unit))
    return Row(label, [Cell(text, _change(means[0], mean, points)) for text, mean in zip(texts, means, strict=True)])


def _spread(values: list[float], runs: int, form: str, unit: str) -> str:
    """The mean and, unless all values are the same, the deviation, with the same number of decimals."""
    if not values:
        return ABSENT
    shown = format(float(np.mean(values)), form)
    if len(set(values)) > 1:
        shown += f" ± {np.std(values, ddof=1):,.{len(shown.partition('.')[2])}f}"
    shown += unit
    return shown if len(values) == runs else f"{shown} ({len(values)} of {runs})"


def _change(first: float | None, other: float | None, points: bool) -> str:
    if first is None or other is None or first == other:
        return ""
    if points:
        return f"{other - first:+z.3f}"
    return f"{100 * (other - first) / abs(first):+z.1f} %" if first else OTHER


def text_row(label: str, groups: Sequence[RunGroup], get: Callable[[Run], str | None]) -> Row:
    """A row of words; those of several runs, each once."""

    def change(text: str) -> str:
        return OTHER if text != texts[0] and ABSENT not in (text, texts[0]) else ""

    texts: list[str] = []
    for group in groups:
        said = [value for run in group.runs if (value := get(run)) is not None]
        texts.append(", ".join(dict.fromkeys(said)) or ABSENT)
    return Row(label, [Cell(text, change(text)) for text in texts])


def format_setting(flat: Flat, name: str) -> str | None:
    """A setting as text, or None if there is no such setting."""
    if name not in flat:
        return None
    return flat[name] if isinstance(flat[name], str) else json.dumps(flat[name], ensure_ascii=False)


def union(names: Iterable[Iterable[str]]) -> list[str]:
    """Each name once, in the order of first occurrence."""
    return list(dict.fromkeys(name for some in names for name in some))


def all_runs(groups: Sequence[RunGroup]) -> list[Run]:
    """The runs of all groups."""
    return [run for group in groups for run in group.runs]


Pick = Callable[[Run], Scores | None]

_OUTCOMES = {"overall", "overall_interval", "tasks", "absent_tasks", "held_out", "correct_images", "correct_prompts"}
_OUTCOMES |= {"prompts", "images", "images_sha256", "bounds"}  # fields of a summary that are no settings
_SPEED = "generated_with.speed."  # no setting either
_JUDGE = ("detector", "thresholds")  # fields of a summary that scores must share to be compared
_PLACES = ("model", "file")  # of these, where weights were found: their hash says which they are
_OVERALL, _HELD_OUT = "overall", "held out"
_SEEDS_NOTE = (
    "A paired interval is about these weights, over prompts; another seed of the same recipe may differ by more."
)
_STAR_NOTE = (
    "* the 95 % interval of the difference leaves out 0 (Welch's t where both have several runs, else the paired one): "
    "by chance alone, one row in 20 does."
)


# --- while training ---


def score_tables(groups: Sequence[RunGroup]) -> list[Table]:
    """Each stage's newest complete scores in metrics.jsonl, and its best overall score."""
    found = [_score_table(groups, stage) for stage in union(run.stages for run in all_runs(groups))]
    return [table for table in found if table is not None]


def _score_table(groups: Sequence[RunGroup], name: str) -> Table | None:
    def newest(run: Run) -> dict[str, Any]:
        lines = run.stages[name].of("score") if name in run.stages else []
        return next((line for line in reversed(lines) if line.get("complete", True)), {})

    def newest_value(score: str) -> Callable[[Run], float | None]:
        return lambda run: newest(run).get(score)

    def best(run: Run) -> float | None:
        series = run.stages[name].series("score", "overall") if name in run.stages else None
        return None if series is None else float(series[1].max())

    scores = union((key for key in newest(run) if key not in NO_SCORES) for run in all_runs(groups))
    if not scores:
        return None
    rows = [text_row("of step", groups, lambda run: f"{newest(run)['step']:,}" if newest(run) else None)]
    for score in scores:
        rows.append(number_row(score.replace("_", " "), groups, newest_value(score), ".3f", points=True))
    rows.append(number_row("overall, best", groups, best, ".3f", points=True))
    return Table(f"Newest scores while training, stage {name}", rows)


# --- GenEval ---


def geneval_tables(groups: Sequence[RunGroup]) -> list[Table]:
    """GenEval scores; folders of the same name are compared, and where each run has one folder, these."""
    scored = [run.scores for run in all_runs(groups) if run.scores]
    if not scored:
        return []
    if all(len(scores) == 1 for scores in scored):
        return _of_geneval(groups, "GenEval", lambda run: next(iter(run.scores.values()), None))
    return [table for name in union(scored) for table in _of_geneval(groups, f"GenEval, {name}", _of_folder(name))]


def _of_folder(folder: str) -> Pick:
    return lambda run: run.scores.get(folder)


def _of_geneval(groups: Sequence[RunGroup], title: str, pick: Pick) -> list[Table]:
    tables, how = [_geneval_table(groups, title, pick)], _how(groups, pick)
    if how:
        tables.append(Table(f"{title}: generated or judged with other settings", how, words=True))
    return tables


def _geneval_table(groups: Sequence[RunGroup], title: str, pick: Pick) -> Table:
    found = [scores for run in all_runs(groups) if (scores := pick(run)) is not None]
    tasks = union(scores.summary["tasks"] for scores in found)
    rows = {_OVERALL: _score_row(groups, _OVERALL, pick, _OVERALL)}
    rows |= {task: _score_row(groups, "  " + task.replace("_", " "), pick, task) for task in tasks}
    if any("held_out" in scores.summary for scores in found):
        rows[_HELD_OUT] = _score_row(groups, _HELD_OUT, pick, _HELD_OUT)
    notes = []
    for number, group in enumerate(groups[1:], 1):
        differences, said = _judge(groups[0], group, pick)
        notes += said
        for name in [name for name in differences if differences[name].significant and name in rows]:
            rows[name].cells[number] = replace(rows[name].cells[number], significant=True)
    if any(cell.significant for row in rows.values() for cell in row.cells):
        notes.append(_STAR_NOTE)
    if any(set(scores.summary["tasks"]) != set(tasks) for scores in found):
        notes.append("The overall scores are means of different tasks: they cannot be compared.")
    images = number_row("images", groups, lambda run: _images(pick(run)), ",.0f")
    return Table(title, [*rows.values(), images], union([notes]))


def _score_row(groups: Sequence[RunGroup], label: str, pick: Pick, name: str) -> Row:
    """A score, with its interval where the group is one run."""

    def entry(run: Run) -> dict[str, Any]:
        scores = pick(run)
        if scores is None:
            return {}
        if name not in (_OVERALL, _HELD_OUT):
            return scores.summary["tasks"].get(name, {})
        its = scores.summary if name == _OVERALL else scores.summary.get("held_out", {})
        return {"score": its.get("overall"), "interval": its.get("overall_interval")}

    row = number_row(label, groups, lambda run: entry(run).get("score"), ".3f", points=True)
    for number, group in enumerate(groups):
        interval = entry(group.runs[0]).get("interval")
        if interval and len(group.runs) == 1:
            cell = row.cells[number]
            row.cells[number] = replace(cell, text=f"{cell.text} [{interval[0]:.3f}, {interval[1]:.3f}]")
    return row


def _images(scores: Scores | None) -> float | None:
    counts = [] if scores is None else [task.get("images") for task in scores.summary["tasks"].values()]
    return sum(counts) if counts and None not in counts else None


def _how(groups: Sequence[RunGroup], pick: Pick) -> list[Row]:
    """What else differs in the summaries: how images were generated and judged."""

    def flat(run: Run) -> Flat:
        scores = pick(run)
        how = {} if scores is None else fields_of({k: v for k, v in scores.summary.items() if k not in _OUTCOMES})
        return {name: value for name, value in how.items() if not name.startswith(_SPEED)}

    found = [flat(run) for run in all_runs(groups) if pick(run) is not None]

    def setting(name: str) -> Callable[[Run], str | None]:
        return lambda run: format_setting(flat(run), name)

    return [text_row(name, groups, setting(name)) for name in differing(found)]


# --- what may be said of a difference ---


def _judge(first: RunGroup, other: RunGroup, pick: Pick) -> tuple[dict[str, Difference], list[str]]:
    """The differences of the overall and the tasks' scores, as far as they can be compared, and sentences about them.

    Where both groups have several runs, the differences are over runs: seeds differ by more than the paired interval
    of their pooled images.
    """
    sides = [[scores for run in group.runs if (scores := pick(run))] for group in (first, other)]
    if not all(sides):
        return {}, []
    name = f"{other.name} less {first.name}"
    try:
        _same_judge([*sides[0], *sides[1]])
        paired = paired_bootstrap(_results(sides[0]), _results(sides[1]))
    except Incomparable as reason:
        return {}, [f"{name}: cannot tell whether the difference is more than chance: {reason}"]
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
    found = [
        scores.overall if row == _OVERALL else scores.summary["tasks"].get(row, {}).get("score") for scores in side
    ]
    return [value for value in found if value is not None]


def _same_judge(scores: Sequence[Scores]) -> None:
    judges = [fields_of({key: its.summary.get(key) for key in _JUDGE}) for its in scores]
    if names := [name for name in differing(judges) if name.rpartition(".")[2] not in _PLACES]:
        raise Incomparable(f"they were not judged alike ({', '.join(names)})")


def _results(side: Sequence[Scores]) -> list[dict[str, Any]]:
    if missing := [scores.folder for scores in side if scores.results is None]:
        raise Incomparable(f"{missing[0]} has no results.jsonl")
    return [line for scores in side for line in scores.results or []]


def _words(difference: Difference) -> str:
    low, high = difference.interval
    verdict = "significant" if difference.significant else "not significant"
    return f"overall {difference.value:+.3f} [{low:+.3f}, {high:+.3f}], {verdict}"


def all_tables(groups: Sequence[RunGroup]) -> dict[str, list[Table]]:
    """All tables, by section."""
    return {
        "What differs": [settings_table(groups)],
        "Scores": [*geneval_tables(groups), *score_tables(groups)],
        "Stages": stage_tables(groups),
    }


# --- settings ---


def settings_table(groups: Sequence[RunGroup]) -> Table:
    """Every field of the configs, code, machine and data that is not the same in all runs.

    Stages of the same name are compared; a field that differs in all of them alike has one row.
    """
    runs = [run for run in all_runs(groups) if run.config]
    title = "Settings that differ"
    if len(runs) < 2:
        return Table(title, [], ["Fewer than two runs have a config."], words=True)
    rows = []
    stages = [[name for name in run.settings if name != SHARED] for run in runs]
    if any(names != stages[0] for names in stages):
        rows.append(text_row("stages", groups, lambda run: ", ".join(filter(None, run.settings)) or None))
    common = [name for name in stages[0] if all(name in names for names in stages)] or [SHARED]
    fields = {stage: differing([run.settings[stage] for run in runs]) for stage in common}
    for name in sorted(union(fields.values())):
        if all(run.settings[stage].get(name) == run.settings[common[0]].get(name) for run in runs for stage in common):
            rows.append(text_row(name, groups, _setting(common[0], name)))
        else:
            its = [stage for stage in common if name in fields[stage]]
            rows += [text_row(f"{stage}: {name}", groups, _setting(stage, name)) for stage in its]
    for name in differing([run.about for run in runs]):
        rows.append(text_row(f"environment: {name}", groups, _about(name)))
    none = "None: the runs differ in neither settings nor code, machine and data."
    return Table(title, rows, [] if rows else [none], words=True)


def _setting(stage: str, name: str) -> Callable[[Run], str | None]:
    return lambda run: format_setting(run.settings.get(stage, {}), name)


def _about(name: str) -> Callable[[Run], str | None]:
    return lambda run: format_setting(run.about, name)


# --- stages ---


def stage_tables(groups: Sequence[RunGroup]) -> list[Table]:
    """What each stage cost and reached."""
    return [_stage_table(groups, name) for name in union(run.stages for run in all_runs(groups))]


def _stage_table(groups: Sequence[RunGroup], name: str) -> Table:
    found = [run.stages[name] for run in all_runs(groups) if name in run.stages]

    def row(label: str, get: Callable[[Stage], float | None], form: str, unit: str = "") -> Row:
        return number_row(label, groups, lambda run: get(run.stages[name]) if name in run.stages else None, form, unit)

    def words(label: str, get: Callable[[Stage], str | None]) -> Row:
        return text_row(label, groups, lambda run: get(run.stages[name]) if name in run.stages else None)

    second, unit = _time_unit(max(stage.seconds for stage in found))
    bands = sorted({key for stage in found for line in stage.of("validation") for key in line if "_t" in key})
    terms = union((key for key in stage.last if re.fullmatch("loss_[a-z]+", key)) for stage in found)
    rows = [
        words("steps", lambda stage: f"{stage.last['step']:,} of {stage.last['total_steps']:,}"),
        row("images seen", lambda stage: stage.images, ",.0f"),
        row("wall time", lambda stage: stage.seconds / second, ",.1f", unit),
        row("images/s, median", _of(np.median, "train", "images_per_s"), ",.1f"),
        row("MFU, median", _of(lambda values: 100 * np.median(values), "train", "mfu"), ".1f", " %"),
        row("memory, peak", _of(np.max, "train", "memory_gib"), ".2f", " GiB"),
        row("skipped updates", lambda stage: stage.last.get("skipped_updates"), ",.0f"),
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
    """One number for a stage's values of a metric, or None if it was never finite."""

    def get(stage: Stage) -> float | None:
        series = stage.series(kind, metric)
        return None if series is None else float(reduce(series[1]))

    return get


def _first(values: np.ndarray) -> float:
    return float(values[0])


def _last(values: np.ndarray) -> float:
    return float(values[-1])


def _at_the_end(values: np.ndarray) -> float:
    """The mean of the last tenth, since single steps are noisy."""
    return float(values[-max(1, len(values) // 10) :].mean())


def _best_step(stage: Stage) -> str | None:
    series = stage.series("validation", "loss")
    return None if series is None else f"{series[0][series[1].argmin()] - stage.start:,.0f}"


def _band(metric: str) -> str:
    return metric.removeprefix("loss_t").replace("-", "–")


def _time_unit(longest: float) -> tuple[float, str]:
    """The unit for a row of times, in seconds, and its name."""
    if longest >= 7200:
        return 3600.0, " h"
    return (60.0, " min") if longest >= 600 else (1.0, " s")
