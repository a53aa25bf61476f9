"""The first minute of a run: what would end it hours later is found before networks are built.

Rank 0 tries the run's folder, the room in it and the mirror; every rank reads every source; and the estimate of each
stage's memory is held against the devices. What the step itself would meet is for the dry run (`dry_run.py`).
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.errors import StoreError, UserError
from data.shards.index import SourceIndex
from data.store import open_store
from t2i.build import choose_dtype
from t2i.config import RunConfig
from t2i.config_base import ConfigError
from t2i.engine.checkpoint import checkpoints, step_of
from t2i.train.memory import GIB, check_memory, device_bytes, estimate
from t2i.train.places import StagePlace
from t2i.train.processes import World
from t2i.train.stage_data import StageData

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


def check_room(config: RunConfig, place: StagePlace, checkpoint: int, free: float) -> None:
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


def leftover_bytes(place: StagePlace) -> int:
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


def check_start(stages: Sequence[tuple[RunConfig, StagePlace, StageData]], world: World) -> list[str]:
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
    return world.from_main(lambda: _check_on_main(stages, world, available))


def _check_on_main(
    stages: Sequence[tuple[RunConfig, StagePlace, StageData]], world: World, available: int
) -> list[str]:
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
