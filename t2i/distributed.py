"""The processes of a run: who this rank is, what rank 0 says, and the run's lock.

What became of a run: `outcome.json` in its folder, since launchers lose exit codes.

    {"outcome": "done" | "resumable" | "failed", "reason": ..., "rank": ..., "time": ...}

- The file goes when the run starts. So none means that it runs, or that it was killed: start it again.
- Resumable: the same command, started again, goes on without anybody's help. Failed: it would meet the same again.
- The first to say something writes it: rank 0, the rank at fault, or the watch of a rank that hangs. A run that left
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

from data.errors import BAD_INPUT, DONE, EXIT_RESUMABLE, FAILED, StoreError, UserError
from data.files import FileLock, InUseError

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
        """Whether this is the rank that speaks and writes."""
        return self.rank == 0

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank; an exception there is raised on every rank."""
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
        """What this rank makes; an error of any rank ends all: its own, where it has one, else the first rank's.

        Of errors, a user's, and those of memory, disks and networks; after others the ranks' launcher ends them.
        """
        made: list[T] = []
        fault: Exception | None = None
        try:
            made.append(make())
        except dist.DistError:  # other ranks are gone
            raise
        except (UserError, StoreError, OSError, MemoryError, RuntimeError) as error:
            fault = error
        first = next((it for it in self.gather(fault) if it is not None), None)
        if first is not None:
            raise fault or first
        return made[0]

    def split_for_rank(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of what all share out: neighbours, in order, and one more than another rank's at most."""
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
        """Element by element, over all ranks."""
        if self.size == 1:
            return [int(number) for number in numbers]
        total = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(total, group=self.cpu_group)
        return [int(number) for number in total]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.cpu_group)


class RunInUseError(InUseError):
    """Another process holds the run."""


class RunLock(FileLock):
    """One writer a run: a lock on `run.lock`, which stays in the folder of a run that has begun.

    Args:
        directory: the run's folder, made if need be.
        word: written into the file, so that the other ranks can see that they share the folder.
        patience_s: seconds to wait for another holder to leave.

    Raises:
        UserError: the folder cannot be written to.
        RunInUseError: another process still holds it after that; the message names it.
    """

    def __init__(self, directory: Path, word: str, patience_s: float = 120.0) -> None:
        try:
            super().__init__(directory / LOCK, str(directory), f"({word})", patience_s)
        except InUseError as error:
            raise RunInUseError(str(error)) from None
        except OSError as error:
            raise UserError(f"root {directory.parent}: cannot be written to: {error.strerror}") from error

    def release(self) -> None:
        """Let another process have the run. Folders that were made for the lock and hold nothing else go again."""
        if self._made and list(self.path.parent.iterdir()) == [self.path]:
            super().release()
        else:
            self._file.close()


Outcome = Literal["done", "resumable", "failed"]
_OUTCOMES: dict[int, Outcome] = {DONE: "done", EXIT_RESUMABLE: "resumable"}


class Preempted(Exception):
    """The run leaves because it was asked to, saved, to be started again. Alike on every rank."""


def run_exit_code(error: Exception) -> int:
    """The exit code of a run that an error ends. Faults of disks and devices may pass, or be left behind."""
    if isinstance(error, Preempted | StoreError | RunInUseError | OSError | torch.AcceleratorError):
        return EXIT_RESUMABLE
    return BAD_INPUT if isinstance(error, UserError) else FAILED


def outcome_of(code: int) -> Outcome:
    """What an exit code says of a run."""
    return _OUTCOMES.get(code, "failed")


class OutcomeFile:
    """The outcome of a run in this folder, which exists.

    Args:
        directory: the run's folder.
        attempt: the word of this start, which the run's lock holds. Ranks of an earlier one may outlive their lock, and
            what they would say then is not this start's.
    """

    def __init__(self, directory: Path, attempt: str) -> None:
        self.path, self._lock, self._attempt = directory / "outcome.json", directory / LOCK, attempt

    def clear(self) -> None:
        """The run begins."""
        self.path.unlink(missing_ok=True)

    def write(self, code: int, reason: str, rank: int) -> None:
        """Say what became of it, unless somebody has said so already. A disk that does not take it is said on stderr.

        Args:
            code: the exit code.
            reason: in a sentence.
            rank: where it happened.
        """
        line = {"outcome": outcome_of(code), "reason": reason, "rank": rank, "time": time.time()}
        try:
            ours = self._attempt in self._lock.read_text()
            if ours and any(path.name != LOCK for path in self.path.parent.iterdir()):
                with self.path.open("x") as file:
                    file.write(json.dumps(line, indent=1) + "\n")
        except FileExistsError:
            pass
        except OSError as error:
            print(f"{self.path} cannot be written ({error.strerror}): {line}", file=sys.stderr)


def is_done(directory: Path) -> bool:
    """Whether the outcome of a run in this folder says so."""
    path = directory / "outcome.json"
    return path.exists() and '"done"' in path.read_text()
