"""Which updates are not applied, and what follows when there are too many.

- Every rank is told the same numbers and decides alike: a `Guard` talks to nobody, waits for no device, reads no clock.
- A value is measured against the median and the median absolute deviation of the values that were applied before.
  What was not applied, or is not finite, never counts: one NaN is one lost step, a spike does not hide the next.
- Medians follow a trend, and the deviation grows with it, so a loss or norm that falls or rises steadily is no spike.
- Too many in a row mean that the weights are at fault, or that the data has changed for good. A rollback then leaves
  out a stretch of batches, from some before the first bad update to the last. It must be a stretch: the bad updates
  never reached the weights, so without them alone a deterministic run would come to the same place (PaLM, Chowdhery
  et al. 2022, section 5.1, leaves out 200 to 500 batches from before and during a spike).
- The stretch does not depend on the checkpoint that the run goes back to, and all state is a few numbers in the
  checkpoint: a run that was killed, wherever, decides as one that was not.

A start's first update that is not finite: in which terms and parameters, and whether eager code agrees.
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

from data.errors import UserError
from data.loader import Batch
from t2i.config.train import SpikeGuardConfig
from t2i.distributed import World
from t2i.engine.engine import StepResult
from t2i.train.metrics import EventLog, JsonLines
from t2i.train.step import Trained

NAMED = 4
"""Parameters that a sentence names."""


def never(loss: float, grad_norm: float) -> str:
    """The veto of a step that is repeated to look at it."""
    return "repeated without compilation"


def is_finite(trained: Trained) -> bool:
    """Whether loss and gradient norm are."""
    return math.isfinite(trained.means["loss"]) and math.isfinite(trained.result.grad_norm)


def _parameters(result: StepResult, world: World) -> str:
    """The first parameters whose gradient is not finite on any rank, and how many more there are."""
    names = list(dict.fromkeys(name for part in world.gather(list(result.not_finite)) for name in part))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def explain(trained: Trained, repeat: Callable[[], Trained] | None, world: World, tell: Callable[[str], None]) -> None:
    """Say in which loss terms and parameters a step is not finite, and whether it is without compilation.

    All ranks take part: they know the same loss and norm, so each comes here, and repeats the step, or none does.

    Args:
        repeat: makes the same step again, with an update that is vetoed; None: nothing is compiled.
        tell: takes sentences.
    """
    terms = ", ".join(name for name, value in trained.means.items() if not math.isfinite(value))
    told = [f"the gradient norm is {trained.result.grad_norm}"]
    if terms:
        told.append(f"not finite in the loss: {terms}")
    if parameters := _parameters(trained.result, world):
        told.append(f"not finite in the gradient: {parameters}")
    tell(f"the first update of this start is not finite; {'; '.join(told)}")
    if repeat is None:
        return
    tell("repeating it without compilation")
    with torch.compiler.set_stance("force_eager"):
        eager = repeat()
    if is_finite(eager):
        tell(
            f"without compilation it is finite (loss {eager.means['loss']:.4g}, gradient norm "
            f"{eager.result.grad_norm:.4g}): the compiled blocks compute something else on this machine, train with "
            "--engine.compile false"
        )
    else:
        tell("without compilation it is not finite either: the compiler is not at fault")


# The least that counts as one deviation: below it, a run with little noise would take harmless steps for spikes.
LOSS_FLOOR = 0.02
"""As a share of the median loss."""
LOG_NORM_FLOOR = 0.3
"""Of the natural logarithm of the gradient norm."""
_TINY = 1e-6


@dataclass(frozen=True)
class Rollback:
    """The stage goes back to a checkpoint from before step `first`, and leaves out the batches `first` to `last`."""

    first: int
    last: int
    reason: str


@dataclass(frozen=True)
class Stop:
    """The run ends, saved."""

    reason: str


class GuardError(UserError):
    """The run was stopped, saved: too many updates were bad, and going back does not help."""


def robust_z(value: float, history: Sequence[float], floor: float) -> float:
    """How far `value` lies above the median of `history`, in deviations.

    A deviation is 1.4826 median absolute deviations (the standard deviation, where values are normal), at least
    `floor`. Below the median the result is negative.
    """
    middle = median(history)
    deviation = 1.4826 * median([abs(other - middle) for other in history])
    return (value - middle) / max(deviation, floor)


def log_norm(grad_norm: float) -> float:
    """What the statistics hold of a gradient norm; finite for 0 too."""
    return math.log(max(grad_norm, _TINY))


def why_not(
    loss: float, grad_norm: float, losses: Sequence[float], log_norms: Sequence[float], config: SpikeGuardConfig
) -> str | None:
    """Why an update is not to be applied, after those with `losses` and `log_norms`; None: it is."""
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

    A step is `skip`; or, where that says no, `veto` between the norm and the update, and `record` after it.

    Args:
        config: its settings.
        state: what `state` was at the checkpoint that the stage goes on from; None at the stage's start.
    """

    def __init__(self, config: SpikeGuardConfig, state: dict[str, Any] | None = None) -> None:
        self.config = config
        self.events: int = state["events"] if state else 0
        """How many events there have been."""
        # The last step ever judged: a rollback comes by it again, and what was noted is not noted twice.
        self._reached: int = state["reached"] if state else 0
        self._skipped = [(first, last) for first, last in state["skipped"]] if state else []  # by rollbacks
        self._new: list[dict[str, Any]] = []
        self._take_up(state)

    def _take_up(self, state: dict[str, Any] | None) -> None:
        self._losses: deque[float] = deque(state["losses"] if state else (), self.config.window)
        self._log_norms: deque[float] = deque(state["log_norms"] if state else (), self.config.window)
        self._vetoed: list[int] = list(state["vetoed"]) if state else []  # steps, those of the last skip_window

    @property
    def state(self) -> dict[str, Any]:
        """A copy of everything, in JSON's terms: two numbers for each step of `window`, and some."""
        return {
            "losses": list(self._losses),
            "log_norms": list(self._log_norms),
            "vetoed": list(self._vetoed),
            "skipped": [list(stretch) for stretch in self._skipped],
            "reached": self._reached,
            "events": self.events,
        }

    def skip(self, step: int) -> bool:
        """Whether the batch of `step` is consumed without training on it, because of an earlier rollback."""
        found = [first <= step <= last for first, last in self._skipped]
        if found and found[-1]:  # earlier ones have been noted
            self._note("skip", step, "left out by a rollback")
        return any(found)

    def veto(self, loss: float, grad_norm: float) -> str | None:
        """Why this step's update is not to be applied; None: it is. Changes nothing.

        Args:
            loss: mean over the global batch.
            grad_norm: global, before clipping.
        """
        return why_not(loss, grad_norm, self._losses, self._log_norms, self.config)

    def record(self, step: int, loss: float, grad_norm: float, vetoed: str | None) -> Rollback | Stop | None:
        """Take note of a step after its update.

        Args:
            vetoed: why the update was not applied, by `veto` or by the engine; None: it was.

        Returns:
            What must happen now, before the next step.
        """
        repeated, self._reached = step <= self._reached, max(step, self._reached)
        if vetoed is None:
            assert math.isfinite(loss) and math.isfinite(grad_norm)
            self._losses.append(loss)
            self._log_norms.append(log_norm(grad_norm))
            return None
        self._vetoed = [*self._recent(step), step]
        if not repeated:
            self._note("veto", step, vetoed, loss=loss, grad_norm=grad_norm)
        if len(self._vetoed) <= self.config.max_skips:
            return None
        decision = self._too_many()
        self._note("rollback" if isinstance(decision, Rollback) else "stop", step, decision.reason)
        return decision

    def _recent(self, step: int) -> list[int]:
        return [other for other in self._vetoed if other > step - self.config.skip_window]

    def _too_many(self) -> Rollback | Stop:
        config, first, last = self.config, self._vetoed[0], self._vetoed[-1]
        reason = f"{len(self._vetoed)} updates of steps {first} to {last} were vetoed"
        for begin, end in self._skipped:
            if begin <= last and first <= end + config.skip_window:
                return Stop(
                    f"{reason}, and to leave out the batches of steps {begin} to {end} did not help: see "
                    "skipped.jsonl; lower optimizer.lr, or raise spike_guard.threshold if the data is like that"
                )
        if len(self._skipped) >= config.max_rollbacks:
            return Stop(f"{reason}, and spike_guard.max_rollbacks is {config.max_rollbacks}: see skipped.jsonl")
        begin = max(1, first - config.rollback_margin)
        return Rollback(begin, last, f"{reason}: going back, to leave out the batches of steps {begin} to {last}")

    def roll_back(self, rollback: Rollback, state: dict[str, Any] | None) -> None:
        """Go back to the statistics of a checkpoint from before `rollback.first`; what is to be skipped stays known.

        Args:
            state: what `state` was at that checkpoint; None: at the stage's start.
        """
        self._skipped.append((rollback.first, rollback.last))
        self._take_up(state)

    def needed_before(self, step: int) -> int:
        """What retention must heed after `step`: of the checkpoints from before the step returned the newest must stay,
        and all after it, since a rollback now or later may ask for any of them."""
        first = min([*self._recent(step + 1), step + 1])
        return max(1, first - self.config.rollback_margin)

    def _note(self, kind: str, step: int, reason: str, **values: float) -> None:
        self.events += 1
        self._new.append({"event": self.events, "kind": kind, "step": step, "reason": reason, **values})

    def take_events(self) -> list[dict[str, Any]]:
        """What has happened since the last call, the same on every rank: lines for `SkippedFile`."""
        new, self._new = self._new, []
        return new


def ids_of(batch: Batch, world: World) -> list[str]:
    """The ids of the global batch in the order of its slots, on every rank. All ranks take part."""
    parts = world.gather(list(zip(batch.slots.tolist(), batch.ids, strict=True)))
    return [name for _, name in sorted(pair for part in parts for pair in part)]


class SkippedFile:
    """skipped.jsonl of a run: one line an event of the guard, with the ids of the batch that it concerns.

    Rank 0 alone has one. Lines are numbered through a stage, and rollbacks do not take them back; those that
    a killed run wrote after the checkpoint it goes on from are, and come again.

    Args:
        directory: the run's folder.
        stage: the stage's name.
        events: `Guard.events` as the stage goes on.
    """

    def __init__(self, directory: Path, stage: str, events: int) -> None:
        self._file = JsonLines(directory / "skipped.jsonl")
        self._stage = stage
        self._events = EventLog(directory, stage)
        if self._file.path.exists():  # a torn last line goes, too
            with self._events.beside("skipped.jsonl"):
                self._file.keep(lambda line: line["stage"] != stage or line["event"] <= events)

    def write(self, events: list[dict[str, Any]], ids: list[str]) -> None:
        """Append events of the step whose global batch has these ids."""
        with self._events.beside("skipped.jsonl"):
            for event in events:
                of_batch = {"ids": ids} if event["kind"] in ("veto", "skip") else {}
                self._file.write({"stage": self._stage, **event, **of_batch})
