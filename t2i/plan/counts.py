"""What a step's networks hold and compute for one image, counted on the meta device for every family.

- A backward pass counts twice its forward; a frozen network's backward to its input once (PaLM, Chowdhery et al. 2022).
  Frozen networks are built from their configuration: nothing is downloaded and no weight is read.
- The trained networks' forward pass runs with one sample and with two. FLOPs are those of one; what autograd keeps is
  what the second sample adds, so that tables and cast weights, which samples share, do not count.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from t2i.build import Denoiser, TrainingNetwork, build_denoiser, build_projector
from t2i.config.base import ConfigError
from t2i.config.run import RunConfig
from t2i.config.train import STAND_IN, ObjectiveConfig
from t2i.diffusion.perceptual import EfficientNetLite, Lpips, cosine_distance
from t2i.engine.engine import PERSISTENT_NUMEL
from t2i.models.layers import muon_takes
from t2i.models.pixeldit import ClassPixelDiT, PixelDiT
from t2i.models.pixelgen import PixelGen
from t2i.models.text import auto_class, check_length, resolve_model, text_part
from t2i.plan.meta import META, FusedKernels, SavedTensors, count_flops, numel, saved_bytes

Checkpointing = bool | Literal["pixel"]
"""As engine.activation_checkpointing."""
Part = Literal["image blocks", "text blocks", "pixel blocks"]
PARTS: tuple[Part, ...] = ("image blocks", "text blocks", "pixel blocks")


@dataclass(frozen=True)
class Trained:
    """Numbers of trained parameters, by part."""

    image_blocks: int
    """With PixelDiT from text, these include the text stream."""
    text_blocks: int
    pixel_blocks: int
    rest: int
    """Embeddings, the text's input layer and the head of the denoiser."""
    projector: int
    by_muon: int
    """Parameters that Muon updates: they have one moment, others two."""
    block: int
    """Parameters of the largest block: FSDP2 and ZeRO-3 gather one block at a time."""
    small: int
    """Parameters of tensors so small that ZeRO-3 does not shard them."""

    @property
    def denoiser(self) -> int:
        return self.image_blocks + self.text_blocks + self.pixel_blocks + self.rest

    @property
    def total(self) -> int:
        return self.denoiser + self.projector


@dataclass(frozen=True)
class BlockCost:
    """What one image takes in one block."""

    part: Part
    flops: int
    """Of its forward pass."""
    kept: int
    """Bytes that autograd keeps inside it."""
    given: int
    """Bytes of inputs of this block only, which checkpointing keeps instead."""
    largest: int
    """Bytes of the largest tensor that autograd keeps inside it."""

    def checkpointed(self, checkpointing: Checkpointing) -> bool:
        """Whether its inside is recomputed."""
        return self.part == "pixel blocks" if checkpointing == "pixel" else checkpointing


@dataclass(frozen=True)
class ImageCost:
    """What one image takes in the trained networks. FLOPs are those of the forward pass."""

    blocks: tuple[BlockCost, ...]
    outside: int
    """Bytes that autograd keeps outside blocks, with alignment's, and of inputs that several blocks share."""
    flops: dict[str, int]
    """The denoiser's, by part. The text's matrices inside PixelDiT's image blocks count as text blocks; the joint
    attention does not."""
    projector_flops: int

    @property
    def denoiser_flops(self) -> int:
        return sum(self.flops.values())

    def recomputed_flops(self, checkpointing: Checkpointing) -> int:
        return sum(block.flops for block in self.blocks if block.checkpointed(checkpointing))

    def kept(self, part: Part, checkpointing: Checkpointing) -> int:
        """Bytes of a part's blocks that stay until their backward."""
        blocks = (block for block in self.blocks if block.part == part)
        return sum(block.given if block.checkpointed(checkpointing) else block.kept for block in blocks)

    def recomputed_bytes(self, checkpointing: Checkpointing) -> int:
        """Bytes of the largest block that is recomputed for its backward."""
        return max((block.kept for block in self.blocks if block.checkpointed(checkpointing)), default=0)

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor that autograd keeps inside a block."""
        return max(block.largest for block in self.blocks)


def on_meta(config: RunConfig, text_width: int, features_width: int) -> TrainingNetwork:
    """What a stage trains, on the meta device. Widths of a caption's states and of the aligned features; 0 without
    them."""
    aligned = config.objective.repa_weight > 0
    with META:
        denoiser = build_denoiser(config.model, text_width, config.text.length)
        return TrainingNetwork(denoiser, build_projector(config.model, features_width) if aligned else None)


def trained(config: RunConfig, network: TrainingNetwork) -> Trained:
    """Count a stage's parameters."""
    parts = {part: sum(map(numel, blocks)) for part, blocks in _parts(network.denoiser).items()}
    muon = config.optimizer.name == "muon"
    return Trained(
        image_blocks=parts["image blocks"],
        text_blocks=parts["text blocks"],
        pixel_blocks=parts["pixel blocks"],
        rest=numel(network.denoiser) - sum(parts.values()),
        projector=numel(network.projector) if network.projector is not None else 0,
        by_muon=sum(p.numel() for n, p in network.named_parameters() if muon and p.ndim == 2 and muon_takes(n)),
        block=max(map(numel, network.blocks)),
        small=sum(p.numel() for p in network.parameters() if p.numel() <= PERSISTENT_NUMEL),
    )


def _parts(denoiser: Denoiser) -> dict[Part, list[nn.Module]]:
    return {  # its blocks by part
        "image blocks": [*denoiser.blocks],
        "text blocks": [*denoiser.text_blocks] if isinstance(denoiser, PixelGen) else [],
        "pixel blocks": [*denoiser.pixels.blocks] if isinstance(denoiser, PixelDiT | ClassPixelDiT) else [],
    }


def image_cost(
    config: RunConfig, size: tuple[int, int], network: TrainingNetwork, text_width: int, dtype: torch.dtype
) -> ImageCost:
    """Count what an image of `size` (height, width) takes. The network, on the meta device, becomes `dtype`."""
    network.to(dtype)
    with FlopCounterMode(display=False) as counter, SavedTensors(network, network.blocks) as kept_of_one:
        _forward(config, size, network, text_width, dtype, 1)
    with SavedTensors(network, network.blocks) as kept_of_two:
        _forward(config, size, network, text_width, dtype, 2)

    denoiser, root, named = network.denoiser, type(network).__name__, counter.get_flop_counts()
    flops = {module: sum(named.get(f"{root}.{name}", {}).values()) for name, module in network.named_modules()}
    text_stream = [m for n, m in denoiser.blocks.named_modules() if ".text." in n and isinstance(m, nn.Linear)]
    in_text_stream = sum(flops[module] for module in text_stream)
    by_part: dict[str, int] = {part: sum(flops[block] for block in blocks) for part, blocks in _parts(denoiser).items()}
    by_part["image blocks"] -= in_text_stream
    by_part["text blocks"] += in_text_stream
    by_part["embeddings and head"] = flops[denoiser] - sum(by_part.values())

    part_of = {block: part for part, blocks in _parts(denoiser).items() for block in blocks}
    (one, outside_one), (two, outside_two) = _by_block(kept_of_one), _by_block(kept_of_two)
    return ImageCost(
        blocks=tuple(
            BlockCost(part_of[block], flops[block], *(b - a for a, b in zip(first, second, strict=True)))
            for block, first, second in zip(network.blocks, one, two, strict=True)
        ),
        outside=outside_two - outside_one,
        flops=by_part,
        projector_flops=flops[network.projector] if network.projector is not None else 0,
    )


def _by_block(found: SavedTensors) -> tuple[list[tuple[int, int, int]], int]:
    """For each block the bytes that it keeps, of inputs of its own, and of the largest tensor kept; and the bytes
    outside, among them inputs that several blocks share, which stay with or without checkpointing."""
    times = Counter(at for given in found.given for at in given)
    shared = {at: n for given in found.given for at, n in given.items() if times[at] > 1}
    blocks = []
    for kept, given in zip(found.of_block, found.given, strict=True):
        own = [n for at, n in kept.items() if at not in shared]
        alone = [n for at, n in given.items() if at not in shared]
        blocks.append((sum(own), sum(alone), max(own, default=0)))
    return blocks, sum((found.outside | shared).values())


def _forward(
    config: RunConfig,
    size: tuple[int, int],
    network: TrainingNetwork,
    text_width: int,
    dtype: torch.dtype,
    samples: int,
) -> None:
    """The forward pass of a training step, up to alignment."""
    model, side = config.model, config.objective.repa_grid
    with META:
        condition = [torch.empty(samples, config.text.length, text_width, dtype=dtype)]
        if model.condition == "class":
            condition = [torch.empty(samples, dtype=torch.long)] * (2 if model.dropout > 0 else 1)  # labels, keys
        image, times = torch.empty(samples, 3, *size), torch.empty(samples)
    with FusedKernels():
        _, projected = network(image, times, *condition)
        if projected is not None:
            tokens = side**2 if side is not None else projected.shape[1]
            compared = torch.empty(samples, tokens, projected.shape[2], device=META, requires_grad=True)
            cosine_distance(compared, torch.empty_like(compared, requires_grad=False))


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
"""Differences from transformers' default configurations, for models that may not be on this machine."""


@dataclass(frozen=True)
class Frozen:
    """A frozen network: `forward_flops` of one image or caption, `saved_bytes` that autograd keeps for one image."""

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
    """The text encoder, on one caption of `text.length` tokens; None for classes."""
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
    """LPIPS, VGG16 in `dtype`, or its stand-in, on one image of a size; FLOPs of the predicted image's half."""
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


def ungated_fraction(objective: ObjectiveConfig) -> float:
    """Exact share of the samples with t at or above perceptual_t_min, from the density of t."""
    if objective.perceptual_t_min in (0.0, 1.0):
        return 1.0 - objective.perceptual_t_min
    # The threshold before the shift of times.
    shifted = math.log(objective.perceptual_t_min / (1.0 - objective.perceptual_t_min)) + math.log(objective.shift)
    return 0.5 * math.erfc((shifted - objective.logit_mean) / objective.logit_std / math.sqrt(2.0))
