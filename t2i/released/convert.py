"""Weights between the released layout and that of our model folders.

A released checkpoint holds the denoiser as trained, its average, and the projector, which has no average: both of our
files get the one there is. Its position table is not taken over but compared with the one that our network computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from t2i.build import build_denoiser
from t2i.config import RunConfig
from t2i.config_base import ConfigError
from t2i.model_folder import DENOISER, PROJECTOR
from t2i.models.layers import Projector, sincos_table
from t2i.released.checkpoint import Checkpoint
from t2i.released.names import PROJECTOR as PROJECTOR_NAMES
from t2i.released.names import TEXT_TO_IMAGE, released_names

RELEASED_DENOISER = {"raw": "denoiser.", "ema": "ema_denoiser."}
RELEASED_PROJECTOR = "diffusion_trainer.proj.0."
POSITIONS = "pos_embed"
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


def import_weights(checkpoint: Checkpoint, config: RunConfig, text_width: int) -> Imported:
    """The weights of a released text-to-image checkpoint under our names.

    Args:
        config: of a run whose `model` and `text` are the checkpoint's.
        text_width: of the text encoder's states.

    Raises:
        ConfigError: the checkpoint is damaged, or of another network.
    """
    with torch.device("meta"):
        denoiser = build_denoiser(config.model, text_width, config.text.length)
    report, found = Report(), dict[str, dict[str, Tensor]]()
    for which, prefix in RELEASED_DENOISER.items():
        if any(name.startswith(prefix) for name in checkpoint.weights):
            names = released_names(TEXT_TO_IMAGE, denoiser.state_dict())
            found[which] = _take(checkpoint, prefix, names, denoiser, DENOISER, report)
            _compare_positions(checkpoint, prefix + POSITIONS, config.model.width, report)
    if not found:
        prefixes = " or ".join(RELEASED_DENOISER.values())
        raise ConfigError(f"{checkpoint.path} is not a checkpoint of PixelGen: no weight's name begins with {prefixes}")
    for which, other in (("raw", "ema"), ("ema", "raw")):
        if which not in found:
            report.notes.append(f"{which}: the checkpoint has only the {other} weights, which stand in for them")
    projector = _projector(checkpoint, config.model.width, report)
    _note_what_is_left(checkpoint, report)
    raw, ema = (found.get(which) or found[other] for which, other in (("raw", "ema"), ("ema", "raw")))
    return Imported({**raw, **projector}, {**ema, **projector}, report)


def _take(
    checkpoint: Checkpoint, prefix: str, names: dict[str, str], network: torch.nn.Module, ours: str, report: Report
) -> dict[str, Tensor]:
    """A network's tensors; all of them, in the shapes that it has, and none besides."""
    expected = {name: list(value.shape) for name, value in network.state_dict().items()}
    present = {name.removeprefix(prefix) for name in checkpoint.weights if name.startswith(prefix)}
    for problem, wrong in (("lacks", names.keys() - present), ("has", present - names.keys() - {POSITIONS})):
        if wrong:
            raise ConfigError(
                f"{checkpoint.path} is of another network than the config's model: it {problem} {prefix}{min(wrong)}"
                + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            )
    taken = {}
    for released, name in names.items():
        size = list(checkpoint.weights[prefix + released].size)
        if size != expected[name]:
            raise ConfigError(
                f"{checkpoint.path} is of another network than the config's model: {prefix}{released} is {size}, "
                f"by the config {expected[name]}"
            )
        taken[ours + name] = checkpoint.tensor(prefix + released).float()
        report.used[prefix + released] = ours + name
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


def _projector(checkpoint: Checkpoint, width: int, report: Report) -> dict[str, Tensor]:
    last = checkpoint.weights.get(f"{RELEASED_PROJECTOR}4.bias")
    if last is None:
        report.notes.append("projector: the checkpoint has none; training with alignment would start a fresh one")
        return {}
    with torch.device("meta"):
        projector = Projector(width, last.size[0])
    names = released_names(PROJECTOR_NAMES, projector.state_dict())
    return _take(checkpoint, RELEASED_PROJECTOR, names, projector, PROJECTOR, report)


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
        ConfigError: a weight is not of the text-to-image network.
    """
    rows, columns = (side // config.model.patch_size for side in config.data.size)
    table = sincos_table(rows, columns, config.model.width, torch.device("cpu"))[None]
    weights: dict[str, Tensor] = {}
    for which, tensors in (("raw", raw), ("ema", ema)):
        prefix = RELEASED_DENOISER[which]
        weights[prefix + POSITIONS] = table
        weights |= _renamed(tensors, DENOISER, prefix, TEXT_TO_IMAGE)
    weights |= _renamed(raw, PROJECTOR, RELEASED_PROJECTOR, PROJECTOR_NAMES)
    return {"epoch": 0, "global_step": 0, "pytorch-lightning_version": _LIGHTNING, "state_dict": weights}


def _renamed(tensors: Mapping[str, Tensor], ours: str, theirs: str, table: Mapping[str, str]) -> dict[str, Tensor]:
    own = [name.removeprefix(ours) for name in tensors if name.startswith(ours)]
    try:
        names = released_names(table, own)
    except KeyError as error:
        raise ConfigError(f"the released layout has no name for {ours}{error.args[0]}") from error
    return {theirs + released: tensors[ours + name] for released, name in names.items()}
