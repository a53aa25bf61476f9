"""Writes checkpoints in the background while training goes on.

- `save` copies this rank's slices to host memory and returns; a thread writes them.
- Two phases: each rank's thread writes its file and a report into a folder whose name begins with a dot and which all
  ranks see; rank 0's thread waits for the reports, writes the manifest and gives the folder its final name.
- Threads communicate through that folder only. `save` and `wait` have one collective, on the training thread, which
  waits for no disk: ranks exchange whether they are still writing, so that all of them skip a save or none does.
- A disk fault does not stop training: it is reported as an event, nothing is deleted, and the next save tries again.
- Memory: one copy of the state on the host. Disk: one checkpoint more than are kept, and two that wait for the mirror.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import first_of
from data.files import atomic_write, commit, sync, write_json
from t2i.engine.checkpoint.format import (
    EPHEMERAL,
    MANIFEST,
    Retention,
    checkpoints,
    folder_name,
    manifest_text,
    part_name,
    step_of,
)
from t2i.engine.checkpoint.mirror import Mirror
from t2i.engine.engine import Shards
from t2i.engine.optimizer import OffloadDir

COMMIT_TIMEOUT_S = 300.0
GIVE_UP_S = 10.0
"""How long rank 0 waits for the other ranks to finish before it removes what they wrote."""
CLOSE_TIMEOUT_S = 30.0
POLL_S = 0.02
_CHUNK_BYTES = 8 << 20


def _tensors(shards: Shards, ema: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a rank saves: views named `param/NAME`, `ema/NAME` and one `MOMENT/NAME` a moment, none of them empty."""
    tensors: dict[str, Tensor] = {}
    for name, shard in shards.items():
        if shard.is_primary and shard.param.numel():
            tensors[f"param/{name}"] = shard.param
            tensors[f"ema/{name}"] = ema[name]
            tensors.update({f"{moment}/{name}": tensor for moment, tensor in shard.state.items()})
    return tensors


class Snapshot:
    """A copy of a rank's state in host memory (or in `offload_dir`), laid out as the safetensors file it becomes.

    The buffer is allocated once, pinned if the state is on a GPU. The file is written from it in chunks that are
    hashed on the way, without the GIL: nothing is copied or read again, and training does not wait.
    """

    def __init__(self, offload_dir: OffloadDir | None = None) -> None:
        self._offload_dir = offload_dir
        self._buffer = torch.empty(0)
        self._used = 0
        self._header = b""
        self.slices: dict[str, list[int]] = {}
        """Start and stop of each slice that this rank saves, in the flattened parameter."""
        self.shapes: dict[str, list[int]] = {}
        """Shape of every parameter."""

    def allocate(self, shards: Shards, ema: Mapping[str, Tensor]) -> None:
        """Allocate the buffer, which takes seconds for some GB."""
        tensors = _tensors(shards, ema).values()
        numel = sum(tensor.numel() for tensor in tensors)
        if numel > self._buffer.numel():
            pinned = any(tensor.is_cuda for tensor in tensors)
            self._buffer = (
                self._offload_dir.zeros(numel) if self._offload_dir else torch.zeros(numel, pin_memory=pinned)
            )

    def capture(self, shards: Shards, ema: Mapping[str, Tensor]) -> None:
        """Copy the state; when this returns, training may change it."""
        self.allocate(shards, ema)
        self.slices = {n: [s.start, s.stop] for n, s in shards.items() if s.is_primary and s.param.numel()}
        self.shapes = {name: list(shard.shape) for name, shard in shards.items()}
        entries, at, devices = {}, 0, set()
        for key, tensor in _tensors(shards, ema).items():
            assert tensor.dtype == torch.float32, key
            self._buffer[at : at + tensor.numel()].copy_(tensor.detach(), non_blocking=True)
            offsets = [4 * at, 4 * (at + tensor.numel())]
            entries[key] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": offsets}
            at += tensor.numel()
            devices.add(tensor.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        self._header, self._used = len(header).to_bytes(8, "little") + header, at

    def write(self, path: Path) -> tuple[str, int]:
        """Write the file durably; return its SHA-256 and its size in bytes."""
        content = self._buffer[: self._used].numpy().data.cast("B") if self._used else memoryview(b"")
        digest = hashlib.sha256(self._header)
        with path.open("wb") as file:
            file.write(self._header)
            for start in range(0, len(content), _CHUNK_BYTES):
                chunk = content[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest(), len(self._header) + len(content)


class SaveResult(NamedTuple):
    """Whether a `save` started, which is the same on all ranks, and the seconds for which it blocked this rank."""

    started: bool
    stall_s: float


class _Status(NamedTuple):
    """What a rank sends to the others at a save."""

    busy: bool
    failed: bool
    committed: int | None
    events: list[str]


@dataclass(frozen=True)
class _Job:
    """One checkpoint to write."""

    step: int
    partial: Path
    final: Path
    state: dict[str, Any]
    ephemeral: bool
    needed_before: int | None


class _CommitFailed(Exception):
    """Why rank 0 cannot commit, with the rank at fault."""


class _Reported(Exception):
    """The checkpoint is given up, and rank 0 reports why."""


def gather_all(item: Any) -> list[Any]:
    """Every rank's item, in rank order, through the default process group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


class CheckpointWriter:
    """Writes the checkpoints of one stage. All ranks construct one and call `save` and `wait` alike.

    Args:
        folder: holds the stage's checkpoints; all ranks see it.
        attempt_id: the same on all ranks and new at every start of the run, so that files which a killed attempt left
            behind are never mixed with this one's.
        keep: newest regular checkpoints to keep.
        keep_every: regular checkpoints at multiples of this many steps are kept for good; 0 keeps none.
        mirror: receives a copy of each regular checkpoint; only rank 0's is used.
        gather: returns every rank's item, in rank order, on every rank.
        offload_dir: holds the copy of the state; by default it is in memory.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        attempt_id: str,
        keep: int,
        keep_every: int = 0,
        mirror: Mirror | None = None,
        gather: Callable[[Any], list[Any]] = gather_all,
        offload_dir: OffloadDir | None = None,
    ) -> None:
        self.folder = folder
        self.rank = rank
        self.world_size = world_size
        self.skipped = 0
        """Saves that were left out because the one before was still being written."""
        self._attempt_id = attempt_id
        self._retention = Retention(keep, keep_every)
        self._mirror = mirror if rank == 0 else None
        self._gather = gather
        self._snapshot = Snapshot(offload_dir)
        self._started = 0
        self._committed: int | None = None
        self._thread: threading.Thread | None = None
        self._failed = False
        self._abandoned = threading.Event()
        self._events: deque[str] = deque()

    def allocate(self, shards: Shards, ema: Mapping[str, Tensor]) -> None:
        """Allocate memory for the copy of the state now, so that the first save need not."""
        self._snapshot.allocate(shards, ema)

    def save(
        self,
        step: int,
        shards: Shards,
        ema: Mapping[str, Tensor],
        state: dict[str, Any],
        *,
        may_skip: bool = False,
        ephemeral: bool = False,
        needed_before: int | None = None,
    ) -> SaveResult:
        """Start a checkpoint. A collective: all ranks pass the same arguments (only rank 0's `state` is used).

        Args:
            state: the trainer's global state, in JSON's types; must not be modified afterwards.
            may_skip: leave this checkpoint out if the one before is still being written, instead of waiting for it.
            ephemeral: remove this checkpoint once a later one is there.
            needed_before: keep the newest checkpoint from before this step too, for a rollback.
        """
        began = time.perf_counter()
        if not may_skip:
            self._join()
        if any(status.busy for status in self._exchange_status()):
            self.skipped += 1
            if self.rank == 0:
                self._events.append(f"checkpoint of step {step} skipped: the one before is still being written")
            return SaveResult(False, time.perf_counter() - began)
        self._join()
        self._started += 1
        self._failed = False
        self._abandoned.clear()
        self._snapshot.capture(shards, ema)
        # Numbered, so that a second save of a step does not find what the first one left.
        partial = self.folder / f".{folder_name(step)}.{self._attempt_id}.{self._started}"
        job = _Job(step, partial, self.folder / folder_name(step), state, ephemeral, needed_before)
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()
        return SaveResult(True, time.perf_counter() - began)

    def wait(self) -> int | None:
        """Wait until the current checkpoint is committed or has failed. A collective.

        Returns the step of the last checkpoint that this writer committed.
        """
        self._join()
        return self._exchange_status()[0].committed

    @property
    def mirroring(self) -> bool:
        """Whether this rank's mirror has checkpoints to copy."""
        return self._mirror is not None and bool(self._mirror.in_use())

    def discard_after(self, step: int) -> None:
        """Remove later checkpoints, here and in the mirror, for a rollback. A collective."""
        self.wait()
        if self.rank == 0:
            try:
                for path in checkpoints(self.folder):
                    if step_of(path) > step:
                        path.rename(path.with_name(f".{path.name}.superseded"))  # the next save removes it
            except OSError as error:
                self._events.append(f"checkpoints after step {step} cannot be removed: {error}")
            self._committed = None
            if self._mirror is not None:
                self._mirror.discard_after(step)
        self._gather(None)

    def take_events(self) -> list[str]:
        """Messages since the last call; on rank 0 those of all ranks. Cheap enough for every step."""
        events: list[str] = []
        while self.rank == 0 and self._events:
            events.append(self._events.popleft())
        if self._mirror is not None:
            events += self._mirror.take_events()
        return events

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Wait until the current checkpoint is written and mirrored, or the time is over."""
        deadline = time.monotonic() + timeout_s
        if self._thread is not None:
            self._thread.join(timeout_s)
        if self._mirror is not None:
            self._mirror.close(max(0.0, deadline - time.monotonic()))

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _exchange_status(self) -> list[_Status]:
        busy = self._thread is not None and self._thread.is_alive()
        events: list[str] = []
        while self.rank and self._events:
            events.append(self._events.popleft())
        statuses = self._gather(_Status(busy, self._failed and not busy, self._committed, events))
        if self.rank == 0:
            for status in statuses:
                self._events.extend(status.events)
            if any(status.failed for status in statuses):
                self._abandoned.set()  # a rank that could not even report
        return statuses

    # The background thread

    def _run(self, job: _Job) -> None:
        try:
            self._write(job)
        except _Reported:
            self._failed = True
        except Exception as error:  # an event: whatever is wrong with a disk, training goes on
            self._failed = True
            kept = "" if self._committed is None else f"; that of step {self._committed} stays"
            self._events.append(f"checkpoint of step {job.step} was not written: {self._describe(error)}{kept}")

    def _describe(self, error: Exception) -> str:
        if isinstance(error, _CommitFailed):
            return str(error)
        return f"rank {self.rank}: {error if isinstance(error, OSError) else repr(error)}"

    def _write(self, job: _Job) -> None:
        if self.rank == 0:
            for leftover in self.folder.glob(".step_*"):  # nobody writes there now, except ranks that are dying
                if leftover != job.partial:
                    shutil.rmtree(leftover, ignore_errors=True)
        try:
            job.partial.mkdir(parents=True, exist_ok=True)
            part = job.partial / part_name(self.rank)
            digest, size = self._snapshot.write(part)
            report = {"file": part.name, "bytes": size, "sha256": digest, "slices": self._snapshot.slices}
            write_json(self._report(job, self.rank), report)
            if self.rank == 0:
                self._commit(job)
        except Exception as error:
            if self.rank == 0:
                self._clean_up(job)
            else:
                self._report_failure(job, error)
            raise
        if self.rank == 0:
            self._prune(job)

    def _report(self, job: _Job, rank: int, suffix: str = "json") -> Path:
        return job.partial / f"rank_{rank:05d}.{suffix}"

    def _clean_up(self, job: _Job) -> None:
        """Free the disk space of a failed checkpoint, on rank 0: a full disk should not stay full."""
        with suppress(OSError):
            deadline = time.monotonic() + GIVE_UP_S
            # A rank that writes after the removal would make the folder anew.
            while self._unreported(job, set()) - {0} and not self._abandoned.wait(POLL_S):
                if time.monotonic() > deadline:
                    break
        shutil.rmtree(job.partial, ignore_errors=True)

    def _report_failure(self, job: _Job, error: Exception) -> None:
        """Remove this rank's file and write a failure report for rank 0.

        Raises:
            _Reported: rank 0 knows.
        """
        if isinstance(error, FileNotFoundError) and not job.partial.exists():
            raise _Reported from error  # rank 0 has removed it
        with suppress(OSError):  # what rank 0 does not learn now, it learns at the next save
            (job.partial / part_name(self.rank)).unlink(missing_ok=True)
            report = self._report(job, self.rank, "partial")
            report.touch()
            with suppress(OSError):
                report.write_text(self._describe(error))
            has_reason = report.stat().st_size > 0
            report.rename(self._report(job, self.rank, "failed"))
            if has_reason:
                raise _Reported from error

    def _wait_for_reports(self, job: _Job) -> list[dict[str, Any]]:
        deadline = time.monotonic() + COMMIT_TIMEOUT_S
        failed: set[int] = set()
        while missing := self._unreported(job, failed):
            if failed:
                break
            if self._abandoned.is_set() or time.monotonic() > deadline:
                reason = "failed" if self._abandoned.is_set() else f"not done after {COMMIT_TIMEOUT_S:g} s"
                raise _CommitFailed(f"rank{'s' if len(missing) > 1 else ''} {first_of(sorted(missing))}: {reason}")
            time.sleep(POLL_S)
        if failed:
            raise _CommitFailed(self._report(job, min(failed), "failed").read_text() or f"rank {min(failed)}: failed")
        return [json.loads(self._report(job, rank).read_text()) for rank in range(self.world_size)]

    def _unreported(self, job: _Job, failed: set[int]) -> set[int]:
        """Ranks that have reported neither success nor failure; those that failed are added to `failed`."""
        names = set(os.listdir(job.partial))  # one listing, whatever the number of ranks
        failed |= {rank for rank in range(self.world_size) if self._report(job, rank, "failed").name in names}
        return {rank for rank in range(self.world_size) if self._report(job, rank).name not in names} - failed

    def _commit(self, job: _Job) -> None:
        """On rank 0: once every rank has reported, write the manifest and give the folder its final name."""
        parts = self._wait_for_reports(job)
        for part in parts:
            if (size := (job.partial / part["file"]).stat().st_size) != part["bytes"]:
                raise OSError(f"{job.partial / part['file']}: {size} of {part['bytes']} bytes are there")
        if job.ephemeral:
            (job.partial / EPHEMERAL).touch()
        body = {"step": job.step, "state": job.state, "shapes": self._snapshot.shapes, "parts": parts}
        atomic_write(job.partial / MANIFEST, manifest_text(body).encode())
        for rank in range(self.world_size):
            self._report(job, rank).unlink()
        sync(job.partial)
        commit(job.partial, job.final)
        self._committed = job.step
        if self._mirror is not None and not job.ephemeral:
            self._mirror.enqueue(job.final)

    def _prune(self, job: _Job) -> None:
        in_use = self._mirror.in_use() if self._mirror is not None else set()
        found = {step_of(path): path for path in checkpoints(self.folder)}
        ephemeral = {step: (path / EPHEMERAL).exists() for step, path in found.items()}
        try:
            for step in self._retention.expired(ephemeral, job.step, job.needed_before):
                if found[step] not in in_use:
                    # Renamed first, so that a half-removed one is not taken for a damaged checkpoint.
                    dropped = found[step].with_name(f".{found[step].name}.dropped")
                    found[step].rename(dropped)
                    shutil.rmtree(dropped)
        except OSError as error:
            self._events.append(f"an old checkpoint cannot be removed: {error}")
