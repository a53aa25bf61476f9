"""Weights between the released layouts and our model folders.

- A released checkpoint holds the denoiser as trained, perhaps its EMA, and the projector, of which Lightning's has no
  EMA: if there is only one of two, both of our files get it.
- The position table in PixelGen's checkpoints, which our networks compute, is compared with ours.
- Released checkpoints do not hold the null caption. PixelGen was trained on Qwen3's states of an empty caption: 128
  pads, all masked. What attention returned then was a library's choice of two: the mean of the values, as without a
  mask, or zero. No record says which. PixelDiT's null caption is Gemma-2's, whose first token is not masked.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sized
from dataclasses import dataclass, field
from itertools import chain
from textwrap import shorten
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from t2i.build import build_denoiser, build_projector
from t2i.config.base import ConfigError
from t2i.config.run import ModelConfig, RunConfig
from t2i.model_folder import DENOISER, PROJECTOR, UNUSED, check_finite
from t2i.models.layers import sincos_table
from t2i.models.text import TextEncoder
from t2i.released.checkpoint import AVERAGE, Checkpoint, StoredTensor, kind_name
from t2i.released.names import (
    LIGHTNING,
    PLAIN,
    POSITIONS,
    PROJECTOR_TABLE,
    TITLES,
    Table,
    check_released,
    denoiser_table,
    from_released,
    network_name,
    prefixes,
    released_shares,
    released_sizes,
    to_released,
    unused_weights,
)

# The average of a constant drifts by rounding, up to half a unit in the last place / (1 - decay), which is 3e-4 near 1,
# and bf16 is off by 2e-3. Another table would differ by about 1.
_TOLERANCE = 5e-3


def trained_resolution(checkpoint: Checkpoint, patch_size: int) -> int | None:
    """Side in pixels of a checkpoint's training images, by its position table; None without one, as in PixelDiT."""
    for prefix in LIGHTNING.denoiser.values():
        stored = checkpoint.weights.get(prefix + POSITIONS)
        if stored is not None and len(stored.size) == 3:
            return math.isqrt(stored.size[1]) * patch_size
    return None


def compare_positions(checkpoint: Checkpoint, name: str, width: int) -> str:
    """A sentence about the stored position table `name`; a ConfigError if it is not the one that our network
    computes."""
    size = list(checkpoint.weights[name].size)
    side = math.isqrt(size[1]) if len(size) == 3 else 0
    if size != [1, side * side, width]:
        raise ConfigError(f"{checkpoint.path}: {name} is {size}: it should be [1, a square number, {width}]")
    computed = sincos_table(side, side, width, torch.device("cpu"))
    difference = (checkpoint.tensor(name)[0].float() - computed).abs().max().item()
    if not difference <= _TOLERANCE:
        raise ConfigError(
            f"{checkpoint.path}: {name} is not the table of sines and cosines that this network adds: it differs by "
            f"{difference:.2g}"
        )
    return f"a table for {side} x {side} patches; computed for any grid, it differs by {difference}"


NullAttention = Literal["mean", "zero"]


def null_caption(encoder: TextEncoder, attention: NullAttention) -> Tensor:
    """States (L, E) of the empty caption; `attention`: the result of attention where every token is masked."""
    if attention == "mean":
        # All pads are the same token with the same values: any attention weights give the mean.
        return encoder.null_caption()
    with encoder.loaded() as net:
        outputs = [module for name, module in net.named_modules() if name.endswith("self_attn.o_proj")]
        if not outputs or encoder.tokenizer("")["input_ids"]:
            raise ConfigError(
                "null_attention zero: it should be mean for this text.model, which is no decoder of Qwen's kind or "
                "makes tokens of an empty caption"
            )
        hooks = [module.register_forward_pre_hook(_nothing) for module in outputs]
        try:
            return encoder.null_caption()
        finally:
            for hook in hooks:
                hook.remove()


def _nothing(module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (torch.zeros_like(arguments[0]),)


_OTHER = {"raw": "ema", "ema": "raw"}
_LIGHTNING = "2.4.0"
"""The version in PixelGen's public configuration; Lightning refuses a checkpoint without one."""


@dataclass
class Report:
    """What became of every key of a checkpoint."""

    used: dict[str, str] = field(default_factory=dict)
    """Our name by the checkpoint's; for the EMA, in ema.safetensors."""
    recomputed: dict[str, str] = field(default_factory=dict)
    """Not imported, since the network computes it."""
    left: dict[str, str] = field(default_factory=dict)
    """Not imported, or not all rows of it."""
    notes: list[str] = field(default_factory=list)
    """What the checkpoint does not hold, what stands in for it, and what our network has no place for."""


@dataclass(frozen=True)
class Imported:
    """Tensors of a model folder's two files, in fp32; they may be views of the checkpoint: do not write to them."""

    raw: dict[str, Tensor]
    ema: dict[str, Tensor]
    report: Report


@dataclass(frozen=True)
class Exported:
    """A checkpoint for torch.save, and notes about it."""

    content: dict[str, Any]
    notes: list[str]


class _Part(NamedTuple):
    """A network in a model folder and in a checkpoint: the prefixes of its names, the table between them, and other
    names that the checkpoint may have under its prefix."""

    ours: str
    released: str
    table: Table
    others: Collection[str] = ()


def _denoiser(which: str, model: ModelConfig) -> _Part:
    others = (POSITIONS,) if model.family == "pixelgen" else unused_weights(model)
    return _Part(DENOISER, prefixes(model).denoiser[which], denoiser_table(model), others)


def _projector(prefix: str) -> _Part:
    return _Part(PROJECTOR, prefix, PROJECTOR_TABLE)


def import_weights(checkpoint: Checkpoint, config: RunConfig, text_width: int) -> Imported:
    """The weights of a released checkpoint under our names.

    Settings that no weight shows come from the config: where the class's tokens join, and dropout. `config`: of a run
    with the checkpoint's `model` and `text`; `text_width`: of the text encoder's states, ignored for classes.

    Raises:
        ConfigError: the checkpoint is damaged, of another network, or has numbers that are not finite.
    """
    model, named = config.model, prefixes(config.model)
    check_released(model)
    with torch.device("meta"):
        denoiser = build_denoiser(model, text_width, config.text.length)
    report, found = Report(), dict[str, dict[str, Tensor]]()
    for which, prefix in named.denoiser.items():
        if _holds(checkpoint, prefix):
            found[which] = _take(checkpoint, _denoiser(which, model), denoiser, model, report)
            found[which] |= _keep(checkpoint, prefix, model, report)
            if (positions := prefix + POSITIONS) in checkpoint.weights:
                report.recomputed[positions] = compare_positions(checkpoint, positions, model.width)
    if not found:
        words = " or ".join(named.denoiser.values())
        for name in sorted(checkpoint.weights.keys() | checkpoint.unusable.keys()):
            if name.startswith(tuple(named.denoiser.values())):
                _refuse_unusable(checkpoint, name)
        raise ConfigError(
            f"{checkpoint.path} is not a checkpoint of {TITLES[model.family]}: no weight's name begins with {words}"
        )
    for which in _OTHER.keys() - found.keys():
        report.notes.append(f"{which}: the checkpoint has only the {_OTHER[which]} weights, which stand in for them")
    projectors = {
        which: _take_projector(checkpoint, _projector(prefix), model, report)
        for which, prefix in named.projector.items()
        if _holds(checkpoint, f"{prefix}4.bias")
    }
    if not projectors:
        report.notes.append("projector: the checkpoint has none; training with alignment would start a fresh one")
    if unused_weights(model):
        report.notes.append(
            "the last block's text: but for its keys and values it is kept to be exported again, and not trained"
        )
    _note_what_is_left(checkpoint, report)
    kept = (item for part in found.values() for item in part.items() if item[0].startswith(UNUSED))
    used = ((name, checkpoint.tensor(name).float()) for name in report.used)
    check_finite(chain(used, kept), str(checkpoint.path))
    raw, ema = ({**_either(found, which), **_either(projectors, which)} for which in _OTHER)
    return Imported(raw, ema, report)


def _holds(checkpoint: Checkpoint, prefix: str) -> bool:
    """Whether a tensor with this prefix is not empty: placeholders of sharded weights are."""
    return any(name.startswith(prefix) and 0 not in stored.size for name, stored in checkpoint.weights.items())


def _refuse_unusable(checkpoint: Checkpoint, name: str) -> None:
    """Raise a ConfigError with the cause if a needed weight cannot be read."""
    cause = checkpoint.unusable.get(name)
    if name in checkpoint.weights and 0 in checkpoint.weights[name].size:
        cause = "empty, a placeholder as ZeRO-3 leaves: gather the weights first, by zero_to_fp32.py for one"
    if cause:
        raise ConfigError(f"{checkpoint.path}: {name} is {cause}")


def _either(found: Mapping[str, dict[str, Tensor]], which: str) -> dict[str, Tensor]:
    return found.get(which) or found.get(_OTHER[which], {})


def _take(
    checkpoint: Checkpoint, part: _Part, network: torch.nn.Module, model: ModelConfig, report: Report
) -> dict[str, Tensor]:
    """A network's tensors: all of them, in the expected shapes, and no others."""
    ours = network.state_dict()
    sources = {name: released_shares(part.table, name) for name in ours}
    expected = {share.name for shares in sources.values() for share in shares}
    for needed in sorted(expected):
        _refuse_unusable(checkpoint, part.released + needed)
    present = {name.removeprefix(part.released) for name in checkpoint.weights if name.startswith(part.released)}
    another = f"{checkpoint.path}, {network_name(checkpoint)}, is of another network than the config's model"
    for problem, wrong in (("lacks", expected - present), ("has", present - expected - {*part.others})):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ConfigError(f"{another}: it {problem} {part.released}{min(wrong)}{more}")
    taken = {}
    for name, shares in sources.items():
        for share, right in zip(shares, released_sizes(name, ours[name].shape, shares, model), strict=True):
            released = part.released + share.name
            size = list(checkpoint.weights[released].size)
            if size != right:
                raise ConfigError(f"{another}: {released} is {size}, by the config {right}")
            report.used[released] = part.ours + name
            if not share.whole:
                first, last = (size[0] // share.of * edge for edge in (share.first, share.last))
                report.left[f"{_place(released)}, the other rows"] = (
                    f"used are {first} to {last - 1} of {size[0]}; kept to be exported again"
                )
                taken[UNUSED + share.name] = checkpoint.tensor(released).float()
        tensors = [checkpoint.tensor(part.released + share.name).float() for share in shares]
        taken[part.ours + name] = from_released(name, tensors, shares, model)
    return taken


def _keep(checkpoint: Checkpoint, prefix: str, model: ModelConfig, report: Report) -> dict[str, Tensor]:
    """Tensors of a denoiser that our networks do not read, as far as the checkpoint has them."""
    kept = {}
    for name, shape in unused_weights(model).items():
        if (released := prefix + name) in checkpoint.weights:
            size = checkpoint.weights[released].size
            if tuple(size) != shape:
                raise ConfigError(f"{checkpoint.path}: {released} is {list(size)}, by the config {list(shape)}")
            report.left[_place(released)] = f"tensor {list(size)}, kept to be exported again"
            kept[UNUSED + name] = checkpoint.tensor(released).float()
    return kept


def _take_projector(checkpoint: Checkpoint, part: _Part, model: ModelConfig, report: Report) -> dict[str, Tensor]:
    with torch.device("meta"):
        projector = build_projector(model, max(checkpoint.weights[f"{part.released}4.bias"].size, default=1))
    return _take(checkpoint, part, projector, model, report)


def _note_what_is_left(checkpoint: Checkpoint, report: Report) -> None:
    for name in checkpoint.weights.keys() - report.used.keys() - report.recomputed.keys():
        report.left.setdefault(_place(name), f"tensor {list(checkpoint.weights[name].size)}")
    for name, cause in checkpoint.unusable.items():
        report.left[_place(name)] = f"is {cause}"
    for key, value in checkpoint.rest.items():
        report.left[str(key)] = _described(value)
    for name in checkpoint.unknown:
        report.left[f"class or function {name}"] = "not looked for: nothing of a file is run"


def _described(value: Any) -> str:
    """A value of any type in a line."""
    if isinstance(value, StoredTensor):
        return f"tensor {value.size}"
    if isinstance(value, str | bytes | int | float | complex | torch.dtype | None):
        return shorten(repr(value), 200)
    return kind_name(value) + (f" of {len(value)}" if isinstance(value, Sized) and not isinstance(value, type) else "")


def _place(name: str) -> str:
    """Where one of the weights is in the file."""
    return name if name.startswith(f"{AVERAGE}.") else f"state_dict.{name}"


def export_weights(config: RunConfig, raw: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> Exported:
    """A checkpoint in the released layout, without an optimizer, from a model folder's weights.

    For PixelDiT from text, the EMA is written only if it differs from the weights. A ConfigError is raised if a weight
    is not of the config's network, the network is of no released kind, or PixelGen's images are not square.
    """
    model, named = config.model, prefixes(config.model)
    check_released(model)
    weights: dict[str, Tensor] = {}
    for which, tensors in (("raw", raw), ("ema", ema)):
        weights |= _besides(config, tensors, named.denoiser[which])
        weights |= _renamed(tensors, _denoiser(which, model), model)
        if which in named.projector:
            weights |= _renamed(tensors, _projector(named.projector[which]), model)
    if named is not PLAIN:
        around = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": _LIGHTNING}
        return Exported({**around, "state_dict": weights}, [])
    own = {name: tensor for name, tensor in weights.items() if not name.startswith(f"{AVERAGE}.")}
    average = {name.removeprefix(f"{AVERAGE}."): weights[name] for name in weights if name not in own}
    content = {"state_dict": own}
    if own.keys() != average.keys() or any(not torch.equal(own[name], average[name]) for name in own):
        content[AVERAGE] = average
    if any(name.startswith(UNUSED) for name in raw):
        return Exported(content, [])
    zeros = "the last block's text: zeros, but for its keys and values; no picture depends on the rest"
    return Exported(content, [zeros])


def _besides(config: RunConfig, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors of a checkpoint's denoiser that our network has not: PixelGen's position table, and the unused weights as
    they were imported, or zeros."""
    model = config.model
    if model.family == "pixeldit":
        return {
            prefix + name: tensors[UNUSED + name] if UNUSED + name in tensors else torch.zeros(shape)
            for name, shape in unused_weights(model).items()
        }
    rows, columns = (side // model.patch_size for side in config.data.size)
    if rows != columns:
        raise ConfigError(
            f"data.resolution {list(config.data.size)}: the released layout has square pictures alone; in the folder's "
            "config.yaml, give the square that the checkpoint is to be read at"
        )
    return {prefix + POSITIONS: sincos_table(rows, columns, model.width, torch.device("cpu"))[None]}


def _renamed(tensors: Mapping[str, Tensor], part: _Part, model: ModelConfig) -> dict[str, Tensor]:
    renamed = {}
    kept = {name.removeprefix(UNUSED): tensor for name, tensor in tensors.items() if name.startswith(UNUSED)}
    for name in (whole.removeprefix(part.ours) for whole in tensors if whole.startswith(part.ours)):
        try:
            shares = released_shares(part.table, name)
        except KeyError as error:
            raise ConfigError(f"the released layout has no name for {part.ours}{error.args[0]}") from error
        for share, tensor in zip(
            shares, to_released(name, tensors[part.ours + name], shares, model, kept), strict=True
        ):
            renamed[part.released + share.name] = tensor
    return renamed
