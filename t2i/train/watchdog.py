"""A run that stands still ends with every rank's stacks, and a rank that hangs ends when another has failed.

- Every rank has a thread that counts how long the main thread has given no sign. It counts its own seconds awake: a
  process that was stopped and goes on, or a machine that slept, is not taken for one that hangs.
- That thread must get through whatever else hangs. So it makes no call that may block: the store and the file system,
  perhaps the cause of it all, are left to threads that it does not wait for beyond bounds.
- It needs the interpreter's lock now and then. Where the main thread never gives that back, faulthandler's own timer
  writes the stacks to stderr: it dumps and does not end the process, since it does count the time of being stopped.
- The process groups' time-outs are longer than the watch's, which knows more: they are for a watch that fails.

What ends a run on one rank is told to all the others.

- A notice board in the store through which the ranks met. Unlike a collective it needs no other rank's attention: it
  can be written to while the others hang. The first notice stands, and carries the exit code that all ranks leave with.
- The first rank to leave takes the others with it: its launcher ends them, and with rank 0 the store may go. So
  whoever leaves waits until all ranks have taken note, for a few seconds at most.
- The store's calls know no time-out while its host is stopped or its machine is gone. Only a thread of their own ever
  makes them; whoever asks is answered within bounds.
- When a rank dies the others' collectives fail. That is a consequence, and not reported before its cause had time.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import _get_default_store

from data.errors import EXIT_RESUMABLE, StoreError, UserError
from t2i.config.train import TimeoutsConfig
from t2i.distributed import Preempted, World, run_exit_code

POLL_S = 0.5
CAUSE_S = 5.0
"""How long a consequence waits for its cause to be posted."""
POST_S = 5.0
"""How long a post waits for the store; a rank that is not heard goes by its own notice."""
ANSWER_S = 5.0
"""How long a rank that leaves waits for the others to take note."""
_NOTICE, _ANSWERS = "notice", "answers"


@dataclass(frozen=True)
class Failure:
    """What ended the run."""

    rank: int
    """Where it happened, or was noticed."""
    code: int
    """The exit code of every rank."""
    message: str
    hang: bool = False
    """Whether training stood still, so that every rank shows its stacks."""

    def __str__(self) -> str:
        return f"error on rank {self.rank}: {self.message}"


def is_lost_contact(error: BaseException) -> bool:
    """Whether an exception tells of another rank's death or silence, and not of a fault here.

    All errors of NCCL and of the store count, since they cannot be told apart, and those of gloo's connections.
    """
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and re.search(r"gloo/(transport|rendezvous)/", str(error)) is not None


class Failures:
    """The ranks' notice board. The default process group must be there; a world of one has no use for the store.

    A context manager: it ends the thread that listens.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.first: Failure | None = None
        """What ended the run; None while nothing has."""
        self.leaving = False
        """Whether this rank's main thread has met an error, and is on its way out."""
        self._known, self._wake, self._settled = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._posted: Failure | None = None
        self._reported: Failure | None = None
        self._answering = self._answered = self._closed = False
        self._absent: list[int] = []
        self._listener: threading.Thread | None = None
        if world.size > 1:
            # A connection of its own, since a call on one waits for the call before it.
            self._store = dist.PrefixStore("failures", _get_default_store().clone())
            self._listener = threading.Thread(target=self._listen, name="failures", daemon=True)
            self._listener.start()
        else:
            self._settled.set()

    def __enter__(self) -> Failures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the listening thread; one that a mute store holds is left behind.

        While it listens, the end of rank 0's process is a failure: at a run's good end a barrier comes first.
        """
        self._closed = True
        self._wake.set()
        if self._listener is not None:
            self._listener.join(POST_S)

    def post(self, failure: Failure) -> Failure:
        """Tell all ranks, unless something was told before; return what was told first.

        Never waits longer than POST_S; if the store is mute or gone, this rank goes by its own notice.
        """
        if self._listener is None:
            return self._find(failure)
        self._posted = failure
        self._wake.set()
        self._known.wait(POST_S)
        return self._find(failure)

    def answer(self, within_s: float) -> list[int]:
        """Say that this rank has taken note of `first`, and wait until every rank has, or none can be asked any more.

        Returns:
            Ranks that did not answer; known to rank 0 and to the rank that posted, empty on others.
        """
        self._answering = True
        self._wake.set()
        return [] if self._settled.wait(within_s) else self._absent

    def report(self, error: Exception) -> Failure:
        """Tell all ranks of an exception that ends this one; the main thread calls it before it cleans up.

        Args:
            error: what this rank met. Lost contact with another rank is EXIT_RESUMABLE.

        Returns:
            What is to be shown, and whose exit code is to be taken: the cause, where `error` is a consequence.
            Takes some seconds if other ranks are dead. Once told, further calls change nothing.
        """
        if self._reported is not None:
            return self._reported
        self.leaving = True
        plain = isinstance(error, UserError | StoreError | Preempted)
        told = str(error) if plain else f"{type(error).__name__}: {error}"
        failure = Failure(self.world.rank, run_exit_code(error), told)
        if is_lost_contact(error):
            self._known.wait(CAUSE_S)
            failure = Failure(self.world.rank, EXIT_RESUMABLE, f"lost contact with another rank: {error}")
        self.post(failure)
        self._reported = self.conclude()
        return self._reported

    def conclude(self) -> Failure:
        """`first`, once all ranks have taken note of it or ANSWER_S are over; it then names those that did not."""
        absent = self.answer(ANSWER_S)
        assert self.first is not None
        told = f"; no answer from {name_ranks(absent)}" if absent else ""
        return replace(self.first, message=self.first.message + told)

    def _find(self, failure: Failure) -> Failure:
        with self._lock:
            if self.first is None:
                self.first = failure
                self._known.set()
            return self.first

    def _listen(self) -> None:
        try:
            while not self._closed and not self._settled.is_set():
                self._exchange()
                self._wake.wait(POLL_S)
                self._wake.clear()
        except dist.DistError:
            gone = Failure(
                0, EXIT_RESUMABLE, "the process is gone, or its launcher: nobody answers at the ranks' store"
            )
            self._find(self._posted or gone)
            self._settled.set()

    def _exchange(self) -> None:
        """One round with the store."""
        if self.first is None:
            if self._posted is not None:
                told = self._store.compare_set(_NOTICE, "", json.dumps(asdict(self._posted)))
            elif self._store.check([_NOTICE]):
                told = self._store.get(_NOTICE)
            else:
                return
            self._find(Failure(**json.loads(told)))
        if self._answering and not self._settled.is_set():
            self._await_answers()

    def _await_answers(self) -> None:
        rank, size = self.world.rank, self.world.size
        if not self._answered:
            self._store.set(f"{_ANSWERS}/{rank}", "")
            self._store.add(_ANSWERS, 1)
            self._answered = True
        if self._store.add(_ANSWERS, 0) >= size:
            self._settled.set()
        elif self.first is not None and rank in (0, self.first.rank):
            self._absent = [other for other in range(size) if not self._store.check([f"{_ANSWERS}/{other}"])]


def name_ranks(ranks: list[int]) -> str:
    named = ", ".join(str(rank) for rank in ranks[:8])
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {named}{more}"


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
        limits: TimeoutsConfig,
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
        """As `alive`, and allow timeouts.start_minutes. Again once an engine is built, for its groups' time-outs."""
        self._starting = True
        self._allow(self._limits.start_minutes)
        self.alive(what)

    def step_done(self) -> None:
        """A step is done: after the first one, timeouts.step_minutes are allowed."""
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
        return Failure(
            self.failures.world.rank, EXIT_RESUMABLE, f"{told}; all ranks' stacks are in {self._folder}", True
        )

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
