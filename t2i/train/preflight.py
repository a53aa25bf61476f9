"""The first minute of a run: what would end it hours later is found before networks are built.

Rank 0 tries the run's folder, the room in it and the mirror; every rank reads every source; and the estimate of each
stage's memory is held against the devices. What the step itself would meet is for the dry run (`dry_run.py`).

Whether a stage fits: the planner's estimate of it against what a rank's device has.

A stage is refused only where what every step needs, the networks with their state and the activations of their blocks,
is more than there is. The rest of the estimate is an upper bound, and leads to a notice.

One optimizer step on noise before the first real one, so that shapes, kernels and memory are tried at once.

An engine's vetoed step reaches neither weights nor moments, and all that is random belongs to slots: nothing of a dry
run is left.
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
from t2i.plan.memory import CAPTION_CACHE, StageMemory, checkpoint_bytes, engine_of, open_samples, total
from t2i.train.data import StageData
from t2i.train.metrics import memory_gib
from t2i.train.run_dir import StageDir
from t2i.train.step import TrainingStep, training_times

TIGHT = 0.9
"""Share of a device's memory from which its estimate is worth a notice."""
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes that a stage takes."""

    least: int
    """Of a rank's device: the networks, their state, and what autograd keeps of the blocks."""
    expected: int
    """Of a rank's device at the fullest moment, rather too many."""
    checkpoint: int
    """Of one checkpoint on disk."""


def estimate(config: RunConfig, ranks: int, dtype: torch.dtype) -> Estimate:
    """What a stage takes.

    Args:
        config: its settings.
        ranks: in all.
        dtype: of weights and arithmetic.

    Raises:
        UserError: what a network consists of is not known here.
    """
    engine, micro = config.engine, config.train.micro_batch_size
    memory = StageMemory.of(config, max(1, ranks // engine.dp_replicate), dtype.itemsize)
    name = engine_of(engine)
    static = memory.static(name)
    away = sum(static.pop(part) for part in ("masters", "moments", "average")) if engine.offload else 0
    # A compiled block may keep less than an eager one.
    kept = memory.activations(micro, True if engine.compile else engine.activation_checkpointing)
    # Activations go as gradients come, and a text encoder that is released is gone before either.
    passing = max(static.pop("gradients"), sum(kept[part] for part in PARTS), memory.released_bytes)
    static.pop(CAPTION_CACHE, None)  # there may not be as many captions
    return Estimate(
        least=total(static) + passing,
        expected=memory.device_bytes(name, micro, engine.activation_checkpointing) - away,
        checkpoint=checkpoint_bytes(memory.network),
    )


def remedy(config: RunConfig) -> str:
    """What makes a stage take less memory, naming fields."""
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
    """Compare an estimate with what a rank's device has.

    Args:
        config: the stage's settings.
        stage: its name.
        found: its estimate.
        available: bytes.

    Returns:
        A notice where it may be tight.

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
    """Memory of a rank's device, the least over all ranks; on CPUs, a host's by its ranks. A collective."""
    if world.device.type == "cuda":
        mine = torch.cuda.get_device_properties(world.device).total_memory
    else:
        mine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    everywhere = world.gather((socket.gethostname(), mine))
    ranks = Counter(host for host, _ in everywhere)
    return min(has if world.device.type == "cuda" else has // ranks[host] for host, has in everywhere)


def made_up_batch(config: RunConfig, stage: str, step: int, world: World) -> Batch:
    """A rank's share of a batch of noise in the stage's full shape, the largest bucket's, for the step that comes.

    Its slots are of that step, dealt out so that in each micro-batch as many samples are over the gate as will ever be.
    Its caption fills text.length: none takes more memory.
    Deterministic; no generator is touched.

    Args:
        config: the stage's settings.
        stage: its name.
        step: steps done.
    """
    train, (height, width) = config.train, config.data.largest
    share = train.batch_size // world.size
    slots = np.arange(step * train.batch_size, (step + 1) * train.batch_size)
    over = (
        training_times(config.objective, uniform(key(config.seed, stage, "time"), slots))
        >= config.objective.perceptual_t_min
    )
    wanted = open_samples(train.micro_batch_size, ungated_fraction(config.objective))
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
    """The veto of a dry run."""
    return "dry run"


def dry_run(train: TrainingStep, config: RunConfig, stage: str, world: World) -> str:
    """Run a stage's first step on noise, and veto its update. All ranks take part.

    Args:
        train: makes the stage's steps.
        config: the stage's settings.
        stage: its name.
        world: this process.

    Returns:
        A sentence with its seconds and the peak of memory so far.

    Raises:
        UserError: the device has not enough memory.
    """
    began = time.perf_counter()
    try:
        train(made_up_batch(config, stage, 0, world), 0, no_update)
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

# Disk


def check_writable(directory: Path) -> None:
    """Write a small file to the disk, read it back and remove it.

    Raises:
        UserError: one of them is not possible.
    """
    path, word = directory / f".written-{secrets.token_hex(4)}", secrets.token_bytes(16)
    try:
        try:
            with path.open("xb") as file:
                file.write(word)
                file.flush()
                os.fsync(file.fileno())
            found = path.read_bytes()
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"root {directory.parent}: {directory} cannot be written to: {error.strerror}") from error
    if found != word:
        raise UserError(f"root {directory.parent}: what is written to {directory} does not come back: mend the disk")


def check_room(config: RunConfig, place: StageDir, checkpoint: int, free: float) -> None:
    """See that a stage's checkpoints have room, besides those that are there.

    Args:
        config: the stage's settings.
        place: its folder.
        checkpoint: bytes of one.
        free: bytes that are free there.

    Raises:
        UserError: they have not.
    """
    saving, present = config.checkpoint, checkpoints(place.checkpoints)
    step = step_of(present[-1]) if present else 0
    coming = -(-(config.train.steps - step) // saving.every)
    needed = max(0, min(saving.keep + 1 - len(present), coming)) * checkpoint
    if needed > free:
        raise UserError(
            f"root {config.root}: {free / GIB:.3g} GiB are free for {place.folder}, and the checkpoints "
            f"that come, of {checkpoint / GIB:.3g} GiB each, need {needed / GIB:.3g} GiB (checkpoint.keep "
            f"{saving.keep}, and one more): free some, set root to a larger disk, or lower checkpoint.keep"
        )


def free_bytes(directory: Path) -> float:
    """Bytes that may still be written there; infinite on a file system that does not say."""
    usage = shutil.disk_usage(directory)
    return usage.free if usage.total else math.inf


def leftover_bytes(place: StageDir) -> int:
    """Bytes that the first save will free: of checkpoints that were never finished, or given up."""
    files = (file for folder in place.checkpoints.glob(".step_*") for file in folder.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def check_mirror(config: RunConfig) -> str | None:
    """Write a small object into `checkpoint.mirror`, if there is one, read it back and delete it.

    Returns:
        A notice where the mirror does not answer: that may pass, and training does not wait for it.

    Raises:
        ConfigError: the mirror is not there, or may not be written, read or deleted from.
    """
    saving, word = config.checkpoint, secrets.token_bytes(16)
    if saving.mirror is None:
        return None
    if not (saving.mirror.startswith("s3://") or Path(saving.mirror).is_dir()):
        raise ConfigError(f"checkpoint.mirror {saving.mirror} is not a directory: mount or make it")
    name = f"{config.name}/.written-{secrets.token_hex(4)}"
    try:
        store = open_store(saving.mirror, replace(saving.mirror_options, retry_minutes=MIRROR_MINUTES))
        store.write(name, word)
        found = store.read(name)
        store.delete(name)
    except UserError as error:
        raise ConfigError(f"checkpoint.mirror {saving.mirror}: {error}") from error
    except StoreError as error:
        return f"checkpoint.mirror {saving.mirror} does not answer, and copies may be missing: {error}"
    if found != word:
        raise ConfigError(f"checkpoint.mirror {saving.mirror}: what is written there does not come back")
    return None


# Data


def read_one(index: SourceIndex) -> None:
    """Read a sample's bytes from a source, its first one.

    Raises:
        DataError: they are not there, or may not be read.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    shard = int(np.flatnonzero(index.counts)[0])
    start, stop = (int(offset) for offset in index.offsets(shard)[:2])
    index.store.read(index.names[shard], start, stop, version=index.versions[shard])


def check_reach(indices: Sequence[SourceIndex], world: World) -> None:
    """See that every rank reads every source: rank 0, which opened them, may be on another machine. A collective.

    Raises:
        UserError: on every rank alike, what the first rank that does not met.
        StoreError: likewise.
    """
    fault: UserError | StoreError | None = None
    try:
        for index in indices:
            read_one(index)
    except (UserError, StoreError) as error:
        kind = UserError if isinstance(error, UserError) else StoreError
        fault = kind(f"rank {world.rank} on {socket.gethostname()}: {error}")
    if faults := [it for it in world.gather(fault) if it is not None]:
        raise fault or faults[0]


# All of it


def check_start(stages: Sequence[tuple[RunConfig, StageDir, StageData]], world: World) -> list[str]:
    """Check the stages that are to be trained before anything long begins. A collective.

    Args:
        stages: settings, place and opened data of each.

    Returns:
        Notices, on every rank.

    Raises:
        UserError: on every rank: what would end the run.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    sources = [source for _, _, data in stages for source in (*data.sources, *data.heldout)]
    check_reach(list({(it.index.name, it.index.store.url): it.index for it in sources}.values()), world)
    available = device_bytes(world)
    return world.broadcast_from_rank0(lambda: _check_on_main(stages, world, available))


def _check_on_main(stages: Sequence[tuple[RunConfig, StageDir, StageData]], world: World, available: int) -> list[str]:
    config = stages[0][0]
    check_writable(config.directory)
    mirrors = {(it.checkpoint.mirror, it.checkpoint.mirror_options): it for it, _, _ in stages}
    notices = [check_mirror(it) for it in mirrors.values()]
    for config, place, _ in stages:
        try:
            found = estimate(config, world.size, choose_dtype(config.engine.dtype, world.device))
        except Exception as error:  # networks of any kind may be named, and only what is known can be counted
            notices.append(f"the memory of stage {place.name} is not estimated: {error}")
        else:
            check_room(config, place, found.checkpoint, free_bytes(config.directory) + leftover_bytes(place))
            notices.append(check_memory(config, place.name, found, available))
    return [notice for notice in notices if notice is not None]
