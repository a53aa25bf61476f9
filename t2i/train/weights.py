"""Whole weights out of what the ranks hold of them: for drawing, and for a model's folder. All ranks take part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from t2i.config import RunConfig
from t2i.engine.checkpoint import values_of
from t2i.engine.shards import Shards, gather_full
from t2i.model_folder import DENOISER, write_model
from t2i.train.processes import World


def load_average(shards: Shards, average: Mapping[str, Tensor], denoiser: nn.Module) -> None:
    """Put the averaged weights into a denoiser, of whatever type and on whatever device its own are."""
    target = dict(denoiser.named_parameters())
    for name, value in gather_full(shards, average):
        if name.startswith(DENOISER):
            target[name.removeprefix(DENOISER)].data.copy_(value)


def gather_model(
    config: RunConfig, shards: Shards, average: Mapping[str, Tensor], null_caption: Tensor, world: World
) -> Callable[[Path], None]:
    """Gather the raw and the averaged weights on rank 0's host, and return what writes a model's folder there."""
    raw, ema = (
        {name: whole.cpu() for name, whole in gather_full(shards, slices) if world.is_main}
        for slices in (values_of(shards), average)
    )
    return lambda folder: write_model(folder, config, raw, ema, null_caption)
