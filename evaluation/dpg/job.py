"""The steps of scoring a model on DPG-Bench, shared out over the processes: draw, look the grids over, judge, sum up.

All processes see one folder. What is in it is whole: pictures and a prompt's answers are written aside and renamed, so
a job that is killed goes on at the next picture or prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import atomic_write
from data.progress import followed
from evaluation.dpg import rules
from evaluation.dpg.judge import PICTURES, Answers, Drawing, Judge, crops, examine, find
from evaluation.dpg.rules import Benchmark, Item
from evaluation.sampling_job import draw_together, write_json
from t2i.distributed import World
from t2i.pipeline import Pipeline


def draw(
    world: World, pipeline: Pipeline, drawing: Drawing, fingerprint: dict[str, Any], beside: dict[str, Any]
) -> None:
    """Draw what is missing, and put it together."""

    def begin() -> tuple[list[Sequence[tuple[Item, int]]], list[Item]]:
        drawing.begin(fingerprint, beside)
        return drawing.missing(), drawing.unfinished()

    missing, unfinished = world.broadcast_from_rank0(begin)
    draw_together(world, drawing.out, missing, lambda mine, drawn: drawing.draw(pipeline, mine, drawn))
    drawing.assemble(unfinished[world.rank :: world.size])
    world.barrier()
    if world.is_rank0:
        drawing.end()


@dataclass(frozen=True)
class Examined:
    """Grids that can be scored.

    Attributes:
        items: their prompts.
        grids: the images, by the prompts' ids.
        sha256: of each image's file.
        resolution: side of one picture in pixels.
        pictures: how many of a grid are scored.
        dropped: in parity, what falls out of the mean, and why.
    """

    items: list[Item]
    grids: dict[str, Path]
    sha256: dict[str, str]
    resolution: int
    pictures: int
    dropped: dict[str, str]

    def hashes(self, benchmark: Benchmark) -> dict[str, str]:
        """Of all that is asked about: the table, and the grids with the resolution at which they are cut."""
        grids = json.dumps([self.resolution, *sorted(self.sha256.items())])
        return {
            "table_sha256": benchmark.table_sha256,
            "grids_sha256": hashlib.sha256(grids.encode()).hexdigest(),
        }


def look_over(
    world: World, benchmark: Benchmark, folder: Path, resolution: int, pictures: int, parity: bool = False
) -> Examined:
    """See that every prompt has a grid that can be scored.

    Raises:
        UserError: one has not, or there are images of no prompt; in parity that falls out, unless nothing is left.
    """
    grids, items, dropped = world.broadcast_from_rank0(lambda: _match(benchmark, folder, parity))
    mine: list[tuple[str, str, str]] = []
    for item in items[world.rank :: world.size]:
        try:
            mine.append((item.id, examine(grids[item.id], resolution, pictures), ""))
        except UserError as error:
            mine.append((item.id, "", str(error)))
    seen = sorted(one for part in world.gather(mine) for one in part)
    faults = {name: fault for name, _, fault in seen if fault}
    if faults and not parity:
        raise UserError(next(iter(faults.values())))
    dropped |= faults
    items = [item for item in items if item.id not in faults]
    if not items:
        raise UserError(f"{folder} has no grid that can be scored: {next(iter(dropped.values()))}")
    sha256 = {name: digest for name, digest, fault in seen if not fault}
    return Examined(items, {item.id: grids[item.id] for item in items}, sha256, resolution, pictures, dropped)


def _match(benchmark: Benchmark, folder: Path, parity: bool) -> tuple[dict[str, Path], list[Item], dict[str, str]]:
    names = {item.id for item in benchmark.items}
    grids = find(folder, names)
    missing, strange = sorted(names - set(grids)), sorted(set(grids) - names)
    if missing and not parity:
        raise UserError(
            f"{folder} has no image for {len(missing)} of {len(names)} prompts, such as {missing[0]}.png: draw them all"
        )
    if strange and not parity:
        raise UserError(f"{folder} holds {grids[strange[0]].name}, but there is no prompts/{strange[0]}.txt: remove it")
    dropped = dict.fromkeys(missing, "there is no image") | dict.fromkeys(strange, "there is no such prompt")
    items = []
    for item in benchmark.items:
        if item.id in grids:
            try:
                rules.zeroing_order(item, parity)
                items.append(item)
            except UserError as error:
                dropped[item.id] = str(error)
    return grids, items, dropped


def ask(world: World, judge: Judge, examined: Examined, out: Path) -> Answers:
    """Have a judge answer all questions; on every process, all answers.

    What it has answered lies in `answers/`, and is not asked again about the same pictures.
    """
    folder = out / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    mine = examined.items[world.rank :: world.size]
    for item in followed(mine, len(mine), "prompt", "asking", shown=world.is_rank0):
        asked = _asked(judge, examined, item)
        path = folder / f"{item.id}.json"
        if path.exists() and json.loads(path.read_text())["asked"] == asked:
            continue
        pictures = crops(examined.grids[item.id], examined.resolution, examined.pictures)
        answers = [[judge.answer(picture, it.text) for it in item.questions] for picture in pictures]
        write_json(path, {"asked": asked, "answers": answers})
    world.barrier()

    def read(item: Item) -> list[dict[int, str]]:
        answers = json.loads((folder / f"{item.id}.json").read_text())["answers"]
        numbers = [question.number for question in item.questions]
        return [dict(zip(numbers, answered, strict=True)) for answered in answers]

    return {item.id: read(item) for item in examined.items}


def _asked(judge: Judge, examined: Examined, item: Item) -> dict[str, Any]:
    """All that a prompt's answers depend on."""
    return {
        "judge": judge.weights_blake2b,
        "grid_sha256": examined.sha256[item.id],
        "resolution": examined.resolution,
        "pictures": examined.pictures,
        "questions": [question.text for question in item.questions],
    }


def sum_up(
    out: Path, benchmark: Benchmark, examined: Examined, judge: Mapping[str, str], answers: Answers, parity: bool,
    drawn_with: Mapping[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """Score the answers, and write `results.jsonl` and `summary.json`.

    Args:
        judge: its name and what else is known of it.
        drawn_with: how the grids were drawn; none: by others.

    Returns:
        The summary.
    """
    results = [rules.score(item, answers[item.id], parity) for item in examined.items]
    table = rules.summarise(results, parity)
    summary = {
        "name": rules.title(judge["name"], table["prompts"], len(benchmark.items), benchmark.prompts_sha256),
        **table,
        "pictures_per_prompt": examined.pictures,
        "resolution": examined.resolution,
        "judge": dict(judge),
        "parity": parity,
        "dropped": examined.dropped,
        **examined.hashes(benchmark),
        "prompts_sha256": benchmark.prompts_sha256,
        "drawn_with": drawn_with,
    }
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "results.jsonl", (f"{json.dumps(result)}\n".encode() for result in results))
    write_json(out / "summary.json", summary)
    return summary


def table(summary: Mapping[str, Any]) -> str:
    """A summary to read."""

    def line(name: str, cell: Mapping[str, Any]) -> str:
        low, high = cell["interval"]
        return f"{name:<34}{cell['score']:7.2f}  [{low:.2f}, {high:.2f}]  {cell['questions']:7d}"

    low, high = summary["interval"]
    told = summary["answers"]
    how = f"{summary['pictures_per_prompt']} of {PICTURES} pictures a prompt"
    if summary["parity"]:
        how += ", counted as the official code does: categories before zeroing, on the last picture alone"
    dropped: Sequence[str] = [f"not counted: {name}: {reason}" for name, reason in summary["dropped"].items()]
    return "\n".join(
        [
            f"{summary['name']}: {summary['total']:.2f} [{low:.2f}, {high:.2f}]",
            how,
            f"answers: {told['yes']} yes, {told['no']} no, {told['other']} neither, which count as no",
            *dropped,
            f"{'category':<34}  score  [95 % interval]  answers",
            *(line(name, cell) for name, cell in summary["broad"].items()),
            *(line(f"  {name}", cell) for name, cell in summary["detailed"].items()),
        ]
    )
