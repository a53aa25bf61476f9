"""What a step's networks hold and compute, counted on PyTorch's meta device: shapes without memory, in seconds.

- Parameters are the modules' own. FLOPs are those of matrix products and convolutions (two a multiply-add); what is
  element by element, norms, softmax and resizing are not counted.
- A backward pass counts twice its forward, a frozen network's backward to its input once (PaLM, Chowdhery et al. 2022).
- Frozen networks are built from their configuration: nothing is downloaded and no weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from data.buckets import Size
from t2i.build import build_denoiser
from t2i.config import RunConfig
from t2i.config_base import ConfigError
from t2i.config_objective import STAND_IN, ObjectiveConfig
from t2i.diffusion.perceptual import EfficientNetLite, Lpips
from t2i.engine.deepspeed import PERSISTENT_NUMEL
from t2i.models.layers import Projector, axial_rope_table, rope_table
from t2i.models.pixelgen import Block, PixelGen, muon_takes
from t2i.models.pixelgen_class import ClassBlock
from t2i.models.text import resolve_model
from t2i.train.build import denoiser_training_flops

META = torch.device("meta")

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
    }
}
KNOWN_FEATURES: dict[str, dict[str, Any]] = {"facebook/dinov2-base": {"image_size": 518, "patch_size": 14}}
"""Configurations, as far as they differ from transformers' defaults, of what a config names and may not be at hand."""


@dataclass(frozen=True)
class Trained:
    """What is trained: parameters by part, and how many of them."""

    image_blocks: int
    text_blocks: int
    rest: int
    """Embeddings, the text's entrance and the head of the denoiser."""
    projector: int
    by_muon: int
    """Those of them that Muon takes: they have one moment, others two."""
    block: int
    """Parameters of one image block, the largest part that FSDP2 and ZeRO-3 put together at a time."""
    small: int
    """Those of tensors so small that ZeRO-3 leaves them whole on every rank."""

    @property
    def denoiser(self) -> int:
        return self.image_blocks + self.text_blocks + self.rest

    @property
    def total(self) -> int:
        return self.denoiser + self.projector


@dataclass(frozen=True)
class Frozen:
    """A frozen network: `forward_flops` of one image or caption, `saved_bytes` that its backward to one image needs."""

    name: str
    parameters: int
    width: int
    forward_flops: float
    saved_bytes: int = 0


def _flops(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


class _FusedAttention(TorchFunctionMode):
    """Save of attention what a fused kernel saves; on the meta device PyTorch would take the one that is not fused."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _FusedShapes.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _FusedShapes(torch.autograd.Function):
    """The output's shape; queries, keys, values, output and the logarithm of each row's sum are kept for backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("only what the forward pass keeps is wanted")


def saved_bytes(run: Callable[[], object], besides: nn.Module | None = None) -> int:
    """Bytes that autograd keeps for the backward of `run`, each storage once; a module's own tensors do not count."""
    own = [*besides.parameters(), *besides.buffers()] if besides is not None else []
    theirs = {tensor.untyped_storage()._cdata for tensor in own}
    found: dict[int, int] = {}
    kept = []  # a storage that is freed gives its address to the next

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in theirs:
            found[storage._cdata] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(found.values())


def trained(config: RunConfig, text_width: int, features: Frozen | None) -> Trained:
    """Count what a stage trains."""
    with META:
        denoiser = build_denoiser(config.model, text_width, config.text.length)
        aligned = features is not None and config.objective.repa_weight > 0
        projector = Projector(config.model.width, features.width) if aligned and features else None
    image_blocks = size(denoiser.blocks)
    text_blocks = size(denoiser.text_blocks) if isinstance(denoiser, PixelGen) else 0
    muon = config.optimizer.name == "muon"
    tensors = [*denoiser.parameters(), *(projector.parameters() if projector is not None else ())]
    return Trained(
        image_blocks=image_blocks,
        text_blocks=text_blocks,
        rest=size(denoiser) - image_blocks - text_blocks,
        projector=size(projector) if projector is not None else 0,
        # By the names in the whole network; the projector's have neither of the parts that Muon looks for.
        by_muon=sum(
            p.numel() for n, p in denoiser.named_parameters() if muon and p.ndim == 2 and muon_takes(f"denoiser.{n}")
        ),
        block=size(denoiser.blocks[0]),
        small=sum(p.numel() for p in tensors if p.numel() <= PERSISTENT_NUMEL),
    )


def size(module: nn.Module) -> int:
    """Its parameters."""
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class TrainedFlops:
    """FLOPs of one training image, forward and backward; `blocks` are the forward of all blocks, which activation
    checkpointing computes again."""

    denoiser: float
    text_refiner: float
    """The denoiser's text blocks, part of `denoiser`."""
    projector: float
    blocks: float


def trained_flops(config: RunConfig, text_width: int, features: Frozen | None) -> TrainedFlops:
    """Count what a training image costs in the trained networks."""
    model, (rows, columns) = config.model, _grid(config)
    with META:
        image = torch.empty(1, rows * columns, model.width)
        refining, drawing = _blocks_flops(config, image)
        projecting = 0.0
        if features is not None and config.objective.repa_weight > 0:
            projector = Projector(model.width, features.width)
            projecting = 3 * _flops(lambda: projector(image))
    return TrainedFlops(
        denoiser=denoiser_training_flops(config, text_width),
        text_refiner=3 * refining,
        projector=projecting,
        blocks=refining + drawing,
    )


def _blocks_flops(config: RunConfig, image: Tensor) -> tuple[float, float]:
    """FLOPs of one sample's forward through all text blocks, and through all image blocks."""
    model, grid = config.model, _grid(config)
    head_width = model.width // model.heads
    given = torch.empty(1, 1, model.width)
    if model.condition == "class":
        class_block = ClassBlock(model.width, model.heads, 0.0)

        def through(context: int) -> float:
            tokens = torch.empty(1, context + image.shape[1], model.width)
            return _flops(lambda: class_block(tokens, given, axial_rope_table(*grid, head_width, context, META)))

        return 0.0, model.context_start * through(0) + (model.depth - model.context_start) * through(
            model.context_tokens
        )
    text = torch.empty(1, config.text.length, model.width)
    text_block, block = Block(model.width, model.heads, False), Block(model.width, model.heads, True)
    rope = rope_table(*grid, head_width, META)
    refining = model.text_depth * _flops(lambda: text_block(text, given))
    return refining, model.depth * _flops(lambda: block(image, given, rope, text))


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
    from transformers import AutoModel

    if config.model.condition == "class":
        return None
    described = _described(config.text.model, "text.model", KNOWN_TEXT)
    with META, torch.no_grad():
        net = AutoModel.from_config(described).eval()
        tokens = torch.zeros(1, config.text.length, dtype=torch.long)
        flops = _flops(lambda: net(input_ids=tokens))
    return Frozen(config.text.model, size(net), int(described.hidden_size), flops)


def _stand_in() -> EfficientNetLite:
    try:
        return EfficientNetLite().to(META)
    except ModuleNotFoundError as error:
        raise ConfigError(f"objective: the stand-in {STAND_IN} comes with the extra 'demo': {error}") from error


def image_distance(config: RunConfig, dtype: torch.dtype) -> Frozen | None:
    """LPIPS, VGG16 in `dtype`, or its stand-in on one image at full resolution: FLOPs of the predicted image's half.

    With buckets, FLOPs are of the resolution's square and bytes of the largest bucket, here and in `patch_features`.
    """
    if config.objective.lpips_weight == 0:
        return None
    image, predicted = _images(config.data.size)
    large, large_predicted = _images(config.data.largest)
    if config.objective.lpips_network == STAND_IN:
        stand_in = _stand_in()
        flops = _flops(lambda: stand_in.distance(predicted, image)) / 2
        saved = saved_bytes(lambda: stand_in.distance(large_predicted, large), stand_in)
        return Frozen(STAND_IN, size(stand_in), 0, flops, saved)
    import lpips

    with META:
        net = Lpips(lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False), dtype).to(META)
    flops = _flops(lambda: net.distance(predicted, image)) / 2
    return Frozen("LPIPS, VGG16", size(net), 0, flops, saved_bytes(lambda: net.distance(large_predicted, large), net))


def patch_features(config: RunConfig, dtype: torch.dtype) -> Frozen | None:
    """DINOv2 in `dtype`, or its stand-in, on one image, resized so that its patches match the model's."""
    objective, grid, large_grid = config.objective, _grid(config), _grid(config, config.data.largest)
    if objective.pdino_weight + objective.repa_weight == 0:
        return None
    (_, predicted), (_, large_predicted) = _images(config.data.size), _images(config.data.largest)
    if objective.features_network == STAND_IN:
        stand_in = _stand_in()
        flops = _flops(lambda: stand_in.tokens(predicted, grid, [1]))
        saved = saved_bytes(lambda: stand_in.tokens(large_predicted, large_grid, [1]), stand_in)
        return Frozen(STAND_IN, size(stand_in), stand_in.width, flops, saved)
    from transformers import Dinov2Model

    described = _described(objective.features_path, "objective.features_path", KNOWN_FEATURES, "dinov2")
    with META:
        net = Dinov2Model(described).eval().requires_grad_(False).to(dtype)
        resized, large_resized = (
            torch.empty(1, 3, *(described.patch_size * side for side in sides), dtype=dtype, requires_grad=True)
            for sides in (grid, large_grid)
        )
        flops = _flops(lambda: net(resized))
        with _FusedAttention():
            saved = saved_bytes(lambda: net(large_resized), net)
    return Frozen("DINOv2", size(net), int(described.hidden_size), flops, saved)


def _images(size: Size) -> tuple[Tensor, Tensor]:
    """An image and a predicted one."""
    with META:
        return torch.empty(1, 3, *size), torch.empty(1, 3, *size, requires_grad=True)


def _grid(config: RunConfig, size: Size | None = None) -> tuple[int, int]:
    """Rows and columns of an image's patches, of the resolution's by default."""
    height, width = size or config.data.size
    return height // config.model.patch_size, width // config.model.patch_size


def open_share(objective: ObjectiveConfig) -> float:
    """Share of the samples with t at or above the gate, exactly, from the time density."""
    if objective.gate in (0.0, 1.0):
        return 1.0 - objective.gate
    # The gate before the shift of times, which is undone by the inverse shift.
    shifted = math.log(objective.gate / (1.0 - objective.gate)) + math.log(objective.timeshift)
    return 0.5 * math.erfc((shifted - objective.time_mean) / objective.time_std / math.sqrt(2.0))
