"""The processes of a run: who this rank is, what rank 0 says, and the run's lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data.errors import UserError
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
    hosts: dist.ProcessGroup | None = None
    """The group for what concerns hosts alone, over gloo; none: the default group."""

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that speaks and writes."""
        return self.rank == 0

    def from_main(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank; an exception there is raised on every rank."""
        message: list[Any] = [None, None]
        if self.is_main:
            try:
                message[0] = make()
            except Exception as error:
                message[1] = error
        if self.size > 1:
            dist.broadcast_object_list(message, src=0, group=self.hosts)
        if message[1] is not None:
            raise message[1]
        return message[0]

    def together(self, make: Callable[[], T]) -> T:
        """What this rank makes; a UserError of any rank, of the first that has one, is raised on every rank."""
        made: list[T] = []
        fault: UserError | None = None
        try:
            made.append(make())
        except UserError as error:
            fault = error
        for it in self.gather(fault):
            if it is not None:
                raise it
        return made[0]

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of what all share out: neighbours, in order, and one more than another rank's at most."""
        first, end = (rank * len(items) // self.size for rank in (self.rank, self.rank + 1))
        return items[first:end]

    def gather(self, item: T) -> list[T]:
        """Every rank's item, in rank order, on every rank."""
        items: list[Any] = [item]
        if self.size > 1:
            items = [None] * self.size
            dist.all_gather_object(items, item, group=self.hosts)
        return items

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """Element by element, over all ranks."""
        if self.size == 1:
            return [int(number) for number in numbers]
        total = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(total, group=self.hosts)
        return [int(number) for number in total]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.hosts)


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
