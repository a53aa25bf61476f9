"""What a run will need, before anything is spent: parameters, memory, FLOPs, days, bandwidth, disk.

Arithmetic from the config and from networks counted on the meta device (`plan_networks.py`, `plan_memory.py`,
`plan_stage.py`): no weights, no data, no GPU, a few seconds. `BASIS` says of each figure whether it is counted, derived
or assumed.

The FLOPs are those of our training step: the perceptual networks see the samples over the gate alone. With
`reference`, those of the public code, whose perceptual networks see every sample; its memory is then listed as well.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from data.loader import PREFETCH
from data.order import check_layout
from t2i.config import RunConfig
from t2i.config_base import ConfigError
from t2i.config_loading import stage_config
from t2i.gpus import GPUS, Gpu
from t2i.plan_memory import (
    CONTEXT_BYTES,
    ENGINES,
    FP32,
    Bytes,
    Engine,
    buffers,
    checkpoint_bytes,
    reference_static_memory,
    total,
)
from t2i.plan_networks import TrainedFlops, open_share, trained_flops
from t2i.plan_stage import StageMemory

USABLE = 0.9
"""Share of a device's memory that a plan may fill; the rest is for fragments and what is not foreseen."""
FED_TOKENS = 8192
"""Assumed: image tokens in a micro-batch from which matrix products keep a GPU busy."""
PREFERENCE: tuple[Engine, ...] = ("zero1", "zero2", "fsdp2", "zero3")
"""Engines from the least communication to the most; zero0 holds more than zero1 and computes the same."""

BASIS = {
    "parameters": "counted: the networks, built on the meta device",
    "flops": "counted: matrix products and convolutions; a backward as two forwards, one through frozen networks; "
    "captions of text.length tokens, an upper bound under model.text_padding mask, without text.instruction's",
    "static": "derived: bytes a parameter of each engine, measured on 1 and 2 ranks",
    "activations": "derived: what autograd keeps of each layer in eager mode, checked on small networks; an upper "
    "bound for torch.compile; a backward's working memory assumed",
    "device": f"assumed: {CONTEXT_BYTES / 2**30:g} GiB for CUDA's context and workspaces, and that {USABLE:.0%} of "
    "the memory may be filled",
    "time": "derived from the assumed utilisation: FLOPs that are computed, recomputed ones too, over the data sheet's "
    "peak; the paper's 6 days on 8 H800 are 22 %; validation, checkpoints and communication are in it alone",
    "data": "derived from the assumed bytes a sample; samples that filters pass over come on top",
    "storage": "derived: exact but for the trainer's state, some KB a lane",
}


@dataclass(frozen=True)
class Assumptions:
    """What the config does not say."""

    gpus: int
    gpu: Gpu
    utilisation: float
    """Share of the peak that the step reaches, over all FLOPs it computes."""
    sample_bytes: float
    """Mean bytes of a sample as it is read."""
    reference: bool = False

    @classmethod
    def of(cls, gpus: int, gpu: str, mfu: float, sample_bytes: float, reference: bool) -> Assumptions:
        """From the command line's words.

        Raises:
            ConfigError: one of them is out of range, or the GPU is not known.
        """
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
    """An engine with or without activation checkpointing: the largest micro-batch that fits, and what it fills."""

    engine: Engine
    checkpointing: bool
    micro_batch_size: int
    """0 where not even one sample fits."""
    bytes: int
    """On each device, at that micro-batch (at 1 where nothing fits)."""


@dataclass(frozen=True)
class _Stage:
    """A stage with its counted networks."""

    name: str
    given: Assumptions
    memory: StageMemory
    counted: TrainedFlops

    @classmethod
    def of(cls, config: RunConfig, index: int, given: Assumptions) -> _Stage:
        stage = stage_config(config, index)
        check_layout(stage.train.batch_size, stage.data.lanes, given.gpus)
        # auto is bf16 on every GPU of the table
        dtype_bytes = FP32 if stage.engine.dtype == "fp32" else 2
        memory = StageMemory.of(stage, given.gpus, dtype_bytes, seen=1.0 if given.reference else None)
        counted = trained_flops(stage, memory.text_width, memory.features)
        return cls(config.stages[index]["name"], given, memory, counted)

    @property
    def config(self) -> RunConfig:
        return self.memory.config

    @property
    def share(self) -> int:
        """Samples of a global batch that a rank has."""
        return self.config.train.batch_size // self.given.gpus

    def flops(self) -> dict[str, float]:
        """FLOPs of one training image, by component."""
        memory, objective = self.memory, self.config.objective
        parts = {"denoiser": self.counted.denoiser, "projector": self.counted.projector}
        if memory.text is not None:
            parts["text encoder"] = memory.text.forward_flops
        if memory.distance is not None:
            parts["lpips, predicted"] = 2 * memory.distance.forward_flops * memory.seen
            parts["lpips, clean"] = memory.distance.forward_flops * memory.seen
        if memory.features is not None:
            clean = 1.0 if objective.repa_weight > 0 else memory.compared
            parts["dino, predicted"] = 2 * memory.features.forward_flops * memory.compared
            parts["dino, clean"] = memory.features.forward_flops * clean
        return parts

    @property
    def budget(self) -> int:
        """Bytes of a device that may be filled."""
        return int(USABLE * self.given.gpu.memory_gib * 2**30)

    def option(self, engine: Engine, checkpointing: bool) -> Option:
        """The largest micro-batch that divides a rank's share and fits."""
        sizes = [n for n in range(1, self.share + 1) if self.share % n == 0]
        fitting = [n for n in sizes if self.memory.device_bytes(engine, n, checkpointing) <= self.budget]
        best = max(fitting, default=0)
        return Option(engine, checkpointing, best, self.memory.device_bytes(engine, max(best, 1), checkpointing))

    def executed_flops(self, checkpointing: bool) -> float:
        """FLOPs of an image as computed: checkpointing runs the blocks' forward again."""
        return sum(self.flops().values()) + (self.counted.blocks if checkpointing else 0.0)

    def images_per_s(self, checkpointing: bool) -> float:
        given = self.given
        return given.gpus * given.gpu.peak_bf16 * given.utilisation / self.executed_flops(checkpointing)


def recommend(stage: _Stage, options: list[Option]) -> Option | None:
    """The option that computes least: no checkpointing before checkpointing, then the least communication, as long as
    its micro-batch feeds the GPU; failing that, the one with the largest micro-batch. None where nothing fits."""
    height, width = stage.config.data.size
    tokens = height * width // stage.config.model.patch_size**2
    wanted = min(stage.share, -(-FED_TOKENS // tokens))
    ranked = sorted(options, key=lambda it: (it.checkpointing, (*PREFERENCE, "zero0").index(it.engine)))
    fitting = [it for it in ranked if it.micro_batch_size]
    for it in fitting:
        if it.micro_batch_size >= wanted:
            return it
    return max(fitting, key=lambda it: it.micro_batch_size, default=None)


def _advice(stage: _Stage, options: list[Option], chosen: Option | None) -> list[str]:
    """Sentences: whether the config's own settings fit, and what would be cheaper."""
    micro, gib = stage.config.train.micro_batch_size, 2**30
    said = []
    if stage.share % micro:
        said.append(f"train.micro_batch_size {micro} does not divide a rank's share of the batch, {stage.share}")
    else:
        need = stage.memory.device_bytes("zero1", micro, False)
        verdict = "fits" if need <= stage.budget else "does not fit"
        said.append(
            f"train.micro_batch_size {micro} with zero1 and no checkpointing takes {need / gib:.1f} GiB: it {verdict} "
            f"into {USABLE:.0%} of {stage.given.gpu.memory_gib:g} GiB"
        )
    if (folder := stage.config.engine.state_folder) is not None:
        mapped = total(stage.memory.mapped("zero1"))
        said.append(f"moments and average, {mapped / gib:.1f} GiB a rank at zero1, are files in {folder}, not memory")
    flops = stage.flops()
    whole = sum(flops.values())
    if chosen is None:
        least = min(options, key=lambda it: it.bytes)
        said.append(
            f"nothing fits: one sample takes {least.bytes / gib:.1f} GiB or more ({least.engine}, checkpointing): "
            "take more or larger GPUs, or a smaller model"
        )
    else:
        alike = [it for it in options if it.checkpointing == chosen.checkpointing]
        roomiest = max(alike, key=lambda it: it.micro_batch_size)
        if roomiest.micro_batch_size > chosen.micro_batch_size:
            said.append(f"{roomiest.engine} would hold {roomiest.micro_batch_size}, for more communication")
        if chosen.checkpointing:
            said.append(
                f"checkpointing computes {stage.counted.blocks / whole:.0%} more: GPUs with more memory save it"
            )
    encoding = flops.get("text encoder", 0.0) / whole
    if stage.memory.text is None:
        said.append("classes cost nothing to encode")
    elif stage.config.text.cache:
        said.append(f"text.cache saves up to {encoding:.1%} of these FLOPs where captions come again soon")
    else:
        said.append(f"caption states computed once and kept would save {encoding:.1%} of FLOPs")
    clean = sum(flops.get(name, 0.0) for name in ("lpips, clean", "dino, clean"))
    if clean:
        said.append(f"the clean images' perceptual features are {clean / whole:.1%} of FLOPs")
    return said


def _stage_plan(stage: _Stage) -> dict[str, Any]:
    """One stage's plan, in plain values; bytes, seconds, FLOPs."""
    config, given = stage.config, stage.given
    memory = stage.memory
    options = [stage.option(engine, checkpointing) for checkpointing in (False, True) for engine in ENGINES]
    chosen = recommend(stage, options)
    checkpointing = chosen.checkpointing if chosen is not None and not given.reference else False
    micro = config.train.micro_batch_size
    flops = stage.flops()
    rate = stage.images_per_s(checkpointing)
    images = config.train.steps * config.train.batch_size
    seconds = images / rate
    static: dict[str, Bytes] = {engine: _summed(memory.static(engine)) for engine in ENGINES}
    if given.reference:
        static["ddp"] = _summed(reference_static_memory(memory.network, memory.frozen(perceptual_bytes=FP32)))
    return {
        "name": stage.name,
        "resolution": config.data.resolution,
        "steps": config.train.steps,
        "batch_size": config.train.batch_size,
        "micro_batch_size": micro,
        "dtype": "fp32" if memory.dtype_bytes == FP32 else "bf16",
        "parameters": {
            "denoiser": memory.network.denoiser,
            "of which image blocks": memory.network.image_blocks,
            "of which text refiner": memory.network.text_blocks,
            "of which embeddings and head": memory.network.rest,
            "projector": memory.network.projector,
            "trained": memory.network.total,
            "frozen": {net.name: net.parameters for net in (memory.text, memory.distance, memory.features) if net},
        },
        "over_gate": open_share(config.objective),
        "flops_per_image": {**flops, "total": sum(flops.values())},
        "of_which": {
            "text refiner": stage.counted.text_refiner,
            "recomputed with checkpointing": stage.counted.blocks,
        },
        "static_bytes": static,
        "engine_buffer_bytes": {engine: buffers(engine, memory.network, memory.dtype_bytes) for engine in ENGINES},
        "activation_bytes": {
            name: _summed(memory.activations(micro, with_checkpointing))
            for name, with_checkpointing in (("plain", False), ("checkpointed", True))
        },
        "options": [asdict(option) for option in options],
        "recommended": asdict(chosen) if chosen is not None else None,
        "advice": _advice(stage, options, chosen),
        "time": {
            "images": images,
            "flops": images * stage.executed_flops(checkpointing),
            "images_per_s": rate,
            "step_s": config.train.batch_size / rate,
            "days": seconds / 86400,
            "gpu_hours": seconds * given.gpus / 3600,
            "metrics_mfu": given.utilisation * flops["denoiser"] / stage.executed_flops(checkpointing),
        },
        "data": _data(stage, rate),
        "storage": _storage(stage),
    }


def _summed(parts: Bytes) -> Bytes:
    return {**parts, "total": total(parts)}


def _data(stage: _Stage, rate: float) -> dict[str, float]:
    """Bandwidth of all ranks, and host memory of one rank's loader."""
    data, given = stage.config.data, stage.given
    remote = sum(source.url.startswith("s3://") for source in data.sources)
    # A request to S3 brings neighbours that a block needs later; from a disk each sample is read when it is due.
    ahead = data.lanes // given.gpus * remote * data.shuffle_block * given.sample_bytes
    pixels = stage.share * 3 * data.size[0] * data.size[1]
    return {
        "bytes_per_s": rate * given.sample_bytes,
        "bytes_per_s_a_rank": rate * given.sample_bytes / given.gpus,
        "bytes_read": stage.config.train.steps * stage.config.train.batch_size * given.sample_bytes,
        "read_ahead_bytes_a_rank": ahead,
        "read_ahead_limit_bytes_a_rank": data.buffer_gib * 2**30,
        "decoded_bytes_a_rank": (PREFETCH + 1) * pixels,
    }


def _storage(stage: _Stage) -> dict[str, float]:
    """Bytes on disk, and those of the snapshot in a rank's host memory."""
    network, checkpoint = stage.memory.network, stage.config.checkpoint
    one = checkpoint_bytes(network)
    saves = -(-stage.config.train.steps // checkpoint.every)
    return {
        "checkpoint_bytes": one,
        "checkpoints": min(checkpoint.keep, saves),
        "kept_bytes": one * min(checkpoint.keep, saves),
        "model_bytes": 2 * FP32 * network.total,
        "snapshot_bytes_a_rank": one / stage.given.gpus,
    }


def plan(config: RunConfig, given: Assumptions) -> dict[str, Any]:
    """The plan of a run's stages, in plain values: what `--json` prints.

    Raises:
        ConfigError: the config has no stage, or a network it names is not known here.
        DataError: the GPUs cannot share a stage's batch or lanes evenly.
    """
    if not config.stages:
        raise ConfigError("stages: the config names no stage")
    stages = [_stage_plan(_Stage.of(config, index, given)) for index in range(len(config.stages))]
    kept = sum(stage["storage"]["kept_bytes"] + stage["storage"]["model_bytes"] for stage in stages)
    return {
        "name": config.name,
        "gpus": given.gpus,
        "gpu": asdict(given.gpu),
        "utilisation": given.utilisation,
        "sample_bytes": given.sample_bytes,
        "reference": given.reference,
        "stages": stages,
        "total": {
            "days": sum(stage["time"]["days"] for stage in stages),
            "gpu_hours": sum(stage["time"]["gpu_hours"] for stage in stages),
            "flops": sum(stage["time"]["flops"] for stage in stages),
            "images": sum(stage["time"]["images"] for stage in stages),
            # Besides what is kept, one checkpoint is being written.
            "disk_bytes": kept + max(stage["storage"]["checkpoint_bytes"] for stage in stages),
        },
        "basis": BASIS,
    }
