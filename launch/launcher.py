"""Ranks hear when their launcher dies.

A killed `deepspeed` leaves its ranks running, and a restart would then be a second writer. Standard library alone, so
that it can be watched before the imports that take seconds.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

NODE_LAUNCHER = "deepspeed.launcher.launch"
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed")
POLL_S = 0.5


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third: state, parent, ..., and the start time as the 20th."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _words(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")


def launchers() -> list[tuple[int, str]]:
    """Process id and start time of the launchers above this process, nearest first.

    Raises:
        ProcessLookupError: one of them is gone already.
    """
    found: list[tuple[int, str]] = []
    pid = os.getppid()
    try:
        while pid >= 1:
            words, stat = _words(pid), _stat(pid)
            # A launcher is a Python running one; a shell whose command line names one may come and go.
            program = " ".join(words[1:4])
            if "python" not in Path(words[0]).name or not any(name in program for name in LAUNCHERS):
                break
            found.append((pid, stat[19]))
            pid = int(stat[1])
            if NODE_LAUNCHER in program and pid == 1 and not any(name in " ".join(_words(1)) for name in LAUNCHERS):
                raise ProcessLookupError("the deepspeed command above the node's launcher is gone")
    except FileNotFoundError as error:
        raise ProcessLookupError("a launcher above this process is gone") from error
    # Not LOCAL_RANK: that is also set by hand, or from Slurm's, in a container where all are children of process 1.
    if not found and os.getppid() == 1 and ("TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ):
        raise ProcessLookupError("the launcher that started this rank is gone")
    return found


def _is_alive(pid: int, started: str) -> bool:
    try:
        stat = _stat(pid)
    except OSError:
        return False
    return stat[19] == started and stat[0] not in "ZX"


def watch_launcher(died: Callable[[], None]) -> None:
    """Call `died`, on a thread, when a launcher above this process dies; end the process if one is dead already."""
    try:
        watched = launchers()
    except ProcessLookupError:
        os._exit(1)
    if not watched:
        return

    def watch() -> None:
        while all(_is_alive(pid, started) for pid, started in watched):
            time.sleep(POLL_S)
        died()

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
