"""Dropout whose masks are a function of the sample: the same for any micro-batch, rank, recomputation or compiler.

A mask is a hash of (key of the sample, layer, place in the layer, token, channel), on whatever device the activations
are. The key is 62 random bits that belong to a slot of the run. Nothing is drawn and nothing is kept, so activation
checkpointing computes the same mask again.

The hash works on 31 bits held in int64: products of two such numbers do not overflow, so that every device and
compiler agrees to the bit. It is not cryptographic; its rounds are those of an xor-shift-multiply mixer.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEY_BITS = 62
_BITS = 31
_LOW = (1 << _BITS) - 1


def _mix(x: Tensor) -> Tensor:
    """A bijection of the numbers below 2**31 that spreads every bit over all."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _LOW
    x = (x ^ (x >> 15)) * 0x5BD1E995 & _LOW
    return x ^ (x >> 16)


def derive(key_B: Tensor, number: int) -> Tensor:
    """Another key for each key (B,), int64 below 2**62: that of a layer, say."""
    low = _mix(_mix(key_B & _LOW) ^ number)
    high = _mix((key_B >> _BITS) ^ low)
    return (high << _BITS) | low


def keep_mask(key_B: Tensor, tokens: int, channels: int, rate: float) -> Tensor:
    """Which of (B, tokens, channels) are kept: each with probability 1 - `rate`, to within 2**-31.

    Args:
        key_B: random or derived; plain numbers in a row would share rows of their masks.
    """
    token = torch.arange(tokens, device=key_B.device)
    channel = torch.arange(channels, device=key_B.device)
    # Two numbers a row: of one alone, some of a step's millions of rows would be equal.
    first = _mix((key_B & _LOW)[:, None] ^ token)
    second = _mix((key_B >> _BITS)[:, None] ^ first)
    return _mix(_mix(first[..., None] ^ channel) ^ second[..., None]) >= round(rate * 2**_BITS)


def dropout(x_BND: Tensor, key_B: Tensor, rate: float) -> Tensor:
    """Set a share `rate` of the values to zero and scale the others so that the mean stays."""
    keep = keep_mask(key_B, x_BND.shape[1], x_BND.shape[2], rate)
    return torch.where(keep, x_BND * (1.0 / (1.0 - rate)), 0.0).to(x_BND.dtype)
