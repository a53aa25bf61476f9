"""Scores side by side: those taken while training, and those of GenEval with what may be said of their differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from evaluation.compare.cells import Row, Table, all_members, measured, told, union, worded
from evaluation.compare.paired import CannotSay, Difference, over_seeds, paired_bootstrap
from evaluation.compare.read import Column, Member, Scores
from evaluation.compare.settings import Flat, differing, flatten
from t2i.train.run_folder import NO_SCORES, Stage

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
    except CannotSay as reason:
        return {}, [f"{name}: whether the difference is more than chance cannot be said: {reason}"]
    said = [f"{name}: {_words(paired.overall)} (paired bootstrap over {paired.prompts} prompts)"]
    over_runs = {}
    for row in (_OVERALL, *paired.tasks):
        with suppress(CannotSay):
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
        raise CannotSay(f"they were not judged alike ({', '.join(names)})")


def _results(side: Sequence[Scores]) -> list[dict[str, Any]]:
    if missing := [it.folder for it in side if it.results is None]:
        raise CannotSay(f"{missing[0]} has no results.jsonl")
    return [line for it in side for line in it.results or []]


def _words(difference: Difference) -> str:
    low, high = difference.interval
    verdict = "significant" if difference.significant else "not significant"
    return f"overall {difference.value:+.3f} [{low:+.3f}, {high:+.3f}], {verdict}"
