"""The pixel pathway of PixelDiT: the order of pixels, and what its ablations have in common with what they change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_weights import randomise

from t2i.config.model import PixelConfig
from t2i.models.layers import rope_table
from t2i.models.pixel_pathway import (
    ROPE_EXTENT,
    PixelPathway,
    from_pixels_of_patches,
    parts_rope_table,
    to_pixels_of_patches,
)

WIDTH, HEADS, PATCH = 32, 2, 4


def pathway(pixel: dict[str, Any], patch: int = PATCH) -> PixelPathway:
    """All weights random and of a size at which every part matters."""
    config = PixelConfig(depth=2, width=8, **pixel)
    pixels = PixelPathway(
        width=WIDTH,
        depth=config.depth,
        patch_size=patch,
        pixel_width=config.width,
        attention=(WIDTH, HEADS) if config.attention else None,
        cut=config.cut,
        modulation=config.modulation,
        post_modulation=config.post_modulation,
    )
    torch.manual_seed(0)
    randomise(pixels)
    return pixels


# The order of pixels


@pytest.mark.parametrize("cut", [(1, 1), (1, 2), (2, 2), (4, 4), (2, 1)])
def test_pixels_come_back_to_their_places(cut: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 12, 20)
    pixels = to_pixels_of_patches(x, 4, cut)
    assert pixels.shape == (2, 15, 16, 3)
    assert torch.equal(from_pixels_of_patches(pixels, 4, cut, 12, 20), x)


def test_a_patch_is_unfolds_and_a_part_is_a_rectangle_of_it() -> None:
    x = torch.randn(2, 3, 12, 20)
    unfolded = F.unfold(x, 4, stride=4).unflatten(1, (3, 16)).permute(0, 3, 2, 1)
    assert torch.equal(to_pixels_of_patches(x, 4, (1, 1)), unfolded)
    parts = to_pixels_of_patches(x, 4, (1, 2)).unflatten(2, (2, 8))
    row, column = 8, 4  # of the patch in the last row, second column
    expected = x[:, :, row : row + 4, column + 2 : column + 4].permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(parts[:, 11, 1], expected)


@pytest.mark.parametrize(("down", "across"), [(1, 1), (1, 2), (2, 2), (4, 2)])
def test_a_part_turns_by_its_place_among_all_parts(down: int, across: int) -> None:
    device = torch.device("cpu")
    tables = zip(
        parts_rope_table(3, 5, down, across, 16, device),
        rope_table(3 * down, 5 * across, 16, device, ROPE_EXTENT),
        strict=True,
    )
    for parts, grid in tables:
        for row in range(3 * down):
            for column in range(5 * across):
                patch, inside = (row // down) * 5 + column // across, (row % down) * across + column % across
                assert torch.equal(parts[patch * down * across + inside], grid[row * 5 * across + column])


# Switches


@pytest.mark.parametrize("modulation", ["patch", "additive"])
@pytest.mark.parametrize(("tokens", "patch"), [(4, 2), (16, 1)])
def test_a_patch_of_several_tokens_is_as_many_small_patches(modulation: str, tokens: int, patch: int) -> None:
    """Where all pixels of a patch are told the same, they might as well be of patches that are told the same."""
    whole, small = (
        pathway({"tokens_per_patch": tokens, "modulation": modulation}),
        pathway({"modulation": modulation}, patch),
    )
    small.load_state_dict(whole.state_dict())
    x, patches = torch.randn(2, 3, 12, 20), torch.randn(2, 15, WIDTH)
    side = PATCH // patch
    of_small = patches.reshape(2, 3, 5, WIDTH).repeat_interleave(side, 1).repeat_interleave(side, 2).flatten(1, 2)
    torch.testing.assert_close(whole(x, patches), small(x, of_small), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("more", [{}, {"post_modulation": True}, {"attention": False}, {"tokens_per_patch": 4}])
def test_pixels_that_are_told_the_same_are_told_by_the_patch(more: dict[str, Any]) -> None:
    patchwise, pixelwise = pathway({"modulation": "patch", **more}), pathway(more)
    state = patchwise.state_dict()
    for name in [name for name in state if ".adaln." in name]:
        state[name] = torch.cat([state[name]] * PATCH**2)
    pixelwise.load_state_dict(state)
    x, patches = torch.randn(2, 3, 12, 20), torch.randn(2, 15, WIDTH)
    torch.testing.assert_close(patchwise(x, patches), pixelwise(x, patches), atol=1e-5, rtol=1e-5)


def test_without_attention_is_as_if_it_returned_nothing() -> None:
    without, with_it = pathway({"attention": False}), pathway({})
    missing, unexpected = with_it.load_state_dict(without.state_dict(), strict=False)
    assert missing and not unexpected
    x, patches = torch.randn(2, 3, 12, 20), torch.randn(2, 15, WIDTH)
    assert (with_it(x, patches) - without(x, patches)).abs().max() > 0.1
    for block in with_it.blocks:
        torch.nn.init.zeros_(block.expand.weight)
        torch.nn.init.zeros_(block.expand.bias)
    torch.testing.assert_close(with_it(x, patches), without(x, patches))


@pytest.mark.parametrize(
    ("pixel", "sees"), [({}, True), ({"modulation": "additive"}, True), ({"attention": False}, False)]
)
def test_attention_alone_takes_pixels_to_other_patches(pixel: dict[str, Any], sees: bool) -> None:
    pixels, x, patches = pathway(pixel), torch.randn(1, 3, 12, 12, requires_grad=True), torch.randn(1, 9, WIDTH)
    (gradient,) = torch.autograd.grad(pixels(x, patches)[:, :, :4, :4].square().sum(), x)
    assert gradient[:, :, :4, :4].abs().min() > 0
    far = gradient[:, :, 4:, 4:].abs()
    assert (far.min() > 0) if sees else (far.max() == 0)
