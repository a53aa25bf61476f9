"""Batches as the ranks agree on them: a global batch reaches every rank or none.

A rank that cannot get its share must not leave the others waiting in the next step's collectives. So each step
begins with one small sum over the ranks' hosts: who failed, who is asked to leave, who has no batch yet, how many
samples were read, how many set aside. While one has none, the sum is taken again and again: a lane that finds nothing
good is judged, too, and no patience with a store outlasts that of the process group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from data.errors import DataError, StoreError, UserError
from data.loader import Batch, Loader
from data.stream import SetAside
from t2i.config import RunConfig
from t2i.train.events import EventLog
from t2i.train.observe import JsonLines
from t2i.train.outcome import Departed
from t2i.train.processes import World

_ROUND_S = 5.0
"""A rank whose batch is not there says so this often, so that no rank waits for long in the sum."""
_JUDGED_AFTER = 1000
_WORST_NAMED = 3


class Intake:
    """One stage's batches on this rank, and what was passed over on the way to them.

    Args:
        loader: this rank's batches.
        world: this process.
        config: the stage's settings.
        stage: its name.
        step: batches consumed; lines of quarantine.jsonl past it are taken back.
        damage: what is known to be wrong with its shards.
    """

    def __init__(
        self, loader: Loader, world: World, config: RunConfig, stage: str, step: int, damage: Sequence[SetAside]
    ) -> None:
        self._loader, self._world, self._stage = loader, world, stage
        self._max_set_aside = config.data.max_set_aside
        self._quarantine = JsonLines(config.directory / "quarantine.jsonl")
        self._events = EventLog(config.directory, stage, world.is_main)
        if world.is_main:
            with self._events.beside("quarantine.jsonl"):
                self._quarantine.rewind(stage, step)
            self._write([{"stage": stage, "step": 0, **asdict(shard)} for shard in (damage if step == 0 else ())])
        self._damaged = len(damage)
        self._pending: list[dict[str, Any]] = []
        self.state = loader.state()
        """This rank's data state after the last batch that every rank has."""

    def close(self) -> None:
        """End the loader's threads."""
        self._loader.close()

    def next(self, step: int, leave: Callable[[], str | None] = lambda: None) -> Batch:
        """Return this rank's share of the batch of `step`.

        Args:
            leave: why this rank is asked to leave; None: it is not.

        Raises:
            Departed: on every rank: one was asked to leave.
            Exception: on every rank alike: what any rank met, or DataError past the share of bad samples.
        """
        batch: Batch | None = None
        fault: Exception | None = None
        while True:
            try:
                batch = batch or self._loader.take(_ROUND_S)
            except Exception as error:  # also what nobody thought of: the other ranks must hear of it
                fault = error
            reason = leave()
            failed, leaving, missing, read, set_aside = self._world.sum(
                [fault is not None, reason is not None, batch is None, *self._counts(batch)]
            )
            too_bad = read >= _JUDGED_AFTER and set_aside > self._max_set_aside * read
            if leaving and not failed:
                raise Departed(next(told for told in self._world.gather(reason) if told is not None))
            if not (failed or too_bad or missing):
                assert batch is not None
                self._note(step, batch.set_aside)
                self.state = batch.state
                return batch
            if failed or too_bad:
                break
        self._note(step, [*(batch.set_aside if batch is not None else ()), *self._loader.take_set_aside()])
        self.flush()
        if failed:
            self._raise_one(fault)
        raise DataError(self._world.from_main(lambda: self._too_bad(set_aside, read)))

    def _counts(self, batch: Batch | None) -> tuple[int, int]:
        """Samples read and set aside: up to this batch or, while it is looked for, so far."""
        counters = self._loader.counters() if batch is not None else self._loader.read_so_far()
        set_aside = counters.get("set_aside", 0)
        return sum(counters.values()) - set_aside, set_aside  # set_aside counts again what is there by reasons

    def _note(self, step: int, found: Sequence[SetAside]) -> None:
        self._pending += [{"stage": self._stage, "step": step, **asdict(it)} for it in found]

    def _raise_one(self, fault: Exception | None) -> NoReturn:
        """Raise this rank's fault, else the first other rank's."""
        told: Exception | None = fault
        if fault is not None and not isinstance(fault, UserError | StoreError):  # it may not pickle
            told = RuntimeError(f"rank {self._world.rank}: {type(fault).__name__}: {fault}")
        faults = self._world.gather(told)
        raise fault or next(it for it in faults if it is not None)

    def flush(self) -> tuple[dict[str, int], dict[str, int]]:
        """Write out what was set aside on all ranks; the counters and the retried requests over all ranks."""
        counters: Counter[str] = Counter()
        retries: Counter[str] = Counter()
        for counted, retried, pending in self._world.gather(
            (self._loader.counters(), self._loader.retries(), self._pending)
        ):
            counters.update(counted)
            retries.update(retried)
            if self._world.is_main:
                self._write(pending)
        self._pending = []
        if self._damaged:
            counters["damaged_shards"] = self._damaged
        return dict(counters), dict(retries)

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        with self._events.beside("quarantine.jsonl"):
            for line in lines:
                self._quarantine.write(line)

    def _too_bad(self, set_aside: int, read: int) -> str:
        shards = Counter(
            f"{line['source']}/{line['shard']}"
            for line in self._quarantine.lines()
            if line["stage"] == self._stage and line["reason"] != "damaged_tar"
        )
        worst = ", ".join(f"{name} ({count})" for name, count in shards.most_common(_WORST_NAMED))
        return (
            f"{set_aside} of {read} samples have bad content, over data.max_set_aside {self._max_set_aside:g}; "
            f"the worst shards: {worst}; {self._quarantine.path} lists them: mend them, or raise data.max_set_aside"
        )
