"""Checks before training: what would end the run hours later is found in its first minute.

Before any network is built, rank 0 tries the run's folder, the free space and the mirror, every rank reads every
source, and the estimate of each stage's memory is compared with the devices. A stage is refused only if what every step
needs, the networks with their state and the activations of their blocks, is too much; the rest of the estimate is an
upper bound and leads to a notice.

The dry run makes one step on noise before the first real one, which tries shapes, kernels and memory. It leaves no
trace: a skipped update reaches neither weights nor moments, and everything random belongs to slots.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data.errors import StoreError, UserError
from data.files import name_in_errors
from data.loader import Batch
from data.randomness import key, uniform
from data.shards.index import SourceIndex
from data.store import open_store
from t2i.build import choose_dtype
from t2i.config.base import ConfigError
from t2i.config.run import RunConfig
from t2i.distributed import World
from t2i.engine.checkpoint import checkpoints, step_of
from t2i.plan.counts import PARTS, ungated_fraction
from t2i.plan.memory import CAPTION_CACHE, StageMemory, checkpoint_bytes, engine_of, total, ungated_samples
from t2i.train.data import StageData
from t2i.train.metrics import memory_gib
from t2i.train.run_dir import StageDir
from t2i.train.step import TrainingStep, training_times

TIGHT = 0.9
"""Fraction of a device's memory from which an estimate leads to a notice."""
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes that a stage takes."""

    least: int
    """On a rank's device: the networks, their state, and what autograd keeps of the blocks."""
    expected: int
    """Peak on a rank's device, an upper bound."""
    checkpoint: int
    """On disk, for one checkpoint."""


def estimate(config: RunConfig, ranks: int, dtype: torch.dtype) -> Estimate:
    """Estimate a stage on `ranks` ranks, with weights and arithmetic in `dtype`.

    Raises:
        UserError: a network of an unknown kind.
    """
    engine, micro = config.engine, config.train.micro_batch_size
    memory = StageMemory.of(config, max(1, ranks // engine.dp_replicate), dtype.itemsize)
    name = engine_of(engine)
    static = memory.static(name)
    away = sum(static.pop(part) for part in ("masters", "moments", "ema")) if engine.offload else 0
    # A compiled block may keep less than an eager one, so count as under activation checkpointing.
    kept = memory.activations(micro, True if engine.compile else engine.activation_checkpointing)
    # Activations are freed as gradients appear, and a text encoder that does not stay loaded is freed before either.
    passing = max(static.pop("gradients"), sum(kept[part] for part in PARTS), memory.released_bytes)
    static.pop(CAPTION_CACHE, None)  # it may stay smaller
    return Estimate(
        least=total(static) + passing,
        expected=memory.device_bytes(name, micro, engine.activation_checkpointing) - away,
        checkpoint=checkpoint_bytes(memory.network),
    )


def remedy(config: RunConfig) -> str:
    """Which fields make a stage take less memory, in words."""
    engine, train = config.engine, config.train
    ways = []
    if engine.name == "deepspeed" and engine.zero_stage < 3:
        ways.append(f"raise engine.zero_stage ({engine.zero_stage}) or set engine.name to fsdp")
    if engine.name == "deepspeed" and engine.zero_stage == 3 and not engine.offload:
        ways.append("set engine.offload")
    if engine.dp_replicate > 1:
        ways.append(f"lower engine.dp_replicate ({engine.dp_replicate})")
    if train.micro_batch_size > 1:
        ways.append(f"lower train.micro_batch_size ({train.micro_batch_size})")
    if config.model.family == "pixeldit" and not engine.activation_checkpointing:
        ways.append("set engine.activation_checkpointing to pixel or, which takes still less, to true")
    elif engine.activation_checkpointing is not True:
        ways.append("set engine.activation_checkpointing to true")
    return ", or ".join([*ways, "take more ranks or larger devices"])


def check_memory(config: RunConfig, stage: str, found: Estimate, available: int) -> str | None:
    """Compare an estimate with the bytes that a rank's device has; returns a notice if memory may be tight.

    Raises:
        UserError: the stage cannot fit.
    """
    has = f"a rank has {available / GIB:.3g} GiB"
    if found.least > available:
        raise UserError(
            f"stage {stage} needs {found.least / GIB:.3g} GiB for its networks, their state and its blocks' "
            f"activations alone, and {has}: {remedy(config)}"
        )
    if found.expected > TIGHT * available:
        return (
            f"the memory of stage {stage} may be tight: up to {found.expected / GIB:.3g} GiB are expected, and {has}; "
            f"if that is not enough, {remedy(config)}"
        )
    return None


def device_bytes(world: World) -> int:
    """Memory of a rank's device, the least over all ranks; on CPUs, a host's divided by its ranks. A collective."""
    if world.device.type == "cuda":
        mine = torch.cuda.get_device_properties(world.device).total_memory
    else:
        mine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    everywhere = world.gather((socket.gethostname(), mine))
    ranks = Counter(host for host, _ in everywhere)
    return min(has if world.device.type == "cuda" else has // ranks[host] for host, has in everywhere)


def made_up_batch(config: RunConfig, stage: str, step: int, world: World) -> Batch:
    """A rank's share of a batch of noise that takes as much memory as any batch of the stage.

    Its images have the shape of the largest bucket, and its captions fill text.length. Its slots are those of step
    `step` (from 0), in an order that makes each micro-batch hold the largest possible number of ungated samples.
    Deterministic; no random generator is touched.
    """
    train, (height, width) = config.train, config.data.largest
    share = train.batch_size // world.size
    slots = np.arange(step * train.batch_size, (step + 1) * train.batch_size)
    over = (
        training_times(config.objective, uniform(key(config.seed, stage, "time"), slots))
        >= config.objective.perceptual_t_min
    )
    wanted = ungated_samples(train.micro_batch_size, ungated_fraction(config.objective))
    seen, unseen = (slots[chosen] if chosen.any() else slots for chosen in (over, ~over))
    dealt = np.concatenate([np.resize(seen, wanted), np.resize(unseen, train.micro_batch_size - wanted)])
    pixels = np.random.default_rng(world.rank).integers(0, 256, (share, 3, height, width), np.uint8)
    return Batch(
        pixels=[torch.from_numpy(pixels)],
        captions=["" if config.model.condition == "class" else "a " * config.text.length] * share,
        ids=[f"made up/{number}" for number in range(share)],
        slots=np.resize(dealt, share),
        state={},
        bad=[],
        wait_s=0.0,
    )


def no_update(loss: float, grad_norm: float) -> str:
    """Why the update of a dry run is skipped."""
    return "dry run"


def dry_run(train_step: TrainingStep, config: RunConfig, stage: str, world: World) -> str:
    """Make a stage's first step on noise and skip its update; returns its time and peak memory in a sentence.

    All ranks take part.

    Raises:
        UserError: the device has not enough memory.
    """
    began = time.perf_counter()
    try:
        train_step(made_up_batch(config, stage, 0, world), 0, no_update)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise UserError(
            f"the stage's step does not fit into the device's memory ({reason}): {remedy(config)}"
        ) from error
    seconds = time.perf_counter() - began
    return f"a dry step took {seconds:.1f} s and {memory_gib(world.device):.2f} GiB"


MIRROR_MINUTES = 1.0
"""How long the write test waits for a mirror that does not answer."""


def check_writable(directory: Path) -> None:
    """Write a small file, read it back and remove it.

    Raises:
        UserError: that fails.
    """
    path, content = directory / f".written-{secrets.token_hex(4)}", secrets.token_bytes(16)
    with name_in_errors(f"root {directory.parent}: {directory}"):
        try:
            with path.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            found = path.read_bytes()
        finally:
            path.unlink(missing_ok=True)
    if found != content:
        raise UserError(f"root {directory.parent}: what is written to {directory} does not read back: check the disk")


def check_room(config: RunConfig, stage_dir: StageDir, checkpoint: int, free: float) -> None:
    """Check that a stage's coming checkpoints, of `checkpoint` bytes each, fit into `free` bytes.

    Raises:
        UserError: they do not.
    """
    saving, present = config.checkpoint, checkpoints(stage_dir.checkpoints)
    step = step_of(present[-1]) if present else 0
    coming = -(-(config.train.steps - step) // saving.every)
    needed = max(0, min(saving.keep + 1 - len(present), coming)) * checkpoint
    if needed > free:
        raise UserError(
            f"root {config.root}: {free / GIB:.3g} GiB are free for {stage_dir.folder}, and the checkpoints "
            f"that come, of {checkpoint / GIB:.3g} GiB each, need {needed / GIB:.3g} GiB (checkpoint.keep "
            f"{saving.keep}, and one more): free some, set root to a larger disk, or lower checkpoint.keep"
        )


def free_bytes(directory: Path) -> float:
    """Free bytes of a folder's file system; infinite if it does not say."""
    usage = shutil.disk_usage(directory)
    return usage.free if usage.total else math.inf


def leftover_bytes(stage_dir: StageDir) -> int:
    """Bytes of unfinished and discarded checkpoints, which the first save will free."""
    files = (file for folder in stage_dir.checkpoints.glob(".step_*") for file in folder.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def check_mirror(config: RunConfig) -> str | None:
    """Write a small object into `checkpoint.mirror`, if there is one, read it back and delete it.

    Returns a notice if the mirror does not answer: that may pass, and training does not wait for it.

    Raises:
        ConfigError: the mirror does not exist, or may not be written, read or deleted from.
    """
    saving, content = config.checkpoint, secrets.token_bytes(16)
    if saving.mirror is None:
        return None
    if not (saving.mirror.startswith("s3://") or Path(saving.mirror).is_dir()):
        raise ConfigError(f"checkpoint.mirror {saving.mirror} is not a directory: mount or make it")
    name = f"{config.name}/.written-{secrets.token_hex(4)}"
    try:
        store = open_store(saving.mirror, replace(saving.mirror_options, retry_minutes=MIRROR_MINUTES))
        store.write(name, content)
        found = store.read(name)
        store.delete(name)
    except UserError as error:
        raise ConfigError(f"checkpoint.mirror {saving.mirror}: {error}") from error
    except StoreError as error:
        return f"checkpoint.mirror {saving.mirror} does not answer, and copies may be missing: {error}"
    if found != content:
        raise ConfigError(f"checkpoint.mirror {saving.mirror}: what is written there does not read back")
    return None


def read_first_sample(index: SourceIndex) -> None:
    """Read the bytes of a source's first sample."""
    shard = int(np.flatnonzero(index.counts)[0])
    start, stop = (int(offset) for offset in index.offsets(shard)[:2])
    index.store.read(index.names[shard], start, stop, version=index.versions[shard])


def check_reach(indices: Sequence[SourceIndex], world: World) -> None:
    """Check that every rank reads every source; rank 0, which opened them, may be on another machine. A collective.

    Raises, on every rank:
        UserError: a rank cannot read one.
        StoreError: the network or a disk failed for longer than the retries last.
    """

    def read_all() -> None:
        try:
            for index in indices:
                read_first_sample(index)
        except (UserError, StoreError) as error:
            kind = UserError if isinstance(error, UserError) else StoreError
            raise kind(f"rank {world.rank} on {socket.gethostname()}: {error}") from error

    world.raise_on_all_ranks(read_all)


def check_start(stages: Sequence[tuple[RunConfig, StageDir, StageData]], world: World) -> list[str]:
    """Check the stages that are to be trained; returns notices, on every rank. A collective.

    Raises, on every rank:
        UserError: what would end the run later.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    indices = [source.index for _, _, data in stages for source in (*data.sources, *data.val_sources)]
    check_reach(list({(index.name, index.store.url): index for index in indices}.values()), world)
    available = device_bytes(world)
    return world.broadcast_from_rank0(lambda: _check_on_rank0(stages, world, available))


def _check_on_rank0(stages: Sequence[tuple[RunConfig, StageDir, StageData]], world: World, available: int) -> list[str]:
    config = stages[0][0]
    check_writable(config.directory)
    mirrors = {(stage.checkpoint.mirror, stage.checkpoint.mirror_options): stage for stage, _, _ in stages}
    notices = [check_mirror(stage) for stage in mirrors.values()]
    for config, stage_dir, _ in stages:
        try:
            found = estimate(config, world.size, choose_dtype(config.engine.dtype, world.device))
        except Exception as error:  # a network of an unknown kind
            notices.append(f"the memory of stage {stage_dir.name} is not estimated: {error}")
        else:
            check_room(config, stage_dir, found.checkpoint, free_bytes(config.directory) + leftover_bytes(stage_dir))
            notices.append(check_memory(config, stage_dir.name, found, available))
    return [notice for notice in notices if notice is not None]
