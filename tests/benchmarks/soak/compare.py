"""Differences between a run that was killed and one that was not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import metrics

from data.loader import Batch
from soak.runs import LAST, STEPS, Run
from t2i.config.loading import stage_config
from t2i.distributed import World
from t2i.engine.checkpoint import Checkpoint
from t2i.train.data import Opened, open_data

TOLERANCE = 1e-5


class Stream:
    """What a loader yields that nobody stops: ids and data state of every step of every stage."""

    def __init__(self, run: Run) -> None:
        opened: Opened = {}
        self._names = [place.name for place in run.places]
        self._settings = [stage_config(run.config, stage) for stage in range(len(self._names))]
        self._data = [open_data(stage, name, opened) for stage, name in zip(self._settings, self._names, strict=True)]
        whole = [self._read(stage, None, STEPS) for stage in range(len(self._names))]
        self._ids = [[batch.ids for batch in batches] for batches in whole]
        self._states = [[json.loads(json.dumps(batch.state)) for batch in batches] for batches in whole]

    def _read(self, stage: int, state: dict[str, Any] | None, count: int) -> list[Batch]:
        world = World(0, 1, torch.device("cpu"))
        with self._data[stage].loader(self._settings[stage], self._names[stage], world, state) as loader:
            return [next(loader) for _ in range(count)]

    def check(
        self, name: str, stage: int, first: int, state: dict[str, Any] | None, last: int
    ) -> Iterator[tuple[str, str]]:
        """What differs of the run `name`: its data state after step `first`, and the ids from there to step `last`."""
        where = f"{name}, stage {self._names[stage]}, step {first}"
        if first and state != self._states[stage][first - 1]:
            yield "data state", where
        found = [batch.ids for batch in self._read(stage, state, max(0, last - first))]
        if found != self._ids[stage][first : first + len(found)]:
            yield "ids", f"{where} to {last}"


def numbers(run: Run) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """Lines of metrics.jsonl by stage, kind and step, of which one is due; none of saves, and not what a step cost."""
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for line in metrics(run.config.directory):
        if line["kind"] != "checkpoint":
            found.setdefault((line["stage"], line["kind"], line["step"]), []).append(line)
    return found


def is_close(a: float | None, b: float | None) -> bool:
    """Whether two losses are equal, as far as another order of sums leaves them so; None is NaN."""
    return a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=TOLERANCE))


def tensors(run: Run) -> dict[str, torch.Tensor]:
    """Everything in the models and the last checkpoints, by file and name, as bytes."""
    found = {}
    for place in run.places:
        files = [*place.model.glob("*.safetensors"), *(place.checkpoints / LAST).glob("*.safetensors")]
        for path in files:
            for name, tensor in load_file(path).items():
                found[f"{path.relative_to(run.config.directory)}:{name}"] = tensor.flatten().view(torch.uint8)
    return found


def differing_lines(run: Run, expected: Run, exact: bool) -> Iterator[tuple[str, str]]:
    """Differences between the metrics of two finished runs: any at all, or losses by more than TOLERANCE."""
    ours, theirs = numbers(run), numbers(expected)
    for place in sorted(ours.keys() | theirs.keys()):
        where = f"{run.config.name}, {' '.join(map(str, place))}"
        if len(ours.get(place, ())) != len(theirs.get(place, ())):
            yield "metrics", f"{where}: {len(ours.get(place, ()))} lines"
            continue
        for our, their in zip(ours[place], theirs[place], strict=True):
            for name in sorted(our.keys() | their.keys()):
                is_loss, found, value = name.startswith("loss"), our.get(name), their.get(name)
                if found != value if exact else is_loss and not is_close(found, value):
                    yield "losses" if is_loss else "metrics", f"{where}: {name} {found} instead of {value}"


def differing_files(run: Run, expected: Run) -> Iterator[tuple[str, str]]:
    """Differences in any bit between the models and the last checkpoints of two finished runs."""
    ours, theirs = tensors(run), tensors(expected)
    assert any("ema.safetensors" in name for name in theirs) and any("rank_00001" in name for name in theirs)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name]):
            yield "weights", f"{run.config.name}, {name}"
    for our, their in zip(run.places, expected.places, strict=True):
        states = [Checkpoint(place.checkpoints / LAST).state for place in (our, their)]
        for name in sorted(states[0].keys() | states[1].keys()):
            if name != "config" and states[0].get(name) != states[1].get(name):
                yield "state", f"{run.config.name}, stage {our.name}: {name}"


def compare(run: Run, expected: Run, exact: bool) -> Iterator[tuple[str, str]]:
    """What differs between two finished runs, and where: any bit, or losses by more than TOLERANCE."""
    yield from differing_lines(run, expected, exact)
    if exact:
        yield from differing_files(run, expected)
