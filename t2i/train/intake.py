"""Batches as the ranks agree on them: a global batch reaches every rank or none.

A rank that cannot get its share must not leave the others waiting in the next step's collectives. So each step
begins with one small sum over the ranks' hosts: who failed, how many samples were read, how many set aside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from data.errors import DataError, StoreError, UserError
from data.loader import Batch, Loader
from data.stream import SetAside
from t2i.config import RunConfig
from t2i.train.observe import JsonLines
from t2i.train.processes import World

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
        if world.is_main:
            self._quarantine.rewind(stage, step)
            for shard in damage if step == 0 else ():
                self._quarantine.write({"stage": stage, "step": 0, **asdict(shard)})
        self._pending: list[dict[str, Any]] = []
        self.state = loader.state()
        """This rank's data state after the last batch that every rank has."""

    def close(self) -> None:
        """End the loader's threads."""
        self._loader.close()

    def next(self, step: int) -> Batch:
        """Return this rank's share of the batch of `step`.

        Raises:
            UserError, StoreError: on every rank alike, where any rank has it, or past the share of bad samples.
        """
        batch: Batch | None = None
        fault: UserError | StoreError | None = None
        try:
            batch = next(self._loader)
        except (UserError, StoreError) as error:
            fault = error
        counters = self._loader.counters()
        set_aside = counters.get("set_aside", 0)
        read = sum(counters.values()) - set_aside  # set_aside counts again what is there by reasons
        failed, read, set_aside = self._world.sum([fault is not None, read, set_aside])
        if batch is not None:
            self._pending += [{"stage": self._stage, "step": step, **asdict(it)} for it in batch.set_aside]
        if failed:
            raise next(error for error in self._world.gather(fault) if error is not None)
        if read >= _JUDGED_AFTER and set_aside > self._max_set_aside * read:
            self.flush()
            raise DataError(self._world.from_main(lambda: self._too_bad(set_aside, read)))
        assert batch is not None
        self.state = batch.state
        return batch

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
                for line in pending:
                    self._quarantine.write(line)
        self._pending = []
        return dict(counters), dict(retries)

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
