"""Writes checkpoints beside training.

- `save` copies this rank's slices to host memory and returns; a thread does the rest. What it costs is told.
- Two phases. Each rank's thread writes its file and a report into a folder with a dot in front, which all ranks see;
  rank 0's thread waits for the reports, with a time limit, writes the manifest and gives the folder its name.
- Threads talk through that folder alone. The one collective is in `save` and `wait`, on the training thread, and
  waits for no disk: ranks tell each other whether they are still writing, so that all skip a save or none does.
- No fault of a disk stops training: it is an event, nothing is deleted then, and the next save tries again.
- Memory and disk: one copy of the state on the host; room for one checkpoint more than are kept, and for two that
  wait for the mirror.
"""

from __future__ import annotations

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

import torch.distributed as dist
from torch import Tensor

from data.files import atomic_write, commit, sync
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
from t2i.engine.checkpoint.snapshot import Snapshot
from t2i.engine.engine import Shards
from t2i.engine.optimizer import StateFolder

COMMIT_TIMEOUT_S = 300.0
GIVE_UP_S = 10.0
"""For how long rank 0 lets the others end by themselves before it removes what they wrote."""
CLOSE_TIMEOUT_S = 30.0
POLL_S = 0.02


class Saving(NamedTuple):
    """What became of a `save`, alike on all ranks, and the seconds for which it kept this rank from training."""

    begun: bool
    stall_s: float


class _Status(NamedTuple):
    """What a rank tells the others at a save."""

    busy: bool
    failed: bool
    committed: int | None
    events: list[str]


@dataclass(frozen=True)
class _Job:
    """One checkpoint to write."""

    step: int
    aside: Path
    final: Path
    state: dict[str, Any]
    ephemeral: bool
    needed_before: int | None


class _Fault(Exception):
    """Why rank 0 cannot commit, with the rank that is to blame."""


class _GivenUp(Exception):
    """The checkpoint is given up, and rank 0 says why."""


def gather_all(item: Any) -> list[Any]:
    """Every rank's item, in rank order, through the default process group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


class CheckpointWriter:
    """Writes the checkpoints of one stage. All ranks make one and call `save` and `wait` alike.

    Args:
        folder: holds the stage's checkpoints; visible to all ranks.
        attempt: the same word on all ranks, another one at each start of the run, so that what a killed
            attempt left behind is never mixed with this one's files.
        keep: newest regular checkpoints to keep.
        keep_every: regular checkpoints at multiples of so many steps are kept for ever; 0: none.
        mirror: where regular checkpoints are copied to; rank 0's counts.
        gather: every rank's item, in rank order, on every rank.
        offload_dir: where the copy of the state lies, if not in memory.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        attempt: str,
        keep: int,
        keep_every: int = 0,
        mirror: Mirror | None = None,
        gather: Callable[[Any], list[Any]] = gather_all,
        offload_dir: StateFolder | None = None,
    ) -> None:
        self.folder = folder
        self.rank = rank
        self.world_size = world_size
        self.attempt = attempt
        self.skipped = 0
        """Saves that overtook the one before and were left out."""
        self._retention = Retention(keep, keep_every)
        self._mirror = mirror if rank == 0 else None
        self._gather = gather
        self._snapshot = Snapshot(offload_dir)
        self._begun = 0
        self._committed: int | None = None
        self._thread: threading.Thread | None = None
        self._failed = False
        self._abandoned = threading.Event()
        self._events: deque[str] = deque()

    # What the trainer calls

    def reserve(self, shards: Shards, ema: Mapping[str, Tensor]) -> None:
        """Make room for the copies now, so that the first save need not."""
        self._snapshot.reserve(shards, ema)

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
    ) -> Saving:
        """Begin a checkpoint. A collective: all ranks call it with the same arguments (`state`: rank 0's counts).

        Args:
            state: the trainer's global state, in JSON's terms; it is left alone afterwards.
            may_skip: leave this one out if the one before is still being written, instead of waiting for it.
            ephemeral: it goes when a later one is there.
            needed_before: after it, the newest checkpoint from before this step is kept: a rollback may ask for it.
        """
        began = time.perf_counter()
        if not may_skip:
            self._join()
        if any(status.busy for status in self._exchange()):
            self.skipped += 1
            if self.rank == 0:
                self._events.append(f"checkpoint of step {step} skipped: the one before is still being written")
            return Saving(False, time.perf_counter() - began)
        self._join()
        self._begun += 1
        self._failed = False
        self._abandoned.clear()
        self._snapshot.take(shards, ema)
        # Numbered, so that a second attempt at a step does not find what the first one left.
        aside = self.folder / f".{folder_name(step)}.{self.attempt}.{self._begun}"
        job = _Job(step, aside, self.folder / folder_name(step), state, ephemeral, needed_before)
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()
        return Saving(True, time.perf_counter() - began)

    def wait(self) -> int | None:
        """Wait until the checkpoint under way is there or has failed. A collective.

        Returns:
            The step of the last checkpoint that this writer committed, on every rank.
        """
        self._join()
        return self._exchange()[0].committed

    @property
    def mirroring(self) -> bool:
        """Whether a checkpoint is on its way to this rank's mirror, or waits for it."""
        return self._mirror is not None and bool(self._mirror.holding())

    def discard_after(self, step: int) -> None:
        """Take later checkpoints away, here and in the mirror: training goes another way from there. A collective."""
        self.wait()
        if self.rank == 0:
            try:
                for path in checkpoints(self.folder):
                    if step_of(path) > step:
                        path.rename(path.with_name(f".{path.name}.superseded"))  # the next save removes it
            except OSError as error:
                self._events.append(f"checkpoints after step {step} cannot be taken away: {error}")
            self._committed = None
            if self._mirror is not None:
                self._mirror.discard_after(step)
        self._gather(None)

    def take_events(self) -> list[str]:
        """What has happened since the last call, in sentences: rank 0 hears of all ranks. Cheap: for every step."""
        events: list[str] = []
        while self.rank == 0 and self._events:
            events.append(self._events.popleft())
        if self._mirror is not None:
            events += self._mirror.take_events()
        return events

    def close(self, patience_s: float = CLOSE_TIMEOUT_S) -> None:
        """Let the checkpoint under way, and its way to the mirror, be finished, for so many seconds at most."""
        deadline = time.monotonic() + patience_s
        if self._thread is not None:
            self._thread.join(patience_s)
        if self._mirror is not None:
            self._mirror.close(max(0.0, deadline - time.monotonic()))

    # What the ranks tell each other

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _exchange(self) -> list[_Status]:
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

    # What the thread does

    def _run(self, job: _Job) -> None:
        try:
            self._write(job)
        except _GivenUp:
            self._failed = True
        except Exception as error:  # an event: whatever ails a disk, training goes on
            self._failed = True
            kept = "" if self._committed is None else f"; that of step {self._committed} stays"
            self._events.append(f"checkpoint of step {job.step} was not written: {self._fault(error)}{kept}")

    def _fault(self, error: Exception) -> str:
        if isinstance(error, _Fault):
            return str(error)
        return f"rank {self.rank}: {error if isinstance(error, OSError) else repr(error)}"

    def _write(self, job: _Job) -> None:
        if self.rank == 0:
            self._clear_leftovers(job.aside)
        try:
            job.aside.mkdir(parents=True, exist_ok=True)
            part = job.aside / part_name(self.rank)
            digest, size = self._snapshot.write(part)
            report = {"file": part.name, "bytes": size, "sha256": digest, "slices": self._snapshot.places}
            atomic_write(self._report(job, self.rank), json.dumps(report).encode())
            if self.rank == 0:
                self._commit(job)
        except Exception as error:
            self._give_up(job, error)
            raise
        if self.rank == 0:
            self._prune(job)

    def _report(self, job: _Job, rank: int, kind: str = "json") -> Path:
        return job.aside / f"rank_{rank:05d}.{kind}"

    def _give_up(self, job: _Job, error: Exception) -> None:
        """Free the room that was taken: a full disk should not stay full. Other ranks report to rank 0.

        Raises:
            _GivenUp: rank 0 knows.
        """
        if self.rank == 0:
            with suppress(OSError):  # one that came later would make the folder anew
                deadline = time.monotonic() + GIVE_UP_S
                while self._unreported(job, set()) - {0} and not self._abandoned.wait(POLL_S):
                    if time.monotonic() > deadline:
                        break
            shutil.rmtree(job.aside, ignore_errors=True)
            return
        if isinstance(error, FileNotFoundError) and not job.aside.exists():
            raise _GivenUp from error  # rank 0 has removed it
        with suppress(OSError):  # what rank 0 does not learn now, it learns at the next save
            (job.aside / part_name(self.rank)).unlink(missing_ok=True)
            partial = self._report(job, self.rank, "partial")
            partial.touch()
            with suppress(OSError):
                partial.write_text(self._fault(error))
            told = partial.stat().st_size > 0
            partial.rename(self._report(job, self.rank, "failed"))
            if told:
                raise _GivenUp from error

    def _clear_leftovers(self, aside: Path) -> None:
        """Remove what is whole no more or not yet; nobody writes there now, but for ranks that are dying."""
        for leftover in self.folder.glob(".step_*"):
            if leftover != aside:
                shutil.rmtree(leftover, ignore_errors=True)

    def _wait_for_reports(self, job: _Job) -> list[dict[str, Any]]:
        deadline = time.monotonic() + COMMIT_TIMEOUT_S
        failed: set[int] = set()
        while missing := self._unreported(job, failed):
            if failed:
                break
            if self._abandoned.is_set() or time.monotonic() > deadline:
                late = f"rank {min(missing)}" + (f" and {len(missing) - 1} others" if len(missing) > 1 else "")
                reason = "failed" if self._abandoned.is_set() else f"not done after {COMMIT_TIMEOUT_S:g} s"
                raise _Fault(f"{late}: {reason}")
            time.sleep(POLL_S)
        if failed:
            raise _Fault(self._report(job, min(failed), "failed").read_text() or f"rank {min(failed)}: failed")
        return [json.loads(self._report(job, rank).read_text()) for rank in range(self.world_size)]

    def _unreported(self, job: _Job, failed: set[int]) -> set[int]:
        """Ranks of which neither a report nor a fault is there; the latter's are added to `failed`."""
        names = set(os.listdir(job.aside))  # one look, however many ranks there are
        failed |= {rank for rank in range(self.world_size) if self._report(job, rank, "failed").name in names}
        return {rank for rank in range(self.world_size) if self._report(job, rank).name not in names} - failed

    def _commit(self, job: _Job) -> None:
        """Rank 0: once every rank's part is there, write the manifest and give the folder its name."""
        parts = self._wait_for_reports(job)
        for part in parts:
            if (size := (job.aside / part["file"]).stat().st_size) != part["bytes"]:
                raise OSError(f"{job.aside / part['file']}: {size} of {part['bytes']} bytes are there")
        if job.ephemeral:
            (job.aside / EPHEMERAL).touch()
        body = {"step": job.step, "state": job.state, "shapes": self._snapshot.shapes, "parts": parts}
        atomic_write(job.aside / MANIFEST, manifest_text(body).encode())
        for rank in range(self.world_size):
            self._report(job, rank).unlink()
        sync(job.aside)
        commit(job.aside, job.final)
        self._committed = job.step
        if self._mirror is not None and not job.ephemeral:
            self._mirror.offer(job.final)

    def _prune(self, job: _Job) -> None:
        held = self._mirror.holding() if self._mirror is not None else set()
        found = {step_of(path): path for path in checkpoints(self.folder)}
        ephemeral = {step: (path / EPHEMERAL).exists() for step, path in found.items()}
        try:
            for step in self._retention.outdated(ephemeral, job.step, job.needed_before):
                if found[step] not in held:
                    # Under another name first, so that one that is half gone is not taken for a damaged one.
                    going = found[step].with_name(f".{found[step].name}.dropped")
                    found[step].rename(going)
                    shutil.rmtree(going)
        except OSError as error:
            self._events.append(f"an old checkpoint cannot be removed: {error}")
