"""Which network a released checkpoint is of, by the names and shapes in it."""

from __future__ import annotations

import re

from t2i.config import ModelConfig
from t2i.config_base import ConfigError
from t2i.released.checkpoint import Checkpoint
from t2i.released.names import RELEASED_DENOISER

_EMBEDDING = {"text": ("y_embedder.proj.weight", 0), "class": ("y_embedder.embedding_table.weight", 1)}
"""By condition, the tensor that only this network has, and the axis of it that is the width."""
_SHIPPED = {
    ("text", 1536, 16): "PixelGen-XXL/16 for text to image, as in configs/pixelgen_xxl.yaml",
    ("class", 1152, 28): "PixelGen-XL/16 for class to image, as in configs/pixelgen_xl.yaml",
    ("class", 1024, 24): "PixelGen-L/16 for class to image, as in configs/pixelgen_l.yaml",
}


def network_of(checkpoint: Checkpoint) -> tuple[str, int, int] | None:
    """Condition, width and number of blocks; None where they are not those of a PixelGen."""
    for prefix in RELEASED_DENOISER.values():
        numbers = [re.match(rf"{prefix}blocks\.(\d+)\.", name) for name in checkpoint.weights]
        depth = 1 + max((int(number[1]) for number in numbers if number), default=-1)
        for condition, (name, axis) in _EMBEDDING.items():
            stored = checkpoint.weights.get(prefix + name)
            if stored is not None and len(stored.size) == 2:
                return condition, stored.size[axis], depth
    return None


def network_name(checkpoint: Checkpoint) -> str:
    """The network in words, with the config that it goes with where there is one."""
    network = network_of(checkpoint)
    if network is None:
        return "an unknown network"
    condition, width, depth = network
    return _SHIPPED.get(network, f"PixelGen for {condition} to image, {depth} blocks of width {width}")


def check_condition(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """See that a checkpoint draws from what the config's model draws from.

    Raises:
        ConfigError: it draws from captions and the model classes, or the reverse.
    """
    network = network_of(checkpoint)
    if network is not None and network[0] != model.condition:
        raise ConfigError(
            f"{checkpoint.path} is {network_name(checkpoint)}: the config's model.condition should be {network[0]}, "
            f"not {model.condition}"
        )
