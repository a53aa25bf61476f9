"""Layers and blocks that the pixel transformers share.

Shape suffixes: B batch, C channels, N image tokens, L text tokens, M keys, H heads, K head width, D model width.

- Rotary embedding uses real arithmetic: complex tensors keep a compiler from fusing it.
- Attention on CUDA is PyTorch's fused kernel, or flash-attn where it is installed and nothing is masked. On a CPU it is
  three plain operations, since the fused kernel takes twice as long in bfloat16 (tests/benchmarks/attention.py). On the
  meta device, where the planner counts, it is the same as on CUDA.
- Norms and the rotation are computed in fp32 and cast back.
- A dropout mask is a hash of (key of the sample, layer, place in the layer, token, channel), so it is the same for any
  micro-batch, rank or compiler, and activation checkpointing recomputes it. The hash works on 31 bits held in int64:
  products of two such numbers do not overflow, so all devices agree to the bit.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

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
    """A linear layer that computes in fp32 whatever its weights' dtype, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type  # the planner's meta device has no autocast
        with torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext():
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class SwiGLU(nn.Module):
    """`down(silu(gate) * up)`; one matrix computes gate (the first half) and up."""

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
    """Softmax attention, scaled by 1/sqrt(K): (B, H, N, K). `mask_BM` is true for the keys attended to, at least one a
    sample; the weight of others is exactly 0. None attends to all."""
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
    # The largest score is subtracted against overflow only: it cancels, so its gradient is zero.
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    # Dividing after the product keeps the compiler from turning this back into the slow fused kernel.
    return (weights @ v_BHMK) / weights.sum(-1, keepdim=True)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels. x (B, H, N, K); cos, sin (N, K), fp32, from `turns`."""
    values = x.float()
    # Each channel, and its gradient, is one product of itself plus one of its partner. Stacking even and odd channels
    # instead gives strided stores of transposed tiles in the compiled gradient of keys, which was NaN on a processor
    # with AVX512 and without bf16 (torch 2.14).
    partners = values.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(values * cos, partners, sin).to(x.dtype)


def turns(angles: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The factors (N, K), fp32, of each channel and of its partner, from one angle a channel pair (N, K/2). The second
    is the sine with the rotation's sign."""
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

    Positions along an axis of n patches are linspace(0, extent, n), both ends included. None is an extent of n, as in
    PixelGen (a spacing of n/(n-1)); PixelDiT has 16 for any grid. Channel pairs alternate x, y, x, y, ...; pairs 2k and
    2k+1 share the frequency 10000^(-4k/K).
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
    """`turns` (L, K) of the 1-D rotary embedding (Su et al. 2021): pair k of token n rotates by n 10000^(-2k/K)."""
    frequencies = 10000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float64, device="cpu") / head_width)
    angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequencies
    return turns(angles, device)


@lru_cache(maxsize=64)
def axial_rope_table(
    rows: int, columns: int, head_width: int, unturned: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`turns` (unturned + N, K) of the 2-D rotary embedding of EVA-02 (Fang et al. 2023) and JiT.

    The first half of the channel pairs encodes the row, the second the column; pair k of either rotates by the position
    0, 1, 2, ... times 10000^(-4k/K). `unturned` context tokens come first and are not rotated.
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
    """Sines, then cosines, of the positions 0 ... n - 1 of one axis: (n, C)."""
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
    """`sincos_grid` as tokens (N, D), row by row; cached."""
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
    """Three-layer SiLU MLP from a block's features to a frozen encoder's width (REPA, Yu et al. 2024)."""

    def __init__(self, width: int, hidden: int, target: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, target)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


KEY_BITS = 62
_BITS = 31
_LOW = (1 << _BITS) - 1


def _mix(x: Tensor) -> Tensor:
    """A bijection of the numbers below 2**31 that spreads every bit over all."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _LOW
    x = (x ^ (x >> 15)) * 0x5BD1E995 & _LOW
    return x ^ (x >> 16)


def derive(key_B: Tensor, number: int) -> Tensor:
    """A new key for each key (B,), int64 below 2**62, for instance one for a layer."""
    low = _mix(_mix(key_B & _LOW) ^ number)
    high = _mix((key_B >> _BITS) ^ low)
    return (high << _BITS) | low


def keep_mask(key_B: Tensor, tokens: int, channels: int, rate: float) -> Tensor:
    """Which of (B, tokens, channels) are kept: each with probability 1 - `rate`, to within 2**-31.

    Keys must be random or derived: consecutive numbers would share rows of their masks.
    """
    token = torch.arange(tokens, device=key_B.device)
    channel = torch.arange(channels, device=key_B.device)
    # Two numbers a row: with one alone, some of a step's millions of rows would be equal.
    first = _mix((key_B & _LOW)[:, None] ^ token)
    second = _mix((key_B >> _BITS)[:, None] ^ first)
    return _mix(_mix(first[..., None] ^ channel) ^ second[..., None]) >= round(rate * 2**_BITS)


def dropout(x_BND: Tensor, key_B: Tensor, rate: float) -> Tensor:
    """Set a share `rate` of the values to zero and scale the others so that the mean stays the same."""
    keep = keep_mask(key_B, x_BND.shape[1], x_BND.shape[2], rate)
    return torch.where(keep, x_BND * (1.0 / (1.0 - rate)), 0.0).to(x_BND.dtype)


class Prediction(NamedTuple):
    """What a denoiser returns, in the order of its fields."""

    output: Tensor
    """(B, C, H, W), fp32: the clean image, in [-1, 1] once trained, or the velocity, as model.prediction says."""
    features: Tensor
    """(B, N, D), after the block `repa_layer`."""


class Attention(nn.Module):
    """Self-attention with QK-RMSNorm; with `cross`, a context adds its keys and values."""

    def __init__(self, width: int, heads: int, cross: bool, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.context_kv = nn.Linear(width, 2 * width, bias=False) if cross else None
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.out = nn.Linear(width, width)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and rotated, and values of (B, N, D); each (B, H, N, K)."""
        q, k, v = self._heads(self.qkv(x), 3)
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if rope is None else (rotate(q, *rope), rotate(k, *rope), v)

    def merge(self, attended: Tensor) -> Tensor:
        """(B, H, N, K) -> (B, N, D)."""
        return self.out(attended.transpose(1, 2).flatten(-2))

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`mask` (B, M), bool: the keys attended to, the context's last; None: all."""
        q, k, v = self.project(x, rope)
        if self.context_kv is not None:
            assert context is not None
            context_k, context_v = self._heads(self.context_kv(context), 2)
            k = torch.cat([k, self.k_norm(context_k)], dim=2)
            v = torch.cat([v, context_v], dim=2)
        return self.merge(attention(q, k, v, mask))


class Block(nn.Module):
    """A transformer block with adaLN, driven by one condition a sample (time, perhaps with a class); with `cross`, its
    attention also reads the text. `hidden`: width inside the MLP."""

    def __init__(self, width: int, heads: int, cross: bool, hidden: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads, cross)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, hidden)
        self.adaln = nn.Linear(width, 6 * width)

    def modulation(self, cond_B1D: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention, then of the MLP; each (B, 1, D)."""
        return self.adaln(cond_B1D).chunk(6, dim=-1)

    def pre(self, x_BND: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """The input of attention."""
        return modulate(self.norm1(x_BND), modulation[0], modulation[1])

    def post(self, x_BND: Tensor, attended_BND: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """The block's output, from that of attention."""
        _, _, gate1, shift2, scale2, gate2 = modulation
        x_BND = x_BND + gate1 * attended_BND
        return x_BND + gate2 * self.mlp(modulate(self.norm2(x_BND), shift2, scale2))

    def forward(
        self,
        x_BND: Tensor,
        cond_B1D: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        modulation = self.modulation(cond_B1D)
        return self.post(x_BND, self.attn(self.pre(x_BND, modulation), rope, context, mask), modulation)


def muon_takes(name: str) -> bool:
    """Whether Muon updates a parameter: matrices of attention and MLP, not adaLN, embeddings or head."""
    return ".attn." in name or (".mlp." in name and ".time." not in name)
