"""A stage's checkpoints: when they are due, whether the stage is saved, and how far back it may go.

All ranks take part in every call; rank 0's observer hears what the writing threads have to say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from data.errors import StoreError
from t2i.config import RunConfig
from t2i.engine.checkpoint import CheckpointError, CheckpointWriter, Mirror, newest_anywhere
from t2i.engine.mapped import StateFolder
from t2i.engine.shards import Shards
from t2i.train.guard import Guard, Rollback, Stop
from t2i.train.observe import Observer
from t2i.train.places import StagePlace
from t2i.train.processes import World
from t2i.train.start import mirror_of
from t2i.train.watch import Watch

CLOSE_PATIENCE_S = 30.0
MIRROR_PATIENCE_S = 3600.0
"""At the end of a stage the mirror may still be copying its last checkpoint."""
MIRROR_ROUND_S = 0.5

State = Callable[[], dict[str, Any]]
"""Makes the trainer's part of a checkpoint, in JSON's terms. A collective."""


def build_mirror(config: RunConfig, place: StagePlace, world: World) -> Mirror | None:
    """What copies a stage's checkpoints to `checkpoint.mirror`; rank 0 alone has one."""
    saving = config.checkpoint
    store = mirror_of(config, place) if world.is_main else None
    return Mirror(store, keep=saving.keep, keep_every=saving.keep_every) if store is not None else None


class Saver:
    """Saves one stage.

    Args:
        config: the stage's settings.
        place: where its checkpoints are.
        world: this process.
        watch: told that this rank gets on.
        attempt: a word that all ranks share and no other start of the stage does.
        mirror: rank 0's copier, if any.
        shards: this rank's slices of weights and moments.
        average: its slices of the average.
        guard: says which checkpoints a rollback may ask for.
        loaded_step: the step that need not be saved, since the stage was loaded there; -1: none.
    """

    def __init__(
        self,
        config: RunConfig,
        place: StagePlace,
        world: World,
        watch: Watch,
        attempt: str,
        mirror: Mirror | None,
        shards: Shards,
        average: Mapping[str, Tensor],
        guard: Guard,
        loaded_step: int,
    ) -> None:
        self.mirror = mirror
        self._saving = config.checkpoint
        self._place, self._world, self._watch = place, world, watch
        self._open_mirror = lambda: mirror_of(config, place)
        self._shards, self._average, self._guard = shards, average, guard
        self._loaded_step, self._begun_step = loaded_step, -1
        self._writer = CheckpointWriter(
            place.checkpoints,
            rank=world.rank,
            world_size=world.size,
            attempt=attempt,
            keep=self._saving.keep,
            keep_every=self._saving.keep_every,
            mirror=mirror,
            gather=world.gather,
            state_folder=StateFolder(folder) if (folder := config.engine.state_folder) else None,
        )
        self._writer.reserve(shards, average)

    def when_due(self, step: int, state: State, observer: Observer, *, last: bool) -> None:
        """Begin a regular checkpoint, or an ephemeral one between them; the `last` of a stage is never skipped."""
        saving = self._saving
        if last or step % saving.every == 0:
            self._begin(step, state, observer, may_skip=not last)
        elif saving.ephemeral_every and step % saving.ephemeral_every == 0:
            self._begin(step, state, observer, may_skip=True, ephemeral=True)
        self._tell(observer)

    def now(self, step: int, state: State, observer: Observer) -> str:
        """See that a checkpoint of where the stage stands is there when this returns; say in words whether it is."""
        if step == self._loaded_step:
            return "saved" if step else "nothing to save"
        for _ in range(2):
            if self._begun_step != step:
                self._begin(step, state, observer)
            if self.wait(observer) == step:
                return "saved"
            self._begun_step = -1  # a fault that may have passed
        return "NOT saved (events.log says why)"

    def _begin(
        self, step: int, state: State, observer: Observer, *, may_skip: bool = False, ephemeral: bool = False
    ) -> None:
        self._watch.alive(f"the checkpoint of step {step}")
        saving = self._writer.save(
            step,
            self._shards,
            self._average,
            state(),
            may_skip=may_skip,
            ephemeral=ephemeral,
            needed_before=self._guard.needed_before(step),
        )
        if saving.begun:
            self._begun_step = step
        costs = {"stall_s": saving.stall_s, "skipped_checkpoints": self._writer.skipped}
        observer.write("checkpoint", step, costs)

    def wait(self, observer: Observer) -> int | None:
        """Wait for the checkpoint under way; return the step of the last one that was committed."""
        self._watch.alive(f"the checkpoint of step {self._begun_step}")
        committed = self._writer.wait()
        self._tell(observer)
        return committed

    def await_mirror(self, leave: Callable[[], str | None]) -> None:
        """Let the mirror have the stage's last checkpoint, within bounds, unless a rank is asked to leave."""
        deadline = time.monotonic() + MIRROR_PATIENCE_S
        while True:
            waits = self._writer.mirroring and time.monotonic() < deadline
            waiting, leaving = self._world.sum([waits, leave() is not None])
            if leaving or not waiting:
                return
            self._watch.alive("waiting for the mirror")
            time.sleep(MIRROR_ROUND_S)

    def leads_back(self, rollback: Rollback) -> Rollback | Stop:
        """See that there is a checkpoint to go back to, or the stage's start, before later ones are given up."""
        if rollback.first <= (self._saving.ephemeral_every or self._saving.every):
            return rollback
        try:
            found, _ = self._world.from_main(
                lambda: newest_anywhere(self._place.checkpoints, self._open_mirror(), rollback.first)
            )
        except (CheckpointError, StoreError):
            found = None
        lost = f"{rollback.reason}, but no good checkpoint from before step {rollback.first} is left"
        return rollback if found is not None else Stop(lost)

    def go_back(self, rollback: Rollback, observer: Observer) -> None:
        """Take away the checkpoints from `rollback.first` on."""
        self._watch.alive("going back")
        self._writer.discard_after(rollback.first - 1)
        self._tell(observer)

    def _tell(self, observer: Observer) -> None:
        for event in self._writer.take_events():
            observer.event(event)

    def close(self) -> None:
        """Let a checkpoint under way be finished, within bounds."""
        self._writer.close(CLOSE_PATIENCE_S)
