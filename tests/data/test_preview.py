"""The ids of coming batches are those that training reads, from any place on."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tar_samples import jpeg, write_source

from data.errors import DataError
from data.fetch import MOST_AT_ONCE
from data.filters import Buckets, Filters
from data.lane import Source
from data.loader import Loader, merge_states
from data.prefetch import request_bytes
from data.preview import preview_batches
from data.sample import ImageSettings

ORDER: dict[str, Any] = {
    "batch_size": 12, "lanes": 6, "seed": 5, "stage": "low", "shuffle_block": 4, "buffer_bytes": 1 << 30,
}  # fmt: skip
IMAGES = ImageSettings(8)


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    bad = {n: {"jpg": b"no image"} for n in range(0, 40, 7)} | {n: {"txt": b"long " * 9} for n in range(3, 40, 9)}
    return [
        Source(write_source(tmp_path / "a", [7, 20, 13], "a", bad), 2.0, Filters(max_caption_words=5)),
        Source(write_source(tmp_path / "b", [9], "b"), 1.0),
    ]


def trained(
    sources: list[Source], batches: int, world: int, images: ImageSettings = IMAGES
) -> tuple[list[list[str]], list[dict[str, Any]], int]:
    """Ids by slot of the global batches that `world` ranks read, the state after each, and samples passed over."""
    loaders = [Loader(sources, images, rank=rank, world_size=world, workers=2, **ORDER) for rank in range(world)]
    ids, states = [], []
    for _ in range(batches):
        shares = [next(loader) for loader in loaders]
        by_slot = {slot: id_ for share in shares for slot, id_ in zip(share.slots.tolist(), share.ids, strict=True)}
        ids.append([by_slot[slot] for slot in sorted(by_slot)])
        states.append(merge_states([share.state for share in shares]))
    passed = sum(n for loader in loaders for name, n in loader.counters().items() if name not in ("samples", "bad"))
    for loader in loaders:
        loader.close()
    return ids, states, passed


@pytest.mark.parametrize("world", [1, 3])
def test_the_batches_of_training(sources: list[Source], world: int) -> None:
    ids, _, passed = trained(sources, 9, world)
    told: list[int] = []
    coming = preview_batches(sources, IMAGES, 9, progress=told.append, **ORDER)
    assert (coming.first, coming.ids) == (0, ids)
    assert sum(coming.skipped.values()) == passed > 0
    assert set(coming.skipped) == {"undecodable_image", "caption_words"}
    assert sum(told) == 9 * 12


def test_from_a_state_on(sources: list[Source]) -> None:
    ids, states, passed = trained(sources, 9, 2)
    before = sum(preview_batches(sources, IMAGES, 4, **ORDER).skipped.values())
    coming = preview_batches(sources, IMAGES, 5, state=states[3], **ORDER)
    assert (coming.first, coming.ids) == (4, ids[4:])
    assert sum(coming.skipped.values()) == passed - before


def test_with_buckets_it_tells_the_sizes_too(tmp_path: Path) -> None:
    wide = {n: {"jpg": jpeg(n, (16, 32))} for n in range(0, 40, 3)}
    images = ImageSettings(8, buckets=Buckets(((8, 8), (8, 16)), 2))
    sources = [Source(write_source(tmp_path, [7, 20, 13], replaced=wide))]
    ids, states, _ = trained(sources, 9, 3, images)
    coming = preview_batches(sources, images, 9, **ORDER)
    assert (coming.first, coming.ids, coming.skipped) == (0, ids, {})
    among = [int(id_.rsplit("/", 1)[1]) % 3 == 0 for row in ids for id_ in row]
    assert coming.sizes == {(8, 8): among.count(False), (8, 16): among.count(True)} and sum(among) > 9
    assert coming.waiting == sum(len(lane["waiting"]) for lane in states[-1]["lanes"].values()) > 0
    later = preview_batches(sources, images, 4, state=states[4], **ORDER)
    assert (later.ids, later.waiting) == (ids[5:], coming.waiting)


def test_a_state_of_another_order_is_refused(sources: list[Source]) -> None:
    _, states, _ = trained(sources, 1, 1)
    with pytest.raises(DataError, match="seed is 6, but the data state was saved with 5"):
        preview_batches(sources, IMAGES, 1, state=states[0], **ORDER | {"seed": 6})


def test_one_lane_needs_the_memory_of_one(sources: list[Source]) -> None:
    under_way = 2 * MOST_AT_ONCE * request_bytes(sources[0].index)
    one = int(sum(2 * 2 * source.index.mean_bytes for source in sources)) + under_way + 99
    with pytest.raises(DataError, match="over data.buffer_gib"):
        Loader(sources, IMAGES, rank=0, world_size=1, workers=0, **ORDER | {"buffer_bytes": one})
    assert preview_batches(sources, IMAGES, 1, **ORDER | {"buffer_bytes": one}).ids


def test_wrong_numbers_are_refused(sources: list[Source]) -> None:
    with pytest.raises(DataError, match="order is 0"):
        preview_batches(sources, IMAGES, 0, **ORDER)
    with pytest.raises(DataError, match="12 or 18"):
        preview_batches(sources, IMAGES, 1, **ORDER | {"batch_size": 13})


def test_no_thread_outlives_a_mistake(tmp_path: Path) -> None:
    source = Source(write_source(tmp_path, [6], replaced={n: {"jpg": b"?"} for n in range(6)}))
    before = set(threading.enumerate())
    with pytest.raises(DataError, match="none of"):
        preview_batches([source], IMAGES, 1, **ORDER | {"lanes": 3})
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
