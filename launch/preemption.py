"""When a run is asked to leave: signals, the launcher's death, the clock.

- The first request is only noted: training finishes its step, saves, and all ranks leave together, to be started
  again. A second one leaves at once, and what was trained since the last checkpoint is trained again.
- A thread reads the signals, which reach it even while the main thread is inside a collective.
- Launchers pass signals on, and some say the same twice (Ctrl-C is SIGINT to all, and SIGTERM by the launcher):
  what comes soon after the first counts as the same.

Standard library alone, so that it can stand before the imports that take seconds.

Ranks hear when their launcher dies.

A killed `deepspeed` leaves its ranks running, and a restart would then be a second writer. Standard library alone, so
that it can be watched before the imports that take seconds.
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


SAME_REQUEST_S = 3.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_BEGAN = time.monotonic()


class Preemption:
    """This process's wish to leave. Use `listen` on the main thread."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._asked: float | None = None
        self._deadline: float | None = None
        self._minutes = 0.0
        self._listening = self._settled = False

    @property
    def reason(self) -> str | None:
        """Why to leave at the next step's end; None: go on."""
        if self._reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self._reason = f"timeouts.wall_clock_minutes {self._minutes:g} are over"
        return self._reason

    def limit(self, minutes: float) -> None:
        """Ask to leave so long after the process began; 0: never."""
        self._minutes, self._deadline = minutes, _BEGAN + 60 * minutes if minutes else None

    def listen(self) -> None:
        """From now on signals are requests. Until then they end the process, which has nothing to save."""
        if self._listening:
            return
        self._listening = True
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # the thread does it: this one may be busy in a collective

        def read() -> None:
            with reader, writer:
                while received := reader.recv(1):
                    if received[0] in SIGNALS:
                        self.request(f"{signal.Signals(received[0]).name} came")

        threading.Thread(target=read, name="signals", daemon=True).start()

    def launcher_died(self) -> None:
        """Ask to leave; where nothing listens yet, there is nothing to save."""
        if not self._listening:
            os._exit(1)
        self._reason = self.reason or "its launcher is gone"

    def request(self, reason: str) -> None:
        """Ask to leave; who asks a second time wants it at once."""
        now = time.monotonic()
        if self._asked is None:
            self._asked, self._reason = now, self.reason or reason
        elif now - self._asked > SAME_REQUEST_S and not self._settled:
            os._exit(EXIT_RESUMABLE)

    def settle(self) -> None:
        """Everything is saved: nothing that comes now can hurry it."""
        self._settled = True


preemption = Preemption()
"""This process's."""
