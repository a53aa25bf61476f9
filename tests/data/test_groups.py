"""Buckets keep the order's promises: a batch knows no layout, resumption is exact, nothing is lost or comes twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from grouped import FILTERS, LANES, SHAPES, SIZES, Case, bucket, came_and_waits, number_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tar_samples import jpeg, write_source

from data.errors import DataError
from data.filters import Buckets, Size
from data.order import mix
from data.sample import ImageSettings


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
    expected, aside, end = case.read(indices, batches)
    size = case.lanes * case.group_size * case.groups
    assert [slot for batch in expected for slot, *_ in batch] == list(range(batches * size))
    assert case.read(indices, batches, data.draw(worlds), workers=data.draw(st.integers(0, 3))) == (
        expected,
        aside,
        end,
    )
    cut = data.draw(st.integers(1, batches - 1))
    first, aside_1, state = case.read(indices, cut, data.draw(worlds), workers=data.draw(st.integers(0, 2)))
    rest, aside_2, last = case.read(
        indices, batches - cut, data.draw(worlds), workers=data.draw(st.integers(0, 2)), state=state
    )
    assert (first + rest, last) == (expected, end)
    assert sorted(aside_1 + aside_2, key=str) == aside


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
def test_every_sample_once_in_a_lanes_epoch_used_or_waiting_or_passed_over(
    case: Case, batches: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    indices = case.write(tmp_path_factory.mktemp("case"))
    read, aside, state = case.read(indices, batches)
    came, waits = came_and_waits(case, indices, state)
    used = Counter((id_.partition("/")[0], number_of(id_)) for batch in read for _, id_, *_ in batch)
    passed = Counter((it.source, int(it.key or -1)) for it in aside)
    short = Counter({place: n for place, n in came.items() if place[1] in case.short})
    assert came == used + waits + passed + short
    bad = case.broken | case.no_image
    assert not {n for _, n in used} & bad and {n for _, n in passed} <= bad
    counters: Counter[str] = Counter()
    for of_lane in state["lanes"].values():
        counters.update(of_lane["counters"])
    assert counters["samples"] == used.total() and counters["bad"] == len(aside)
    assert sum(counters.values()) - len(aside) == came.total() - waits.total()


def test_sources_are_mixed_by_weight_though_one_is_half_broken(tmp_path: Path) -> None:
    case = Case(((30,), (30,)), weights=(1.0, 2.0), lanes=1)
    good, bad = (
        replace(case, broken=broken).write(tmp_path / str(n)) for n, broken in enumerate(((), range(0, 30, 2)))
    )
    read, aside, state = case.read([bad[0], good[1]], 40)
    assert len(aside) > 10 and {it.source for it in aside} == {"s0"}
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
