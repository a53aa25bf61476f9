"""What differs between runs' settings, and what their stages cost and came to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from evaluation.compare.cells import Row, Table, all_members, measured, told, union, worded
from evaluation.compare.read import Column, Member
from evaluation.compare.scores import geneval_tables, score_tables
from evaluation.compare.settings import SHARED, differing
from t2i.train.run_folder import Stage


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
