"""The released text-to-image PixelGen, from its description alone: names, shapes, and a forward pass over them.

It shares no line with the package: complex-number rotary embedding, unfold and fold, MAE's table in numpy. Images are
square.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """The network's constructor arguments."""

    hidden: int
    blocks: int
    heads: int
    text_width: int
    text_length: int
    text_blocks: int
    bottleneck: int
    patch: int
    grid: int
    """Patches along a side of the image it was trained on."""
    features: int
    """Width that the projector ends in."""


def denoiser_shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Every key of the denoiser."""
    d, head, values = s.hidden, s.hidden // s.heads, 3 * s.patch**2
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, s.grid**2, d),
        "y_pos_embedding": (1, s.text_length, d),
        "x_embedder.proj1.weight": (s.bottleneck, values),
        "x_embedder.proj2.weight": (d, s.bottleneck),
        "x_embedder.proj2.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.proj.weight": (d, s.text_width),
        "y_embedder.proj.bias": (d,),
        "y_embedder.norm.weight": (d,),
        "final_layer.linear.weight": (values, d),
        "final_layer.linear.bias": (values,),
    }
    for stack, depth in (("blocks", s.blocks), ("text_refine_blocks", s.text_blocks)):
        for n in range(depth):
            block: dict[str, tuple[int, ...]] = {
                "norm1.weight": (d,),
                "attn.q_norm.weight": (head,),
                "attn.k_norm.weight": (head,),
                "attn.proj.weight": (d, d),
                "attn.proj.bias": (d,),
                "norm2.weight": (d,),
                "mlp.w12.weight": (8 * d, d),
                "mlp.w3.weight": (d, 4 * d),
                "adaLN_modulation.0.weight": (6 * d, d),
                "adaLN_modulation.0.bias": (6 * d,),
            }
            if stack == "blocks":
                block |= {"attn.qkv_x.weight": (3 * d, d), "attn.kv_y.weight": (2 * d, d)}
            else:
                block |= {"attn.qkv.weight": (3 * d, d)}
            shapes |= {f"{stack}.{n}.{name}": shape for name, shape in block.items()}
    return shapes


def every_shape(denoiser: dict[str, tuple[int, ...]], features: int) -> dict[str, tuple[int, ...]]:
    """Every key of a state dict: of the denoiser, its EMA, and the projector, whose output is `features` wide."""
    hidden = denoiser["pos_embed"][2]
    shapes = {f"{prefix}{name}": size for prefix in ("denoiser.", "ema_denoiser.") for name, size in denoiser.items()}
    for n, width in {0: hidden, 2: hidden, 4: features}.items():
        shapes |= {
            f"diffusion_trainer.proj.0.{n}.weight": (width, hidden),
            f"diffusion_trainer.proj.0.{n}.bias": (width,),
        }
    return shapes


def lightning(weights: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    """What Lightning puts around a state dict."""
    state = OrderedDict(weights)
    state._metadata = OrderedDict({"": {"version": 1}})
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}}
    return {
        "epoch": 2,
        "global_step": 360_000,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.95), "params": [0]}]}],
        "lr_schedulers": [],
        **more,
    }


def random_weights(denoiser: dict[str, tuple[int, ...]], features: int) -> dict[str, Tensor]:
    """A whole state dict; raw and averaged weights differ."""
    return random_tensors(every_shape(denoiser, features))


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights, large enough that every part affects the output."""
    generator = torch.Generator().manual_seed(seed)

    def random(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith(".pos_embed"):
            return position_table(math.isqrt(shape[1]), shape[2])[None]
        values = torch.randn(shape, generator=generator)
        if len(shape) in (2, 4):
            return values * 0.8 / math.sqrt(math.prod(shape[1:]))
        return 0.3 * values + (1.0 if "norm" in name else 0.0)

    return {name: random(name, shape) for name, shape in shapes.items()}


def position_table(grid: int, width: int) -> Tensor:
    """MAE's: the first half of the channels is of the column, the second of the row; in each, sines, then cosines."""
    frequencies = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    angles = [np.outer(place, frequencies) for place in (columns, rows)]
    return torch.from_numpy(np.hstack([f(a) for a in angles for f in (np.sin, np.cos)])).float()


def _turns(grid: int, head: int) -> Tensor:
    """Unit complex numbers (patches, head / 2): places from 0 to `grid`, both included; pairs go x, y, x, y."""
    frequency = 10000.0 ** (-torch.arange(0, head, 4)[: head // 4].double() / head)
    place = torch.linspace(0, grid, grid, dtype=torch.float64)
    x, y = place.repeat(grid), place.repeat_interleave(grid)
    angles = torch.stack([torch.outer(x, frequency), torch.outer(y, frequency)], dim=2).reshape(grid * grid, -1)
    return torch.polar(torch.ones_like(angles), angles)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6) * weight


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).reshape(x.shape).to(x.dtype)


def _block(w: dict[str, Tensor], at: str, s: Sizes, x: Tensor, condition: Tensor, text: Tensor | None) -> Tensor:
    """A block; with `text`, an image block. `condition` (B, 1, D) is of time alone, already through its SiLU."""

    def split(values: Tensor, count: int) -> list[Tensor]:
        return [part.reshape(*part.shape[:2], s.heads, -1).transpose(1, 2) for part in values.chunk(count, dim=2)]

    def linear(values: Tensor, name: str) -> Tensor:
        return F.linear(values, w[f"{at}.{name}.weight"], w.get(f"{at}.{name}.bias"))

    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = linear(condition, "adaLN_modulation.0").chunk(6, 2)
    h = _rms_norm(x, w[f"{at}.norm1.weight"]) * (1 + scale_msa) + shift_msa
    q, k, v = split(linear(h, "attn.qkv" if text is None else "attn.qkv_x"), 3)
    q, k = _rms_norm(q, w[f"{at}.attn.q_norm.weight"]), _rms_norm(k, w[f"{at}.attn.k_norm.weight"])
    if text is not None:
        turns = _turns(math.isqrt(x.shape[1]), s.hidden // s.heads)
        text_k, text_v = split(linear(text, "attn.kv_y"), 2)
        q, k = _turned(q, turns), _turned(k, turns)
        k = torch.cat([k, _rms_norm(text_k, w[f"{at}.attn.k_norm.weight"])], dim=2)
        v = torch.cat([v, text_v], dim=2)
    scores = torch.einsum("bhqk,bhmk->bhqm", q, k) / math.sqrt(s.hidden // s.heads)
    mixed = torch.einsum("bhqm,bhmk->bqhk", scores.softmax(dim=-1), v).reshape(x.shape)
    x = x + gate_msa * linear(mixed, "attn.proj")
    h = _rms_norm(x, w[f"{at}.norm2.weight"]) * (1 + scale_mlp) + shift_mlp
    gate, up = linear(h, "mlp.w12").chunk(2, dim=2)
    return x + gate_mlp * linear(F.silu(gate) * up, "mlp.w3")


def forward(w: dict[str, Tensor], s: Sizes, x: Tensor, t: Tensor, y: Tensor, align_layer: int) -> tuple[Tensor, Tensor]:
    """The predicted image and the tapped features.

    Args:
        w: the denoiser's state dict, without a prefix.
        x, t, y: noisy images (B, 3, H, H), times, text states (B, L, E).
        align_layer: the features are what block number `align_layer`, from 0, is given.
    """
    frequencies = torch.exp(-math.log(10.0) * torch.arange(128) / 128)
    waves = torch.cat([(t[:, None] * frequencies).cos(), (t[:, None] * frequencies).sin()], dim=1)
    time = F.silu(F.linear(waves, w["t_embedder.mlp.0.weight"], w["t_embedder.mlp.0.bias"]))
    time = F.linear(time, w["t_embedder.mlp.2.weight"], w["t_embedder.mlp.2.bias"])
    condition = F.silu(time)[:, None, :]
    text = F.linear(y, w["y_embedder.proj.weight"], w["y_embedder.proj.bias"])
    text = _rms_norm(text, w["y_embedder.norm.weight"]) + w["y_pos_embedding"]
    for n in range(s.text_blocks):
        text = _block(w, f"text_refine_blocks.{n}", s, text, condition, None)
    h = F.linear(F.unfold(x, s.patch, stride=s.patch).mT, w["x_embedder.proj1.weight"])
    h = F.linear(h, w["x_embedder.proj2.weight"], w["x_embedder.proj2.bias"]) + w["pos_embed"]
    features = h
    for n in range(s.blocks):
        if n == align_layer:
            features = h
        h = _block(w, f"blocks.{n}", s, h, condition, text)
    h = F.layer_norm(h, (s.hidden,), eps=1e-6)
    pixels = F.linear(h, w["final_layer.linear.weight"], w["final_layer.linear.bias"])
    return F.fold(pixels.mT, x.shape[2:], s.patch, stride=s.patch), features


def project(w: dict[str, Tensor], features: Tensor) -> Tensor:
    """The projector of representation alignment; `w` without a prefix."""
    for n in (0, 2):
        features = F.silu(F.linear(features, w[f"{n}.weight"], w[f"{n}.bias"]))
    return F.linear(features, w["4.weight"], w["4.bias"])
