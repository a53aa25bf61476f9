"""Weights between the released layout and that of our model folders.

A released checkpoint holds the denoiser as trained, its average, and the projector, which has no average: both of our
files get the one there is. Its position table is not taken over but compared with the one that our network computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2i.build import build_denoiser, build_projector
from t2i.config import ModelConfig, RunConfig
from t2i.config_base import ConfigError
from t2i.model_folder import DENOISER, PROJECTOR
from t2i.models.layers import sincos_table
from t2i.released.checkpoint import Checkpoint
from t2i.released.layout import from_released, released_size, to_released
from t2i.released.names import (
    POSITIONS,
    PROJECTOR_TABLE,
    RELEASED_DENOISER,
    RELEASED_PROJECTOR,
    denoiser_table,
    released_names,
)
from t2i.released.network import network_name

# The average of a constant drifts by rounding, up to half a unit in the last place / (1 - decay), which is 3e-4 near 1,
# and bf16 is off by 2e-3. Another table would differ by about 1.
_POSITION_TOLERANCE = 5e-3
_LIGHTNING = "2.4.0"
"""The version that the public configuration names; Lightning refuses a checkpoint without one."""


@dataclass
class Report:
    """What became of every key of a checkpoint."""

    used: dict[str, str] = field(default_factory=dict)
    """Our name, by the checkpoint's; of the average, in ema.safetensors."""
    recomputed: dict[str, str] = field(default_factory=dict)
    """Not taken over, since the network computes it."""
    left: dict[str, str] = field(default_factory=dict)
    """Not taken over."""
    notes: list[str] = field(default_factory=list)
    """What the checkpoint does not hold, and what stands in for it."""


@dataclass(frozen=True)
class Imported:
    """Tensors for a model folder's two files, in fp32; those of the checkpoint's memory must not be written to."""

    raw: dict[str, Tensor]
    ema: dict[str, Tensor]
    report: Report


def trained_resolution(checkpoint: Checkpoint, patch_size: int) -> int | None:
    """Side in pixels of the images that a checkpoint was trained on, by its position table; None without one."""
    for prefix in RELEASED_DENOISER.values():
        stored = checkpoint.weights.get(prefix + POSITIONS)
        if stored is not None and len(stored.size) == 3:
            return math.isqrt(stored.size[1]) * patch_size
    return None


class _Part(NamedTuple):
    """A network in a model folder and in a checkpoint: the prefixes of its names, and the table between them."""

    ours: str
    released: str
    table: Mapping[str, str]


def _denoiser(which: str, model: ModelConfig) -> _Part:
    return _Part(DENOISER, RELEASED_DENOISER[which], denoiser_table(model))


_PROJECTOR = _Part(PROJECTOR, RELEASED_PROJECTOR, PROJECTOR_TABLE)


def import_weights(checkpoint: Checkpoint, config: RunConfig, text_width: int) -> Imported:
    """The weights of a released checkpoint under our names.

    What no weight tells is taken from the config: where the class's tokens join, and what training drops.

    Args:
        config: of a run whose `model` and `text` are the checkpoint's.
        text_width: of the text encoder's states; nothing to a network that draws classes.

    Raises:
        ConfigError: the checkpoint is damaged, or of another network.
    """
    with torch.device("meta"):
        denoiser = build_denoiser(config.model, text_width, config.text.length)
    report, found = Report(), dict[str, dict[str, Tensor]]()
    for which, prefix in RELEASED_DENOISER.items():
        if any(name.startswith(prefix) for name in checkpoint.weights):
            found[which] = _take(checkpoint, _denoiser(which, config.model), denoiser, config.model, report)
            _compare_positions(checkpoint, prefix + POSITIONS, config.model.width, report)
    if not found:
        prefixes = " or ".join(RELEASED_DENOISER.values())
        raise ConfigError(f"{checkpoint.path} is not a checkpoint of PixelGen: no weight's name begins with {prefixes}")
    for which, other in (("raw", "ema"), ("ema", "raw")):
        if which not in found:
            report.notes.append(f"{which}: the checkpoint has only the {other} weights, which stand in for them")
    projector = _projector(checkpoint, config.model, report)
    _note_what_is_left(checkpoint, report)
    raw, ema = (found.get(which) or found[other] for which, other in (("raw", "ema"), ("ema", "raw")))
    return Imported({**raw, **projector}, {**ema, **projector}, report)


def _take(
    checkpoint: Checkpoint, part: _Part, network: torch.nn.Module, model: ModelConfig, report: Report
) -> dict[str, Tensor]:
    """A network's tensors; all of them, in the shapes that the checkpoint should give them, and none besides."""
    ours = network.state_dict()
    names = released_names(part.table, ours)
    present = {name.removeprefix(part.released) for name in checkpoint.weights if name.startswith(part.released)}
    another = f"{checkpoint.path}, {network_name(checkpoint)}, is of another network than the config's model"
    for problem, wrong in (("lacks", names.keys() - present), ("has", present - names.keys() - {POSITIONS})):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise ConfigError(f"{another}: it {problem} {part.released}{min(wrong)}{more}")
    taken = {}
    for released, name in names.items():
        size = list(checkpoint.weights[part.released + released].size)
        expected = released_size(name, ours[name].shape, model)
        if size != expected:
            raise ConfigError(f"{another}: {part.released}{released} is {size}, by the config {expected}")
        taken[part.ours + name] = from_released(name, checkpoint.tensor(part.released + released).float(), model)
        report.used[part.released + released] = part.ours + name
    return taken


def _compare_positions(checkpoint: Checkpoint, name: str, width: int, report: Report) -> None:
    """See that the stored position table, if there is one, is the one that our network computes."""
    if name not in checkpoint.weights:
        return
    size = list(checkpoint.weights[name].size)
    side = math.isqrt(size[1]) if len(size) == 3 else 0
    if size != [1, side * side, width]:
        raise ConfigError(f"{checkpoint.path}: {name} is {size}: it should be [1, a square number, {width}]")
    computed = sincos_table(side, side, width, torch.device("cpu"))
    difference = (checkpoint.tensor(name)[0].float() - computed).abs().max().item()
    if not difference <= _POSITION_TOLERANCE:
        raise ConfigError(
            f"{checkpoint.path}: {name} is not the table of sines and cosines that this network adds: it differs by "
            f"{difference:.2g}"
        )
    report.recomputed[name] = f"a table for {side} x {side} patches; computed for any grid, it differs by {difference}"


def _projector(checkpoint: Checkpoint, model: ModelConfig, report: Report) -> dict[str, Tensor]:
    last = checkpoint.weights.get(f"{RELEASED_PROJECTOR}4.bias")
    if last is None:
        report.notes.append("projector: the checkpoint has none; training with alignment would start a fresh one")
        return {}
    with torch.device("meta"):
        projector = build_projector(model, last.size[0])
    return _take(checkpoint, _PROJECTOR, projector, model, report)


def _note_what_is_left(checkpoint: Checkpoint, report: Report) -> None:
    for name in checkpoint.weights.keys() - report.used.keys() - report.recomputed.keys():
        report.left[f"state_dict.{name}"] = f"tensor {list(checkpoint.weights[name].size)}"
    for key, value in checkpoint.rest.items():
        plain = isinstance(value, str | int | float | None)
        report.left[str(key)] = repr(value) if plain else f"{type(value).__name__} of {len(value)}"
    for name in checkpoint.unknown:
        report.left[f"class or function {name}"] = "not looked for: nothing of a file is run"


def export_weights(config: RunConfig, raw: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> dict[str, Any]:
    """A checkpoint in the released layout, without an optimizer, for torch.save.

    Args:
        config, raw, ema: of a model folder, the weights under their names there.

    Raises:
        ConfigError: a weight is not of the config's network, or its pictures are not square.
    """
    rows, columns = (side // config.model.patch_size for side in config.data.size)
    if rows != columns:
        raise ConfigError(
            f"data.resolution {list(config.data.size)}: the released layout has square pictures alone; in the folder's "
            "config.yaml, give the square that the checkpoint is to be read at"
        )
    table = sincos_table(rows, columns, config.model.width, torch.device("cpu"))[None]
    weights: dict[str, Tensor] = {}
    for which, tensors in (("raw", raw), ("ema", ema)):
        weights[RELEASED_DENOISER[which] + POSITIONS] = table
        weights |= _renamed(tensors, _denoiser(which, config.model), config.model)
    weights |= _renamed(raw, _PROJECTOR, config.model)
    return {"epoch": 0, "global_step": 0, "pytorch-lightning_version": _LIGHTNING, "state_dict": weights}


def _renamed(tensors: Mapping[str, Tensor], part: _Part, model: ModelConfig) -> dict[str, Tensor]:
    own = [name.removeprefix(part.ours) for name in tensors if name.startswith(part.ours)]
    try:
        names = released_names(part.table, own)
    except KeyError as error:
        raise ConfigError(f"the released layout has no name for {part.ours}{error.args[0]}") from error
    return {
        part.released + released: to_released(name, tensors[part.ours + name], model)
        for released, name in names.items()
    }
