"""The pixel pathway of PixelDiT (paper section 3.2): every pixel is a token, conditioned by its patch's token.

Design, as measured in the public code (and counted in tests):
- A pixel's token is 16 wide: a linear layer of its colours plus a fixed sin-cos table of its position in pixels.
- Pixel-wise adaLN: one matrix computes all scales, shifts and gates of a patch's pixels from the patch's token; it has
  most of a block's parameters.
- Compaction: one matrix turns a patch's pixels into one token (or several, `cut`); these attend, with no norm,
  modulation or residual at that width; another matrix turns them back.
- The MLP works on single pixels. The head is a norm and one matrix in fp32, without adaLN; it starts at zero.

The pixels of a patch are adjacent: part by part where a patch is cut into several tokens, row by row inside a part. The
rotary position of a part's token is its place in the grid of all parts.

Shape suffixes: B batch, C pixel width, N patches, P pixels of a patch, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from t2i.models.layers import Attention, Fp32Linear, RMSNorm, modulate, rope_table, sincos_grid

ROPE_EXTENT = 16.0
"""Rotary positions of an axis span [0, ROPE_EXTENT] at any resolution."""

Modulation = Literal["pixel", "patch", "additive"]


class PixelBlock(nn.Module):
    """A PiT block. `pixels`: P; `tokens`: tokens a patch in attention; the rest as in `PixelPathway`."""

    def __init__(
        self,
        *,
        width: int,
        pixels: int,
        pixel_width: int,
        attention: tuple[int, int] | None,
        tokens: int,
        modulation: Modulation,
        post_modulation: bool,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.post_modulation = post_modulation
        self.per_branch = 2 if post_modulation else 3  # scale and shift; or shift, scale and gate
        self.modulated = pixels if modulation == "pixel" else 1
        self.add_patch: nn.Linear | None = None
        self.adaln: nn.Linear | None = None
        if modulation == "additive":
            assert attention is not None
            self.add_patch = nn.Linear(width, attention[0])
        else:
            # Signals of the attention are made without attention, too: so the paper counts its ablation.
            self.adaln = nn.Linear(width, self.modulated * 2 * self.per_branch * pixel_width)
        self.norm1: RMSNorm | None = None
        if attention is not None:
            part = pixels // tokens * pixel_width
            self.norm1 = RMSNorm(pixel_width)
            self.compress = nn.Linear(part, attention[0])
            self.attn = Attention(*attention, cross=False)
            self.expand = nn.Linear(attention[0], part)
        self.norm2 = RMSNorm(pixel_width)
        self.mlp = nn.Sequential(
            nn.Linear(pixel_width, 4 * pixel_width), nn.GELU(), nn.Linear(4 * pixel_width, pixel_width)
        )

    def _modulation(self, patches_BND: Tensor) -> list[Tensor | None]:
        """Of the attention and the MLP: adaLN's output (B, N, P or 1, `per_branch`, C), or None without adaLN."""
        if self.adaln is None:
            return [None, None]
        return [*self.adaln(patches_BND).unflatten(-1, (self.modulated, 2, self.per_branch, -1)).unbind(3)]

    def _branch(self, x: Tensor, run: Callable[[Tensor], Tensor], modulation: Tensor | None) -> Tensor:
        if modulation is None:
            return run(x)
        if self.post_modulation:
            scale, shift = modulation.unbind(3)
            return modulate(run(x), shift, scale)
        shift, scale, gate = modulation.unbind(3)
        return gate * run(modulate(x, shift, scale))

    def _attend(self, x_BNPC: Tensor, patches_BND: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        compact = self.compress(x_BNPC.unflatten(2, (self.tokens, -1)).flatten(3))
        if self.add_patch is not None:
            compact = compact + self.add_patch(patches_BND)[:, :, None]
        return self.expand(self.attn(compact.flatten(1, 2), rope)).reshape(x_BNPC.shape)

    def forward(self, x_BNPC: Tensor, patches_BND: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """`patches_BND`: the patches' tokens; `rope`: of the N x `tokens` compacted tokens."""
        of_attention, of_mlp = self._modulation(patches_BND)
        if self.norm1 is not None:
            x_BNPC = x_BNPC + self._branch(
                self.norm1(x_BNPC), lambda x: self._attend(x, patches_BND, rope), of_attention
            )
        return x_BNPC + self._branch(self.norm2(x_BNPC), self.mlp, of_mlp)


class PixelPathway(nn.Module):
    """From a noisy image and its patches' tokens to the network's output.

    Args:
        depth: M, blocks.
        pixel_width: C.
        attention: width and heads of the attention; None leaves it out.
        cut: rows and columns of the parts of a patch, one token a part.
        modulation: how a patch's token conditions its pixels: by adaLN, one for each pixel or the same for all, or
            added to their tokens.
        post_modulation: adaLN scales and shifts a branch's output in place of its input, without gates.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        patch_size: int,
        pixel_width: int,
        attention: tuple[int, int] | None,
        cut: tuple[int, int],
        modulation: Modulation,
        post_modulation: bool,
    ) -> None:
        super().__init__()
        self.patch_size, self.cut = patch_size, cut
        self.pixel_width = pixel_width
        self.head_width = attention[0] // attention[1] if attention is not None else 4  # then the table is not used
        self.embed = nn.Linear(3, pixel_width)
        self.blocks = nn.ModuleList(
            PixelBlock(
                width=width,
                pixels=patch_size**2,
                pixel_width=pixel_width,
                attention=attention,
                tokens=cut[0] * cut[1],
                modulation=modulation,
                post_modulation=post_modulation,
            )
            for _ in range(depth)
        )
        self.norm = RMSNorm(pixel_width)
        self.head = Fp32Linear(pixel_width, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x_BCHW: Tensor, patches_BND: Tensor) -> Tensor:
        """The network's output (B, 3, H, W), fp32, from the noisy image and its patches' tokens, row by row."""
        height, width = x_BCHW.shape[-2:]
        grid = height // self.patch_size, width // self.patch_size
        device, dtype = x_BCHW.device, patches_BND.dtype
        # Not cached: a table takes 64 bytes a pixel, and there is one for each image size.
        place = sincos_grid(height, width, self.pixel_width, device).to(dtype).permute(2, 0, 1)[None]
        place = to_pixels_of_patches(place, self.patch_size, self.cut)
        x = self.embed(to_pixels_of_patches(x_BCHW, self.patch_size, self.cut).to(dtype)) + place
        rope = parts_rope_table(*grid, *self.cut, self.head_width, device)
        for block in self.blocks:
            x = block(x, patches_BND, rope)
        return from_pixels_of_patches(self.head(self.norm(x.float())), self.patch_size, self.cut, height, width)


def to_pixels_of_patches(image: Tensor, patch: int, cut: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, N, P, C): patches row by row; parts of a patch row by row; pixels of a part row by row."""
    rows, columns = cut
    batch, channels, height, width = image.shape
    parts = image.reshape(
        batch, channels, height // patch, rows, patch // rows, width // patch, columns, patch // columns
    )
    return parts.permute(0, 2, 5, 3, 6, 4, 7, 1).reshape(batch, -1, patch**2, channels)


def from_pixels_of_patches(pixels: Tensor, patch: int, cut: tuple[int, int], height: int, width: int) -> Tensor:
    """The inverse of `to_pixels_of_patches`."""
    rows, columns = cut
    batch, _, _, channels = pixels.shape
    parts = pixels.reshape(
        batch, height // patch, width // patch, rows, columns, patch // rows, patch // columns, channels
    )
    return parts.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(batch, channels, height, width)


@lru_cache(maxsize=64)
def parts_rope_table(
    rows: int, columns: int, parts_down: int, parts_across: int, head_width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`rope_table` (N x parts, K) of the grid of all parts, reordered patch by patch."""
    cos, sin = rope_table(rows * parts_down, columns * parts_across, head_width, device, ROPE_EXTENT)

    def by_patch(table: Tensor) -> Tensor:
        parts = table.reshape(rows, parts_down, columns, parts_across, -1)
        return parts.transpose(1, 2).reshape(-1, table.shape[-1])

    return by_patch(cos), by_patch(sin)
