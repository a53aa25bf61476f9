"""The transformer blocks that the families share, and what every denoiser returns.

Shape suffixes: B batch, C channels, N tokens, M keys, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from t2i.models.layers import RMSNorm, SwiGLU, attention, modulate, rotate


class Prediction(NamedTuple):
    """What a denoiser returns, in the order of its fields."""

    output: Tensor
    """(B, C, H, W), fp32: the clean image, in [-1, 1] once trained, or the velocity; the config's model.prediction says
    which, the network does not know."""
    features: Tensor
    """(B, N, D): of the block that representation alignment taps."""


class Attention(nn.Module):
    """Self-attention with QK-RMSNorm; with `cross`, its keys and values are joined by those of a context."""

    def __init__(self, width: int, heads: int, cross: bool, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.context_kv = nn.Linear(width, 2 * width, bias=False) if cross else None
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.out = nn.Linear(width, width)

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, N, parts D) -> parts tensors (B, H, N, K)."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and turned, and values, (B, H, N, K) each, of (B, N, D)."""
        q, k, v = self._heads(self.qkv(x), 3)
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if rope is None else (rotate(q, *rope), rotate(k, *rope), v)

    def merge(self, attended: Tensor) -> Tensor:
        """The result (B, N, D) of what attention gave the heads (B, H, N, K)."""
        return self.out(attended.transpose(1, 2).flatten(-2))

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`mask` (B, M), bool: keys that take part, the context's last; None: all."""
        q, k, v = self.project(x, rope)
        if self.context_kv is not None:
            assert context is not None
            context_k, context_v = self._heads(self.context_kv(context), 2)
            k = torch.cat([k, self.k_norm(context_k)], dim=2)
            v = torch.cat([v, context_v], dim=2)
        return self.merge(attention(q, k, v, mask))


class Block(nn.Module):
    """A transformer block modulated by time, or what else is given once a sample; `cross` makes it an image block that
    also reads the text. `hidden`: width inside the MLP."""

    def __init__(self, width: int, heads: int, cross: bool, hidden: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads, cross)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, hidden)
        self.adaln = nn.Linear(width, 6 * width)

    def signals(self, given_B1D: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention, then of the MLP, (B, 1, D) each."""
        return self.adaln(given_B1D).chunk(6, dim=-1)

    def enter(self, x_BND: Tensor, signals: tuple[Tensor, ...]) -> Tensor:
        """What attention is given."""
        return modulate(self.norm1(x_BND), signals[0], signals[1])

    def leave(self, x_BND: Tensor, attended_BND: Tensor, signals: tuple[Tensor, ...]) -> Tensor:
        """The block's result, after attention."""
        _, _, gate1, shift2, scale2, gate2 = signals
        x_BND = x_BND + gate1 * attended_BND
        return x_BND + gate2 * self.mlp(modulate(self.norm2(x_BND), shift2, scale2))

    def forward(
        self,
        x_BND: Tensor,
        given_B1D: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        signals = self.signals(given_B1D)
        return self.leave(x_BND, self.attn(self.enter(x_BND, signals), rope, context, mask), signals)


def muon_takes(name: str) -> bool:
    """Whether Muon is to update a parameter: the matrices of attention and MLP, not adaLN, embeddings or head."""
    return ".attn." in name or (".mlp." in name and ".time." not in name)
