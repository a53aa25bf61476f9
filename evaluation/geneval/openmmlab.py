"""OpenMMLab's Mask2Former checkpoints (mmdet 2.x), as transformers' Mask2FormerForUniversalSegmentation takes them.

- The names given are those of the Hugging Face hub's files, not of the modules: transformers renames modules between
  its versions, and reads the hub's names in all of them.
- Both networks compute the same; but for names, only this differs:
  queries, keys and values have one matrix here in Swin and in the decoder's self-attention, three there; a patch
  merging has its 4 pixels of C channels here as unfold gives them, channel by channel with (row, column) inside, and
  there pixel by pixel, column before row, with the channels inside.
- A file is read without running anything that is in it: beside weights it holds whatever the training noted.
"""

from __future__ import annotations

import pickle
import re
import types
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import UserError
from t2i.released.checkpoint import Inert

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
# The repeated ones: where they lie, here and there, and what each of them holds.
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
            # A layer attends to the pixels first.
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


class _Unpickler(pickle.Unpickler):
    """Knows tensors and ordered dictionaries; whatever else a file names becomes `Inert`, which does nothing.

    torch.load itself looks up the storage types. Its own weights_only refuses a file for one class it does not know.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")):
            return getattr(torch._utils, name)
        return Inert


class _Restricted(types.ModuleType):
    """What torch.load takes for the module pickle."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _Unpickler(file, **options).load()


def read(path: Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint that mmcv or mmengine saved, old file format or new.

    Raises:
        UserError: it is no such file, or damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_Restricted("restricted"))
    except Exception as error:  # a spoilt file may raise anything
        raise UserError(f"{path} is no checkpoint, or damaged: {' '.join(str(error).split())[:200]}") from error
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise UserError(f"{path} is no checkpoint of OpenMMLab: it has no state_dict of tensors")
    return dict(weights)


def convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn the weights of mmdet's Mask2Former with a Swin backbone into those of transformers.

    Args:
        weights: by mmdet's names. Each is used once.

    Returns:
        By the Hugging Face hub's names.

    Raises:
        UserError: a weight that this network has not, or another order of Swin's position biases.
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
    """A module's name there; "{}" stands where it becomes three."""
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
    """Which row of its bias table a pair of a window's pixels has: (query - key) by rows, then columns."""
    window = round(index.shape[0] ** 0.5)
    at = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    rows, columns = (at[:, None] - at[None] + window - 1).unbind(-1)
    if not torch.equal(index, rows * (2 * window - 1) + columns):
        raise UserError(f"{name}: not the order of position biases that Swin has")
