"""A run that stands still ends with every rank's stacks, and a rank that hangs ends when another has failed.

- Every rank has a thread that counts how long the main thread has given no sign. It counts its own seconds awake: a
  process that was stopped and goes on, or a machine that slept, is not taken for one that hangs.
- That thread must get through whatever else hangs. So it makes no call that may block: the store and the file system,
  perhaps the cause of it all, are left to threads that it does not wait for beyond bounds.
- It needs the interpreter's lock now and then. Where the main thread never gives that back, faulthandler's own timer
  writes the stacks to stderr: it dumps and does not end the process, since it does count the time of being stopped.
- The process groups' time-outs are longer than the watch's, which knows more: they are for a watch that fails.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from t2i.config_limits import LimitsConfig
from t2i.exit_codes import START_AGAIN
from t2i.train.failures import Failure, Failures
from t2i.train.processes import World

TICK_S = 1.0
GRACE_S = 10.0
"""How long a rank whose main thread has not noticed another rank's failure stays."""
CLEAN_UP_S = 60.0
"""And one whose main thread has, and is on its way out."""
BOUND_S = 5.0
"""How long the watch waits for files and for last words."""
TIMER_MARGIN_S = 30.0
GROUPS_MARGIN_S = 120.0
_STDERR = 2


def collective_timeout(minutes: float) -> timedelta:
    """The time-out of process groups where the watch allows `minutes`."""
    return timedelta(minutes=minutes, seconds=GROUPS_MARGIN_S)


def set_collective_timeouts(timeout: timedelta) -> None:
    """Set the time-out of what is yet to begin on all of this rank's process groups, the engine's own ones too."""
    for group in list(distributed_c10d._world.pg_map):  # torch has no public list of them
        dist.set_timeout(timeout, group)


def stacks() -> str:
    """The Python stacks of all threads (of 100 at most), most recent call first."""
    # Into memory, since faulthandler holds the interpreter's lock while it writes: a file system may hang.
    with os.fdopen(os.memfd_create("stacks"), "r+") as memory:
        faulthandler.dump_traceback(memory, all_threads=True)
        memory.seek(0)
        return memory.read()


def tell(failure: Failure) -> None:
    """Last words of a rank that the watch ends."""
    os.write(_STDERR, f"{failure}\n".encode())  # the main thread may hang with sys.stderr's lock


class Watch:
    """Watches this rank from now on, in a thread, until it is closed.

    Args:
        failures: the ranks' notice board.
        limits: how long is too long.
        folder: where stacks go, made if need be.
        attempt: a word that all ranks share and no other start of the run does.
        last_words: told what ended the run before this rank is ended; not waited for beyond BOUND_S.
    """

    def __init__(
        self,
        failures: Failures,
        limits: LimitsConfig,
        folder: Path,
        attempt: str,
        last_words: Callable[[Failure], None] = tell,
    ) -> None:
        self.failures, self._limits, self._last_words = failures, limits, last_words
        self._folder = folder
        self._file = folder / f"{attempt}_rank_{failures.world.rank:05d}.txt"
        self._closed = threading.Event()
        self._signs = 0
        self._what = ""
        self.start("start")
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def alive(self, what: str) -> None:
        """The main thread gets on: it now begins `what`, for messages. Costs nothing."""
        self._what = what
        self._signs += 1

    def start(self, what: str) -> None:
        """As `alive`, and allow limits.start_minutes. Again once an engine is built, for its groups' time-outs."""
        self._starting = True
        self._allow(self._limits.start_minutes)
        self.alive(what)

    def step_done(self) -> None:
        """A step is done: after the first one, limits.step_minutes are allowed."""
        self._signs += 1
        if self._starting:
            self._starting = False
            self._allow(self._limits.step_minutes)

    def _allow(self, minutes: float) -> None:
        self._allowed_s = 60 * minutes
        if self.failures.world.size > 1:
            set_collective_timeouts(collective_timeout(minutes))

    def close(self) -> None:
        """End the watch; nothing is ended by it any more."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        seen, silent_s, last = self._signs, 0.0, time.monotonic()
        while not self._closed.wait(TICK_S):
            now = time.monotonic()
            # More than a tick has only passed where this thread did not run either.
            silent_s += min(now - last, 2 * TICK_S)
            last = now
            if self._signs != seen:
                seen, silent_s = self._signs, 0.0
            faulthandler.dump_traceback_later(self._allowed_s + TIMER_MARGIN_S, file=_STDERR)
            failed = self.failures.first is not None or self.failures.leaving
            if silent_s > self._allowed_s and not failed:
                self.failures.post(self._hang(silent_s))
            if (first := self.failures.first) is not None:
                self._end(first, silent_s)
                break
        faulthandler.cancel_dump_traceback_later()

    def _hang(self, silent_s: float) -> Failure:
        told = f"stood still for {silent_s / 60:.1f} minutes in {self._what}, itself or waiting for a rank that does"
        return Failure(self.failures.world.rank, START_AGAIN, f"{told}; all ranks' stacks are in {self._folder}", True)

    def _end(self, first: Failure, silent_s: float) -> None:
        """End the process, unless its main thread ends it, or closes the watch, in time."""
        if first.hang:
            world, found = self.failures.world, stacks()
            head = f"rank {world.rank} of {world.size}, process {os.getpid()} on {socket.gethostname()}: "
            _bounded(lambda: self._write(f"{head}{silent_s:.0f} s in {self._what}\n\n{found}"))
            first = self.failures.conclude()
        else:
            self.failures.answer(0)
            if self._closed.wait(GRACE_S) or (self.failures.leaving and self._closed.wait(CLEAN_UP_S)):
                return
        _bounded(lambda: self._last_words(first))
        os._exit(first.code)

    def _write(self, text: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file.write_text(text)


def _bounded(act: Callable[[], None]) -> None:
    """Do something in a thread that is left behind should it take longer than BOUND_S."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(BOUND_S)


def straggler(seconds: Sequence[float]) -> dict[str, Any]:
    """Metrics of the ranks' seconds, in rank order: the longest, the median, and which rank took longest."""
    longest = max(seconds)
    return {"rank_s_max": longest, "rank_s_median": median(seconds), "slowest_rank": seconds.index(longest)}


def slowest(world: World, seconds: float) -> dict[str, Any]:
    """`straggler` over the ranks. All of them take part, so on steps whose metrics are written.

    Args:
        world: this process.
        seconds: what this rank alone did of a step, without waiting for another: collectives make all ranks' steps
            equally long, whoever is slow.
    """
    return straggler(world.gather(seconds))
