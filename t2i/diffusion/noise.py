"""Gaussian noise that belongs to a slot: a function of a key and a number, whatever the batch around it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from data.randomness import hash_u64


def slot_noise(key: int, slots: ArrayLike, shape: Sequence[int], device: torch.device, scale: float = 1.0) -> Tensor:
    """Normal fp32 noise (len(slots), *shape) of standard deviation `scale`; the same slot gives the same noise on one
    kind of device."""
    generator = torch.Generator(device)
    seeds = hash_u64(key, slots).tolist()
    drawn = [torch.randn(*shape, generator=generator.manual_seed(seed), device=device) for seed in seeds]
    return scale * torch.stack(drawn)
