"""Every kind of block, compiled, computes what it does eagerly: results and all gradients, at the real sizes.

Compiled code is another for every processor, so this is worth running on each (and on a GPU, where there is one).
Tokens and head widths are real, as code is made for them; models are narrow, but for the text block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2i.models.layers import Block, axial_rope_table, line_rope_table, rope_table
from t2i.models.pixel_pathway import ROPE_EXTENT, PixelBlock, parts_rope_table
from t2i.models.pixeldit import JointBlock, LastJointBlock
from t2i.models.pixelgen import ClassBlock

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TEXT, BATCH, CONTEXT = 128, 2, 32
GRIDS = [(16, 16), (32, 32), (13, 19)]
"""Patches of 256 px, 512 px and a bucket: one graph for the first size, one for all others."""


def noise(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE).requires_grad_()


def mask_of(before: int, after: int) -> Tensor:
    """Of the joined keys; the second caption has 20 tokens, the rest are pads."""
    mask = torch.ones(BATCH, before + TEXT + after, dtype=torch.bool, device=DEVICE)
    mask[1, before + 20 : before + TEXT] = False
    return mask


def text_to_image(dtype: torch.dtype, rows: int, columns: int, masked: bool) -> list[Any]:
    tokens, mask = rows * columns, mask_of(rows * columns, 0) if masked else None
    x, text = noise(dtype, BATCH, tokens, 640), noise(dtype, BATCH, TEXT, 640)
    return [x, noise(dtype, BATCH, 1, 640), rope_table(rows, columns, 64, DEVICE), text, mask]


def text_alone(dtype: torch.dtype, rows: int, columns: int) -> list[Any]:
    """Its mask is of the text itself, whose length is the one that varies."""
    length = TEXT if rows == 16 else rows + columns
    mask = torch.arange(length, device=DEVICE) < torch.tensor([[length], [20]], device=DEVICE)
    return [noise(dtype, BATCH, length, 128), noise(dtype, BATCH, 1, 128), None, None, mask]


def classes(dtype: torch.dtype, rows: int, columns: int) -> list[Any]:
    rope = axial_rope_table(rows, columns, 72, CONTEXT, DEVICE)
    x = noise(dtype, BATCH, CONTEXT + rows * columns, 144)
    return [x, noise(dtype, BATCH, 1, 144), rope]  # of dropout: test_dropout.py


def patches(dtype: torch.dtype, rows: int, columns: int) -> list[Any]:
    rope = rope_table(rows, columns, 72, DEVICE, ROPE_EXTENT)
    return [noise(dtype, BATCH, rows * columns, 144), noise(dtype, BATCH, 1, 144), rope]


def joint(dtype: torch.dtype, rows: int, columns: int) -> list[Any]:
    x, text, given = (noise(dtype, BATCH, n, 128) for n in (rows * columns, TEXT, 1))
    rope, text_rope = rope_table(rows, columns, 64, DEVICE, ROPE_EXTENT), line_rope_table(TEXT, 64, DEVICE)
    return [x, text, given, rope, text_rope, mask_of(0, rows * columns)]


def pixels(dtype: torch.dtype, rows: int, columns: int) -> list[Any]:
    rope = parts_rope_table(rows, columns, 1, 1, 72, DEVICE)
    return [noise(dtype, 1, rows * columns, 256, 16), noise(dtype, 1, rows * columns, 128), rope]


def pixel_block() -> PixelBlock:
    return PixelBlock(
        width=128, pixels=256, pixel_width=16, attention=(144, 2), tokens=1, modulation="pixel", post_modulation=False
    )


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[..., list[Any]]]] = {
    "text to image": (lambda: Block(640, 10, True, 2560), lambda *of: text_to_image(*of, masked=False)),
    "text to image, masked": (lambda: Block(640, 10, True, 2560), lambda *of: text_to_image(*of, masked=True)),
    "text alone": (lambda: Block(128, 2, False, 512), text_alone),
    "class to image": (lambda: ClassBlock(144, 2, 0.1), classes),
    "patches": (lambda: Block(144, 2, False, 384), patches),
    "patches and text": (lambda: JointBlock(128, 2), joint),
    "patches and the last text": (lambda: LastJointBlock(128, 2), joint),
    "pixels": (pixel_block, pixels),
}


def outcome(forward: Callable[..., Any], block: nn.Module, given: list[Any], weights: list[Tensor]) -> list[Tensor]:
    """Results, and the gradients of what is given and of all parameters."""
    leaves = [*(item for item in given if isinstance(item, Tensor) and item.requires_grad), *block.parameters()]
    out = forward(*given)
    results = list(out) if isinstance(out, tuple) else [out]
    if not weights:
        weights += [torch.randn_like(item) for item in results]
    products = [(result.float() * weight.float()).sum() for result, weight in zip(results, weights, strict=True)]
    total = torch.stack(products)
    gradients = torch.autograd.grad(total.sum(), leaves, allow_unused=True)
    return [*(item.detach() for item in results), *(item for item in gradients if item is not None)]


def in_fp32(value: Any) -> Any:
    """A tensor that is differentiated or weighs results, in fp32; anything else as it is."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return value
    return value.detach().float().requires_grad_(value.requires_grad)


def cases() -> Iterator[Any]:
    """A GPU takes every kind, type and size. A CPU, for which a graph takes ten seconds to make, takes each kind in
    bf16 at 256 px and one in all sizes, and of each family one in fp32 at 512 px."""
    every = DEVICE.type == "cuda"
    for kind in KINDS:
        grids = GRIDS if every or kind == "text to image, masked" else GRIDS[:1]
        yield pytest.param(kind, torch.bfloat16, grids, id=f"{kind}-bf16")
        if every or kind in ("text to image", "patches and text"):
            yield pytest.param(kind, torch.float32, GRIDS if every else GRIDS[1:2], id=f"{kind}-fp32")


@pytest.mark.parametrize(("kind", "dtype", "grids"), [*cases()])
def test_compiled_is_eager(kind: str, dtype: torch.dtype, grids: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    make, inputs = KINDS[kind]
    block = make()
    for parameter in block.parameters():
        if parameter.ndim > 1:  # nothing is zero at the start
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    block.to(DEVICE, dtype)
    compiled, exact = torch.compile(block.forward, fullgraph=True), copy.deepcopy(block).float()
    # Eager bf16 rounds after each operation, compiled code after several, so both are held to eager fp32. Of a tensor's
    # largest value: a channel that is another's, or not written at all, is some 10 times further off.
    tolerance = 0.06 if dtype == torch.bfloat16 else 1e-4
    for grid in grids:
        given, weights = inputs(dtype, *grid), []
        found = outcome(compiled, block, given, weights)
        expected = outcome(exact.forward, exact, [in_fp32(item) for item in given], [in_fp32(item) for item in weights])
        off = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
        assert all(share < tolerance for share in off), (grid, off)  # NaN is not
