"""Gradients at the head without a backward pass, and what becomes of their norms."""

from __future__ import annotations

import math

import pytest
import torch

from t2i.diffusion.objective import head_gradients, norm_ratio, smoothed


def test_head_gradients_are_those_of_autograd() -> None:
    """Through a head whose patches are put together to an image, and losses that mix all of it."""
    torch.manual_seed(0)
    tokens, head = torch.randn(3, 4, 7), torch.nn.Linear(7, 12)
    patches = head(tokens)
    image = patches.unflatten(1, (2, 2)).unflatten(-1, (3, 2, 2)).permute(0, 3, 1, 4, 2, 5).reshape(3, 3, 4, 4)
    losses = [image.square().mean(), (image.flip(0, 3) * image).sin().sum()]
    at_patches = [torch.autograd.grad(loss, patches, retain_graph=True)[0] for loss in losses]
    found = head_gradients(tokens, *at_patches)
    assert found.shape == (2, 12, 7)
    for loss, gradient in zip(losses, found, strict=True):
        torch.testing.assert_close(gradient, *torch.autograd.grad(loss, head.weight, retain_graph=True))
    halves = (
        head_gradients(tokens[:1], *(g[:1] for g in at_patches)),
        head_gradients(tokens[1:], *(g[1:] for g in at_patches)),
    )
    torch.testing.assert_close(sum(halves), found)
    assert head_gradients(tokens.bfloat16(), at_patches[0].bfloat16()).dtype == torch.float32


def test_norm_ratio() -> None:
    a, b = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    assert norm_ratio(a, b, 100.0) == pytest.approx(5 / 2.0001)
    assert norm_ratio(a, b, 2.0) == 2.0
    assert norm_ratio(0 * a, b, 2.0) == 0.0
    assert norm_ratio(a, 0 * b, 2.0) is None
    assert norm_ratio(a, 1e-9 * b, 2.0) == 2.0
    assert math.isnan(norm_ratio(a * math.nan, b, 2.0) or 0.0)


def test_smoothing_keeps_its_share_of_the_old() -> None:
    assert smoothed(1.0, 6.0, 0.8) == pytest.approx(2.0)
    weight = 1.0
    for _ in range(60):
        weight = smoothed(weight, 6.0, 0.8)
    assert weight == pytest.approx(6.0, abs=1e-4)
