"""Dropout masks: a pure function, of the right rate, without a pattern along any axis."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from t2i.models.layers import derive, dropout, keep_mask


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**62, (n,), generator=torch.Generator().manual_seed(seed))


def mix(x: int) -> int:
    """The hash's mixer in Python's own integers."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x5BD1E995)):
        x = (x ^ (x >> shift)) * factor % 2**31
    return x ^ (x >> 16)


def test_a_mask_is_the_hash_of_key_token_and_channel() -> None:
    key, rate = keys(3), 0.3
    mask = keep_mask(key, 4, 5, rate)
    for sample, token, channel in np.ndindex(3, 4, 5):
        low, high = int(key[sample]) % 2**31, int(key[sample]) >> 31
        first = mix(low ^ token)
        second = mix(high ^ first)
        assert mask[sample, token, channel] == (mix(mix(first ^ channel) ^ second) >= rate * 2**31)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_rate_is_right_along_every_axis(rate: float) -> None:
    dropped = (~keep_mask(keys(64), 128, 96, rate)).double()
    assert dropped.mean().item() == pytest.approx(rate, abs=5 * (rate * (1 - rate) / dropped.numel()) ** 0.5)
    for axis in range(3):
        means = dropped.mean(dim=[other for other in range(3) if other != axis])
        spread = (rate * (1 - rate) * len(means) / dropped.numel()) ** 0.5
        assert means.std().item() == pytest.approx(spread, rel=0.5)
        assert (means - rate).abs().max() < 5 * spread


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_neighbours_are_independent(axis: int) -> None:
    """Of neighbouring keys, tokens and channels the product of deviations has mean zero."""
    first = 0x123456789ABCDEF
    key = derive(torch.arange(first, first + 64), 3)
    deviation = (~keep_mask(key, 128, 96, 0.5)).double() - 0.5
    for lag in (1, 2, 16):
        n = deviation.shape[axis] - lag
        product = deviation.narrow(axis, 0, n) * deviation.narrow(axis, lag, n)
        assert abs(product.mean().item()) < 5 * 0.25 / product.numel() ** 0.5


def test_derived_keys_are_keys_and_differ() -> None:
    derived = torch.stack([derive(keys(1000), number) for number in range(28)]).flatten()
    assert derived.unique().numel() == 28_000 and derived.min() >= 0 and derived.max() < 2**62
    # Both halves of a key matter, and either alone makes another mask.
    key = keys(1)
    masks = [keep_mask(derive(k, 0), 8, 64, 0.5) for k in (key, key ^ 1, key ^ (1 << 40))]
    for other in masks[1:]:
        assert 0.3 < (masks[0] ^ other).double().mean() < 0.7


def test_values_are_dropped_or_scaled() -> None:
    x, key = torch.randn(2, 6, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1)), keys(2)
    out = dropout(x, key, 0.5)
    assert out.dtype == x.dtype
    assert torch.equal(out, torch.where(keep_mask(key, 6, 8, 0.5), 2 * x, torch.zeros_like(x)))
    assert torch.equal(dropout(x, key, 0.0), x)
    x[0] = torch.inf  # what is dropped is zero, not 0 x inf
    assert not dropout(x, key, 0.5).isnan().any()


def test_compiled_code_makes_the_same_masks() -> None:
    key, compiled = keys(5), torch.compile(keep_mask, fullgraph=True)
    assert torch.equal(compiled(derive(key, 7), 30, 40, 0.4), keep_mask(derive(key, 7), 30, 40, 0.4))
