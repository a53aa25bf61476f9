"""What a step's frozen networks hold and compute, counted on the meta device.

- A backward pass counts twice its forward, a frozen network's backward to its input once (PaLM, Chowdhery et al. 2022).
- They are built from their configuration: nothing is downloaded and no weight is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from t2i.config import RunConfig
from t2i.config_base import ConfigError
from t2i.config_objective import STAND_IN, ObjectiveConfig
from t2i.diffusion.perceptual import EfficientNetLite, Lpips
from t2i.models.text import auto_class, check_length, resolve_model, text_part
from t2i.plan_meta import META, FusedKernels, count_flops, numel, saved_bytes

KNOWN_TEXT: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-1.7B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "google/gemma-2-2b-it": {"model_type": "gemma2"},
    "Efficient-Large-Model/gemma-2-2b-it": {"model_type": "gemma2"},
}
KNOWN_FEATURES: dict[str, dict[str, Any]] = {"facebook/dinov2-base": {"image_size": 518, "patch_size": 14}}
"""Configurations, as far as they differ from transformers' defaults, of what a config names and may not be at hand."""


@dataclass(frozen=True)
class Frozen:
    """A frozen network: `forward_flops` of one image or caption, `saved_bytes` that its backward to one image needs."""

    name: str
    parameters: int
    width: int
    forward_flops: int
    saved_bytes: int = 0


def _described(name: str, field: str, known: dict[str, dict[str, Any]], default_type: str | None = None) -> Any:
    """The configuration of a Hugging Face model: known here, or read from its folder or the local cache."""
    from transformers import AutoConfig

    if name in known:
        fields = dict(known[name])
        return AutoConfig.for_model(fields.pop("model_type", default_type), **fields)
    try:
        return AutoConfig.from_pretrained(resolve_model(name), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{field} {name!r}: its configuration is not on this machine: give a local folder, or one of "
            f"{', '.join(known)}, or download it first"
        ) from error


def text_encoder(config: RunConfig) -> Frozen | None:
    """The language model, on one caption of `text.length` tokens; none where classes are drawn.

    Raises:
        UserError: what it consists of is not known here.
    """
    if config.model.condition == "class":
        return None
    described = _described(config.text.model, "text.model", KNOWN_TEXT)
    with META, torch.no_grad():
        net = text_part(auto_class(described).from_config(described).eval())
        check_length(config.text.model, net, config.text.length)
        tokens = torch.zeros(1, config.text.length, dtype=torch.long)
        try:
            width = net(input_ids=tokens).last_hidden_state.shape[-1]
        except RuntimeError as error:
            raise ConfigError(
                f"text.model {config.text.model!r} computes nothing without its weights: {error}"
            ) from error
        flops = count_flops(lambda: net(input_ids=tokens))
    return Frozen(config.text.model, numel(net), width, flops)


def _stand_in() -> EfficientNetLite:
    try:
        return EfficientNetLite().to(META)
    except ModuleNotFoundError as error:
        raise ConfigError(f"objective: the stand-in {STAND_IN} comes with the extra 'demo': {error}") from error


def image_distance(config: RunConfig, size: tuple[int, int], dtype: torch.dtype) -> Frozen | None:
    """LPIPS, VGG16 in `dtype`, or its stand-in on one image of a size: FLOPs of the predicted image's half."""
    if config.objective.lpips_weight == 0:
        return None
    image, predicted = _images(size)
    if config.objective.lpips_network == STAND_IN:
        stand_in = _stand_in()
        flops = count_flops(lambda: stand_in.distance(predicted, image)) // 2
        saved = saved_bytes(lambda: stand_in.distance(predicted, image), stand_in)
        return Frozen(STAND_IN, numel(stand_in), 0, flops, saved)
    import lpips

    with META:
        net = Lpips(lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False), dtype).to(META)
    flops = count_flops(lambda: net.distance(predicted, image)) // 2
    return Frozen("LPIPS, VGG16", numel(net), 0, flops, saved_bytes(lambda: net.distance(predicted, image), net))


def patch_features(
    config: RunConfig, size: tuple[int, int], grid: tuple[int, int], dtype: torch.dtype
) -> Frozen | None:
    """DINOv2 in `dtype`, or its stand-in, on one image of a size, resized so that its patches match a grid."""
    objective = config.objective
    if objective.pdino_weight + objective.repa_weight == 0:
        return None
    _, predicted = _images(size)
    if objective.features_network == STAND_IN:
        stand_in = _stand_in()
        flops = count_flops(lambda: stand_in.tokens(predicted, grid, [1]))
        saved = saved_bytes(lambda: stand_in.tokens(predicted, grid, [1]), stand_in)
        return Frozen(STAND_IN, numel(stand_in), stand_in.width, flops, saved)
    from transformers import Dinov2Model

    described = _described(objective.features_path, "objective.features_path", KNOWN_FEATURES, "dinov2")
    with META:
        net = Dinov2Model(described).eval().requires_grad_(False).to(dtype)
        sides = [described.patch_size * side for side in grid]
        resized = torch.empty(1, 3, *sides, dtype=dtype, requires_grad=True)
        flops = count_flops(lambda: net(resized))
        with FusedKernels():
            saved = saved_bytes(lambda: net(resized), net)
    return Frozen("DINOv2", numel(net), int(described.hidden_size), flops, saved)


def _images(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    with META:
        return torch.empty(1, 3, *size), torch.empty(1, 3, *size, requires_grad=True)


def open_share(objective: ObjectiveConfig) -> float:
    """Share of the samples with t at or above the gate, exactly, from the time density."""
    if objective.gate in (0.0, 1.0):
        return 1.0 - objective.gate
    # The gate before the shift of times, which is undone by the inverse shift.
    shifted = math.log(objective.gate / (1.0 - objective.gate)) + math.log(objective.timeshift)
    return 0.5 * math.erfc((shifted - objective.time_mean) / objective.time_std / math.sqrt(2.0))
