"""How strongly two losses pull at the head, the last linear layer, without a backward pass for each. Pure functions.

The head makes image patches y (B, N, P) of tokens h (B, N, D): y = h W' + b. The gradient of a loss at W (P, D) is
then the sum over tokens of dL/dy h', so h and the loss's gradient at the predicted image are all it takes; the rest of
the network, and its one backward pass, never hear of it.

Gradients add up over the micro-batches and ranks of a global batch. Their norms do not: sums come first.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to the norm that divides."""


def head_gradients(tokens_BND: Tensor, *patches_BNP: Tensor) -> Tensor:
    """Gradients (k, P, D) of k losses at the head's weight, fp32.

    Args:
        tokens_BND: what went into the head.
        patches_BNP: each loss's gradient at what came out of it. The order of the P values does not matter to norms.
    """
    at_patches = torch.cat([patches.float() for patches in patches_BNP], dim=-1).flatten(0, 1)
    return (at_patches.T @ tokens_BND.float().flatten(0, 1)).unflatten(0, (len(patches_BNP), -1))


def norm_ratio(numerator: Tensor, denominator: Tensor, most: float) -> float | None:
    """Ratio of the norms of two gradients, at most `most`; None where the second is zero: there is nothing to balance.

    Not finite where a gradient is not.
    """
    if not denominator.any():
        return None
    ratio = numerator.double().norm() / (denominator.double().norm() + EPSILON)
    return float(ratio.clamp(max=most))


def smoothed(weight: float, ratio: float, smoothing: float) -> float:
    """Exponential moving average: `smoothing` of the old weight and the rest of the new ratio."""
    return smoothing * weight + (1.0 - smoothing) * ratio
