"""The released PixelDiT written anew, for classes and for text: names, shapes, and a forward pass over them.

It shares no line with the package or the public code: unfold and fold for patches and for pixels, complex-number rotary
embedding, the pixels' table entry by entry, PyTorch's fused attention. Conventions are the released ones: for classes
time runs from 0, noise, to 1 and the network returns image - noise; for text it runs from 1000, noise, to 0, and the
network returns noise - image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from released_pixelgen import lightning, random_tensors
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class DiTSizes:
    """The network's constructor arguments; without `classes` it is for text."""

    hidden: int
    blocks: int
    heads: int
    pixel_blocks: int
    pixel_width: int
    patch: int
    attention: tuple[int, int]
    """Of the pixels: width and heads."""
    projector: int
    """Width inside the projector."""
    features: int
    """Width that the projector ends in."""
    classes: int = 0
    text_width: int = 0
    text_length: int = 0
    post: bool = False
    """Post-modulation."""


def dit_shapes(s: DiTSizes) -> Shapes:
    """Every key of the denoiser."""
    d, c, inner = s.hidden, s.pixel_width, int(2 * 4 * s.hidden / 3)
    of_patch, (a, pixel_heads) = s.patch**2 * c, s.attention
    biased: Shapes = {
        "s_embedder.proj": (d, 3 * s.patch**2),
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "pixel_embedder.proj": (c, 3),
        "final_layer.linear": (3, c),
    }
    plain: Shapes = {"final_layer.norm": (c,)}
    if s.classes:
        plain["y_embedder.embedding_table"] = (s.classes + 1, d)
    else:
        biased["y_embedder.proj"], plain["y_embedder.norm"] = (d, s.text_width), (d,)
    for n in range(s.blocks):
        for end, part, adaln in [("", "", "")] if s.classes else [("_x", "x", "_img"), ("_y", "y", "_txt")]:
            at = f"patch_blocks.{n}"
            mlp = f"{at}.mlp{end}"
            norms = (f"{at}.norm1", f"{at}.norm2") if s.classes else (f"{at}.norm_{part}1", f"{at}.norm_{part}2")
            plain |= dict.fromkeys(norms, (d,))
            plain |= {f"{at}.attn.{norm}{end}": (d // s.heads,) for norm in ("q_norm", "k_norm")}
            plain |= {f"{at}.attn.qkv{end}": (3 * d, d), f"{mlp}.w1": (inner, d), f"{mlp}.w3": (inner, d)}
            plain[f"{mlp}.w2"] = (d, inner)
            biased |= {f"{at}.attn.proj{end}": (d, d), f"{at}.adaLN_modulation{adaln}.0": (6 * d, d)}
    for n in range(s.pixel_blocks):
        at = f"pixel_blocks.{n}"
        biased |= {f"{at}.compress_to_attn": (a, of_patch), f"{at}.expand_from_attn": (of_patch, a)}
        biased |= {f"{at}.attn.proj": (a, a), f"{at}.adaLN_modulation.0": ((4 if s.post else 6) * of_patch, d)}
        biased |= {f"{at}.mlp.fc1": (4 * c, c), f"{at}.mlp.fc2": (c, 4 * c)}
        plain |= {f"{at}.norm1": (c,), f"{at}.norm2": (c,), f"{at}.attn.qkv": (3 * a, a)}
        plain |= {f"{at}.attn.{norm}": (a // pixel_heads,) for norm in ("q_norm", "k_norm")}
    shapes = {f"{name}.weight": shape for name, shape in {**plain, **biased}.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in biased.items()}
    return shapes if s.classes else shapes | {"y_pos_embedding": (1, s.text_length, d)}


def projector_shapes(s: DiTSizes) -> Shapes:
    """Every key of the projector."""
    widths = {"0": (s.projector, s.hidden), "2": (s.projector, s.projector), "4": (s.features, s.projector)}
    return {f"{n}.weight": shape for n, shape in widths.items()} | {f"{n}.bias": (w,) for n, (w, _) in widths.items()}


def ends_unused(s: DiTSizes) -> set[str]:
    """The keys of a text denoiser that have no bearing on the picture, whole ones."""
    names = {"attn.proj_y.weight", "attn.proj_y.bias", "attn.q_norm_y.weight", "norm_y2.weight"}
    names |= {f"mlp_y.{matrix}.weight" for matrix in ("w1", "w2", "w3")}
    return {f"patch_blocks.{s.blocks - 1}.{name}" for name in names}


def dit_weights(s: DiTSizes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random state dicts of the weights and of their EMA; for a class network the first holds both."""
    denoiser, projector = dit_shapes(s), projector_shapes(s)
    if s.classes:
        shapes = {
            f"{prefix}{name}": size for prefix in ("denoiser.", "ema_denoiser.") for name, size in denoiser.items()
        }
        return random_tensors(shapes | {f"diffusion_trainer.proj.0.{n}": size for n, size in projector.items()}), {}
    shapes = {f"core.{n}": size for n, size in denoiser.items()}
    shapes |= {f"_repa_projector.{n}": size for n, size in projector.items()}
    return random_tensors(shapes, seed=0), random_tensors(shapes, seed=1)


def dit_file(weights: dict[str, Tensor], ema: dict[str, Tensor]) -> dict[str, object]:
    """What the public code puts around state dicts: Lightning, or a dictionary of its own for `core`."""
    if not any(name.startswith("core.") for name in weights):
        return lightning(weights)
    content: dict[str, object] = {"state_dict": weights, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}
    content |= {"scheduler": {"last_epoch": 7}, "rng_state": {"torch": torch.get_rng_state()}}
    return content | ({"state_dict_ema": ema} if ema else {})


def dit_forward(
    w: dict[str, Tensor], s: DiTSizes, x: Tensor, t: Tensor, y: Tensor, align_layer: int
) -> tuple[Tensor, Tensor]:
    """What the network returns (B, 3, H, W), and the tapped features.

    Args:
        w: the denoiser's state dict, without a prefix.
        x, t, y: noisy images, released times, and classes or text states (B, L, E).
        align_layer: the features are what block number `align_layer`, from 1, makes.
    """
    linear = _Linear(w)
    frequencies = torch.exp(-math.log(10.0) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    time = linear(F.silu(linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    time = time[:, None]
    rows, columns = x.shape[2] // s.patch, x.shape[3] // s.patch
    turns = _grid_turns(rows, columns, s.hidden // s.heads)
    h = linear(F.unfold(x, s.patch, stride=s.patch).mT, "s_embedder.proj")
    features = h
    if s.classes:
        given, text, text_turns = F.silu(time + w["y_embedder.embedding_table.weight"][y][:, None]), None, turns
    else:
        given = F.silu(time)
        text = _norm(linear(y, "y_embedder.proj"), w["y_embedder.norm.weight"]) + w["y_pos_embedding"]
        text_turns = _line_turns(y.shape[1], s.hidden // s.heads)
    for n in range(s.blocks):
        at = f"patch_blocks.{n}"
        if text is None:
            (h,) = _joint(linear, at, s.heads, given, [(h, turns, _CLASS)])
        else:
            text, h = _joint(linear, at, s.heads, given, [(text, text_turns, _TEXT), (h, turns, _IMAGE)])
        if n + 1 == align_layer:
            features = h
    return _pixels(linear, s, x, F.silu(time + h), (rows, columns)), features


class _Linear:
    """Matrices by name."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def __call__(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))


_CLASS = {"norm": "norm", "end": "", "mlp": "mlp", "adaln": "adaLN_modulation.0"}
_IMAGE = {"norm": "norm_x", "end": "_x", "mlp": "mlp_x", "adaln": "adaLN_modulation_img.0"}
_TEXT = {"norm": "norm_y", "end": "_y", "mlp": "mlp_y", "adaln": "adaLN_modulation_txt.0"}


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.complex(x[..., 0::2].double(), x[..., 1::2].double()) * turns
    return torch.stack([pairs.real, pairs.imag], dim=-1).flatten(-2).to(x.dtype)


def _grid_turns(rows: int, columns: int, head: int) -> Tensor:
    """Unit complex numbers (patches, head / 2): pairs go x, y, x, y; an axis goes from 0 to 16, both included."""
    turns = torch.ones(rows * columns, head // 2, dtype=torch.complex128)
    for n in range(rows * columns):
        row, column = divmod(n, columns)
        for k in range(head // 4):
            for place, (step, count) in enumerate(((column, columns), (row, rows))):
                angle = 16 * step / max(count - 1, 1) * 10000 ** (-4 * k / head)
                turns[n, 2 * k + place] = complex(math.cos(angle), math.sin(angle))
    return turns


def _line_turns(length: int, head: int) -> Tensor:
    angles = torch.arange(length).double()[:, None] * 10000.0 ** (-2 * torch.arange(head // 2).double() / head)
    return torch.exp(1j * angles)


def _attention_inputs(
    linear: _Linear, at: str, end: str, heads: int, x: Tensor, turns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        part.unflatten(2, (heads, -1)).transpose(1, 2) for part in linear(x, f"{at}.qkv{end}").tensor_split(3, 2)
    )
    q = _turned(_norm(q, linear.weights[f"{at}.q_norm{end}.weight"]), turns)
    return q, _turned(_norm(k, linear.weights[f"{at}.k_norm{end}.weight"]), turns), v


def _joint(
    linear: _Linear, at: str, heads: int, given: Tensor, streams: list[tuple[Tensor, Tensor, dict[str, str]]]
) -> list[Tensor]:
    """A patch block over streams of tokens, each with weights of its own, that attend to one another."""
    made = [linear(given, f"{at}.{names['adaln']}").tensor_split(6, 2) for *_, names in streams]
    inputs = [
        _attention_inputs(
            linear,
            f"{at}.attn",
            names["end"],
            heads,
            _norm(x, linear.weights[f"{at}.{names['norm']}1.weight"]) * (1 + scale) + shift,
            turns,
        )
        for (x, turns, names), (shift, scale, *_) in zip(streams, made, strict=True)
    ]
    mixed = F.scaled_dot_product_attention(*(torch.cat(parts, 2) for parts in zip(*inputs, strict=True)))
    results, first = [], 0
    for (x, _, names), (*_, gate1, shift, scale, gate2) in zip(streams, made, strict=True):
        own = mixed[:, :, first : first + x.shape[1]].transpose(1, 2).flatten(2)
        first += x.shape[1]
        x = x + gate1 * linear(own, f"{at}.attn.proj{names['end']}")
        m = _norm(x, linear.weights[f"{at}.{names['norm']}2.weight"]) * (1 + scale) + shift
        mlp = f"{at}.{names['mlp']}"
        results.append(x + gate2 * linear(F.silu(linear(m, f"{mlp}.w1")) * linear(m, f"{mlp}.w3"), f"{mlp}.w2"))
    return results


def _places(height: int, width: int, channels: int) -> Tensor:
    """(C, H, W): of the column's number sines, then cosines; then of the row's."""
    table, quarter = torch.zeros(channels, height, width, dtype=torch.float64), channels // 4
    for k in range(quarter):
        frequency = 10000.0 ** (-k / quarter)
        columns, rows = torch.arange(width).double() * frequency, torch.arange(height).double() * frequency
        table[k], table[quarter + k] = columns.sin(), columns.cos()
        table[2 * quarter + k], table[3 * quarter + k] = rows.sin()[:, None], rows.cos()[:, None]
    return table.float()


def _pixels(linear: _Linear, s: DiTSizes, image: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The pixel blocks and the head; `patches` (B, L, D) condition them."""
    w, area, tokens = linear.weights, s.patch**2, grid[0] * grid[1]
    turns = _grid_turns(*grid, s.attention[0] // s.attention[1])
    x = linear(image.movedim(1, 3), "pixel_embedder.proj").movedim(3, 1) + _places(*image.shape[2:], s.pixel_width)
    x = F.unfold(x, s.patch, stride=s.patch).unflatten(1, (s.pixel_width, area)).permute(0, 3, 2, 1)  # (B, L, P, C)
    for n in range(s.pixel_blocks):
        at = f"pixel_blocks.{n}"
        made = linear(patches, f"{at}.adaLN_modulation.0").unflatten(2, (area, -1)).split(s.pixel_width, dim=3)
        normed = _norm(x, w[f"{at}.norm1.weight"])
        if not s.post:
            normed = normed * (1 + made[1]) + made[0]
        small = linear(normed.flatten(2), f"{at}.compress_to_attn")
        q, k, v = _attention_inputs(linear, f"{at}.attn", "", s.attention[1], small, turns)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        large = linear(linear(mixed, f"{at}.attn.proj"), f"{at}.expand_from_attn").reshape(x.shape)
        x = x + (large * (1 + made[0]) + made[1] if s.post else made[2] * large)
        normed = _norm(x, w[f"{at}.norm2.weight"])
        if not s.post:
            normed = normed * (1 + made[4]) + made[3]
        result = linear(F.gelu(linear(normed, f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
        x = x + (result * (1 + made[2]) + made[3] if s.post else made[5] * result)
    colours = linear(_norm(x, w["final_layer.norm.weight"]), "final_layer.linear")
    flat = colours.permute(0, 3, 2, 1).reshape(image.shape[0], 3 * area, tokens)
    return F.fold(flat, image.shape[2:], s.patch, stride=s.patch)
