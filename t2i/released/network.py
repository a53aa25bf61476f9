"""Which network a released checkpoint is of, by the names and shapes in it."""

from __future__ import annotations

import re
from typing import NamedTuple

from t2i.config import ModelConfig
from t2i.config_base import ConfigError
from t2i.config_model import PixelConfig
from t2i.released.checkpoint import Checkpoint
from t2i.released.names import LIGHTNING, PLAIN, PREDICTIONS, TITLES, Prefixes


class Network(NamedTuple):
    """What tells released networks apart; `family` and `condition` are the config's."""

    family: str
    condition: str
    width: int
    depth: int


class _Sign(NamedTuple):
    """The tensor that shows a kind of network, the axis of it that is the width, and what its blocks are called."""

    prefixes: Prefixes
    name: str
    axis: int
    blocks: str


_SIGNS = {  # in this order: PixelDiT for classes has that embedding, too
    ("pixeldit", "text"): _Sign(PLAIN, "s_embedder.proj.weight", 0, "patch_blocks"),
    ("pixeldit", "class"): _Sign(LIGHTNING, "s_embedder.proj.weight", 0, "patch_blocks"),
    ("pixelgen", "text"): _Sign(LIGHTNING, "y_embedder.proj.weight", 0, "blocks"),
    ("pixelgen", "class"): _Sign(LIGHTNING, "y_embedder.embedding_table.weight", 1, "blocks"),
}
_SHIPPED = {
    Network("pixelgen", "text", 1536, 16): "PixelGen-XXL/16 for text to image, as in configs/pixelgen_xxl.yaml",
    Network("pixelgen", "class", 1152, 28): "PixelGen-XL/16 for class to image, as in configs/pixelgen_xl.yaml",
    Network("pixelgen", "class", 1024, 24): "PixelGen-L/16 for class to image, as in configs/pixelgen_l.yaml",
    Network("pixeldit", "text", 1536, 14): "PixelDiT-T2I for text to image, as in configs/pixeldit_t2i.yaml",
    Network("pixeldit", "class", 1152, 26): "PixelDiT-XL/16 for class to image, as in configs/pixeldit_xl.yaml",
    Network("pixeldit", "class", 1024, 22): "PixelDiT-L/16 for class to image, as in configs/pixeldit_l.yaml",
    Network("pixeldit", "class", 768, 12): "PixelDiT-B/16 for class to image, as in configs/pixeldit_b.yaml",
}


def network_of(checkpoint: Checkpoint) -> Network | None:
    """None where the weights are not those of a PixelGen or PixelDiT."""
    for (family, condition), sign in _SIGNS.items():
        for prefix in sign.prefixes.denoiser.values():
            stored = checkpoint.weights.get(prefix + sign.name)
            if stored is not None and len(stored.size) == 2:
                numbers = [re.match(rf"{re.escape(prefix)}{sign.blocks}\.(\d+)\.", name) for name in checkpoint.weights]
                depth = 1 + max((int(number[1]) for number in numbers if number), default=-1)
                return Network(family, condition, stored.size[sign.axis], depth)
    return None


def network_name(checkpoint: Checkpoint) -> str:
    """The network in words, with the config that it goes with where there is one."""
    network = network_of(checkpoint)
    if network is None:
        return "an unknown network"
    family, condition, width, depth = network
    return _SHIPPED.get(network, f"{TITLES[family]} for {condition} to image, {depth} blocks of width {width}")


def check_released(model: ModelConfig) -> None:
    """See that networks of a config's kind are ones that were released.

    Raises:
        ConfigError: they were not.
    """
    prediction = PREDICTIONS[model.family]
    if model.prediction != prediction:
        raise ConfigError(
            f"model.prediction {model.prediction}: it should be {prediction} for the released layout of "
            f"{TITLES[model.family]}"
        )
    for name in ("attention", "tokens_per_patch", "modulation"):
        value, default = getattr(model.pixel, name), PixelConfig.model_fields[name].default
        if value != default:
            raise ConfigError(f"model.pixel.{name} {value}: it should be {default} for the released layout of PixelDiT")


def check_kind(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """See that a checkpoint is of the config's family and draws from what its model draws from, and that such networks
    were released.

    Raises:
        ConfigError: it is another, or they were not.
    """
    if (network := network_of(checkpoint)) is not None:
        # All that is to be changed is said at once.
        expected = {"family": network.family, "condition": network.condition, "prediction": PREDICTIONS[network.family]}
        wrong = [
            f"model.{field} should be {value}, not {getattr(model, field)}"
            for field, value in expected.items()
            if getattr(model, field) != value
        ]
        if wrong:
            raise ConfigError(f"{checkpoint.path} is {network_name(checkpoint)}: the config's {' and '.join(wrong)}")
    check_released(model)
