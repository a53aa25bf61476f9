"""When a run should stop: on a signal, on its launcher's death, or at a time limit.

- The first request is noted: training finishes its step, saves, and all ranks exit together, to be started again. A
  second request ends the process at once, and the steps since the last checkpoint are trained again.
- Launchers pass signals on, and some do it twice (Ctrl-C is SIGINT to all processes, then SIGTERM from the launcher):
  a request soon after the first counts as the same one.
- A thread reads the signals, so that one arrives even while the main thread is inside a collective.
- Killing `deepspeed` does not end its ranks, and a restarted run would then have two writers: each rank watches the
  launchers above it.

Imports the standard library alone, so that it runs before the imports that take seconds.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from data.errors import EXIT_RESUMABLE

NODE_LAUNCHER = "deepspeed.launcher.launch"
LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed")
POLL_S = 0.5


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on: state, parent, ...; index 19 is the start time."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")


def launchers() -> list[tuple[int, str]]:
    """Process id and start time of the launchers above this process, nearest first.

    Raises:
        ProcessLookupError: one of them has ended already.
    """
    found: list[tuple[int, str]] = []
    pid = os.getppid()
    try:
        while pid >= 1:
            words, stat = _command_line(pid), _stat(pid)
            # A launcher is a Python that runs one; a shell whose command line names a launcher does not count.
            program = " ".join(words[1:4])
            if "python" not in Path(words[0]).name or not any(name in program for name in LAUNCHERS):
                break
            found.append((pid, stat[19]))
            pid = int(stat[1])
            if (
                NODE_LAUNCHER in program
                and pid == 1
                and not any(name in " ".join(_command_line(1)) for name in LAUNCHERS)
            ):
                raise ProcessLookupError("the deepspeed command above the node's launcher is gone")
    except FileNotFoundError as error:
        raise ProcessLookupError("a launcher above this process is gone") from error
    # LOCAL_RANK proves no launcher: it is also set by hand, or from Slurm's variables, and in a container every
    # process may be a child of process 1.
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


SAME_REQUEST_S = 3.0
"""Seconds after the first request within which another one counts as the same."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_BEGAN = time.monotonic()


class Preemption:
    """Whether this process was asked to stop, and why."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._requested_at: float | None = None
        self._deadline: float | None = None
        self._minutes = 0.0
        self._listening = self._finished = False

    @property
    def reason(self) -> str | None:
        """Why to stop at the end of the step, or None to go on."""
        if self._reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self._reason = f"timeouts.wall_clock_minutes {self._minutes:g} are over"
        return self._reason

    def limit(self, minutes: float) -> None:
        """Stop so many minutes after the process began; 0 sets no limit."""
        self._minutes, self._deadline = minutes, _BEGAN + 60 * minutes if minutes else None

    def listen(self) -> None:
        """From now on, take signals as requests; before, they end the process, which has nothing to save.

        Call it on the main thread.
        """
        if self._listening:
            return
        self._listening = True
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the thread acts on it: the main one may be in a collective

        def read() -> None:
            with reader, writer:
                while received := reader.recv(1):
                    if received[0] in SIGNALS:
                        self.request(f"{signal.Signals(received[0]).name} came")

        threading.Thread(target=read, name="signals", daemon=True).start()

    def launcher_died(self) -> None:
        """Ask to stop; before `listen`, end the process at once."""
        if not self._listening:
            os._exit(1)
        self._reason = self.reason or "its launcher is gone"

    def request(self, reason: str) -> None:
        """Ask to stop at the end of the step; a second request, after SAME_REQUEST_S, ends the process at once."""
        now = time.monotonic()
        if self._requested_at is None:
            self._requested_at, self._reason = now, self.reason or reason
        elif now - self._requested_at > SAME_REQUEST_S and not self._finished:
            os._exit(EXIT_RESUMABLE)

    def finish(self) -> None:
        """Everything is saved: further requests have no effect."""
        self._finished = True


preemption = Preemption()
"""This process's."""
