"""The steps of a DPG-Bench job, which the processes share: generate grids, validate them, ask a judge, summarize.

All processes see one folder, whose files are whole or absent: a job that was killed resumes at the next batch of images
or prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import atomic_write, write_json
from data.progress import followed
from data.tables import format_table
from evaluation.dpg import rules
from evaluation.dpg.judge import IMAGES, Answers, Grids, Judge, check_grid, crops, find
from evaluation.dpg.rules import Benchmark, Item
from t2i.distributed import World
from t2i.pipeline import Pipeline


def generate(
    world: World, pipeline: Pipeline, grids: Grids, fingerprint: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
    """Generate what is missing, and put the grids together. The arguments are those of `Grids.job`."""
    grids.job(pipeline, fingerprint, metadata).run(world)
    unfinished = world.broadcast_from_rank0(grids.unfinished)
    grids.assemble(unfinished[world.rank :: world.size])
    world.barrier()
    if world.is_rank0:
        grids.remove_tiles()


@dataclass(frozen=True)
class Validated:
    """Grids that can be scored.

    Attributes:
        items: their prompts.
        grids: the files, by the prompts' ids.
        sha256: of each file.
        resolution: side of one image in pixels.
        images: how many of a grid are scored.
        dropped: in parity, the prompts that drop out of the mean, and why.
    """

    items: list[Item]
    grids: dict[str, Path]
    sha256: dict[str, str]
    resolution: int
    images: int
    dropped: dict[str, str]

    def hashes(self, benchmark: Benchmark) -> dict[str, str]:
        """Of all that is asked about: the table, and the grids with the resolution at which they are cut."""
        grids = json.dumps([self.resolution, *sorted(self.sha256.items())])
        return {
            "table_sha256": benchmark.table_sha256,
            "grids_sha256": hashlib.sha256(grids.encode()).hexdigest(),
        }


def validate(
    world: World, benchmark: Benchmark, folder: Path, resolution: int, images: int, parity: bool = False
) -> Validated:
    """Check that every prompt has a grid that can be scored.

    Raises:
        UserError: one has not, or a grid is of no prompt; in parity these drop out, unless nothing is left.
    """
    grids, items, dropped = world.broadcast_from_rank0(lambda: _match(benchmark, folder, parity))
    mine: list[tuple[str, str, str]] = []
    for item in items[world.rank :: world.size]:
        try:
            mine.append((item.id, check_grid(grids[item.id], resolution, images), ""))
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
    return Validated(items, {item.id: grids[item.id] for item in items}, sha256, resolution, images, dropped)


def _match(benchmark: Benchmark, folder: Path, parity: bool) -> tuple[dict[str, Path], list[Item], dict[str, str]]:
    names = {item.id for item in benchmark.items}
    grids = find(folder, names)
    missing, strange = sorted(names - set(grids)), sorted(set(grids) - names)
    if missing and not parity:
        raise UserError(
            f"{folder} lacks grids of {len(missing)} of {len(names)} prompts, such as {missing[0]}.png: give them all"
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


def ask(world: World, judge: Judge, valid: Validated, out: Path) -> Answers:
    """Have a judge answer all questions; on every process, all answers.

    Answers are kept in `answers/`, and not asked for again about the same images.
    """
    folder = out / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    mine = valid.items[world.rank :: world.size]
    for item in followed(mine, len(mine), "prompt", "asking", shown=world.is_rank0):
        asked = {
            "judge": judge.weights_blake2b,
            "grid_sha256": valid.sha256[item.id],
            "resolution": valid.resolution,
            "images": valid.images,
            "questions": [question.text for question in item.questions],
        }
        path = folder / f"{item.id}.json"
        if path.exists() and json.loads(path.read_text())["asked"] == asked:
            continue
        images = crops(valid.grids[item.id], valid.resolution, valid.images)
        answers = [[judge.answer(image, question.text) for question in item.questions] for image in images]
        write_json(path, {"asked": asked, "answers": answers})
    world.barrier()

    def read(item: Item) -> list[dict[int, str]]:
        answers = json.loads((folder / f"{item.id}.json").read_text())["answers"]
        numbers = [question.number for question in item.questions]
        return [dict(zip(numbers, answered, strict=True)) for answered in answers]

    return {item.id: read(item) for item in valid.items}


def summarize(
    out: Path, benchmark: Benchmark, valid: Validated, judge: Mapping[str, str], answers: Answers, parity: bool,
    generated_with: Mapping[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """Score the answers, write `results.jsonl` and `summary.json`, and return the summary.

    Args:
        judge: its name and what else is known of it.
        generated_with: how the grids were made, or None if by others.
    """
    results = [rules.score(item, answers[item.id], parity) for item in valid.items]
    scores = rules.summarize(results, parity)
    summary = {
        "name": rules.title(judge["name"], scores["prompts"], len(benchmark.items), benchmark.prompts_sha256),
        **scores,
        "images_per_prompt": valid.images,
        "resolution": valid.resolution,
        "judge": dict(judge),
        "parity": parity,
        "dropped": valid.dropped,
        **valid.hashes(benchmark),
        "prompts_sha256": benchmark.prompts_sha256,
        "generated_with": generated_with,
    }
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "results.jsonl", (f"{json.dumps(result)}\n".encode() for result in results))
    write_json(out / "summary.json", summary)
    return summary


def format_summary(summary: Mapping[str, Any]) -> str:
    """The scores as lines for a terminal."""

    def row(name: str, cell: Mapping[str, Any]) -> list[str]:
        low, high = cell["interval"]
        return [name, f"{cell['score']:.2f}", f"[{low:.2f}, {high:.2f}]", str(cell["questions"])]

    low, high = summary["interval"]
    answers = summary["answers"]
    how = f"{summary['images_per_prompt']} of {IMAGES} images a prompt"
    if summary["parity"]:
        how += ", counted as the official code does: categories before zeroing, on the last image alone"
    rows = [["category", "score", "[95 % interval]", "answers"]]
    rows += [row(name, cell) for name, cell in summary["broad"].items()]
    rows += [row(f"  {name}", cell) for name, cell in summary["detailed"].items()]
    return "\n".join(
        [
            f"{summary['name']}: {summary['total']:.2f} [{low:.2f}, {high:.2f}]",
            how,
            f"answers: {answers['yes']} yes, {answers['no']} no, {answers['other']} neither, which count as no",
            *(f"not counted: {name}: {reason}" for name, reason in summary["dropped"].items()),
            *format_table(rows),
        ]
    )
