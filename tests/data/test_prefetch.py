"""Prefetching: the same samples in the same order, in few requests, within the buffer."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tar_samples import write_source

from data.errors import DataError
from data.fetch import Fetcher
from data.order import SourceOrder
from data.prefetch import FetchedSample, Prefetcher, plan_block, read_again, request_bytes
from data.shards.index import SourceIndex
from data.shards.tar import parse_sample

COUNTS = [30, 7, 1, 50, 12]


class Watched:
    """A store that notes what is asked of it, and may be told to wait; `readahead` is the test's."""

    def __init__(self, index: SourceIndex, readahead: int) -> None:
        self._store, self.url, self.readahead = index.store, index.store.url, readahead
        self.reads: list[tuple[str, int, int]] = []
        self.go = threading.Event()
        self.go.set()

    def read(self, name: str, start: int, stop: int, **options: Any) -> bytes | bytearray:
        self.reads.append((name, start, stop))
        assert self.go.wait(10)
        return self._store.read(name, start, stop, **options)


def watched(index: SourceIndex, readahead: int) -> tuple[SourceIndex, Watched]:
    store = Watched(index, readahead)
    offsets = {shard: index.offsets(shard) for shard in range(len(index.names))}
    copy = SourceIndex(
        index.name,
        store,
        index.names,
        index.sizes,
        index.versions,
        index.counts,
        {},
        in_memory=offsets,
    )
    return copy, store


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceIndex:
    return write_source(tmp_path_factory.mktemp("w"), COUNTS)


def order_of(index: SourceIndex, lanes: int = 3, block: int = 8) -> SourceOrder:
    return SourceOrder(index.name, index.counts, lanes, block, 5, "s")


def expected(order: SourceOrder, lane: int, epochs: int) -> list[tuple[int, int, int, int]]:
    """(epoch, position, shard, sample), straight from the order."""
    return [
        (epoch, n * order.shuffle_block + place, int(shard), int(sample))
        for epoch in range(epochs)
        for n in range(-(-order.lane_size(lane, epoch) // order.shuffle_block))
        for place, (shard, sample) in enumerate(order.block(lane, epoch, n))
    ]


def take(prefetcher: Prefetcher, n: int) -> list[FetchedSample]:
    return [prefetcher.take() for _ in range(n)]


@pytest.mark.parametrize("readahead", [0, 700, 1 << 20])
@pytest.mark.parametrize("buffer", [0, 5_000, 1 << 20])
def test_samples_come_in_their_order_whatever_the_requests(source: SourceIndex, readahead: int, buffer: int) -> None:
    index, _ = watched(source, readahead)
    order = order_of(index)
    wanted = expected(order, 1, 3)
    with closing(Fetcher()) as fetcher:
        taken = take(Prefetcher(index, order, 1, 0, 0, fetcher, buffer), len(wanted))
        assert [(one.epoch, one.position, one.shard, one.sample) for one in taken] == wanted
        for one in taken:
            number = sum(COUNTS[: one.shard]) + one.sample
            sample = parse_sample(one.content)
            assert sample.members["txt"] == f"caption {number}".encode()
            assert one.offset == source.offsets(one.shard)[one.sample]
        for start in (1, 5, 8, len(wanted) // 2):
            epoch, position, *_ = wanted[start]
            rest = take(Prefetcher(index, order, 1, epoch, position, fetcher, buffer), len(wanted) - start)
            assert [(one.epoch, one.position, one.shard, one.sample) for one in rest] == wanted[start:]


def test_a_sample_is_read_again_as_it_was_or_not_at_all(tmp_path: Path) -> None:
    index = write_source(tmp_path, COUNTS)
    order = order_of(index)
    with closing(Fetcher()) as fetcher:
        taken = take(Prefetcher(index, order, 1, 0, 0, fetcher, 5_000), 50)
    assert taken[-1].epoch > 0
    assert [read_again(index, order, 1, one.epoch, one.position)(lambda kind: None) for one in taken] == taken
    os.utime(tmp_path / index.names[taken[7].shard])
    with pytest.raises(DataError, match="changed since it was indexed"):
        read_again(index, order, 1, taken[7].epoch, taken[7].position)(lambda kind: None)


def test_neighbours_share_a_request_and_nothing_is_read_twice(source: SourceIndex) -> None:
    index, store = watched(source, 1 << 20)
    order = order_of(index, lanes=1, block=100)
    with closing(Fetcher()) as fetcher:
        take(Prefetcher(index, order, 0, 0, 0, fetcher, 1), 100)  # with a buffer of 1 byte it reads no further
    assert sorted(store.reads) == sorted(
        (name, 0, int(source.offsets(shard)[-1])) for shard, name in enumerate(index.names)
    )  # the epoch is one block: each shard in one request
    index, store = watched(source, 0)
    with closing(Fetcher()) as fetcher:
        take(Prefetcher(index, order, 0, 0, 0, fetcher, 1), 100)
    assert len(store.reads) == 100 == len(set(store.reads))  # where a request costs nothing, one a sample


def test_small_requests_go_out_together_and_large_ones_alone(source: SourceIndex, monkeypatch: Any) -> None:
    tasks: list[int] = []
    submit = Fetcher.submit_in_turn

    def noted(self: Fetcher, requests: Any, priority: float) -> Any:
        tasks.append(len(requests))
        return submit(self, requests, priority)

    monkeypatch.setattr(Fetcher, "submit_in_turn", noted)
    for readahead, most in ((0, 100), (1 << 20, 1)):  # what a request costs, on a disk and on S3
        index, _ = watched(source, readahead)
        tasks.clear()
        with closing(Fetcher()) as fetcher:
            assert (
                len(take(Prefetcher(index, order_of(index, lanes=1, block=100), 0, 0, 0, fetcher, 1 << 20), 100)) == 100
            )
        assert max(tasks) <= most and (most == 1 or max(tasks) > 10)


def test_requests_stay_within_their_size_and_go_out_by_need(source: SourceIndex) -> None:
    index, _ = watched(source, 4_000)
    order = order_of(index, lanes=1, block=100)
    block = plan_block(index, order, 0, 0, 0)
    firsts = [min(request.places) for request in block.ranges]
    assert firsts == sorted(firsts)
    assert sorted(place for request in block.ranges for place in request.places) == list(range(100))
    assert all(request.stop - request.start <= request_bytes(index) for request in block.ranges)
    assert 100 / 6 < len(block.ranges) < 100 / 2  # some 2 KB a sample
    later = plan_block(index, order, 0, 0, 60)
    assert sorted(place for request in later.ranges for place in request.places) == list(range(60, 100))


def test_a_prefetcher_holds_no_more_than_its_buffer(source: SourceIndex) -> None:
    index, store = watched(source, 0)
    order = order_of(index, lanes=1, block=100)
    sizes = np.diff(source.offsets(0))
    buffer = int(sizes.mean() * 10)
    store.go.clear()  # nothing arrives: what is asked for is what the buffer allows
    with closing(Fetcher()) as fetcher:
        prefetcher = Prefetcher(index, order, 0, 0, 0, fetcher, buffer)
        prefetcher._planning().result(5)
        prefetcher._prefetch()
        assert prefetcher._held <= buffer and 8 <= len(prefetcher._requested) <= 10
        store.go.set()
        take(prefetcher, 50)
        assert prefetcher._held <= buffer + sizes.max()


def test_an_empty_buffer_still_gives_the_sample_that_is_needed(source: SourceIndex) -> None:
    index, _ = watched(source, 0)
    order = order_of(index)
    with closing(Fetcher()) as fetcher:
        assert len(take(Prefetcher(index, order, 0, 0, 0, fetcher, 0), 40)) == 40


def test_the_next_block_is_read_before_this_one_is_used_up(source: SourceIndex) -> None:
    index, store = watched(source, 1 << 20)
    order = order_of(index, lanes=1, block=10)
    with closing(Fetcher()) as fetcher:
        prefetcher = Prefetcher(index, order, 0, 0, 0, fetcher, buffer_bytes=1 << 30)
        prefetcher.take()
        for _ in range(100):  # plans are made on threads; each look takes up one more
            prefetcher._planning().result(5)
            prefetcher._prefetch()
            if prefetcher._unplanned[0] > 2:
                break
        assert len({name for name, _, _ in store.reads}) == len(COUNTS)


def test_a_fault_reaches_the_sample_that_needs_it_and_only_then(source: SourceIndex, tmp_path: Path) -> None:
    index = write_source(tmp_path / "gone", [20, 20])
    order = order_of(index, lanes=1, block=1)
    first = int(order.block(0, 0, 0)[0, 0])
    (tmp_path / "gone" / index.names[1 - first]).unlink()
    with closing(Fetcher()) as fetcher:
        prefetcher = Prefetcher(index, order, 0, 0, 0, fetcher, 1 << 20)
        take(prefetcher, 20)
        with pytest.raises(DataError, match=index.names[1 - first]):
            prefetcher.take()
