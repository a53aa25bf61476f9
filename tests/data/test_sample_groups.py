"""Lanes with buckets: a batch depends on no layout, resumption is exact, and no sample is lost or comes twice."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import numpy as np
import pytest
from grouped import FILTERS, LANES, SHAPES, SIZES, Case, bucket, came_and_waits, number_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tar_samples import jpeg, write_source

from data.errors import DataError
from data.fetch import MOST_AT_ONCE
from data.filters import Buckets, Size
from data.lane import Source
from data.order import mix
from data.prefetch import request_bytes
from data.preview import read_validation_set
from data.sample import ImageSettings
from data.shards.index import SourceIndex, open_index
from data.store import StoreOptions, open_store


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sources = draw(st.integers(1, 2))
    shards = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)
    some = st.frozensets(st.integers(0, 30), max_size=4)
    case = Case(
        tuple(draw(shards) for _ in range(sources)),
        tuple(draw(st.floats(0.2, 5)) for _ in range(sources)),
        draw(st.sampled_from([1, 2, 4, 6])),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 12)),
        draw(some),
        draw(some),
        draw(some),
    )
    bad = case.broken | case.no_image | case.short
    if not all(set(range(sum(counts))) - bad for counts in case.counts):  # at least one sample of each must be left
        case = replace(case, broken=frozenset(), no_image=frozenset(), short=frozenset())
    return case


FIXTURES_ARE_FRESH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=30, deadline=None, suppress_health_check=FIXTURES_ARE_FRESH)
@given(case=cases(), data=st.data())
def test_any_layout_and_any_resumption_give_the_same_batches(
    case: Case, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    indices = case.write(tmp_path_factory.mktemp("case"))
    worlds = st.sampled_from([n for n in range(1, case.lanes + 1) if case.lanes % n == 0])
    batches = 6
    expected, bad, end = case.read(indices, batches)
    size = case.lanes * case.group_size * case.groups
    assert [slot for batch in expected for slot, *_ in batch] == list(range(batches * size))
    assert case.read(indices, batches, data.draw(worlds), workers=data.draw(st.integers(0, 3))) == (
        expected,
        bad,
        end,
    )
    cut = data.draw(st.integers(1, batches - 1))
    first, bad_1, state = case.read(indices, cut, data.draw(worlds), workers=data.draw(st.integers(0, 2)))
    rest, bad_2, last = case.read(
        indices, batches - cut, data.draw(worlds), workers=data.draw(st.integers(0, 2)), state=state
    )
    assert (first + rest, last) == (expected, end)
    assert sorted(bad_1 + bad_2, key=str) == bad


@pytest.mark.parametrize("world", [1, 2, 4])
def test_killed_after_any_batch_over_several_epochs(tmp_path: Path, world: int) -> None:
    """40 samples on 4 lanes, some of them bad: 12 batches of 12 are more than two epochs, and many samples wait."""
    case = Case(
        ((13, 1, 20, 6),), group_size=3, broken=frozenset({5, 17}), no_image=frozenset({8}), short=frozenset({21, 33})
    )
    indices = case.write(tmp_path)
    expected, _, end = case.read(indices, 12)
    assert min(lane["sources"]["s0"][0] for lane in end["lanes"].values()) >= 2
    state, read, waited = None, [], 0
    for n in range(12):
        batches, _, state = case.read(indices, 1, (world, 4, 1)[n % 3], state=state)
        read += batches
        waited += sum(len(lane["waiting"]) for lane in state["lanes"].values())
    assert (read, state) == (expected, end)
    assert waited > 12 * LANES  # more than one a lane and batch


@settings(max_examples=30, deadline=None, suppress_health_check=FIXTURES_ARE_FRESH)
@given(case=cases())
def test_groups_are_what_the_order_without_buckets_makes_of_them(
    case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A second implementation: sort each lane's ids, as they come without buckets, into queues."""
    case = replace(case, broken=frozenset())  # a broken one's place goes to a later sample
    indices, batches = case.write(tmp_path_factory.mktemp("case")), 4
    found, _, end = case.read(indices, batches)
    per_lane, size = case.group_size * case.groups, case.lanes * case.group_size * case.groups
    by_slot = {slot: (id_, shape) for batch in found for slot, id_, _, shape, _ in batch}
    squares = ImageSettings(8, "upscale")
    for lane in range(case.lanes):
        with case.loader(indices, lane, case.lanes, images=squares, batch_size=case.lanes) as loader:
            groups = sorted_into_groups((batch.ids[0] for batch in loader), case.group_size)
            for n in range(batches * per_lane):
                if n % case.group_size == 0:
                    group = next(groups)
                slot = n // per_lane * size + lane + n % per_lane * case.lanes
                id_ = group[n % case.group_size]
                assert by_slot[slot] == (id_, bucket(number_of(id_)))
        drawn, waiting = end["lanes"][str(lane)]["draws"], end["lanes"][str(lane)]["waiting"]
        assert drawn == batches * per_lane + len(waiting)


def sorted_into_groups(ids: Iterator[str], size: int) -> Iterator[list[str]]:
    queues: dict[Size, list[str]] = {}
    for id_ in ids:
        queue = queues.setdefault(bucket(number_of(id_)), [])
        queue.append(id_)
        if len(queue) == size:
            yield queue
            queues[bucket(number_of(id_))] = []


@settings(max_examples=30, deadline=None, suppress_health_check=FIXTURES_ARE_FRESH)
@given(case=cases(), batches=st.integers(1, 8))
def test_every_sample_once_in_a_lanes_epoch_used_or_waiting_or_skipped(
    case: Case, batches: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    indices = case.write(tmp_path_factory.mktemp("case"))
    read, listed, state = case.read(indices, batches)
    came, waits = came_and_waits(case, indices, state)
    used = Counter((id_.partition("/")[0], number_of(id_)) for batch in read for _, id_, *_ in batch)
    passed = Counter((one.source, int(one.key or -1)) for one in listed)
    short = Counter({place: n for place, n in came.items() if place[1] in case.short})
    assert came == used + waits + passed + short
    bad = case.broken | case.no_image
    assert not {n for _, n in used} & bad and {n for _, n in passed} <= bad
    counters: Counter[str] = Counter()
    for of_lane in state["lanes"].values():
        counters.update(of_lane["counters"])
    assert counters["samples"] == used.total() and counters["bad"] == len(listed)
    assert sum(counters.values()) - len(listed) == came.total() - waits.total()


def test_sources_are_mixed_by_weight_though_one_is_half_broken(tmp_path: Path) -> None:
    case = Case(((30,), (30,)), weights=(1.0, 2.0), lanes=1)
    good, bad = (
        replace(case, broken=broken).write(tmp_path / str(n)) for n, broken in enumerate(((), range(0, 30, 2)))
    )
    read, listed, state = case.read([bad[0], good[1]], 40)
    assert len(listed) > 10 and {one.source for one in listed} == {"s0"}
    lane = state["lanes"]["0"]
    came = Counter(id_.partition("/")[0] for batch in read for _, id_, *_ in batch)
    came.update(name for name, *_ in lane["waiting"])
    assert came == Counter(f"s{mix((1.0, 2.0), 0, 1, n)}" for n in range(lane["draws"]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_of_broken_images_is_an_error_not_an_endless_search(tmp_path: Path, workers: int) -> None:
    case = Case(((30,), (30,)), weights=(1.0, 1.0), broken=frozenset(range(30)))
    broken, good = case.write(tmp_path / "a")[0], replace(case, broken=frozenset()).write(tmp_path / "b")[1]
    with (
        case.loader([broken, good], workers=workers) as loader,
        pytest.raises(DataError, match=r"'s0': none of 1000 samples in a row is usable \(undecodable_image: 1000;"),
    ):
        for _ in range(1000):
            next(loader)


def test_an_image_below_its_bucket_is_small_and_counts_so(tmp_path: Path) -> None:
    small = {n: {"jpg": jpeg(n, (14, 7))} for n in range(3)} | {n: {"jpg": jpeg(n, (8, 16))} for n in range(3, 8)}
    index = write_source(tmp_path, [8], "s0", small)
    case, kept = Case(((8,),), lanes=1, group_size=3), ImageSettings(8, buckets=Buckets(SIZES, 3))
    for images, count in ((kept, 5), (replace(kept, small_images="upscale"), 8)):
        state, used, waited = None, set(), set()
        for _ in range(24):
            ((batch,), _, state) = case.read([index], 1, images=images, state=state)
            used |= {number_of(id_) for _, id_, *_ in batch}
            waited |= {number for _, number in came_and_waits(case, [index], state)[1]}
        assert used | waited == set(range(8 - count, 8))
        assert ("small_image" in state["lanes"]["0"]["counters"]) == (count == 5)


def test_filters_of_size_hold_before_anything_waits(tmp_path: Path) -> None:
    case = Case(((24,),), lanes=1)
    filters = replace(FILTERS, min_side=17, max_aspect_ratio=1.8)  # leaves (29, 17) of SHAPES
    read, _, state = case.read(case.write(tmp_path), 3, filters=filters)
    assert {number_of(id_) % len(SHAPES) for batch in read for _, id_, *_ in batch} == {5}
    assert state["lanes"]["0"]["waiting"] == [] and set(state["lanes"]["0"]["counters"]) == {
        "aspect_ratio",
        "samples",
        "small_image",
    }


# States


@pytest.fixture(scope="module")
def case() -> Case:
    return Case(((13, 1, 20, 6),), group_size=3)


@pytest.fixture
def indices(case: Case, tmp_path: Path) -> list[SourceIndex]:
    return case.write(tmp_path)


def test_states_of_other_buckets_are_refused(case: Case, indices: list[SourceIndex]) -> None:
    _, _, state = case.read(indices, 2)
    plain = ImageSettings(8)
    _, _, without = case.read(indices, 2, images=plain)
    assert all("waiting" not in lane for lane in without["lanes"].values())
    assert not without["order"].keys() & {"buckets", "group_size"}
    other = ImageSettings(8, buckets=Buckets(((8, 8), (8, 16)), 3))
    for images, saved in ((other, state), (plain, state), (other, without)):
        with pytest.raises(DataError, match="data.buckets has other sizes than when the data state was saved"):
            case.loader(indices, images=images, state=saved)
    grouped = ImageSettings(8, buckets=Buckets(SIZES, 1))
    with pytest.raises(DataError, match="data.group_size is 1, but the data state was saved with 3"):
        case.loader(indices, images=grouped, state=state)


def test_what_waits_is_read_again_from_the_shard_it_was_in(case: Case, indices: list[SourceIndex]) -> None:
    _, _, state = case.read(indices, 2)
    assert sum(len(lane["waiting"]) for lane in state["lanes"].values()) > 4
    shards = [Path(indices[0].store.url) / name for name in indices[0].names]
    for shard in shards:
        os.utime(shard)
    with case.loader(indices, state=state) as loader, pytest.raises(DataError, match="changed since it was indexed"):
        next(loader)
    for shard in shards:
        shard.unlink()
    with case.loader(indices, state=state) as loader, pytest.raises(DataError, match=r"\.tar"):
        next(loader)


def test_what_waits_passes_by_the_rules_of_now(case: Case, indices: list[SourceIndex]) -> None:
    _, _, state = case.read(indices, 2)
    stricter = replace(FILTERS, max_aspect_ratio=1.4)
    wide = {n for n in range(40) if max(SHAPES[n % 6]) > 1.4 * min(SHAPES[n % 6])}
    came, waits = came_and_waits(case, indices, state)
    assert {n for _, n in waits} & wide and {n for _, n in waits} - wide
    read, _, after = case.read(indices, 1, state=state, filters=stricter)
    assert not {number_of(id_) for _, id_, *_ in read[0]} & wide
    passed = came_and_waits(case, indices, after)[0] - came + waits
    counted = sum(lane["counters"].get("aspect_ratio", 0) for lane in after["lanes"].values())
    assert counted == sum(n for (_, number), n in passed.items() if number in wide)


def test_from_s3_as_from_disk(case: Case, indices: list[SourceIndex], tmp_path: Path, endpoint: str) -> None:
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="grouped")
    for shard in (tmp_path / "s0").iterdir():
        client.put_object(Bucket="grouped", Key=f"set/{shard.name}", Body=shard.read_bytes())
    remote = [open_index(open_store("s3://grouped/set", StoreOptions(endpoint=endpoint)), "s0")]
    expected, _, end = case.read(indices, 5)
    first, _, state = case.read(remote, 2, 2, workers=2)
    rest, _, last = case.read(remote, 3, 4, workers=1, state=state)
    assert (first + rest, last) == (expected, end)


# Shares, micro-batches, memory


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_ranks_have_as_many_micro_batches_each_of_one_size(tmp_path: Path, micro: int) -> None:
    case = Case(((40,),), group_size=4, groups=2)
    indices = case.write(tmp_path)
    for world in (1, 2, 4):
        for rank in range(world):
            with case.loader(indices, rank, world) as loader:
                batch = next(loader)
            parts = list(batch.micro_batches(micro))
            assert len(parts) == 32 // world // micro
            places = np.concatenate([np.arange(32 // world)[part] for part, _ in parts])
            assert places.tolist() == list(range(32 // world))
            for part, pixels in parts:
                assert len(pixels) == micro
                assert {bucket(number_of(id_)) for id_ in batch.ids[part]} == {tuple(pixels.shape[2:])}
                assert len({slot % LANES for slot in batch.slots[part]}) == 1


def test_a_batch_that_does_not_divide_into_groups_is_refused(case: Case, indices: list[SourceIndex]) -> None:
    with pytest.raises(
        DataError, match="train.batch_size 16 is no multiple of data.lanes 4 x data.group_size 3: .* 12 or 24"
    ):
        case.loader(indices, batch_size=16)


def test_what_waits_counts_in_the_buffer(tmp_path: Path) -> None:
    case = Case(((40,),), group_size=9)
    (index,) = case.write(tmp_path)
    ahead = 2 * 9 * index.mean_bytes * LANES + 2 * MOST_AT_ONCE * request_bytes(index)
    waiting = LANES * 3 * 4 * index.mean_bytes  # 4 of 9 in each of 3 buckets
    case.loader([index], buffer_bytes=int(ahead + waiting) + 9).close()
    with pytest.raises(
        DataError, match="and samples that wait in buckets 0.00 GiB, over data.buffer_gib .*lower data.group_size"
    ):
        case.loader([index], buffer_bytes=int(ahead + waiting) - 9)


def test_a_source_of_one_shape_has_samples_for_its_bucket_alone(tmp_path: Path) -> None:
    index = write_source(tmp_path, [4], "s0", {n: {"jpg": jpeg(n, (8, 16))} for n in range(4)})
    images = ImageSettings(16, buckets=Buckets(SIZES, 2))
    assert read_validation_set([Source(index)], 1, images).pixels.shape == (1, 3, 8, 16)
    with pytest.raises(DataError, match="small_image"):
        read_validation_set([Source(index)], 1, ImageSettings(16))
