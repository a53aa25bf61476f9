"""Means of the loss's terms over the samples of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from t2i.diffusion.objective import Terms
from t2i.engine.shards import all_reduce_sum
from t2i.upload import upload


class GlobalMeans:
    """Means of the named terms, by one sum over ranks; terms without a sample are left out. All ranks make it.

    They are on their way to the host once this is made, and waited for when they are read: a step waits for its device
    once, where it needs the gradient norm, which is later.

    Args:
        terms: this rank's.
        names: given, since a rank whose samples are all gated has no perceptual term.
        device: where the sums are.
    """

    def __init__(self, terms: Terms, names: Sequence[str], device: torch.device) -> None:
        self._names = names
        nothing = torch.zeros((), device=device)
        sums = torch.stack([terms.sums.get(name, nothing) for name in names]).double()
        counts = np.array([terms.counts.get(name, 0) for name in names], np.float64)
        table = all_reduce_sum(torch.stack([sums, upload(counts, device)]))
        self._arrived: torch.cuda.Event | None = None
        self._table: Tensor = table
        if device.type == "cuda":
            self._table = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            self._table.copy_(table, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> dict[str, float]:
        """The means by name."""
        if self._arrived is not None:
            self._arrived.synchronize()
        sums, counts = self._table.numpy()
        return {name: float(s / c) for name, s, c in zip(self._names, sums, counts, strict=True) if c > 0}
