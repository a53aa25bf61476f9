"""An exponential moving average of the weights: fp32, sharded like the optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from t2i.engine.engine import Shards
from t2i.engine.optimizer import ZerosLike


class Ema:
    """`ema <- decay ema + (1 - decay) param`, over this rank's slices (`params`, by name).

    Call `update` after applied updates only.
    """

    def __init__(self, shards: Shards, decay: float, zeros_like: ZerosLike = torch.zeros_like) -> None:
        self.decay = decay
        self.shards = shards
        self.params: dict[str, Tensor] = {name: zeros_like(shard.param) for name, shard in shards.items()}
        self.reset()

    def update(self) -> None:
        """Average in the current weights."""
        torch._foreach_lerp_(list(self.params.values()), [s.param for s in self.shards.values()], 1.0 - self.decay)

    def reset(self) -> None:
        """Restart from the current weights."""
        for name, shard in self.shards.items():
            self.params[name].copy_(shard.param)
