"""What became of a run: `outcome.json` in its folder, since launchers lose exit codes.

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
from pathlib import Path
from typing import Literal

import torch

from data.errors import StoreError, UserError
from t2i.exit_codes import BAD_INPUT, DONE, FAILED, START_AGAIN
from t2i.train.processes import LOCK, RunInUseError

Outcome = Literal["done", "resumable", "failed"]
_OUTCOMES: dict[int, Outcome] = {DONE: "done", START_AGAIN: "resumable"}


class Departed(Exception):
    """The run leaves because it was asked to, saved, to be started again. Alike on every rank."""


def code_of(error: Exception) -> int:
    """The exit code of a run that an error ends. Faults of disks and devices may pass, or be left behind."""
    if isinstance(error, Departed | StoreError | RunInUseError | OSError | torch.AcceleratorError):
        return START_AGAIN
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
