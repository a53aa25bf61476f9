"""A pool of threads for a rank's read requests, with as many at once as make it faster.

- The number of requests under way follows the server: it rises while more of them move more bytes a second, falls back
  when they do not, and halves when the server asks for less (503 SlowDown) or stalls.
- The most urgent request begins first, whoever submitted first: a lane that is far ahead does not hold up the others.
  The callers bound the bytes that are ahead (`data/prefetch.py`).
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

Request = Callable[[Callable[[str], None]], T]
"""Moves bytes; its argument is to be called with the kind of each fault that is retried."""

MOST_AT_ONCE = 64
"""Most requests of a rank under way."""


class Concurrency:
    """How many requests to have under way: hill climbing on bytes a second, and halving on congestion.

    It measures over windows of at least `limit` finished requests. A step up (by a quarter, at least 1) is kept if it
    brought 5 % more bytes a second, else taken back and tried again later, since servers change.
    """

    def __init__(self, start: int = 8, most: int = MOST_AT_ONCE) -> None:
        self.limit, self._most = start, most
        self._best = 0.0  # bytes a second at the limit kept last
        self._kept = start
        self._rest = 0  # windows to stay before the next try
        self._bytes = self._requests = 0

    def finished(self, size: int, elapsed_s: float) -> bool:
        """Count a finished request of `size` bytes, `elapsed_s` after the window began; True if it ends the window."""
        self._bytes += size
        self._requests += 1
        if self._requests < max(8, self.limit):
            return False
        rate = self._bytes / max(elapsed_s, 1e-9)
        self._bytes = self._requests = 0
        if self.limit > self._kept:
            if rate > 1.05 * self._best:
                self._kept, self._best = self.limit, rate
            else:
                self.limit, self._rest = self._kept, _REST_WINDOWS
            return True
        self._best = rate
        self._rest -= 1
        if self._rest < 0:
            self.limit = min(self._most, self.limit + max(1, self.limit // 4))
        return True

    def congested(self) -> None:
        """Halve: the server throttled or stalled a request."""
        self.limit = self._kept = max(1, self.limit // 2)
        self._rest, self._best = _REST_WINDOWS, 0.0
        self._bytes = self._requests = 0


_REST_WINDOWS = 8
_CONGESTION = ("throttled", "timeout")
_PAUSE_S = 1.0
"""Faults within this time count as one congestion: requests under way together fail together."""


class FetcherClosed(Exception):
    """The fetcher was closed while a request was under way or waiting."""


@dataclass(order=True)
class _Task:
    """Requests that one thread runs in turn. The smallest priority goes first, then the first submitted."""

    priority: float
    number: int
    left: list[tuple[Request[Any], int, Future[Any]]] = field(compare=False)


class Fetcher:
    """Runs requests on threads. Use from any thread; `close` when done."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: list[_Task] = []  # a heap
        self._numbers = itertools.count()
        self._concurrency = Concurrency()
        self._threads = 0
        self._window_began = self._last_congestion = time.monotonic()
        self._faults: Counter[str] = Counter()
        self._running: dict[int, _Task] = {}
        self._closed = False

    @property
    def limit(self) -> int:
        """Requests that may be under way at once, as of now."""
        return self._concurrency.limit

    def faults(self) -> dict[str, int]:
        """Faults that requests met, by kind; nearly all were retried."""
        with self._changed:
            return dict(sorted(self._faults.items()))

    def submit(self, request: Request[T], size: int = 0, priority: float = 0.0) -> Future[T]:
        """Run `request(on_fault)` on a thread.

        Args:
            size: bytes it moves.
            priority: when its result is needed, on any scale that all callers share; the smallest begins first.
        """
        return self.submit_in_turn([(request, size)], priority)[0]

    def submit_in_turn(self, requests: Sequence[tuple[Request[T], int]], priority: float) -> list[Future[T]]:
        """Run requests, given with their sizes, as `submit` does, one after the other on one thread."""
        futures: list[Future[T]] = [Future() for _ in requests]
        left = [(request, size, future) for (request, size), future in zip(requests, futures, strict=True)]
        task = _Task(priority, next(self._numbers), left)
        with self._changed:
            if self._closed:
                _drop(task)
                return futures
            heapq.heappush(self._queue, task)
            if len(self._running) + len(self._queue) > self._threads and self._threads < self._concurrency.limit:
                self._threads += 1
                threading.Thread(target=self._work, name=f"fetch-{self._threads}", daemon=True).start()
            self._changed.notify()
        return futures

    def close(self) -> None:
        """Drop all requests. A thread with one under way ends with it, or at its next fault."""
        with self._changed:
            self._closed = True
            for task in [*self._queue, *self._running.values()]:
                _drop(task)
            self._queue.clear()
            self._changed.notify_all()

    def _may_begin(self) -> bool:
        return bool(self._queue) and len(self._running) < self._concurrency.limit

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._may_begin())
                if self._closed:
                    return
                task = heapq.heappop(self._queue)
                self._running[task.number] = task
            while task.left:
                if not self._run_first(task):
                    return
            with self._changed:
                del self._running[task.number]
                self._changed.notify()

    def _run_first(self, task: _Task) -> bool:
        """Run a task's next request; False if the fetcher was closed meanwhile."""
        request, size, future = task.left[0]
        result: Any = None
        fault: BaseException | None = None
        try:
            result = request(self._on_fault)
        except BaseException as error:
            fault, size = error, 0
        with self._changed:
            if self._closed:
                return False
            del task.left[0]
            if fault is None:
                future.set_result(result)
            else:
                future.set_exception(fault)
            now = time.monotonic()
            if size and self._concurrency.finished(size, now - self._window_began):
                self._window_began = now
        return True

    def _on_fault(self, kind: str) -> None:
        with self._changed:
            if self._closed:
                raise FetcherClosed
            self._faults[kind] += 1
            now = time.monotonic()
            if kind in _CONGESTION and now - self._last_congestion > _PAUSE_S:
                self._last_congestion = self._window_began = now
                self._concurrency.congested()


def _drop(task: _Task) -> None:
    for _, _, future in task.left:
        future.set_exception(FetcherClosed())
