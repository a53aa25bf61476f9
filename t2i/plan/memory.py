"""Memory of a rank's device during training, in bytes, from the counted networks; and a table of GPUs.

Static memory, bytes a parameter in bf16, measured with DeepSpeed 0.19.8 and PyTorch 2.14 on 1 and 2 ranks (W):

    engine  weights  gradients  masters  moments  EMA
    zero0   -        4          4        8        4    fp32 weights, cast where they are used
    zero1   2        4          4/W      8/W      4/W  gradients are whole on every rank until the step
    zero2   2        4/W        4/W      8/W      4/W  and a bucket for gradients being summed over ranks
    zero3   2/W      4/W        4/W      8/W      4/W  and small weights whole, gathered weights, and a bucket
    fsdp2   -        4/W        4/W      8/W      4/W  and gathered weights; the masters are the parameters
    ddp     4        4 + 4      -        8        4    the public code: fp32, with copies of gradients in buckets

In fp32 the weights of zero1 to zero3 take 4. Muon has one moment where AdamW has two.

Activations are what autograd keeps in eager mode (`counts.py`), an upper bound for `torch.compile`. The table of GPUs
also serves the trainer's MFU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import sqrt
from typing import Literal, get_args

import torch

from data.filters import Size
from t2i.config.run import EngineConfig, RunConfig
from t2i.config.train import STAND_IN
from t2i.engine.engine import BUCKET_NUMEL
from t2i.plan.counts import (
    PARTS,
    Checkpointing,
    Frozen,
    ImageCost,
    Trained,
    image_cost,
    image_distance,
    on_meta,
    patch_features,
    text_encoder,
    trained,
    ungated_fraction,
)

Engine = Literal["zero0", "zero1", "zero2", "zero3", "fsdp2"]
ENGINES: tuple[Engine, ...] = get_args(Engine)

FP32 = 4
CONTEXT_BYTES = int(1.5 * 2**30)
"""Assumed: CUDA's context, the communication library's buffers, workspaces of matrix products."""
BUCKET = BUCKET_NUMEL
"""Values in DeepSpeed's bucket for summing gradients over ranks, in fp32."""
IMAGE_COPIES = 5
"""Of a micro-batch in fp32: the image, noise, x_t, the prediction and its gradient."""
WORKING_COPIES = 3
"""Assumed: tensors of the largest size that exist at once inside an operation or its backward, besides kept ones."""

Bytes = dict[str, int]


def total(parts: Bytes) -> int:
    return sum(parts.values())


def static_memory(engine: Engine, ranks: int, network: Trained, frozen: Bytes, dtype_bytes: int) -> Bytes:
    """Bytes that a rank holds from its first step to its last, by component.

    `ranks` share the state; `frozen` are the bytes of frozen networks by name, whole on every rank; `dtype_bytes` of a
    weight in the network's arithmetic: 2 or 4.
    """
    n = network.total
    shared = 1 if engine == "zero0" else ranks
    weights_shared = ranks if engine in ("zero3", "fsdp2") else 1
    gradients_shared = ranks if engine in ("zero2", "zero3", "fsdp2") else 1
    own_masters = engine in ("zero0", "fsdp2")
    whole = network.small if engine == "zero3" and ranks > 1 else 0
    return {
        "weights": 0 if own_masters else dtype_bytes * (n // weights_shared + whole),
        "gradients": FP32 * n // gradients_shared,
        "masters": FP32 * n // shared,
        "moments": moments_bytes(network) // shared,
        "ema": FP32 * n // shared,
        **frozen,
        "sampling copy": dtype_bytes * network.denoiser,
    }


def checkpoint_bytes(network: Trained) -> int:
    """Bytes of one checkpoint over all ranks: masters, EMA and moments."""
    return 2 * FP32 * network.total + moments_bytes(network)


def moments_bytes(network: Trained) -> int:
    """Bytes over all ranks: two moments a parameter with AdamW, one with Muon."""
    return FP32 * (2 * network.total - network.by_muon)


def reference_static_memory(network: Trained, frozen: Bytes) -> Bytes:
    """Bytes of the public code, whole on every rank: fp32 in distributed data parallel, with AdamW."""
    n = network.total
    return {
        "weights": FP32 * n,
        "gradients": FP32 * n,
        "gradient buckets": FP32 * n,
        "moments": 2 * FP32 * n,
        "ema": FP32 * n,
        **frozen,
    }


def buffers(engine: Engine, network: Trained, dtype_bytes: int) -> int:
    """Bytes an engine needs only while it computes, to gather weights and reduce gradients.

    zero0 in bf16: the cast weights, which autograd keeps. zero2, zero3, and zero1 in fp32: a bucket of gradients,
    allocated whole however small the network. zero3, fsdp2: the weights of two blocks, one in use and one prefetched,
    and of everything outside blocks; fsdp2 also the gradients of one block in fp32, on one rank too.
    """
    under_way = (2 * network.block + network.rest + network.projector) * dtype_bytes
    bucket = FP32 * BUCKET
    return {
        "zero0": 0 if dtype_bytes == FP32 else dtype_bytes * network.total,
        "zero1": bucket if dtype_bytes == FP32 else 0,
        "zero2": bucket,
        "zero3": bucket + under_way,
        "fsdp2": under_way + FP32 * network.block,
    }[engine]


def activation_memory(
    cost: ImageCost,
    pixels: int,
    micro_batch: int,
    ungated_samples: int,
    compared_samples: int,
    distance: Frozen | None,
    features: Frozen | None,
    checkpointing: Checkpointing,
) -> Bytes:
    """Bytes at the peak of a micro-step, by component.

    The backward goes through the perceptual networks first, while all of the denoiser's activations are kept; then
    through the blocks, of which checkpointing recomputes one at a time. The larger of the two peaks counts.
    `ungated_samples` are those that LPIPS sees, `compared_samples` those that P-DINO compares.
    """
    image_bytes = 3 * FP32 * pixels
    perceptual = ungated_samples * (distance.saved_bytes if distance is not None else 0)
    perceptual += compared_samples * (features.saved_bytes if features is not None else 0)
    first_map = 64 * FP32 * pixels if distance is not None else 0
    in_perceptual = perceptual + WORKING_COPIES * ungated_samples * first_map
    in_block = micro_batch * (cost.recomputed_bytes(checkpointing) + WORKING_COPIES * cost.largest)
    return {
        **{part: micro_batch * cost.kept(part, checkpointing) for part in PARTS},
        "ends and projector": micro_batch * cost.outside,
        "images": micro_batch * IMAGE_COPIES * image_bytes,
        "backward": max(in_perceptual, in_block),
    }


CAPTION_CACHE = "caption cache"


def engine_of(config: EngineConfig) -> Engine:
    """The planner's name of a config's engine."""
    if config.name == "fsdp":
        return "fsdp2"
    names: dict[int, Engine] = {0: "zero0", 1: "zero1", 2: "zero2", 3: "zero3"}
    return names[config.zero_stage]


def ungated_samples(micro_batch: int, seen: float) -> int:
    """The most ungated samples of a micro-batch that a run meets: the mean plus three standard deviations."""
    expected = micro_batch * seen
    return min(micro_batch, round(expected + 3 * sqrt(expected * (1 - seen))))


@dataclass(frozen=True)
class StageMemory:
    """A stage's networks, and the memory they take on a rank.

    `size`: of an image, in pixels; `sharing`: ranks that share the state; `dtype_bytes`: of a weight that the network
    computes with. `distance` is LPIPS, `features` the network of P-DINO and alignment, `aligned` the same on the grid
    of objective.repa_grid, or None on the model's; `cost` is that of one image, and `seen` the share of samples that
    LPIPS sees.
    """

    config: RunConfig
    size: Size
    sharing: int
    dtype_bytes: int
    text: Frozen | None
    distance: Frozen | None
    features: Frozen | None
    aligned: Frozen | None
    network: Trained
    cost: ImageCost
    seen: float

    @classmethod
    def of(
        cls, config: RunConfig, sharing: int, dtype_bytes: int, seen: float | None = None, size: Size | None = None
    ) -> StageMemory:
        """Count a stage's networks. By default `seen` is the ungated share and `size` that of the largest bucket.

        Raises:
            UserError: a network is not known here.
        """
        dtype = torch.float32 if dtype_bytes == FP32 else torch.bfloat16
        size, side = size or config.data.largest, config.objective.repa_grid
        grid = size[0] // config.model.patch_size, size[1] // config.model.patch_size
        text, features = text_encoder(config), patch_features(config, size, grid, dtype)
        aligned = None
        if side is not None and (side, side) != grid:
            aligned = patch_features(config, size, (side, side), dtype)
        text_width = text.width if text is not None else 0
        network = on_meta(config, text_width, features.width if features is not None else 0)
        return cls(
            config,
            size,
            sharing,
            dtype_bytes,
            text=text,
            distance=image_distance(config, size, dtype),
            features=features,
            aligned=aligned,
            network=trained(config, network),
            cost=image_cost(config, size, network, text_width, dtype),
            seen=ungated_fraction(config.objective) if seen is None else seen,
        )

    @property
    def text_width(self) -> int:
        """Width of a caption's states; 0 for classes."""
        return self.text.width if self.text is not None else 0

    @property
    def compared(self) -> float:
        """Share of samples that P-DINO compares."""
        objective = self.config.objective
        if objective.pdino_weight == 0:
            return 0.0
        return 1.0 if objective.pdino_gate == "none" else self.seen

    @property
    def text_bytes(self) -> int:
        """Bytes of the text encoder; 0 for classes."""
        return self.text.parameters * self.dtype_bytes if self.text is not None else 0

    @property
    def released_bytes(self) -> int:
        """Bytes of the text encoder if text.reload_every_step frees it before the first micro-step, else 0."""
        return self.text_bytes if self.config.text.reload_every_step else 0

    def frozen(self, perceptual_bytes: int | None = None) -> Bytes:
        """Bytes of the frozen networks, of which one stand-in may be both perceptual ones, and of the caption cache, at
        most.

        `perceptual_bytes`: of a weight of VGG16 and DINOv2; None: as the others. A stand-in's weights are fp32.
        """
        each = perceptual_bytes or self.dtype_bytes
        found = {"text encoder": self.text_bytes} if self.text is not None and not self.released_bytes else {}
        perceptual = {
            net.name: net.parameters * (FP32 if net.name == STAND_IN else each)
            for net in (self.distance, self.features)
            if net is not None
        }
        if perceptual:
            found["perceptual networks"] = sum(perceptual.values())
        if self.text is not None and self.config.text.cache:
            states = self.config.text.length * self.text_width * self.dtype_bytes
            found[CAPTION_CACHE] = self.config.text.cache * states
        return found

    def static(self, engine: Engine) -> Bytes:
        """Bytes from the first step to the last, by component; those in files (`mapped`) count 0."""
        parts = static_memory(engine, self.sharing, self.network, self.frozen(), self.dtype_bytes)
        return parts | dict.fromkeys(self.mapped(engine), 0)

    def mapped(self, engine: Engine) -> Bytes:
        """Bytes in files of engine.offload_dir, by component."""
        if self.config.engine.offload_dir is None:
            return {}
        parts = static_memory(engine, self.sharing, self.network, {}, self.dtype_bytes)
        return {name: parts[name] for name in ("moments", "ema")}

    def activations(self, micro_batch: int, checkpointing: Checkpointing) -> Bytes:
        """Bytes at the peak of a micro-step, by component."""
        height, width = self.size
        return activation_memory(
            self.cost,
            height * width,
            micro_batch,
            ungated_samples(micro_batch, self.seen),
            ungated_samples(micro_batch, self.compared),
            self.distance,
            self.features,
            checkpointing,
        )

    def device_bytes(self, engine: Engine, micro_batch: int, checkpointing: Checkpointing) -> int:
        """Bytes of everything on one device."""
        moving = buffers(engine, self.network, self.dtype_bytes) + total(self.activations(micro_batch, checkpointing))
        return CONTEXT_BYTES + total(self.static(engine)) + max(moving, self.released_bytes)


@dataclass(frozen=True)
class Gpu:
    name: str
    peak_bf16: float
    """Dense bf16 FLOP/s of the vendor's data sheet, without sparsity."""
    memory_gib: float
    """GiB that a process can use: the data sheet's without the driver's, rounded down."""


_MODELS = (
    Gpu("B200", 2250e12, 178),
    Gpu("H200", 989e12, 139),
    Gpu("GH200", 989e12, 94),
    Gpu("H100", 989e12, 79),
    Gpu("H800", 989e12, 79),
    Gpu("H20", 148e12, 95),
    Gpu("A100", 312e12, 79),
    Gpu("A800", 312e12, 79),
    Gpu("A100-40GB", 312e12, 39),
    Gpu("L40S", 362e12, 44),
    Gpu("4090", 165e12, 23.5),
)
GPUS = {gpu.name.lower(): gpu for gpu in _MODELS}
"""By name in lower case. SXM models; the A100 and A800 are those of 80 GB unless their name says otherwise."""


def find_gpu(device_name: str) -> Gpu | None:
    """The model whose name is a word of a device's name ("NVIDIA H100 80GB HBM3"), or None."""
    words = set(re.findall(r"[A-Za-z0-9]+", device_name.lower()))
    return next((gpu for name, gpu in GPUS.items() if name in words), None)
