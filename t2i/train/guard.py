"""The spike guard: which updates are skipped, and what follows when there are too many.

- Every rank is given the same numbers and decides alike: a `Guard` communicates with nobody and reads no clock.
- A value is compared with the median and the median absolute deviation of the values of applied updates. Skipped or
  non-finite values never count, so one NaN costs one step, and a spike does not hide the next one. Medians follow a
  trend, and the deviation grows with it: a loss that falls or rises steadily is no spike.
- Too many skipped updates mean that the weights are damaged, or that the data has changed for good. A rollback then
  leaves out a range of batches, from some before the first skipped update to the last one. Leaving out the skipped
  updates alone would change nothing, since they never reached the weights (PaLM, Chowdhery et al. 2022, section 5.1,
  leaves out 200 to 500 batches from before and during a spike).
- The range does not depend on the checkpoint that the run goes back to, and all state is in the checkpoint: a run that
  was killed decides as one that was not.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from data.errors import UserError, first_of
from data.loader import Batch
from t2i.config.train import SpikeGuardConfig
from t2i.distributed import World
from t2i.train.metrics import EventLog, JsonLines
from t2i.train.step import StepOutput


def is_finite(output: StepOutput) -> bool:
    """Whether loss and gradient norm are finite."""
    return math.isfinite(output.means["loss"]) and math.isfinite(output.result.grad_norm)


def explain(
    output: StepOutput, repeat: Callable[[], StepOutput] | None, world: World, log: Callable[[str], None]
) -> None:
    """Log which loss terms and parameters are not finite in a step, and whether they are without compilation.

    A collective. `repeat` makes the same step again and skips its update; None if nothing is compiled.
    """
    terms = ", ".join(name for name, value in output.means.items() if not math.isfinite(value))
    causes = [f"the gradient norm is {output.result.grad_norm}"]
    if terms:
        causes.append(f"not finite in the loss: {terms}")
    if parameters := {name: None for part in world.gather(list(output.result.not_finite)) for name in part}:
        causes.append(f"not finite in the gradient: {first_of(parameters)}")
    log(f"the first update of this start is not finite; {'; '.join(causes)}")
    if repeat is None:
        return
    log("repeating it without compilation")
    with torch.compiler.set_stance("force_eager"):
        eager = repeat()
    if is_finite(eager):
        log(
            f"without compilation it is finite (loss {eager.means['loss']:.4g}, gradient norm "
            f"{eager.result.grad_norm:.4g}): the compiled blocks compute something else on this machine, train with "
            "--engine.compile false"
        )
    else:
        log("without compilation it is not finite either: the compiler is not at fault")


# The smallest deviations: below them, harmless steps of a run with little noise would be taken for spikes.
LOSS_FLOOR = 0.02
"""Smallest deviation of the loss, as a fraction of its median."""
LOG_NORM_FLOOR = 0.3
"""Smallest deviation of the gradient norm's natural logarithm."""
_TINY = 1e-6


@dataclass(frozen=True)
class Rollback:
    """Go back to a checkpoint from before step `first`, and leave out the batches `first` to `last`."""

    first: int
    last: int
    reason: str


@dataclass(frozen=True)
class Stop:
    """Save, and end the run."""

    reason: str


class GuardError(UserError):
    """The run was saved and stopped: too many updates were skipped, and a rollback does not help."""


def robust_z(value: float, history: Sequence[float], floor: float) -> float:
    """How far `value` lies above the median of `history`, in deviations; negative below it.

    A deviation is 1.4826 median absolute deviations (the standard deviation of a normal distribution), or `floor` if
    that is more.
    """
    middle = median(history)
    deviation = 1.4826 * median([abs(other - middle) for other in history])
    return (value - middle) / max(deviation, floor)


def log_norm(grad_norm: float) -> float:
    """The natural logarithm of a gradient norm; finite for 0 too."""
    return math.log(max(grad_norm, _TINY))


def reason_to_skip(
    loss: float, grad_norm: float, losses: Sequence[float], log_norms: Sequence[float], config: SpikeGuardConfig
) -> str | None:
    """Why an update should be skipped, given the history of applied updates; None if it should be applied."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            return f"the {name} is {value}"
    if not config.threshold or len(losses) < config.min_history:
        return None
    usual = median(losses)
    z = robust_z(loss, losses, max(LOSS_FLOOR * abs(usual), _TINY))
    if z > config.threshold:
        return f"the loss {loss:.4g} is {z:.1f} deviations above its median {usual:.4g}"
    z = robust_z(log_norm(grad_norm), log_norms, LOG_NORM_FLOOR)
    if z > config.threshold:
        usual = math.exp(median(log_norms))
        return (
            f"the gradient norm {grad_norm:.4g} is {z:.1f} deviations (of its logarithm) above its median {usual:.4g}"
        )
    return None


class Guard:
    """The guard of one stage. Steps are counted from 1.

    For each step: `skip_batch`; if that says no, `skip_update` between the norm and the update, and `record` after it.
    """

    def __init__(self, config: SpikeGuardConfig) -> None:
        self.config = config
        self.events = 0
        """Number of events so far."""
        self._reached = 0  # the last step ever recorded: after a rollback, what was noted is not noted again
        self._skipped_ranges: list[tuple[int, int]] = []  # left out by rollbacks
        self._new_events: list[dict[str, Any]] = []
        self._load_statistics(None)

    def _load_statistics(self, state: dict[str, Any] | None) -> None:
        self._losses: deque[float] = deque(state["losses"] if state else (), self.config.window)
        self._log_norms: deque[float] = deque(state["log_norms"] if state else (), self.config.window)
        self._skipped_steps: list[int] = list(state["skipped_steps"]) if state else []  # of the last skip_window

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state in JSON's types: two numbers for each step of `window`, and a few more."""
        return {
            "losses": list(self._losses),
            "log_norms": list(self._log_norms),
            "skipped_steps": list(self._skipped_steps),
            "skipped_ranges": [list(skipped) for skipped in self._skipped_ranges],
            "reached": self._reached,
            "events": self.events,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.events, self._reached = state["events"], state["reached"]
        self._skipped_ranges = [(first, last) for first, last in state["skipped_ranges"]]
        self._load_statistics(state)

    def skip_batch(self, step: int) -> bool:
        """Whether the batch of `step` is consumed without training on it, because of an earlier rollback."""
        found = [first <= step <= last for first, last in self._skipped_ranges]
        if found and found[-1]:  # those of earlier rollbacks have been noted
            self._note("skipped_batch", step, "left out by a rollback")
        return any(found)

    def skip_update(self, loss: float, grad_norm: float) -> str | None:
        """Why this step's update should be skipped, or None. Does not change the guard.

        `loss` is the mean over the global batch, `grad_norm` global and before clipping.
        """
        return reason_to_skip(loss, grad_norm, self._losses, self._log_norms, self.config)

    def record(self, step: int, loss: float, grad_norm: float, skip_reason: str | None) -> Rollback | Stop | None:
        """Record a step after its update; returns what must happen before the next step.

        `skip_reason` says why the guard or the engine skipped the update, or is None.
        """
        repeated, self._reached = step <= self._reached, max(step, self._reached)
        if skip_reason is None:
            assert math.isfinite(loss) and math.isfinite(grad_norm)
            self._losses.append(loss)
            self._log_norms.append(log_norm(grad_norm))
            return None
        self._skipped_steps = [*self._recent(step), step]
        if not repeated:
            self._note("skipped_update", step, skip_reason, loss=loss, grad_norm=grad_norm)
        if len(self._skipped_steps) <= self.config.max_skips:
            return None
        decision = self._too_many()
        self._note("rollback" if isinstance(decision, Rollback) else "stop", step, decision.reason)
        return decision

    def _recent(self, step: int) -> list[int]:
        return [other for other in self._skipped_steps if other > step - self.config.skip_window]

    def _too_many(self) -> Rollback | Stop:
        config, first, last = self.config, self._skipped_steps[0], self._skipped_steps[-1]
        reason = f"{len(self._skipped_steps)} updates of steps {first} to {last} were skipped"
        for begin, end in self._skipped_ranges:
            if begin <= last and first <= end + config.skip_window:
                return Stop(
                    f"{reason}, and to leave out the batches of steps {begin} to {end} did not help: see "
                    "skipped.jsonl; lower optimizer.lr, or raise spike_guard.threshold if the data is like that"
                )
        if len(self._skipped_ranges) >= config.max_rollbacks:
            return Stop(f"{reason}, and spike_guard.max_rollbacks is {config.max_rollbacks}: see skipped.jsonl")
        begin = max(1, first - config.rollback_margin)
        return Rollback(begin, last, f"{reason}: going back, to leave out the batches of steps {begin} to {last}")

    def rollback(self, rollback: Rollback, state: dict[str, Any] | None) -> None:
        """Go back to the statistics of an earlier checkpoint's `state` (None: the stage's start), and skip the range.

        Ranges, events and the last step reached are kept.
        """
        self._skipped_ranges.append((rollback.first, rollback.last))
        self._load_statistics(state)

    def needed_before(self, step: int) -> int:
        """The earliest step that a rollback after `step` may start at.

        Of the checkpoints from before it the newest must be kept, and so must all later ones.
        """
        first = min([*self._recent(step + 1), step + 1])
        return max(1, first - self.config.rollback_margin)

    def _note(self, kind: str, step: int, reason: str, **values: float) -> None:
        self.events += 1
        self._new_events.append({"event": self.events, "kind": kind, "step": step, "reason": reason, **values})

    def take_events(self) -> list[dict[str, Any]]:
        """Events since the last call, the same on every rank: lines for `SkippedFile`."""
        new, self._new_events = self._new_events, []
        return new


def ids_of(batch: Batch, world: World) -> list[str]:
    """The ids of the global batch in the order of its slots, on every rank. A collective."""
    parts = world.gather(list(zip(batch.slots.tolist(), batch.ids, strict=True)))
    return [name for _, name in sorted(pair for part in parts for pair in part)]


class SkippedFile:
    """skipped.jsonl of a run: one line for each event of the guard, with the ids of its batch. On rank 0 alone.

    Lines are numbered within a stage. A rollback keeps them; lines after `events`, the number of events in the
    checkpoint that the stage resumes from, are removed and come again.
    """

    def __init__(self, directory: Path, stage: str, events: int) -> None:
        self._file = JsonLines(directory / "skipped.jsonl")
        self._stage = stage
        self._events = EventLog(directory, stage)
        if self._file.path.exists():  # also removes a torn last line
            with self._events.tolerate_disk_errors("skipped.jsonl"):
                self._file.keep(lambda line: line["stage"] != stage or line["event"] <= events)

    def write(self, events: list[dict[str, Any]], ids: list[str]) -> None:
        """Append events of one step, with the ids of its global batch."""
        with self._events.tolerate_disk_errors("skipped.jsonl"):
            for event in events:
                of_batch = {"ids": ids} if event["kind"] in ("skipped_update", "skipped_batch") else {}
                self._file.write({"stage": self._stage, **event, **of_batch})
