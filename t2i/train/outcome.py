"""What became of a run: `outcome.json` in its folder, since launchers lose exit codes.

    {"outcome": "done" | "resumable" | "failed", "reason": ..., "rank": ..., "time": ...}

- The file goes when the run starts. So none means that it runs, or that it was killed: start it again.
- Resumable: the same command, started again, goes on without anybody's help. Failed: it would meet the same again.
- The first rank that has something to say writes it. A run that left nothing else has no outcome either.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Literal

from data.errors import StoreError
from t2i.train.processes import LOCK

Outcome = Literal["done", "resumable", "failed"]


class Departed(Exception):
    """The run leaves because it was asked to, saved, to be started again. Alike on every rank."""


def outcome_of(error: BaseException) -> Outcome:
    """What an error makes of a run."""
    return "resumable" if isinstance(error, Departed | StoreError) else "failed"


class OutcomeFile:
    """The outcome of a run in this folder, which exists."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "outcome.json"

    def clear(self) -> None:
        """The run begins."""
        self.path.unlink(missing_ok=True)

    def write(self, outcome: Outcome, reason: str, rank: int) -> None:
        """Say what became of it, unless somebody has said so already."""
        if all(path.name == LOCK for path in self.path.parent.iterdir()):
            return
        line = {"outcome": outcome, "reason": reason, "rank": rank, "time": time.time()}
        partial = self.path.with_name(f".outcome.{rank}.partial")
        partial.write_text(json.dumps(line, indent=1) + "\n")
        try:
            self.path.hardlink_to(partial)  # whole, and only the first
        except FileExistsError:
            pass
        finally:
            partial.unlink()
