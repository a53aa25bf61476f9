"""Layers that the pixel transformers share.

Shape suffixes: B batch, N image tokens, L text tokens, M keys, H heads, K head width, D model width.

- Rotary embedding in real arithmetic: complex tensors keep a compiler from fusing it.
- Attention on CUDA is PyTorch's fused kernel, or flash-attn where that is installed and nothing is masked. On a CPU it
  is three plain operations, as the fused kernel takes twice as long in bfloat16 (tests/benchmarks/attention.py). On the
  meta device, where the planner counts, it is what it would be on CUDA.
- Norms and the rotation are computed in fp32 and cast back.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import is_autocast_available

if importlib.util.find_spec("flash_attn") is not None:
    from flash_attn import flash_attn_func
else:
    flash_attn_func = None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a learned scale, in fp32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class Fp32Linear(nn.Linear):
    """A linear layer that computes in fp32, whatever the type of its weights, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type  # the planner's has no autocast
        with torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext():
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class SwiGLU(nn.Module):
    """`down(silu(gate) * up)`, where one matrix makes gate and up (first half: gate)."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor, drop: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """`drop` is the dropout of the hidden values (B, N, hidden)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        hidden = F.silu(gate) * up
        return self.down(hidden if drop is None else drop(hidden))


class TimeEmbedding(nn.Module):
    """t in [0, 1] -> (B, D): 256 sinusoids (cosines first) of the raw t, then Linear, SiLU, Linear in `dtype`.

    The slowest sinusoid has a period of 2 pi `max_period`; t is not scaled by 1000, so 10 spans [0, 1] well.
    """

    def __init__(self, width: int, frequencies: int = 256, max_period: float = 10.0) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.max_period = max_period
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.frequencies // 2
        index = torch.arange(half, device=t_B.device, dtype=torch.float32)
        angles = t_B.float()[:, None] * torch.exp(-math.log(self.max_period) * index / half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(dtype))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x * (1 + scale) + shift`, the adaptive norm of DiT (Peebles and Xie, 2023)."""
    return torch.addcmul(shift, x, 1 + scale)


def attention(q_BHNK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, mask_BM: Tensor | None = None) -> Tensor:
    """Softmax attention, scaled by 1/sqrt(K). Returns (B, H, N, K).

    Args:
        mask_BM: bool, true for the keys that take part, at least one a sample; the share of others is exactly 0. None:
            all do.
    """
    mask_B11M = mask_BM[:, None, None] if mask_BM is not None else None
    # flash-attn takes no mask of keys.
    flash_takes = q_BHNK.is_cuda and mask_BM is None and q_BHNK.dtype in (torch.float16, torch.bfloat16)
    if flash_takes and flash_attn_func is not None:
        heads_last = (x.transpose(1, 2) for x in (q_BHNK, k_BHMK, v_BHMK))
        return flash_attn_func(*heads_last).transpose(1, 2)
    if q_BHNK.is_cuda or q_BHNK.is_meta:
        return F.scaled_dot_product_attention(q_BHNK, k_BHMK, v_BHMK, attn_mask=mask_B11M)
    scores = q_BHNK @ k_BHMK.transpose(-1, -2) * q_BHNK.shape[-1] ** -0.5
    if mask_B11M is not None:
        scores = scores.masked_fill(~mask_B11M, -math.inf)
    # The largest score is subtracted for range alone: it cancels, so its gradient is zero.
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    # Dividing after the product keeps the compiler from turning this back into the slow fused kernel.
    return (weights @ v_BHMK) / weights.sum(-1, keepdim=True)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels by its angle. x (B, H, N, K); cos, sin (N, K), fp32, of `turns`."""
    values = x.float()
    # Every channel is a product of itself and one of its partner, and so is its gradient. Stacked from even and odd
    # channels instead, the gradient of keys is strided stores of transposed tiles in compiled code, and came out of it
    # as NaN on a processor with AVX512 and without bf16 (torch 2.14).
    partners = values.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(values * cos, partners, sin).to(x.dtype)


def turns(angles: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, K), fp32, of one angle a channel pair (N, K/2): of each channel the factor of itself and
    that of its partner, whose sign is the rotation's."""
    cos, sin = angles.cos(), angles.sin()
    return (
        cos.repeat_interleave(2, dim=-1).float().to(device),
        torch.stack([-sin, sin], dim=-1).flatten(-2).float().to(device),
    )


@lru_cache(maxsize=64)
def rope_table(
    rows: int, columns: int, head_width: int, device: torch.device, extent: float | None = None
) -> tuple[Tensor, Tensor]:
    """`turns` (N, K) of the 2-D rotary embedding of PixelGen and PixelDiT for a grid of patches, row-major.

    Positions along an axis of n patches are linspace(0, extent, n), both ends included; none is an extent of n, as in
    PixelGen, whose spacing is n/(n-1). PixelDiT has 16 whatever the grid. Channel pairs alternate x, y, x, y, ...; pair
    2k and 2k+1 share the frequency 10000^(-4k/K).
    """
    frequencies = 10000.0 ** (-torch.arange(0, head_width, 4, dtype=torch.float64, device="cpu") / head_width)
    y, x = torch.meshgrid(
        torch.linspace(0, rows if extent is None else extent, rows, dtype=torch.float64, device="cpu"),
        torch.linspace(0, columns if extent is None else extent, columns, dtype=torch.float64, device="cpu"),
        indexing="ij",
    )
    angles = torch.stack([x.flatten()[:, None] * frequencies, y.flatten()[:, None] * frequencies], dim=-1)
    return turns(angles.flatten(-2), device)


@lru_cache(maxsize=64)
def line_rope_table(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`turns` (L, K) of the rotary embedding of tokens in a line (Su et al. 2021): pair k of token n turns
    by n 10000^(-2k/K)."""
    frequencies = 10000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float64, device="cpu") / head_width)
    angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequencies
    return turns(angles, device)


@lru_cache(maxsize=64)
def axial_rope_table(
    rows: int, columns: int, head_width: int, unturned: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`turns` (unturned + N, K) of the 2-D rotary embedding of EVA-02 (Fang et al. 2023) and JiT.

    The first half of the channel pairs turns with the row, the second with the column; pair k of either turns by its
    position 0, 1, 2, ... times 10000^(-4k/K). `unturned` tokens that are no patches come first and are not turned.
    """
    frequencies = 10000.0 ** (-torch.arange(0, head_width, 4, dtype=torch.float64, device="cpu") / head_width)
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64, device="cpu"),
        torch.arange(columns, dtype=torch.float64, device="cpu"),
        indexing="ij",
    )
    angles = torch.cat([y.flatten()[:, None] * frequencies, x.flatten()[:, None] * frequencies], dim=-1)
    angles = F.pad(angles, (0, 0, unturned, 0))
    return turns(angles, device)


@lru_cache(maxsize=64)
def _sincos_axis(length: int, width: int, device: torch.device) -> Tensor:
    """Sines, then cosines (n, C) of the positions 0 ... n - 1 of one axis."""
    omega = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64, device="cpu") / (width // 2))
    angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float().to(device)


def sincos_grid(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """The fixed position table (H, W, D) of MAE: half the channels encode the column, half the row."""
    x = _sincos_axis(columns, width // 2, device).expand(rows, columns, -1)
    y = _sincos_axis(rows, width // 2, device)[:, None].expand(rows, columns, -1)
    return torch.cat([x, y], dim=-1)


@lru_cache(maxsize=64)
def sincos_table(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """`sincos_grid` as tokens (N, D), row by row; kept."""
    return sincos_grid(rows, columns, width, device).flatten(0, 1)


def patchify(image: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C p p): patches row by row, channel-major inside a patch."""
    batch, channels, height, width = image.shape
    grid = image.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of `patchify`."""
    batch = tokens.shape[0]
    grid = tokens.reshape(batch, height // patch, width // patch, -1, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)


class Projector(nn.Module):
    """Three-layer SiLU network from a block's features to a frozen encoder's width (REPA, Yu et al. 2024)."""

    def __init__(self, width: int, hidden: int, target: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, target)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
