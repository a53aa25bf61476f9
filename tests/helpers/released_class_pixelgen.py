"""The released class-to-image PixelGen written anew: names, shapes, and a forward pass over them.

It shares no line with the package or the public code: convolutions for the patches, complex-number rotary embedding,
PyTorch's fused attention, the image filled in pixel by pixel of a patch. Images are square; nothing is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ClassSizes:
    """The network's constructor arguments."""

    hidden: int
    blocks: int
    heads: int
    classes: int
    context_tokens: int
    context_start: int
    bottleneck: int
    """0: none."""
    patch: int
    grid: int
    """Patches along a side of the image it was trained on."""
    features: int
    """Width that the projector ends in."""


def class_denoiser_shapes(s: ClassSizes) -> dict[str, tuple[int, ...]]:
    """Every key of the denoiser."""
    d, head, inner = s.hidden, s.hidden // s.heads, int(4 * s.hidden * 2 / 3)
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, s.grid**2, d)}
    if s.bottleneck:
        shapes["x_embedder.proj1.weight"] = (s.bottleneck, 3, s.patch, s.patch)
        shapes["x_embedder.proj2.weight"] = (d, s.bottleneck, 1, 1)
        shapes["x_embedder.proj2.bias"] = (d,)
    else:
        shapes["x_embedder.proj1.weight"] = (d, 3, s.patch, s.patch)
        shapes["x_embedder.proj1.bias"] = (d,)
    matrices: dict[str, tuple[int, ...]] = {
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "final_layer.linear": (3 * s.patch**2, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    for n in range(s.blocks):
        matrices[f"blocks.{n}.attn.qkv"] = (3 * d, d)
        matrices[f"blocks.{n}.attn.proj"] = (d, d)
        matrices[f"blocks.{n}.mlp.w12"] = (2 * inner, d)
        matrices[f"blocks.{n}.mlp.w3"] = (d, inner)
        matrices[f"blocks.{n}.adaLN_modulation.1"] = (6 * d, d)
        shapes |= {f"blocks.{n}.{norm}.weight": (d,) for norm in ("norm1", "norm2")}
        shapes |= {f"blocks.{n}.attn.{norm}.weight": (head,) for norm in ("q_norm", "k_norm")}
    for name, shape in matrices.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes["y_embedder.embedding_table.weight"] = (s.classes + 1, d)
    shapes["in_context_posemb"] = (1, s.context_tokens, d)
    shapes["final_layer.norm_final.weight"] = (d,)
    return shapes


def _turns(grid: int, head: int, unturned: int) -> Tensor:
    """Unit complex numbers (tokens, head / 2): a quarter of the channels for either axis's pairs, the row first."""
    angle = torch.zeros(unturned + grid * grid, head // 2, dtype=torch.float64)
    for axis in range(2):
        for k in range(head // 4):
            place = torch.arange(grid, dtype=torch.float64) / 10000 ** (2 * k / (head / 2))
            square = place[:, None].expand(grid, grid) if axis == 0 else place.expand(grid, grid)
            angle[unturned:, axis * (head // 4) + k] = square.reshape(-1)
    return torch.exp(1j * angle)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps=1e-6)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.complex(x[..., 0::2].double(), x[..., 1::2].double()) * turns
    return torch.stack([pairs.real, pairs.imag], dim=-1).flatten(-2).to(x.dtype)


def _block(w: dict[str, Tensor], at: str, s: ClassSizes, x: Tensor, condition: Tensor, turns: Tensor) -> Tensor:
    """A block. `condition` (B, D) is of time and class, not yet through the SiLU."""

    def linear(values: Tensor, name: str) -> Tensor:
        return values @ w[f"{at}.{name}.weight"].T + w[f"{at}.{name}.bias"]

    shifts = linear(F.silu(condition), "adaLN_modulation.1").unflatten(1, (6, 1, s.hidden)).unbind(1)
    h = _norm(x, w[f"{at}.norm1.weight"]) * (1 + shifts[1]) + shifts[0]
    q, k, v = (part.unflatten(2, (s.heads, -1)).transpose(1, 2) for part in linear(h, "attn.qkv").tensor_split(3, 2))
    q = _turned(_norm(q, w[f"{at}.attn.q_norm.weight"]), turns)
    k = _turned(_norm(k, w[f"{at}.attn.k_norm.weight"]), turns)
    x = x + shifts[2] * linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), "attn.proj")
    h = _norm(x, w[f"{at}.norm2.weight"]) * (1 + shifts[4]) + shifts[3]
    gate, up = linear(h, "mlp.w12").tensor_split(2, 2)
    return x + shifts[5] * linear(F.silu(gate) * up, "mlp.w3")


def class_forward(
    w: dict[str, Tensor], s: ClassSizes, x: Tensor, t: Tensor, y: Tensor, align_layer: int
) -> tuple[Tensor, Tensor]:
    """The predicted image and the tapped features.

    Args:
        w: the denoiser's state dict, without a prefix.
        x, t, y: noisy images (B, 3, H, H), times, classes.
        align_layer: the features are the image's tokens that block number `align_layer`, from 0, is given.
    """
    waves = t[:, None] / 10000 ** (torch.arange(128) / 128)
    time = torch.cat([torch.cos(waves), torch.sin(waves)], dim=1)
    time = F.silu(F.linear(time, w["t_embedder.mlp.0.weight"], w["t_embedder.mlp.0.bias"]))
    time = F.linear(time, w["t_embedder.mlp.2.weight"], w["t_embedder.mlp.2.bias"])
    of_class = F.embedding(y, w["y_embedder.embedding_table.weight"])
    condition = time + of_class

    h = F.conv2d(x, w["x_embedder.proj1.weight"], w.get("x_embedder.proj1.bias"), stride=s.patch)
    if s.bottleneck:
        h = F.conv2d(h, w["x_embedder.proj2.weight"], w["x_embedder.proj2.bias"])
    grid = h.shape[2]
    h = h.flatten(2).mT + w["pos_embed"]
    features = h
    for n in range(s.blocks):
        if n == align_layer:
            features = h[:, -grid * grid :]
        if n == s.context_start:
            h = torch.cat([of_class[:, None] + w["in_context_posemb"], h], dim=1)
        h = _block(w, f"blocks.{n}", s, h, condition, _turns(grid, s.hidden // s.heads, h.shape[1] - grid * grid))

    modulation = F.linear(
        F.silu(condition), w["final_layer.adaLN_modulation.1.weight"], w["final_layer.adaLN_modulation.1.bias"]
    )
    shift, scale = modulation[:, None].tensor_split(2, 2)
    h = _norm(h[:, -grid * grid :], w["final_layer.norm_final.weight"]) * (1 + scale) + shift
    values = F.linear(h, w["final_layer.linear.weight"], w["final_layer.linear.bias"])
    image = torch.zeros_like(x)
    for row in range(s.patch):
        for column in range(s.patch):  # the three colours of one place in all patches
            first = 3 * (row * s.patch + column)
            colours = values[:, :, first : first + 3].mT.unflatten(2, (grid, grid))
            image[:, :, row :: s.patch, column :: s.patch] = colours
    return image, features
