"""What the trainer may ask of an engine, whichever library shards the state behind it.

All engines compute the same numbers within rounding. Masters, moments and gradients are fp32, gradients are summed
over micro-steps and ranks in fp32, the global gradient norm is known before weights move, and an update that is
vetoed or not finite reaches neither weights nor moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from t2i.engine.shards import Shards


class StepResult(NamedTuple):
    """Outcome of one optimizer step."""

    grad_norm: float
    """Global, before clipping."""
    vetoed: str | None
    """Why the update was not applied; None: it was."""
    not_finite: Sequence[str] = ()
    """Where the norm is not finite: the parameters whose gradient, as far as this rank holds it, is not either."""


def not_finite(gradients: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those that are not finite."""
    return [name for name, gradient in gradients if not gradient.isfinite().all()]


class Engine(Protocol):
    """A trained network, sharded over the ranks."""

    network: nn.Module
    """Called for the forward pass of a micro-step."""
    shards: Shards
    """What this rank holds of each parameter: fp32 masters and moments, as views of the engine's memory."""
    updates: int
    """Updates applied to the moments: AdamW's bias correction counts with it. May be set."""

    def micro_step(self, loss: Tensor) -> None:
        """The one backward of a micro-step: `loss` is the scalar sum of everything that is minimised.

        Gradients are averaged over micro-steps and ranks.

        Raises:
            RuntimeError: `network` was not called since the last backward, or the optimizer step has all its
                micro-steps already: a second backward would lose or double gradients.
        """

    def step(self, lr: Callable[[bool], float], veto: Callable[[float], str | None]) -> StepResult:
        """Apply the accumulated gradient, unless it is not finite or vetoed.

        Args:
            lr: learning rate of a group; the argument says whether it is Muon's.
            veto: sees the global gradient norm before weights move; a reason stops the update.
        """

    def refresh(self) -> None:
        """Bring the network's weights up to date after the masters (`shards`) were written to."""

    def close(self) -> None:
        """Release hooks and memory, so that the next stage can build its own engine."""


class MicroSteps:
    """Counts the micro-steps of an optimizer step, and refuses a backward that would lose or double gradients."""

    def __init__(self, network: nn.Module, accumulation: int) -> None:
        self._accumulation = accumulation
        self._done = 0
        self._forward_seen = False
        network.register_forward_hook(self._see_forward)

    def _see_forward(self, *_: Any) -> None:
        self._forward_seen = True

    def begin_backward(self) -> None:
        """Enter one backward."""
        if not self._forward_seen:
            raise RuntimeError("a second backward in one micro-step would lose gradients: sum the losses")
        if self._done == self._accumulation:
            raise RuntimeError(f"the optimizer step has its {self._accumulation} micro-steps already: call step")
        self._forward_seen = False
        self._done += 1

    @property
    def complete(self) -> bool:
        """Whether the optimizer step has all its micro-steps."""
        return self._done == self._accumulation

    def finish(self) -> None:
        """End the optimizer step."""
        if not self.complete:
            raise RuntimeError(f"step after {self._done} of {self._accumulation} micro-steps")
        self._done = 0
