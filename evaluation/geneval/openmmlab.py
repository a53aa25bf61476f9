"""OpenMMLab's Mask2Former checkpoints (mmdet 2.x), converted for transformers' Mask2FormerForUniversalSegmentation.

- The new names are those of the Hugging Face hub's files, not of the modules: transformers renames modules between
  versions, and reads the hub's names in all of them.
- Both networks compute the same. Besides names, two things differ. Queries, keys and values have one matrix in mmdet's
  Swin and in its decoder's self-attention, three in transformers. A patch merging has its 4 pixels of C channels in the
  order of unfold in mmdet, channel by channel with (row, column) inside, and in transformers pixel by pixel, column
  before row, with the channels inside.
- A file is read without running anything in it: besides weights it holds whatever the training stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from data.errors import UserError
from t2i.released.checkpoint import Checkpoint

_ENCODER = "model.pixel_level_module.encoder"
_PIXELS = "model.pixel_level_module.decoder"
_QUERIES = "model.transformer_module"
_HEAD = "panoptic_head"
_FEED_FORWARD = {"ffns.0.layers.0.0": "fc1", "ffns.0.layers.1": "fc2"}
_SINGLE = {
    "backbone.patch_embed.projection": f"{_ENCODER}.embeddings.patch_embeddings.projection",
    "backbone.patch_embed.norm": f"{_ENCODER}.embeddings.norm",
    **{f"backbone.norm{i}": f"{_ENCODER}.hidden_states_norms.stage{i + 1}" for i in range(4)},
    # Both lists of projections begin with the coarsest level.
    **{f"{_HEAD}.pixel_decoder.input_convs.{i}.conv": f"{_PIXELS}.input_projections.{i}.0" for i in range(3)},
    **{f"{_HEAD}.pixel_decoder.input_convs.{i}.gn": f"{_PIXELS}.input_projections.{i}.1" for i in range(3)},
    f"{_HEAD}.pixel_decoder.level_encoding": f"{_PIXELS}.level_embed",
    f"{_HEAD}.pixel_decoder.lateral_convs.0.conv": f"{_PIXELS}.adapter_1.0",
    f"{_HEAD}.pixel_decoder.lateral_convs.0.gn": f"{_PIXELS}.adapter_1.1",
    f"{_HEAD}.pixel_decoder.output_convs.0.conv": f"{_PIXELS}.layer_1.0",
    f"{_HEAD}.pixel_decoder.output_convs.0.gn": f"{_PIXELS}.layer_1.1",
    f"{_HEAD}.pixel_decoder.mask_feature": f"{_PIXELS}.mask_projection",
    f"{_HEAD}.transformer_decoder.post_norm": f"{_QUERIES}.decoder.layernorm",
    f"{_HEAD}.query_embed": f"{_QUERIES}.queries_embedder",
    f"{_HEAD}.query_feat": f"{_QUERIES}.queries_features",
    f"{_HEAD}.level_embed": f"{_QUERIES}.level_embed",
    f"{_HEAD}.cls_embed": "class_predictor",  # "no object" is the last class in both
    **{f"{_HEAD}.mask_embed.{2 * i}": f"{_QUERIES}.decoder.mask_predictor.mask_embedder.{i}.0" for i in range(3)},
}
# Repeated modules: their prefix in mmdet and in transformers, and the names inside.
_REPEATED: list[tuple[str, str, dict[str, str]]] = [
    (
        r"backbone\.stages\.(\d+)\.blocks\.(\d+)\.",
        _ENCODER + ".encoder.layers.{}.blocks.{}.",
        {
            "norm1": "layernorm_before",
            "attn.w_msa": "attention.self",  # its table of position biases
            "attn.w_msa.qkv": "attention.self.{}",
            "attn.w_msa.proj": "attention.output.dense",
            "norm2": "layernorm_after",
            "ffn.layers.0.0": "intermediate.dense",
            "ffn.layers.1": "output.dense",
        },
    ),
    (
        r"backbone\.stages\.(\d+)\.downsample\.",
        _ENCODER + ".encoder.layers.{}.downsample.",
        {"norm": "norm", "reduction": "reduction"},
    ),
    (
        rf"{_HEAD}\.pixel_decoder\.encoder\.layers\.(\d+)\.",
        _PIXELS + ".encoder.layers.{}.",
        {
            **{
                f"attentions.0.{name}": f"self_attn.{name}"
                for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
            },
            "norms.0": "self_attn_layer_norm",
            **_FEED_FORWARD,
            "norms.1": "final_layer_norm",
        },
    ),
    (
        rf"{_HEAD}\.transformer_decoder\.layers\.(\d+)\.",
        _QUERIES + ".decoder.layers.{}.",
        {
            # A layer's first attention is to the pixels.
            "attentions.0.attn": "cross_attn",
            "attentions.0.attn.out_proj": "cross_attn.out_proj",
            "norms.0": "cross_attn_layer_norm",
            "attentions.1.attn": "self_attn.{}",
            "attentions.1.attn.out_proj": "self_attn.out_proj",
            "norms.1": "self_attn_layer_norm",
            **_FEED_FORWARD,
            "norms.2": "final_layer_norm",
        },
    ),
]


def read(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint that mmcv or mmengine saved, in torch's old file format or its new one.

    Raises:
        UserError: it is no such file, or damaged.
    """
    checkpoint = Checkpoint(path)
    for name, cause in checkpoint.unusable.items():
        raise UserError(f"{path} is no checkpoint of OpenMMLab: its {name} is {cause}")
    return {name: checkpoint.tensor(name).clone() for name in checkpoint.weights}


def convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of Mask2Former with a Swin backbone, from mmdet's names to the Hugging Face hub's.

    Raises:
        UserError: a weight that this network does not have, or another order of Swin's position biases.
    """
    converted: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.endswith(".relative_position_index"):
            _check_positions(name, weight)
        else:
            converted |= _convert(name, weight)
    return converted


def _convert(name: str, weight: Tensor) -> dict[str, Tensor]:
    module, leaf = name.rpartition(".")[::2]
    there = _place(module)
    if there == f"{_PIXELS}.level_embed":
        return {there: weight}
    if "{}" in there:  # joint queries, keys and values
        parts = ("query", "key", "value") if module.endswith(".qkv") else ("q_proj", "k_proj", "v_proj")
        leaf = leaf.removeprefix("in_proj_")
        return {f"{there.format(part)}.{leaf}": piece for part, piece in zip(parts, weight.chunk(3), strict=True)}
    return {f"{there}.{leaf}": _pixels_first(weight) if ".downsample." in name else weight}


def _place(module: str) -> str:
    """A module's new name, with "{}" where it becomes three."""
    if module in _SINGLE:
        return _SINGLE[module]
    for here, there, parts in _REPEATED:
        found = re.match(here, module)
        if found and module[found.end() :] in parts:
            return there.format(*found.groups()) + parts[module[found.end() :]]
    raise UserError(f"the checkpoint is not of a Mask2Former with a Swin backbone: it has weights of {module!r}")


def _pixels_first(weight: Tensor) -> Tensor:
    """Reorder a patch merging's inputs, the last axis, from (channel, row, column) to (column, row, channel)."""
    patches = weight.unflatten(-1, (-1, 2, 2))
    return patches.movedim((-3, -2, -1), (-1, -2, -3)).flatten(-3).contiguous()


def _check_positions(name: str, index: Tensor) -> None:
    """A pair of a window's pixels must have the row (query - key) of the bias table, by rows, then columns."""
    window = round(index.shape[0] ** 0.5)
    at = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    rows, columns = (at[:, None] - at[None] + window - 1).unbind(-1)
    if not torch.equal(index, rows * (2 * window - 1) + columns):
        raise UserError(f"{name}: not the order of position biases that Swin has")
