"""A trained model's folder: `model.safetensors` (raw), `ema.safetensors` and `config.yaml`.

Both weight files hold the denoiser under `denoiser.`, the REPA projector under `projector.` (absent without it), the
null caption's states, which an update of a library could otherwise change, and under `unused.` the tensors of an
imported checkpoint that our networks do not read, for export. A folder that exists is whole: it is written under
another name, synced and renamed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.files import refuse_lfs_pointer, sync
from t2i.config.base import ConfigError
from t2i.config.loading import dump_config, load_config
from t2i.config.run import RunConfig

DENOISER = "denoiser."
PROJECTOR = "projector."
UNUSED = "unused."
NULL_CAPTION = "null_caption"
FILES = {"raw": "model.safetensors", "ema": "ema.safetensors"}

WhichWeights = Literal["raw", "ema"]


@dataclass(frozen=True)
class SavedModel:
    """A folder's content: config, fp32 tensors by name, and the null caption's states (L, E)."""

    config: RunConfig
    tensors: dict[str, Tensor]
    null_caption: Tensor

    @property
    def denoiser(self) -> dict[str, Tensor]:
        """The denoiser's state dict."""
        return {n.removeprefix(DENOISER): t for n, t in self.tensors.items() if n.startswith(DENOISER)}


def write_model(
    folder: Path, config: RunConfig, raw: Mapping[str, Tensor], ema: Mapping[str, Tensor], null_caption: Tensor
) -> None:
    """Write a folder; the rest of an interrupted attempt is replaced.

    Raises:
        OSError: the disk refuses it; nothing of it stays.
    """
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write_aside(aside, config, raw, ema, null_caption)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{folder} cannot be written: {error}") from error
    aside.rename(folder)
    sync(folder.parent)


def _write_aside(
    aside: Path, config: RunConfig, raw: Mapping[str, Tensor], ema: Mapping[str, Tensor], null_caption: Tensor
) -> None:
    aside.mkdir(parents=True)
    for which, tensors in (("raw", raw), ("ema", ema)):
        whole = {**tensors, NULL_CAPTION: null_caption}
        save_file({name: tensor.contiguous().cpu() for name, tensor in whole.items()}, aside / FILES[which])
    settings = aside / "config.yaml"
    settings.write_text(dump_config(config))
    for name in FILES.values():  # safetensors makes files that only their owner can read
        (aside / name).chmod(settings.stat().st_mode)
    for path in (*aside.iterdir(), aside):
        sync(path)


def check_model(folder: Path, which: WhichWeights) -> None:
    """Check that a folder is a model's and has these weights, without reading them."""
    there = [name for name, file in FILES.items() if (folder / file).exists()]
    if not there or not (folder / "config.yaml").exists():
        missing = "config.yaml" if there else FILES[which]
        raise ConfigError(f"{folder} is not a model folder: it has no {missing}")
    if which not in there:
        raise ConfigError(f"{folder} has no {FILES[which]}, the {which} weights: take its {there[0]} weights")


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise a ConfigError if a tensor is not finite; in one pass, without copies. `where` begins the message."""
    first, count = "", 0
    for name, tensor in tensors:
        if tensor.numel() == 0 or not tensor.is_floating_point() or torch.stack(tensor.aminmax()).isfinite().all():
            continue  # aminmax is NaN where any number is
        if not first:
            first = f"{name} has {int((~tensor.isfinite()).sum()):,} of {tensor.numel():,} numbers that are not finite"
        count += 1
    if count:
        more = f" (as have {count - 1} more tensors)" if count > 1 else ""
        raise ConfigError(f"{where}: {first}{more}: give weights that are whole")


def read_model(folder: Path, which: WhichWeights) -> SavedModel:
    """Read a folder; a ConfigError if it is not a model's, is damaged, or has numbers that are not finite."""
    check_model(folder, which)
    file = folder / FILES[which]
    try:
        with file.open("rb") as opened:
            refuse_lfs_pointer(opened.read(64), str(file))
        tensors = load_file(file)
        check_finite(tensors.items(), str(file))
        null_caption = tensors.pop(NULL_CAPTION)
    except (SafetensorError, KeyError) as error:
        raise ConfigError(f"{file} is damaged or not a model of this kind: {error}") from error
    return SavedModel(load_config(folder / "config.yaml"), tensors, null_caption)
