"""An exponential moving average of the weights: fp32, sharded like the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from t2i.engine.engine import Shards
from t2i.engine.optimizer import ZerosLike


class Ema:
    """`average <- decay average + (1 - decay) weight`, over this rank's slices.

    Call `update` after applied updates only. `zeros_like` says where the average lies.
    """

    def __init__(self, shards: Shards, decay: float, zeros_like: ZerosLike = torch.zeros_like) -> None:
        self.decay = decay
        self.shards = shards
        self.values: dict[str, Tensor] = {name: zeros_like(shard.value) for name, shard in shards.items()}
        self.reset()

    def update(self) -> None:
        """Take in the weights as they are now."""
        torch._foreach_lerp_(list(self.values.values()), [s.value for s in self.shards.values()], 1.0 - self.decay)

    def reset(self) -> None:
        """Start again from the weights as they are now."""
        for name, shard in self.shards.items():
            self.values[name].copy_(shard.value)
