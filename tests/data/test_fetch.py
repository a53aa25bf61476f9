"""Fetching: order, errors, closing, and a number of requests that follows what the server gives."""

from __future__ import annotations

import threading
import time

import pytest

from data.fetch import Concurrency, Fetcher, FetcherClosed


def settle(rate_of: dict[int, float] | None, windows: int, concurrency: Concurrency) -> list[int]:
    """The limits after each of so many windows, on a server that gives rate_of[limit] bytes a second."""
    limits = []
    for _ in range(windows):
        limit = concurrency.limit
        rate = min(limit, 20) * 1e6 if rate_of is None else rate_of[limit]
        moved = 0
        while True:
            moved += 1000
            if concurrency.finished(1000, moved / rate):
                break
        limits.append(concurrency.limit)
    return limits


def test_concurrency_rises_to_what_the_server_gives_and_stays_there() -> None:
    limits = settle(None, 60, Concurrency(start=8, most=64))  # more than 20 at once bring nothing
    assert 19 <= limits[-1] <= 27
    assert max(limits) <= 34
    assert limits[-10:].count(limits[-1]) >= 7  # it tries again now and then, and comes back


def test_concurrency_stays_within_its_most() -> None:
    unbounded = {limit: limit * 1e6 for limit in range(1, 33)}
    assert settle(unbounded, 40, Concurrency(start=8, most=32))[-1] == 32


def test_concurrency_halves_under_congestion_and_recovers() -> None:
    concurrency = Concurrency(start=16)
    concurrency.congested()
    assert concurrency.limit == 8
    for _ in range(10):
        concurrency.congested()
    assert concurrency.limit == 1
    assert settle(None, 80, concurrency)[-1] > 10


def test_requests_begin_in_order_and_their_results_and_errors_arrive() -> None:
    fetcher, begun = Fetcher(), []

    def request(n: int) -> int:
        begun.append(n)
        if n == 3:
            raise ValueError("three")
        return n * n

    futures = [fetcher.submit(lambda _, n=n: request(n), 10) for n in range(6)]
    assert [future.result(5) for n, future in enumerate(futures) if n != 3] == [0, 1, 4, 16, 25]
    with pytest.raises(ValueError, match="three"):
        futures[3].result(5)
    assert sorted(begun) == list(range(6))
    fetcher.close()


def test_no_more_requests_at_once_than_the_limit() -> None:
    fetcher, lock = Fetcher(), threading.Lock()
    busy, most = 0, 0

    def request(_: object) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.005)
        with lock:
            busy -= 1

    limit = fetcher.limit
    for future in [fetcher.submit(request) for _ in range(5 * limit)]:
        future.result(10)
    assert most == limit  # of size 0, they teach nothing
    fetcher.close()


def test_faults_are_counted_and_throttling_lowers_the_limit() -> None:
    fetcher = Fetcher()
    before = fetcher.limit

    def request(on_fault: object) -> str:
        for kind in ("broken", "throttled", "throttled"):
            on_fault(kind)
        return "done"

    fetcher._last_congestion -= 10
    assert fetcher.submit(request, 5).result(5) == "done"
    assert fetcher.faults() == {"broken": 1, "throttled": 2}
    assert fetcher.limit == before // 2  # two at once are one congestion
    fetcher.close()


def test_closing_ends_what_waits_and_what_is_under_way() -> None:
    fetcher, go = Fetcher(), threading.Event()
    ended = threading.Event()

    def request(on_fault: object) -> None:
        go.wait(10)
        try:
            on_fault("timeout")
        except FetcherClosed:
            ended.set()
            raise

    futures = [fetcher.submit(request) for _ in range(50)]
    fetcher.close()
    for future in futures:
        with pytest.raises(FetcherClosed):
            future.result(1)
    go.set()
    assert ended.wait(5)  # a retrying request gives up at its next fault
    with pytest.raises(FetcherClosed):
        fetcher.submit(request).result(1)


def test_what_is_needed_first_begins_first() -> None:
    fetcher, go, begun = Fetcher(), threading.Event(), []

    def request(n: int) -> None:
        begun.append(n)

    busy = [fetcher.submit(lambda _: go.wait(10)) for _ in range(fetcher.limit)]
    later = [fetcher.submit(lambda _, n=n: request(n), priority=n) for n in (5, 3, 9, 1, 3)]
    go.set()
    for future in [*busy, *later]:
        future.result(10)
    assert sorted(begun) == [1, 3, 3, 5, 9]
    assert begun.index(1) < begun.index(9)
    fetcher.close()


def test_a_task_runs_in_turn_and_a_fault_in_it_is_one_requests() -> None:
    fetcher, threads = Fetcher(), set()

    def request(n: int) -> int:
        threads.add(threading.get_ident())
        if n == 1:
            raise ValueError("one")
        return n

    futures = fetcher.submit_in_turn([((lambda _, n=n: request(n)), 10) for n in range(4)], priority=0)
    assert [futures[n].result(5) for n in (0, 2, 3)] == [0, 2, 3]
    with pytest.raises(ValueError, match="one"):
        futures[1].result(5)
    assert len(threads) == 1
    fetcher.close()


def test_closing_in_the_middle_of_a_task_drops_its_rest_and_keeps_what_is_there() -> None:
    fetcher, reached, go = Fetcher(), threading.Event(), threading.Event()
    begun: list[int] = []

    def request(n: int) -> int:
        begun.append(n)
        if n == 1:
            reached.set()
            go.wait(10)
        return n

    futures = fetcher.submit_in_turn([((lambda _, n=n: request(n)), 10) for n in range(3)], priority=0)
    assert reached.wait(5)
    fetcher.close()
    go.set()
    assert futures[0].result(1) == 0
    for future in futures[1:]:
        with pytest.raises(FetcherClosed):
            future.result(1)
    time.sleep(0.05)
    assert begun == [0, 1]
