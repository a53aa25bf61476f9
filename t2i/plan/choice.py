"""Which engine, activation checkpointing and micro-batch a stage may have on given GPUs, and which compute least."""

from __future__ import annotations

from dataclasses import dataclass

from data.order import check_layout
from t2i.config.base import ConfigError
from t2i.config.loading import stage_config
from t2i.config.run import RunConfig
from t2i.plan.counts import Checkpointing
from t2i.plan.memory import ENGINES, FP32, GPUS, Engine, Gpu, StageMemory

USABLE = 0.9
"""Share of a device's memory that a plan may fill; the rest is for fragments and the unforeseen."""
FED_TOKENS = 8192
"""Assumed: image tokens in a micro-batch that keep a GPU's matrix products busy."""
PREFERENCE: tuple[Engine, ...] = ("zero1", "zero2", "fsdp2", "zero3")
"""Engines from the least communication to the most; zero0 uses more memory than zero1 and computes the same."""


@dataclass(frozen=True)
class Assumptions:
    """What the config does not say."""

    gpus: int
    gpu: Gpu
    utilisation: float
    """Share of the peak FLOP/s, over all FLOPs that the step computes."""
    sample_bytes: float
    """Mean bytes of a sample as it is read."""
    reference: bool = False

    @classmethod
    def from_config(cls, gpus: int, gpu: str, mfu: float, sample_bytes: float, reference: bool) -> Assumptions:
        """From the command line's options; a ConfigError names one that is out of range, or an unknown GPU."""
        if gpu.lower() not in GPUS:
            raise ConfigError(f"--gpu {gpu} is not in the table: give one of {', '.join(GPUS)}")
        if gpus < 1:
            raise ConfigError(f"--gpus {gpus} must be at least 1")
        if not 0 < mfu <= 1:
            raise ConfigError(f"--mfu {mfu} must be over 0 and at most 1, such as 0.22")
        if sample_bytes <= 0:
            raise ConfigError(f"--sample_kb {sample_bytes / 1000:g} must be over 0")
        return cls(gpus, GPUS[gpu.lower()], mfu, sample_bytes, reference)


@dataclass(frozen=True)
class Option:
    """An engine with or without activation checkpointing, its largest micro-batch that fits, and the memory it
    takes."""

    engine: Engine
    checkpointing: Checkpointing
    micro_batch_size: int
    """0 if not even one sample fits."""
    bytes: int
    """On each device, at that micro-batch (at 1 if nothing fits)."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its counted networks."""

    name: str
    given: Assumptions
    memory: StageMemory
    """For images of the largest bucket."""
    square: StageMemory
    """For images of the resolution, whose FLOPs count: buckets have about its area."""

    @classmethod
    def of(cls, config: RunConfig, index: int, given: Assumptions) -> PlannedStage:
        stage = stage_config(config, index)
        buckets = stage.data.aspect_buckets
        check_layout(stage.train.batch_size, stage.data.lanes, given.gpus, buckets.group_size if buckets else 1)
        # auto is bf16 on every GPU of the table
        dtype_bytes = FP32 if stage.engine.dtype == "fp32" else 2
        seen = 1.0 if given.reference else None
        memory = StageMemory.of(stage, given.gpus, dtype_bytes, seen)
        square = memory
        if buckets is not None:
            square = StageMemory.of(stage, given.gpus, dtype_bytes, seen, stage.data.size)
        return cls(config.stages[index]["name"], given, memory, square)

    @property
    def config(self) -> RunConfig:
        return self.memory.config

    @property
    def share(self) -> int:
        """Samples of a global batch on a rank."""
        return self.config.train.batch_size // self.given.gpus

    @property
    def together(self) -> int:
        """Samples that a micro-batch divides: a rank's share of a batch, or of one size with buckets."""
        buckets = self.config.data.aspect_buckets
        return buckets.group_size if buckets is not None else self.share

    def flops(self) -> dict[str, float]:
        """FLOPs of one training image, by component."""
        memory, objective = self.square, self.config.objective
        parts: dict[str, float] = {
            "denoiser": 3 * memory.cost.denoiser_flops,
            "projector": 3 * memory.cost.projector_flops,
        }
        if memory.text is not None:
            parts["text encoder"] = memory.text.forward_flops
        if memory.distance is not None:
            parts["lpips, predicted"] = 2 * memory.distance.forward_flops * memory.seen
            parts["lpips, clean"] = memory.distance.forward_flops * memory.seen
        if memory.features is not None:
            shared = objective.repa_weight > 0 and memory.aligned is None
            clean = memory.features.forward_flops * (1.0 if shared else memory.compared)
            parts["dino, predicted"] = 2 * memory.features.forward_flops * memory.compared
            parts["dino, clean"] = clean + (memory.aligned.forward_flops if memory.aligned is not None else 0)
        return parts

    @property
    def checkpointings(self) -> dict[str, Checkpointing]:
        """The values of engine.activation_checkpointing, by name."""
        if self.config.model.family == "pixeldit":
            return {"plain": False, "pixel checkpointed": "pixel", "checkpointed": True}
        return {"plain": False, "checkpointed": True}

    def options(self) -> list[Option]:
        return [self.option(engine, blocks) for blocks in self.checkpointings.values() for engine in ENGINES]

    @property
    def budget(self) -> int:
        """Bytes of a device that may be filled."""
        return int(USABLE * self.given.gpu.memory_gib * 2**30)

    def option(self, engine: Engine, checkpointing: Checkpointing) -> Option:
        """The largest micro-batch that divides a rank's share and fits."""
        sizes = [n for n in range(1, self.together + 1) if self.together % n == 0]
        fitting = [n for n in sizes if self.memory.device_bytes(engine, n, checkpointing) <= self.budget]
        best = max(fitting, default=0)
        return Option(engine, checkpointing, best, self.memory.device_bytes(engine, max(best, 1), checkpointing))

    def executed_flops(self, checkpointing: Checkpointing) -> float:
        """FLOPs of an image with recomputation: checkpointing runs the blocks' forward again."""
        return sum(self.flops().values()) + self.square.cost.recomputed_flops(checkpointing)

    def images_per_s(self, checkpointing: Checkpointing) -> float:
        given = self.given
        return given.gpus * given.gpu.peak_bf16 * given.utilisation / self.executed_flops(checkpointing)


def recommend(stage: PlannedStage, options: list[Option]) -> Option | None:
    """The option that computes least, and of those the one that communicates least, whose micro-batch keeps the GPU
    busy; else the one with the largest micro-batch. None if nothing fits."""
    height, width = stage.memory.size
    tokens = height * width // stage.config.model.patch_size**2
    wanted = min(stage.share, -(-FED_TOKENS // tokens))

    def cost(option: Option) -> tuple[int, int]:
        again = stage.memory.cost.recomputed_flops(option.checkpointing)
        return again, (*PREFERENCE, "zero0").index(option.engine)

    fitting = sorted((option for option in options if option.micro_batch_size), key=cost)
    busy = [option for option in fitting if option.micro_batch_size >= wanted]
    return busy[0] if busy else max(fitting, key=lambda option: option.micro_batch_size, default=None)
