"""Mask2Former as mmdet 2.x computes it from its checkpoints, written from the papers, to compare with transformers'.

Swin: Liu et al. 2021. Deformable attention: Zhu et al. 2021. Mask2Former: Cheng et al. 2022. Plain functions of a state
dict with mmdet's names, in fp64; B = 1 throughout, N = tokens of all levels, C = channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
HEAD = "panoptic_head"
LEVELS, POINTS = 3, 4


@dataclass(frozen=True)
class Sizes:
    """Widths and depths; the defaults are Swin-S's."""

    embed: int = 96
    depths: tuple[int, ...] = (2, 2, 18, 2)
    swin_heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    width: int = 256
    heads: int = 8
    encoder_layers: int = 6
    encoder_hidden: int = 1024
    decoder_layers: int = 9
    decoder_hidden: int = 2048
    queries: int = 100
    classes: int = 80


TINY = Sizes(8, (2, 2, 2, 2), (1, 2, 2, 4), 4, 32, 4, 2, 48, 4, 56, 10, 80)


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every name of such a checkpoint, with its shape."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, into: int, out: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (out, into), (out,)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (width,), (width,)

    found["backbone.patch_embed.projection.weight"] = (sizes.embed, 3, 4, 4)
    found["backbone.patch_embed.projection.bias"] = (sizes.embed,)
    norm("backbone.patch_embed.norm", sizes.embed)
    channels = [sizes.embed * 2**stage for stage in range(4)]
    for stage, (depth, heads, width) in enumerate(zip(sizes.depths, sizes.swin_heads, channels, strict=True)):
        for block in range(depth):
            at = f"backbone.stages.{stage}.blocks.{block}"
            norm(f"{at}.norm1", width)
            found[f"{at}.attn.w_msa.relative_position_bias_table"] = ((2 * sizes.window - 1) ** 2, heads)
            found[f"{at}.attn.w_msa.relative_position_index"] = (sizes.window**2, sizes.window**2)
            linear(f"{at}.attn.w_msa.qkv", width, 3 * width)
            linear(f"{at}.attn.w_msa.proj", width, width)
            norm(f"{at}.norm2", width)
            linear(f"{at}.ffn.layers.0.0", width, 4 * width)
            linear(f"{at}.ffn.layers.1", 4 * width, width)
        if stage < 3:
            norm(f"backbone.stages.{stage}.downsample.norm", 4 * width)
            found[f"backbone.stages.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
        norm(f"backbone.norm{stage}", width)
    pixels = f"{HEAD}.pixel_decoder"
    for level in range(LEVELS):
        found[f"{pixels}.input_convs.{level}.conv.weight"] = (sizes.width, channels[3 - level], 1, 1)
        found[f"{pixels}.input_convs.{level}.conv.bias"] = (sizes.width,)
        norm(f"{pixels}.input_convs.{level}.gn", sizes.width)
    for layer in range(sizes.encoder_layers):
        at = f"{pixels}.encoder.layers.{layer}"
        linear(f"{at}.attentions.0.sampling_offsets", sizes.width, sizes.heads * LEVELS * POINTS * 2)
        linear(f"{at}.attentions.0.attention_weights", sizes.width, sizes.heads * LEVELS * POINTS)
        linear(f"{at}.attentions.0.value_proj", sizes.width, sizes.width)
        linear(f"{at}.attentions.0.output_proj", sizes.width, sizes.width)
        linear(f"{at}.ffns.0.layers.0.0", sizes.width, sizes.encoder_hidden)
        linear(f"{at}.ffns.0.layers.1", sizes.encoder_hidden, sizes.width)
        norm(f"{at}.norms.0", sizes.width)
        norm(f"{at}.norms.1", sizes.width)
    found[f"{pixels}.level_encoding.weight"] = (LEVELS, sizes.width)
    found[f"{pixels}.lateral_convs.0.conv.weight"] = (sizes.width, channels[0], 1, 1)
    norm(f"{pixels}.lateral_convs.0.gn", sizes.width)
    found[f"{pixels}.output_convs.0.conv.weight"] = (sizes.width, sizes.width, 3, 3)
    norm(f"{pixels}.output_convs.0.gn", sizes.width)
    found[f"{pixels}.mask_feature.weight"] = (sizes.width, sizes.width, 1, 1)
    found[f"{pixels}.mask_feature.bias"] = (sizes.width,)
    for layer in range(sizes.decoder_layers):
        at = f"{HEAD}.transformer_decoder.layers.{layer}"
        for attention in range(2):
            found[f"{at}.attentions.{attention}.attn.in_proj_weight"] = (3 * sizes.width, sizes.width)
            found[f"{at}.attentions.{attention}.attn.in_proj_bias"] = (3 * sizes.width,)
            linear(f"{at}.attentions.{attention}.attn.out_proj", sizes.width, sizes.width)
        linear(f"{at}.ffns.0.layers.0.0", sizes.width, sizes.decoder_hidden)
        linear(f"{at}.ffns.0.layers.1", sizes.decoder_hidden, sizes.width)
        for i in range(3):
            norm(f"{at}.norms.{i}", sizes.width)
    norm(f"{HEAD}.transformer_decoder.post_norm", sizes.width)
    found[f"{HEAD}.query_embed.weight"] = found[f"{HEAD}.query_feat.weight"] = (sizes.queries, sizes.width)
    found[f"{HEAD}.level_embed.weight"] = (LEVELS, sizes.width)
    linear(f"{HEAD}.cls_embed", sizes.width, sizes.classes + 1)
    for i in (0, 2, 4):
        linear(f"{HEAD}.mask_embed.{i}", sizes.width, sizes.width)
    return found


def position_index(window: int) -> Tensor:
    """mmdet's way: a sequence of double steps, added to itself, and turned around."""
    steps = (torch.arange(window)[:, None] * (2 * window - 1) + torch.arange(window)).reshape(1, -1)
    return (steps + steps.T).flip(1)


def random_weights(sizes: Sizes, seed: int = 0) -> Weights:
    """A checkpoint in which no two weights are alike, and no norm or bias is neutral."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(sizes).items():
        if name.endswith("relative_position_index"):
            weights[name] = position_index(sizes.window)
            continue
        drawn = torch.randn(shape, generator=generator)
        fan = math.prod(shape[1:]) if len(shape) > 1 and "emb" not in name and "table" not in name else 1
        weights[name] = 1 + 0.2 * drawn if "norm" in name and name.endswith("weight") else drawn * fan**-0.5
    return weights


def mask2former(weights: Weights, sizes: Sizes, image: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits (1, Q, classes + 1) and mask logits (1, Q, H / 4, W / 4) of an image (1, 3, H, W)."""
    features = _swin(weights, sizes, image)
    mask_feature, levels = _pixel_decoder(weights, sizes, features)
    return _decoder(weights, sizes, mask_feature, levels)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def _conv_norm(weights: Weights, name: str, x: Tensor, padding: int = 0) -> Tensor:
    x = F.conv2d(x, weights[f"{name}.conv.weight"], weights.get(f"{name}.conv.bias"), padding=padding)
    return F.group_norm(x, 32, weights[f"{name}.gn.weight"], weights[f"{name}.gn.bias"])


def _swin(weights: Weights, sizes: Sizes, image: Tensor) -> list[Tensor]:
    at = "backbone.patch_embed"
    x = F.conv2d(image, weights[f"{at}.projection.weight"], weights[f"{at}.projection.bias"], stride=4)
    x = _norm(weights, f"{at}.norm", x.movedim(1, -1))
    outputs = []
    for stage, depth in enumerate(sizes.depths):
        for block in range(depth):
            at = f"backbone.stages.{stage}.blocks.{block}"
            shift = sizes.window // 2 if block % 2 else 0
            normed = _norm(weights, f"{at}.norm1", x)
            x = x + _windows(weights, f"{at}.attn.w_msa", normed, sizes.window, shift, sizes.swin_heads[stage])
            hidden = F.gelu(_linear(weights, f"{at}.ffn.layers.0.0", _norm(weights, f"{at}.norm2", x)))
            x = x + _linear(weights, f"{at}.ffn.layers.1", hidden)
        outputs.append(_norm(weights, f"backbone.norm{stage}", x).movedim(-1, 1))
        if stage < 3:
            at = f"backbone.stages.{stage}.downsample"
            height, width = x.shape[1:3]
            padded = F.pad(x.movedim(-1, 1), (0, width % 2, 0, height % 2))
            patches = F.unfold(padded, kernel_size=2, stride=2).transpose(1, 2)
            x = _linear(weights, f"{at}.reduction", _norm(weights, f"{at}.norm", patches))
            x = x.unflatten(1, ((height + 1) // 2, (width + 1) // 2))
    return outputs


def _windows(weights: Weights, name: str, x: Tensor, window: int, shift: int, heads: int) -> Tensor:
    """Attention within windows, one window after the other."""
    height, width, channels = x.shape[1:]
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))[0]
    rows, columns = x.shape[:2]
    # Pixels that the shift brings together from opposite sides do not see each other.
    sides = torch.arange(rows).ge(rows - shift).long()[:, None] * 2 + torch.arange(columns).ge(columns - shift).long()
    x = x.roll((-shift, -shift), (0, 1))
    table = weights[f"{name}.relative_position_bias_table"]
    bias = table[weights[f"{name}.relative_position_index"]].movedim(-1, 0)
    out = torch.zeros_like(x)
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            piece = x[top : top + window, left : left + window].reshape(-1, channels)
            side = sides[top : top + window, left : left + window].reshape(-1)
            if shift == 0:
                side = torch.zeros_like(side)
            q, k, v = _linear(weights, f"{name}.qkv", piece).view(-1, 3, heads, channels // heads).movedim(0, 2)
            logits = q @ k.mT * (channels // heads) ** -0.5 + bias - 100.0 * (side[:, None] != side[None])
            mixed = (logits.softmax(-1) @ v).movedim(0, 1).reshape(window, window, channels)
            out[top : top + window, left : left + window] = _linear(weights, f"{name}.proj", mixed)
    return out.roll((shift, shift), (0, 1))[None, :height, :width]


def _sine(height: int, width: int, channels: int) -> Tensor:
    """DETR's position code, (height * width, channels): y in the first half, x in the second, each 0 to 2 pi."""
    frequency = 10000 ** (torch.arange(channels // 2).double() // 2 * 2 / (channels // 2))
    codes = []
    for axis, length in ((0, height), (1, width)):
        angle = torch.arange(1, length + 1).double() / (length + 1e-6) * 2 * math.pi
        phase = angle[:, None] / frequency
        code = torch.stack((phase[:, 0::2].sin(), phase[:, 1::2].cos()), -1).flatten(1)
        codes.append(code[:, None].expand(-1, width, -1) if axis == 0 else code[None].expand(height, -1, -1))
    return torch.cat(codes, -1).flatten(0, 1)


def _pixel_decoder(weights: Weights, sizes: Sizes, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    name = f"{HEAD}.pixel_decoder"
    grids = [feature.shape[2:] for feature in features[:0:-1]]  # coarsest first
    tokens, positions, places = [], [], []
    for level, feature in enumerate(features[:0:-1]):
        height, width = grids[level]
        tokens.append(_conv_norm(weights, f"{name}.input_convs.{level}", feature)[0].flatten(1).T)
        positions.append(_sine(height, width, sizes.width) + weights[f"{name}.level_encoding.weight"][level])
        y, x = torch.meshgrid(torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5, indexing="ij")
        places.append(torch.stack((x / width, y / height), -1).flatten(0, 1))
    x_NC, position, place = torch.cat(tokens), torch.cat(positions), torch.cat(places)
    for layer in range(sizes.encoder_layers):
        at = f"{name}.encoder.layers.{layer}"
        attended = _deformable(weights, f"{at}.attentions.0", x_NC, x_NC + position, place, grids, sizes.heads)
        x_NC = _norm(weights, f"{at}.norms.0", x_NC + attended)
        hidden = _linear(weights, f"{at}.ffns.0.layers.0.0", x_NC).relu()
        x_NC = _norm(weights, f"{at}.norms.1", x_NC + _linear(weights, f"{at}.ffns.0.layers.1", hidden))
    pieces = x_NC.split([height * width for height, width in grids])
    levels = [piece.T.unflatten(1, grid)[None] for piece, grid in zip(pieces, grids, strict=True)]
    lateral = _conv_norm(weights, f"{name}.lateral_convs.0", features[0])
    finest = lateral + F.interpolate(levels[-1], lateral.shape[2:], mode="bilinear", align_corners=False)
    finest = _conv_norm(weights, f"{name}.output_convs.0", finest, padding=1).relu()
    return F.conv2d(finest, weights[f"{name}.mask_feature.weight"], weights[f"{name}.mask_feature.bias"]), levels


def _deformable(
    weights: Weights, name: str, x_NC: Tensor, query: Tensor, place: Tensor, grids: list[torch.Size], heads: int
) -> Tensor:
    """Each head looks at a few places of every level, (x, y) pixels of that level away from its own."""
    tokens = len(x_NC)
    value = _linear(weights, f"{name}.value_proj", x_NC).view(tokens, heads, -1)
    offsets = _linear(weights, f"{name}.sampling_offsets", query).view(tokens, heads, LEVELS, POINTS, 2)
    shares = _linear(weights, f"{name}.attention_weights", query).view(tokens, heads, -1).softmax(-1)
    shares = shares.view(tokens, heads, LEVELS, POINTS)
    mixed = torch.zeros_like(value)
    for level, (height, width) in enumerate(grids):
        start = sum(h * w for h, w in grids[:level])
        grid = value[start : start + height * width].view(height, width, heads, -1)
        for head in range(heads):
            for point in range(POINTS):
                x = place[:, 0] * width - 0.5 + offsets[:, head, level, point, 0]
                y = place[:, 1] * height - 0.5 + offsets[:, head, level, point, 1]
                mixed[:, head] += shares[:, head, level, point, None] * _between(grid[:, :, head], x, y)
    return _linear(weights, f"{name}.output_proj", mixed.flatten(1))


def _between(grid: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Bilinear values of a grid (height, width, C) at N places (0, 0 is the first pixel's centre); 0 outside."""
    height, width = grid.shape[:2]
    found = grid.new_zeros(len(x), grid.shape[2])
    for row in (y.floor().long(), y.floor().long() + 1):
        for column in (x.floor().long(), x.floor().long() + 1):
            share = (1 - (y - row).abs()) * (1 - (x - column).abs())
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixel = grid[row.clamp(0, height - 1), column.clamp(0, width - 1)]
            found += (share * inside)[:, None] * pixel
    return found


def _decoder(weights: Weights, sizes: Sizes, mask_feature: Tensor, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
    x = weights[f"{HEAD}.query_feat.weight"]
    position = weights[f"{HEAD}.query_embed.weight"]
    memory = [level[0].flatten(1).T + weights[f"{HEAD}.level_embed.weight"][i] for i, level in enumerate(levels)]
    codes = [_sine(*level.shape[2:], sizes.width) for level in levels]
    classes, masks = _predict(weights, x, mask_feature)
    for layer in range(sizes.decoder_layers):
        at, level = f"{HEAD}.transformer_decoder.layers.{layer}", layer % LEVELS
        small = F.interpolate(masks, levels[level].shape[2:], mode="bilinear", align_corners=False)
        unseen = small[0].flatten(1).sigmoid() < 0.5
        unseen[unseen.all(-1)] = False  # a query that sees nothing sees all
        keys = memory[level] + codes[level]
        attended = _attention(
            weights, f"{at}.attentions.0.attn", x + position, keys, memory[level], sizes.heads, unseen
        )
        x = _norm(weights, f"{at}.norms.0", x + attended)
        attended = _attention(weights, f"{at}.attentions.1.attn", x + position, x + position, x, sizes.heads)
        x = _norm(weights, f"{at}.norms.1", x + attended)
        hidden = _linear(weights, f"{at}.ffns.0.layers.0.0", x).relu()
        x = _norm(weights, f"{at}.norms.2", x + _linear(weights, f"{at}.ffns.0.layers.1", hidden))
        classes, masks = _predict(weights, x, mask_feature)
    return classes, masks


def _predict(weights: Weights, x: Tensor, mask_feature: Tensor) -> tuple[Tensor, Tensor]:
    x = _norm(weights, f"{HEAD}.transformer_decoder.post_norm", x)
    mask = x
    for i in (0, 2, 4):
        mask = _linear(weights, f"{HEAD}.mask_embed.{i}", mask if i == 0 else mask.relu())
    return _linear(weights, f"{HEAD}.cls_embed", x)[None], torch.einsum("qc,bchw->bqhw", mask, mask_feature)


def _attention(
    weights: Weights, name: str, query: Tensor, key: Tensor, value: Tensor, heads: int, unseen: Tensor | None = None
) -> Tensor:
    matrices, biases = weights[f"{name}.in_proj_weight"].chunk(3), weights[f"{name}.in_proj_bias"].chunk(3)
    q, k, v = (
        F.linear(x, matrix, bias).unflatten(-1, (heads, -1)).movedim(1, 0)
        for x, matrix, bias in zip((query, key, value), matrices, biases, strict=True)
    )
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if unseen is not None:
        logits = logits.masked_fill(unseen, -math.inf)
    return _linear(weights, f"{name}.out_proj", (logits.softmax(-1) @ v).movedim(0, 1).flatten(1))
