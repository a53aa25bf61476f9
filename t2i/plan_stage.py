"""What one rank holds while it trains one stage: the networks, counted, put into the arithmetic of `plan_memory.py`."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

from t2i.config import EngineConfig, RunConfig
from t2i.config_objective import STAND_IN
from t2i.plan_memory import (
    CONTEXT_BYTES,
    FP32,
    Bytes,
    Engine,
    Shapes,
    activation_memory,
    buffers,
    static_memory,
    total,
)
from t2i.plan_networks import Frozen, Trained, image_distance, open_share, patch_features, text_encoder, trained

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
        sharing: ranks that share the state out among them.
        dtype_bytes: of a weight that the networks compute with: 2 or 4.
        text: the text encoder; none where classes are drawn.
        distance: LPIPS; none where it has no weight.
        features: the network of P-DINO and alignment; none where neither has weight.
        network: what is trained.
        seen: share of the samples that LPIPS sees.
    """

    config: RunConfig
    sharing: int
    dtype_bytes: int
    text: Frozen | None
    distance: Frozen | None
    features: Frozen | None
    network: Trained
    seen: float

    @classmethod
    def of(cls, config: RunConfig, sharing: int, dtype_bytes: int, seen: float | None = None) -> StageMemory:
        """Count a stage's networks; `seen` is the share over the gate unless it is given.

        Raises:
            UserError: what a network consists of is not known here.
        """
        dtype = torch.float32 if dtype_bytes == FP32 else torch.bfloat16
        text, features = text_encoder(config), patch_features(config, dtype)
        return cls(
            config,
            sharing,
            dtype_bytes,
            text=text,
            distance=image_distance(config, dtype),
            features=features,
            network=trained(config, text.width if text is not None else 0, features),
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

    def activations(self, micro_batch: int, checkpointing: bool) -> Bytes:
        """Bytes at the fullest moment of a micro-step, by component."""
        config = self.config
        length = config.text.length if self.text is not None else 0
        shapes = Shapes(config.model, config.data.largest, length, self.text_width, self.dtype_bytes)
        return activation_memory(
            shapes,
            micro_batch,
            open_samples(micro_batch, self.seen),
            open_samples(micro_batch, self.compared),
            self.distance,
            self.features,
            aligned=config.objective.repa_weight > 0,
            checkpointing=checkpointing,
        )

    def device_bytes(self, engine: Engine, micro_batch: int, checkpointing: bool) -> int:
        """Everything on one device."""
        moving = buffers(engine, self.network, self.dtype_bytes) + total(self.activations(micro_batch, checkpointing))
        return CONTEXT_BYTES + total(self.static(engine)) + max(moving, self.released_bytes)
