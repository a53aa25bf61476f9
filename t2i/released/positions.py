"""The position table in PixelGen's checkpoints, which our networks compute: it is compared, not taken over."""

from __future__ import annotations

import math

import torch

from t2i.config_base import ConfigError
from t2i.models.layers import sincos_table
from t2i.released.checkpoint import Checkpoint
from t2i.released.names import LIGHTNING, POSITIONS

# The average of a constant drifts by rounding, up to half a unit in the last place / (1 - decay), which is 3e-4 near 1,
# and bf16 is off by 2e-3. Another table would differ by about 1.
_TOLERANCE = 5e-3


def trained_resolution(checkpoint: Checkpoint, patch_size: int) -> int | None:
    """Side in pixels of the images that a checkpoint was trained on, by its position table; None without one, as of
    PixelDiT."""
    for prefix in LIGHTNING.denoiser.values():
        stored = checkpoint.weights.get(prefix + POSITIONS)
        if stored is not None and len(stored.size) == 3:
            return math.isqrt(stored.size[1]) * patch_size
    return None


def compare_positions(checkpoint: Checkpoint, name: str, width: int) -> str:
    """See that the table stored under `name` is the one that our network computes, and say so.

    Raises:
        ConfigError: it is not.
    """
    size = list(checkpoint.weights[name].size)
    side = math.isqrt(size[1]) if len(size) == 3 else 0
    if size != [1, side * side, width]:
        raise ConfigError(f"{checkpoint.path}: {name} is {size}: it should be [1, a square number, {width}]")
    computed = sincos_table(side, side, width, torch.device("cpu"))
    difference = (checkpoint.tensor(name)[0].float() - computed).abs().max().item()
    if not difference <= _TOLERANCE:
        raise ConfigError(
            f"{checkpoint.path}: {name} is not the table of sines and cosines that this network adds: it differs by "
            f"{difference:.2g}"
        )
    return f"a table for {side} x {side} patches; computed for any grid, it differs by {difference}"
