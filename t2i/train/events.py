"""events.log of a run, and the one rule for what is written beside its checkpoints.

The rule: a disk that does not take it (full, over a quota, read-only, gone, broken) is an event, and training goes on.
Grids, metrics, the best model, reports and records tell of a run; only its checkpoints and its model are the run.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm


class Terminal:
    """stderr, for as long as somebody is there to read it: a launcher that goes must not end what it started."""

    def __init__(self) -> None:
        self._gone = False

    def write(self, text: str) -> None:
        self._try(lambda: sys.stderr.write(text))

    def flush(self) -> None:
        self._try(sys.stderr.flush)

    def isatty(self) -> bool:
        return not self._gone and sys.stderr.isatty()

    def _try(self, act: Callable[[], object]) -> None:
        if not self._gone:
            try:
                act()
            except OSError:  # events.log has what matters
                self._gone = True


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, whole or not at all: a part of one would spoil the line that comes after it.

    Raises:
        OSError: the disk does not take it.
    """
    content = f"{line}\n".encode()
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) < len(content):  # a disk that is about full takes what it can
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


class EventLog:
    """What happens in a stage, in sentences, on rank 0; on other ranks `add` does nothing.

    Args:
        directory: the run's folder.
        stage: the stage's name.
        active: whether this is rank 0.
    """

    def __init__(self, directory: Path, stage: str, active: bool = True) -> None:
        self.terminal = Terminal()
        self._path, self._stage, self._active = directory / "events.log", stage, active
        self._refused: set[str] = set()

    def add(self, text: str) -> None:
        """One sentence for events.log and the terminal."""
        if not self._active:
            return
        self._say(text)
        with self.beside("events.log", self._say):
            append_line(self._path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._stage}: {text}")

    def _say(self, text: str) -> None:
        tqdm.write(f"{self._stage}: {text}", file=self.terminal)

    @contextmanager
    def beside(self, what: str, said: Callable[[str], None] | None = None) -> Iterator[None]:
        """Around everything that is written beside checkpoints: a fault of the disk is an event, the first of its kind.

        Args:
            what: names what is written, in the event.
            said: is told instead of this log.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            if what not in self._refused:
                self._refused.add(what)
                reason = getattr(error, "strerror", None) or str(error)
                (said or self.add)(f"{what} cannot be written ({reason}): training goes on without it")
