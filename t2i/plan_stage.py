"""What one rank holds while it trains one stage: the networks, counted, put into the arithmetic of `plan_memory.py`."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

from data.buckets import Size
from t2i.config import EngineConfig, RunConfig
from t2i.config_objective import STAND_IN
from t2i.plan_memory import (
    CONTEXT_BYTES,
    FP32,
    Bytes,
    Engine,
    activation_memory,
    buffers,
    static_memory,
    total,
)
from t2i.plan_networks import Frozen, image_distance, open_share, patch_features, text_encoder
from t2i.plan_trained import Checkpointing, ImageCost, Trained, image_cost, on_meta, trained

CAPTION_CACHE = "caption cache"


def engine_of(config: EngineConfig) -> Engine:
    """The planner's name of a config's engine."""
    if config.name == "fsdp":
        return "fsdp2"
    names: dict[int, Engine] = {0: "zero0", 1: "zero1", 2: "zero2", 3: "zero3"}
    return names[config.zero_stage]


def open_samples(micro_batch: int, seen: float) -> int:
    """The most samples of a micro-batch over the gate that a run meets: three deviations over their mean."""
    expected = micro_batch * seen
    return min(micro_batch, round(expected + 3 * sqrt(expected * (1 - seen))))


@dataclass(frozen=True)
class StageMemory:
    """A stage's networks, and what they come to on a rank.

    Attributes:
        config: the stage's settings.
        size: height and width of its images, in pixels.
        sharing: ranks that share the state out among them.
        dtype_bytes: of a weight that the networks compute with: 2 or 4.
        text: the text encoder; none where classes are drawn.
        distance: LPIPS; none where it has no weight.
        features: the network of P-DINO and alignment; none where neither has weight.
        aligned: the same on the grid of objective.repa_side; none where that is the model's.
        network: what is trained.
        cost: what an image takes in it.
        seen: share of the samples that LPIPS sees.
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
        """Count a stage's networks; `seen` is the share over the gate, and `size` that of the largest bucket, unless
        they are given.

        Raises:
            UserError: what a network consists of is not known here.
        """
        dtype = torch.float32 if dtype_bytes == FP32 else torch.bfloat16
        size, side = size or config.data.largest, config.objective.repa_side
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
            seen=open_share(config.objective) if seen is None else seen,
        )

    @property
    def text_width(self) -> int:
        """Width of a caption's states; 0 where classes are drawn."""
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
        """Of the text encoder; none where classes are drawn."""
        return self.text.parameters * self.dtype_bytes if self.text is not None else 0

    @property
    def released_bytes(self) -> int:
        """Bytes of the text encoder where it is let go before the first micro-step, else none."""
        return self.text_bytes if self.config.text.release else 0

    def frozen(self, perceptual_bytes: int | None = None) -> Bytes:
        """Bytes of the frozen networks, one stand-in may be both perceptual ones; and of captions kept, at most.

        Args:
            perceptual_bytes: of a weight of VGG16 and DINOv2; None: as of the others. A stand-in's are fp32.
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
        """Bytes of memory from the first step to the last, by component; what is in files (`mapped`) counts nothing."""
        parts = static_memory(engine, self.sharing, self.network, self.frozen(), self.dtype_bytes)
        return parts | dict.fromkeys(self.mapped(engine), 0)

    def mapped(self, engine: Engine) -> Bytes:
        """Bytes that lie in files of engine.state_folder, by component."""
        if self.config.engine.state_folder is None:
            return {}
        parts = static_memory(engine, self.sharing, self.network, {}, self.dtype_bytes)
        return {name: parts[name] for name in ("moments", "average")}

    def activations(self, micro_batch: int, checkpointing: Checkpointing) -> Bytes:
        """Bytes at the fullest moment of a micro-step, by component."""
        height, width = self.size
        return activation_memory(
            self.cost,
            height * width,
            micro_batch,
            open_samples(micro_batch, self.seen),
            open_samples(micro_batch, self.compared),
            self.distance,
            self.features,
            checkpointing,
        )

    def device_bytes(self, engine: Engine, micro_batch: int, checkpointing: Checkpointing) -> int:
        """Everything on one device."""
        moving = buffers(engine, self.network, self.dtype_bytes) + total(self.activations(micro_batch, checkpointing))
        return CONTEXT_BYTES + total(self.static(engine)) + max(moving, self.released_bytes)
