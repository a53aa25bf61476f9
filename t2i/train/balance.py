"""Gradient balancing: the perceptual terms pull at the head as hard as flow matching does (PixelGen, appendix A.2).

Every so many steps the norms of both gradients at the head's weight are measured, over the global batch, and their
ratio enters a moving average that multiplies the perceptual terms from the next step on. A measurement costs two small
matrix products: see `t2i/diffusion/balance.py`.

It differs from the public code where that is at odds with itself: the ratio is of the global batch, not of each rank's
last micro-batch, so that all ranks share one weight; the weight is in the checkpoint; a vetoed update leaves it alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from t2i.build import Denoiser
from t2i.config import RunConfig
from t2i.diffusion.balance import head_gradients, norm_ratio, smoothed
from t2i.diffusion.objective import Watch
from t2i.engine.shards import all_reduce_sum
from t2i.models.layers import patchify
from t2i.models.pixelgen import PixelGen
from t2i.models.pixelgen_class import ClassPixelGen


class GradientBalance:
    """The multiplier of the perceptual terms in one stage. All ranks take part.

    A step is `begin`, the micro-steps, then `finish`.

    Args:
        config: of the stage, with `objective.balance_from_step`.
        head: the denoiser's last layer, a linear one from tokens (B, N, D) to the values of their patches. Copies of
            the network are to be made before: they would report here too.
    """

    def __init__(self, config: RunConfig, head: nn.Module) -> None:
        self._objective, self._patch_size = config.objective, config.model.patch_size
        self._micro_batches = config.train.batch_size // config.train.micro_batch_size
        self.weight = 1.0
        self._measuring = False
        self._tokens: Tensor | None = None  # what went into the head last
        self._sum: Tensor | None = None  # both gradients at the head's weight (2, P, D)
        head.register_forward_pre_hook(self._see)

    @property
    def state(self) -> dict[str, Any]:
        """A copy of everything that outlives a step."""
        return {"weight": self.weight}

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on from what `state` was at a checkpoint."""
        self.weight = state["weight"]

    def _see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._measuring:
            self._tokens = inputs[0].detach()

    def begin(self, step: int) -> Watch | None:
        """What the objective is to show the step's gradients to, if they are measured.

        Args:
            step: steps before this one.
        """
        start = self._objective.balance_from_step
        assert start is not None
        self._measuring = step >= start and step % self._objective.balance_every == 0
        return self._add if self._measuring else None

    def _add(self, flow: Tensor, perceptual: Tensor) -> None:
        assert self._tokens is not None, "the head has not run"
        found = head_gradients(self._tokens, patchify(flow, self._patch_size), patchify(perceptual, self._patch_size))
        self._sum = found if self._sum is None else self._sum + found
        self._tokens = None

    def finish(self, applied: bool) -> None:
        """End the step; a measurement counts unless its update was vetoed."""
        if not self._measuring:
            return
        assert self._sum is not None
        flow, perceptual = all_reduce_sum(self._sum) / self._micro_batches
        self._measuring, self._sum = False, None
        ratio = norm_ratio(flow, perceptual, self._objective.balance_max)
        if applied and ratio is not None:
            self.weight = smoothed(self.weight, ratio, self._objective.balance_smoothing)


def build_balance(config: RunConfig, denoiser: Denoiser) -> GradientBalance | None:
    """The stage's balancing, where its config asks for it."""
    if config.objective.balance_from_step is None:
        return None
    assert isinstance(denoiser, PixelGen | ClassPixelGen)  # the config says so
    return GradientBalance(config, denoiser.head)
