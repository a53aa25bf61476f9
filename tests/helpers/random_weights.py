"""Weights for comparing networks."""

from __future__ import annotations

import math

import torch


def randomise(module: torch.nn.Module) -> None:
    """Randomize all weights, large enough that every part affects the output; none stays at zero or one."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else 0.8 / math.sqrt(parameter.shape[-1]))
