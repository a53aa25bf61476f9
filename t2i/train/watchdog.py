"""A run that hangs ends with every rank's stacks, and a failure of one rank ends all the others.

The watchdog is a thread on every rank that counts how long the main thread has sent no heartbeat. It counts only the
seconds in which it runs itself, so a process that was stopped, or a machine that slept, is not taken for a hang.
- It makes no call that may block: the store and the file system, perhaps the cause of the hang, are left to threads
  that it waits for only for a bounded time.
- If the main thread never releases the interpreter's lock, faulthandler's timer writes the stacks to stderr. It does
  not end the process, because it also counts the time in which the process was stopped.
- The process groups' time-outs are longer than the watchdog's, and serve only if the watchdog fails.

`Failures` is a notice board in the store through which the ranks met. Unlike a collective it can be written while other
ranks hang. The first notice counts, and all ranks exit with its code.
- When the first rank exits, its launcher ends the others, and with rank 0 the store may go. So each rank waits until
  all have acknowledged the notice, for a few seconds at most.
- The store's calls have no time-out while its host is stopped or gone, so only a thread of their own makes them.
- When a rank dies, the others' collectives fail. Such a consequence is reported only after its cause had time to be.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import _get_default_store

from data.errors import EXIT_RESUMABLE, StoreError, UserError, first_of
from t2i.config.train import TimeoutsConfig
from t2i.distributed import Preempted, World, run_exit_code

POLL_S = 0.5
CAUSE_S = 5.0
"""How long a failed collective waits for its cause to be posted."""
POST_S = 5.0
"""How long a post waits for the store; after that, the rank goes by its own notice."""
ANSWER_S = 5.0
"""How long a rank that exits waits for the others to acknowledge the notice."""
_NOTICE, _ANSWERS = "notice", "answers"


@dataclass(frozen=True)
class Failure:
    """What ended the run."""

    rank: int
    """The rank that failed, or that noticed the failure."""
    code: int
    """The exit code of every rank."""
    message: str
    hang: bool = False
    """Whether training hung: every rank then writes its stacks."""

    def __str__(self) -> str:
        return f"error on rank {self.rank}: {self.message}"


def is_lost_contact(error: BaseException) -> bool:
    """Whether an exception means that another rank died or does not answer.

    All errors of NCCL and of the store count, because they do not say more, and those of gloo's connections.
    """
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and re.search(r"gloo/(transport|rendezvous)/", str(error)) is not None


class Failures:
    """The ranks' notice board; needs the default process group. As a context manager, it ends its thread."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.first: Failure | None = None
        """What ended the run, or None so far."""
        self.leaving = False
        """Whether this rank's main thread has met an error and is cleaning up."""
        self._known, self._wake, self._settled = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._posted: Failure | None = None
        self._reported: Failure | None = None
        self._answering = self._answered = self._closed = False
        self._absent: list[int] = []
        self._listener: threading.Thread | None = None
        if world.size > 1:
            # A connection of its own, since calls on one connection wait for each other.
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
        """End the listening thread, or leave it behind if the store does not answer.

        While it listens, the end of rank 0's process is a failure, so a run that succeeds needs a barrier first.
        """
        self._closed = True
        self._wake.set()
        if self._listener is not None:
            self._listener.join(POST_S)

    def post(self, failure: Failure) -> Failure:
        """Post a failure, unless one was posted before; returns the first one.

        Waits for POST_S at most. If the store does not answer, this rank goes by its own notice.
        """
        if self._listener is None:
            return self._set_first(failure)
        self._posted = failure
        self._wake.set()
        self._known.wait(POST_S)
        return self._set_first(failure)

    def answer(self, within_s: float) -> list[int]:
        """Acknowledge `first`, and wait until every rank has, or the store is gone.

        Returns the ranks that did not answer, on rank 0 and on the rank that posted; an empty list on others.
        """
        self._answering = True
        self._wake.set()
        return [] if self._settled.wait(within_s) else self._absent

    def report(self, error: Exception) -> Failure:
        """Post the exception that ends this rank; the main thread calls it before it cleans up.

        Returns the failure to print and to take the exit code from: the cause, if `error` is a consequence. Takes some
        seconds if other ranks are dead; later calls return the same. Lost contact with a rank is EXIT_RESUMABLE.
        """
        if self._reported is not None:
            return self._reported
        self.leaving = True
        plain = isinstance(error, UserError | StoreError | Preempted)
        message = str(error) if plain else f"{type(error).__name__}: {error}"
        failure = Failure(self.world.rank, run_exit_code(error), message)
        if is_lost_contact(error):
            self._known.wait(CAUSE_S)
            failure = Failure(self.world.rank, EXIT_RESUMABLE, f"lost contact with another rank: {error}")
        self.post(failure)
        self._reported = self.conclude()
        return self._reported

    def conclude(self) -> Failure:
        """`first`, once all ranks have acknowledged it or ANSWER_S are over; names those that have not."""
        absent = self.answer(ANSWER_S)
        assert self.first is not None
        missing = f"; no answer from {name_ranks(absent)}" if absent else ""
        return replace(self.first, message=self.first.message + missing)

    def _set_first(self, failure: Failure) -> Failure:
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
            self._set_first(self._posted or gone)
            self._settled.set()

    def _exchange(self) -> None:
        """One round with the store."""
        if self.first is None:
            if self._posted is not None:
                notice = self._store.compare_set(_NOTICE, "", json.dumps(asdict(self._posted)))
            elif self._store.check([_NOTICE]):
                notice = self._store.get(_NOTICE)
            else:
                return
            self._set_first(Failure(**json.loads(notice)))
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
    return f"rank{'s' if len(ranks) > 1 else ''} {first_of(ranks, 8)}"


TICK_S = 1.0
GRACE_S = 10.0
"""How long a rank may go on whose main thread has not noticed another rank's failure."""
CLEAN_UP_S = 60.0
"""How long a rank may take whose main thread has noticed the failure and is cleaning up."""
BOUND_S = 5.0
"""How long the watchdog waits for files and for `on_failure`."""
TIMER_MARGIN_S = 30.0
GROUPS_MARGIN_S = 120.0
_STDERR = 2


def collective_timeout(minutes: float) -> timedelta:
    """The time-out of process groups if the watchdog allows `minutes`."""
    return timedelta(minutes=minutes, seconds=GROUPS_MARGIN_S)


def set_collective_timeouts(timeout: timedelta) -> None:
    """Set the time-out of coming collectives on all of this rank's process groups, the engine's included."""
    for group in list(distributed_c10d._world.pg_map):  # torch has no public list of them
        dist.set_timeout(timeout, group)


def stacks() -> str:
    """The Python stacks of all threads (100 at most), most recent call first."""
    # Into memory: faulthandler holds the interpreter's lock while it writes, and a file system may hang.
    with os.fdopen(os.memfd_create("stacks"), "r+") as memory:
        faulthandler.dump_traceback(memory, all_threads=True)
        memory.seek(0)
        return memory.read()


def print_failure(failure: Failure) -> None:
    """Write a failure to stderr, also while the main thread hangs with the lock of sys.stderr."""
    os.write(_STDERR, f"{failure}\n".encode())


class Watchdog:
    """Watches this rank in a thread until it is closed.

    Args:
        folder: for the stacks; made if need be.
        attempt_id: the same on all ranks, and new at every start of the run.
        on_failure: called with what ended the run before this rank is ended, for BOUND_S at most.
    """

    def __init__(
        self,
        failures: Failures,
        limits: TimeoutsConfig,
        folder: Path,
        attempt_id: str,
        on_failure: Callable[[Failure], None] = print_failure,
    ) -> None:
        self.failures, self._limits, self._on_failure = failures, limits, on_failure
        self._folder = folder
        self._file = folder / f"{attempt_id}_rank_{failures.world.rank:05d}.txt"
        self._closed = threading.Event()
        self._heartbeats = 0
        self._what = ""
        self.start("start")
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def heartbeat(self, what: str) -> None:
        """The main thread makes progress: it now begins `what`, which messages name. Costs nothing."""
        self._what = what
        self._heartbeats += 1

    def start(self, what: str) -> None:
        """A heartbeat from which timeouts.start_minutes are allowed.

        Call it again once an engine is built, for the time-outs of its process groups.
        """
        self._starting = True
        self._allow(self._limits.start_minutes)
        self.heartbeat(what)

    def step_done(self) -> None:
        """A heartbeat at the end of a step: after the first one, timeouts.step_minutes are allowed."""
        self._heartbeats += 1
        if self._starting:
            self._starting = False
            self._allow(self._limits.step_minutes)

    def _allow(self, minutes: float) -> None:
        self._allowed_s = 60 * minutes
        if self.failures.world.size > 1:
            set_collective_timeouts(collective_timeout(minutes))

    def close(self) -> None:
        """End the watchdog."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        seen, silent_s, last = self._heartbeats, 0.0, time.monotonic()
        while not self._closed.wait(TICK_S):
            now = time.monotonic()
            # If more than a tick has passed, this thread did not run either.
            silent_s += min(now - last, 2 * TICK_S)
            last = now
            if self._heartbeats != seen:
                seen, silent_s = self._heartbeats, 0.0
            faulthandler.dump_traceback_later(self._allowed_s + TIMER_MARGIN_S, file=_STDERR)
            failed = self.failures.first is not None or self.failures.leaving
            if silent_s > self._allowed_s and not failed:
                self.failures.post(self._hang(silent_s))
            if (first := self.failures.first) is not None:
                self._end(first, silent_s)
                break
        faulthandler.cancel_dump_traceback_later()

    def _hang(self, silent_s: float) -> Failure:
        message = (
            f"stood still for {silent_s / 60:.1f} minutes in {self._what}, itself or waiting for a rank that does; "
            f"all ranks' stacks are in {self._folder}"
        )
        return Failure(self.failures.world.rank, EXIT_RESUMABLE, message, hang=True)

    def _end(self, first: Failure, silent_s: float) -> None:
        """End the process, unless its main thread ends it or closes the watchdog in time."""
        if first.hang:
            world, found = self.failures.world, stacks()
            head = f"rank {world.rank} of {world.size}, process {os.getpid()} on {socket.gethostname()}: "
            _bounded(lambda: self._write(f"{head}{silent_s:.0f} s in {self._what}\n\n{found}"))
            first = self.failures.conclude()
        else:
            self.failures.answer(0)
            if self._closed.wait(GRACE_S) or (self.failures.leaving and self._closed.wait(CLEAN_UP_S)):
                return
        _bounded(lambda: self._on_failure(first))
        os._exit(first.code)

    def _write(self, text: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file.write_text(text)


def _bounded(act: Callable[[], None]) -> None:
    """Call `act` in a thread that is left behind if it takes longer than BOUND_S."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(BOUND_S)


def slowest(world: World, seconds: float) -> dict[str, Any]:
    """Metrics of the ranks' own seconds in a step: the longest, the median, and the slowest rank. A collective.

    Seconds of waiting for other ranks do not count: collectives make all ranks' steps equally long.
    """
    everywhere = world.gather(seconds)
    longest = max(everywhere)
    return {"rank_s_max": longest, "rank_s_median": median(everywhere), "slowest_rank": everywhere.index(longest)}
