"""What became of a run: `outcome.json` in its folder, since launchers lose exit codes.

    {"outcome": "done" | "resumable" | "failed", "reason": ..., "rank": ..., "time": ...}

- The file goes when the run starts. So none means that it runs, or that it was killed: start it again.
- Resumable: the same command, started again, goes on without anybody's help. Failed: it would meet the same again.
- The first to say something writes it: rank 0, the rank at fault, or the watch of a rank that hangs. A run that left
  nothing else has no outcome either.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Literal

from data.errors import StoreError, UserError
from t2i.exit_codes import BAD_INPUT, DONE, FAILED, START_AGAIN
from t2i.train.processes import LOCK

Outcome = Literal["done", "resumable", "failed"]


class Departed(Exception):
    """The run leaves because it was asked to, saved, to be started again. Alike on every rank."""


def code_of(error: Exception) -> int:
    """The exit code of a run that an error ends."""
    if isinstance(error, UserError):
        return BAD_INPUT
    return START_AGAIN if isinstance(error, Departed | StoreError) else FAILED


def outcome_of(code: int) -> Outcome:
    """What an exit code says of a run."""
    return {DONE: "done", START_AGAIN: "resumable"}.get(code, "failed")  # type: ignore[return-value]


class OutcomeFile:
    """The outcome of a run in this folder, which exists."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "outcome.json"

    def clear(self) -> None:
        """The run begins."""
        self.path.unlink(missing_ok=True)

    def write(self, code: int, reason: str, rank: int) -> None:
        """Say what became of it, unless somebody has said so already.

        Args:
            code: the exit code.
            reason: in a sentence.
            rank: where it happened.
        """
        if all(path.name == LOCK for path in self.path.parent.iterdir()):
            return
        line = {"outcome": outcome_of(code), "reason": reason, "rank": rank, "time": time.time()}
        partial = self.path.with_name(f".outcome.{os.getpid()}.{threading.get_ident()}.partial")
        partial.write_text(json.dumps(line, indent=1) + "\n")
        try:
            self.path.hardlink_to(partial)  # whole, and only the first
        except FileExistsError:
            pass
        finally:
            partial.unlink()
