"""Scores side by side: those taken while training, and those of GenEval with what may be said of their differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from evaluation.compare.cells import Row, Table, all_members, measured, told, union, worded
from evaluation.compare.paired import CannotSay, Difference, Paired, over_seeds, paired_bootstrap
from evaluation.compare.read import Column, Member, Scores
from evaluation.compare.settings import differing, flatten
from t2i.train.run_folder import Stage

Pick = Callable[[Member], Scores | None]

_NO_SCORE = ("kind", "stage", "step", "time")  # of a line of metrics
_OUTCOMES = ("overall", "overall_interval", "tasks", "correct_images", "correct_prompts")  # of a summary
_SEEDS_NOTE = (
    "A paired interval speaks of these weights, over prompts; another seed of the same recipe may differ by more."
)


# --- while training ---


def score_tables(columns: Sequence[Column]) -> list[Table]:
    """Each stage's newest scores in metrics.jsonl, and its best overall one."""
    stages = union(member.stages for member in all_members(columns))
    found = [_score_table(columns, stage) for stage in stages]
    return [table for table in found if table is not None]


def _score_table(columns: Sequence[Column], name: str) -> Table | None:
    def newest(member: Member) -> dict[str, Any]:
        lines = member.stages[name].of("score") if name in member.stages else []
        return lines[-1] if lines else {}

    def value(score: str) -> Callable[[Member], float | None]:
        return lambda it: newest(it).get(score)

    scores = union((key for key in newest(it) if key not in _NO_SCORE) for it in all_members(columns))
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
        return [_geneval_table(columns, "GenEval", lambda it: next(iter(it.scores.values()), None))]
    return [_geneval_table(columns, f"GenEval, {folder}", _of_folder(folder)) for folder in union(scored)]


def _of_folder(folder: str) -> Pick:
    return lambda it: it.scores.get(folder)


def _geneval_table(columns: Sequence[Column], title: str, pick: Pick) -> Table:
    found = [scores for member in all_members(columns) if (scores := pick(member)) is not None]
    tasks = union(scores.summary["tasks"] for scores in found)
    rows = {"overall": _score_row(columns, "overall", pick, _overall)}
    rows |= {task: _score_row(columns, "  " + task.replace("_", " "), pick, _task(task)) for task in tasks}
    notes = []
    for number, column in enumerate(columns[1:], 1):
        paired, said = _judge(columns[0], column, pick)
        notes += said
        differences = {"overall": paired.overall} | paired.tasks if paired else {}
        for name in [name for name, it in differences.items() if it.significant and name in rows]:
            row = rows[name]
            row.cells[number] = replace(row.cells[number], significant=True)
    if any(cell.significant for row in rows.values() for cell in row.cells):
        notes.append("* the paired 95 % interval of the difference leaves out 0.")
    if any(set(scores.summary["tasks"]) != set(tasks) for scores in found):
        notes.append("The overall scores are means of different tasks: they cannot be compared.")
    images = measured("images", columns, lambda it: _images(pick(it)), ",.0f")
    return Table(title, [*rows.values(), images, *_how(columns, pick)], notes)


def _overall(scores: Scores) -> tuple[float | None, list[float] | None]:
    return scores.summary.get("overall"), scores.summary.get("overall_interval")


def _task(name: str) -> Callable[[Scores], tuple[float | None, list[float] | None]]:
    def get(scores: Scores) -> tuple[float | None, list[float] | None]:
        task = scores.summary["tasks"].get(name, {})
        return task.get("score"), task.get("interval")

    return get


def _score_row(
    columns: Sequence[Column], label: str, pick: Pick, get: Callable[[Scores], tuple[float | None, list[float] | None]]
) -> Row:
    """A score, with its interval where the column is one run."""

    def score(member: Member) -> float | None:
        scores = pick(member)
        return None if scores is None else get(scores)[0]

    row = measured(label, columns, score, ".3f", points=True)
    for number, column in enumerate(columns):
        scores = pick(column.members[0])
        interval = get(scores)[1] if scores is not None and len(column.members) == 1 else None
        if interval:
            cell = row.cells[number]
            row.cells[number] = replace(cell, text=f"{cell.text} [{interval[0]:.3f}, {interval[1]:.3f}]")
    return row


def _images(scores: Scores | None) -> float | None:
    counts = [] if scores is None else [task.get("images") for task in scores.summary["tasks"].values()]
    return sum(counts) if counts and None not in counts else None


def _how(columns: Sequence[Column], pick: Pick) -> list[Row]:
    """What else differs in the summaries: how the pictures were drawn and judged."""

    def flat(member: Member) -> dict[str, Any]:
        scores = pick(member)
        return {} if scores is None else flatten({k: v for k, v in scores.summary.items() if k not in _OUTCOMES})

    found = [flat(member) for member in all_members(columns) if pick(member) is not None]

    def setting(name: str) -> Callable[[Member], str | None]:
        return lambda it: worded(flat(it), name)

    return [told(f"  {name}", columns, setting(name)) for name in differing(found)]


# --- what may be said of a difference ---


def _judge(first: Column, other: Column, pick: Pick) -> tuple[Paired | None, list[str]]:
    """The paired differences, if there are any, and sentences about them."""
    if not any(pick(it) for it in first.members) or not any(pick(it) for it in other.members):
        return None, []
    name = f"{other.name} less {first.name}"
    said, paired = [], None
    try:
        paired = paired_bootstrap(_results(first, pick), _results(other, pick))
        said.append(f"{name}: {_words(paired.overall)} (paired bootstrap over {paired.prompts} prompts)")
    except CannotSay as reason:
        said.append(f"{name}: whether the difference is more than chance over prompts cannot be said: {reason}")
    scores = [
        [s.overall for it in side.members if (s := pick(it)) and s.overall is not None] for side in (first, other)
    ]
    try:
        runs = f"{len(scores[0])} and {len(scores[1])}"
        said.append(f"{name}: {_words(over_seeds(*scores))} (Welch's t over {runs} training runs)")
    except CannotSay:
        said += [_SEEDS_NOTE] if paired else []
    return paired, said


def _results(column: Column, pick: Pick) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for member in column.members:
        scores = pick(member)
        if scores is None or scores.results is None:
            where = member.path if scores is None else scores.folder
            raise CannotSay(f"{where} has no results.jsonl")
        lines += scores.results
    return lines


def _words(difference: Difference) -> str:
    low, high = difference.interval
    verdict = "significant" if difference.significant else "not significant"
    return f"overall {difference.value:+.3f} [{low:+.3f}, {high:+.3f}], {verdict}"
