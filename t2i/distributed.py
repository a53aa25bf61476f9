"""The ranks of a run, their devices, its lock, and its outcome.

What became of a run is written to `outcome.json` in its folder, since launchers lose exit codes.

    {"outcome": "done" | "resumable" | "failed", "reason": ..., "rank": ..., "time": ...}

- The file is removed when the run starts. Without it, the run is under way or was killed: start it again.
- After "resumable", the same command goes on by itself; after "failed", it would fail again.
- Whoever is first writes it: rank 0, the rank at fault, or the watchdog of a rank that hangs. A run whose folder holds
  nothing else has no outcome either.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from data.errors import BAD_INPUT, DONE, EXIT_RESUMABLE, FAILED, StoreError, UserError
from data.files import FileLock, InUseError, name_in_errors

T = TypeVar("T")

LOCK = "run.lock"
"""The lock's file in a run's folder."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None = None
    """For objects on the hosts, over gloo; None: the default group."""
    local_size: int = 1
    """Ranks on this machine."""

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; its exception is raised on every rank."""
        message: list[Any] = [None, None]
        if self.is_rank0:
            try:
                message[0] = make()
            except Exception as error:
                message[1] = error
        if self.size > 1:
            dist.broadcast_object_list(message, src=0, group=self.cpu_group)
        if message[1] is not None:
            raise message[1]
        return message[0]

    def raise_on_all_ranks(self, make: Callable[[], T]) -> T:
        """What `make` returns on this rank, unless it raises on any rank: then every rank raises.

        A rank raises its own error, or the first other rank's. This goes for a user's mistakes and for errors of
        memory, disks and networks; after any other error the launcher ends the ranks.
        """
        made: list[T] = []
        fault: Exception | None = None
        try:
            made.append(make())
        except dist.DistError:  # other ranks are gone
            raise
        except (UserError, StoreError, OSError, MemoryError, RuntimeError) as error:
            fault = error
        first = next((error for error in self.gather(fault) if error is not None), None)
        if first is not None:
            raise fault or first
        return made[0]

    def split_for_rank(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's contiguous part of `items`; parts differ by one item at most."""
        first, end = (rank * len(items) // self.size for rank in (self.rank, self.rank + 1))
        return items[first:end]

    def gather(self, item: T) -> list[T]:
        """Every rank's item, in rank order, on every rank."""
        items: list[Any] = [item]
        if self.size > 1:
            items = [None] * self.size
            dist.all_gather_object(items, item, group=self.cpu_group)
        return items

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """Sum over all ranks, element by element."""
        if self.size == 1:
            return [int(number) for number in numbers]
        total = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(total, group=self.cpu_group)
        return [int(number) for number in total]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.cpu_group)


class RunInUseError(InUseError):
    """Another process holds the run."""


class RunLock(FileLock):
    """One writer for each run: a lock on `run.lock`, which stays in the folder of a run that has begun.

    Makes the folder if need be. `attempt_id` is written into the file, so that other ranks can see that they share the
    folder. Waits up to `patience_s` for another holder.

    Raises:
        UserError: the folder cannot be written.
        RunInUseError: another process still holds the lock; the message names it.
    """

    def __init__(self, directory: Path, attempt_id: str, patience_s: float = 120.0) -> None:
        try:
            with name_in_errors(f"root {directory.parent}"):
                super().__init__(directory / LOCK, str(directory), f"({attempt_id})", patience_s)
        except InUseError as error:
            raise RunInUseError(str(error)) from None

    def release(self) -> None:
        """Release the lock, and remove folders that were made for it and hold nothing else."""
        if self._made and list(self.path.parent.iterdir()) == [self.path]:
            super().release()
        else:
            self._file.close()


Outcome = Literal["done", "resumable", "failed"]
_OUTCOMES: dict[int, Outcome] = {DONE: "done", EXIT_RESUMABLE: "resumable"}


class Preempted(Exception):
    """The run was asked to stop; it is saved, and can be started again. Raised on every rank."""


def run_exit_code(error: Exception) -> int:
    """The exit code of a run that an error ends. Errors of disks and devices may pass, so they are resumable."""
    if isinstance(error, Preempted | StoreError | RunInUseError | OSError | torch.AcceleratorError):
        return EXIT_RESUMABLE
    return BAD_INPUT if isinstance(error, UserError) else FAILED


def outcome_of(code: int) -> Outcome:
    return _OUTCOMES.get(code, "failed")


class OutcomeFile:
    """`outcome.json` in a run's folder, which exists.

    Ranks of an earlier start may outlive their lock: they write nothing, because the lock then holds another
    `attempt_id`.
    """

    def __init__(self, directory: Path, attempt_id: str) -> None:
        self.path, self._lock, self._attempt_id = directory / "outcome.json", directory / LOCK, attempt_id

    def clear(self) -> None:
        """Remove the file when the run begins."""
        self.path.unlink(missing_ok=True)

    def write(self, code: int, reason: str, rank: int) -> None:
        """Write the file, unless it exists; prints to stderr if the disk does not take it.

        `code` is the exit code, `reason` a sentence, and `rank` the rank at fault.
        """
        line = {"outcome": outcome_of(code), "reason": reason, "rank": rank, "time": time.time()}
        try:
            ours = self._attempt_id in self._lock.read_text()
            if ours and any(path.name != LOCK for path in self.path.parent.iterdir()):
                with self.path.open("x") as file:
                    file.write(json.dumps(line, indent=1) + "\n")
        except FileExistsError:
            pass
        except OSError as error:
            print(f"{self.path} cannot be written ({error.strerror}): {line}", file=sys.stderr)


def is_done(directory: Path) -> bool:
    """Whether the run in this folder has finished, by its outcome."""
    path = directory / "outcome.json"
    return path.exists() and '"done"' in path.read_text()


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on a device, without waiting for the device; on a CPU it shares the array's memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from pageable memory waits for all work queued before it
    return tensor.to(device, non_blocking=True)
