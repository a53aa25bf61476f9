"""The order of samples: exactly once an epoch whatever the cut, no starved lane, mixtures that hold their weights."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.order import SourceOrder, check_layout, check_sources, interval, mix


def make(counts: list[int], lanes: int, block: int, **kwargs: object) -> SourceOrder:
    settings_ = {"seed": 1, "stage": "pretrain", "name": "a", **kwargs}
    return SourceOrder(counts=counts, lanes=lanes, shuffle_block=block, **settings_)


def lane_epoch(order: SourceOrder, lane: int, epoch: int) -> list[tuple[int, int]]:
    blocks = -(-order.lane_size(lane, epoch) // order.shuffle_block)
    return [(int(shard), int(sample)) for n in range(blocks) for shard, sample in order.block(lane, epoch, n)]


COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)


@settings(max_examples=150, deadline=None)
@given(COUNTS, st.integers(1, 17), st.integers(1, 9), st.integers(0, 5))
def test_every_sample_exactly_once_an_epoch(counts: list[int], lanes: int, block: int, epoch: int) -> None:
    order = make(counts, lanes, block)
    read = [lane_epoch(order, lane, epoch) for lane in range(lanes)]
    everything = {(shard, sample) for shard, count in enumerate(counts) for sample in range(count)}
    assert Counter(itertools.chain(*read)) == Counter(everything)
    sizes = {len(part) for part in read}
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=100, deadline=None)
@given(COUNTS, st.integers(1, 17))
def test_no_lane_starves_and_settling_ends(counts: list[int], lanes: int) -> None:
    order = make(counts, lanes, 4)
    for lane in range(lanes):
        epoch, position, epochs = 0, 0, []
        for _ in range(3 * order.total):
            epoch, position = order.settle(lane, epoch, position)
            assert position < order.lane_size(lane, epoch)
            epochs.append(epoch)
            position += 1
        assert epochs == sorted(epochs)
        assert epochs[-1] < 3 * lanes + 1


def test_a_lane_reads_its_own_interval_in_blocks() -> None:
    """Unshuffled, the blocks are consecutive runs of the shards' permutation; shuffled, the same sets."""
    plain, blocked = make([10] * 6, 3, 1), make([10] * 6, 3, 5)
    for lane in range(3):
        straight, shuffled = lane_epoch(plain, lane, 0), lane_epoch(blocked, lane, 0)
        for shard, run in itertools.groupby(straight, key=lambda place: place[0]):
            assert [sample for _, sample in run] == list(range(10)), shard
        assert shuffled != straight
        for start in range(0, 20, 5):
            assert sorted(shuffled[start : start + 5]) == sorted(straight[start : start + 5])
    assert interval(10, 3, 0, 0) == (0, 3) and interval(10, 3, 2, 0) == (6, 10) and interval(10, 3, 2, 1) == (0, 3)


def test_the_order_depends_on_seed_stage_source_and_epoch() -> None:
    base = lane_epoch(make([5] * 20, 2, 50), 0, 0)
    assert base == lane_epoch(make([5] * 20, 2, 50), 0, 0)
    for other in ({"seed": 2}, {"stage": "sft"}, {"name": "b"}):
        assert base != lane_epoch(make([5] * 20, 2, 50, **other), 0, 0)
    assert base != lane_epoch(make([5] * 20, 2, 50), 0, 2)


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(DataError, match="'a' has no samples"):
        make([0, 0], 2, 4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 15))
def test_mixing_holds_the_weights_in_every_prefix(weights: list[float], lane: int) -> None:
    draws = np.array([mix(weights, lane, 16, n) for n in range(400)])
    ideal = np.arange(1, 401)[:, None] * np.array(weights) / sum(weights)
    error = np.abs(np.cumsum(draws[:, None] == np.arange(len(weights)), axis=0) - ideal).max()
    depth = (len(weights) - 1).bit_length()
    assert error <= depth + 1e-6  # for two sources: within one draw


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.9, 0.1], [0.7, 0.2, 0.1], [1, 2, 3, 4]])
def test_mixing_is_even_over_the_lanes_of_every_draw(weights: list[float]) -> None:
    shares = np.array(weights) / sum(weights)
    for n in (0, 1, 7, 1000, 123_456_789):
        counts = np.bincount([mix(weights, lane, 128, n) for lane in range(128)], minlength=len(weights))
        assert np.abs(counts - 128 * shares).max() <= (1 if len(weights) == 2 else 4)


def test_mixing_draws_one_source_and_each_of_512() -> None:
    assert {mix([5.0], 0, 1, n) for n in range(5)} == {0}
    assert {mix([1.0] * 512, 0, 1, n) for n in range(1000)} == set(range(512))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0, 0.0], "'b': weight 0.0 must be a finite number above 0"),
        ([-1.0, 2.0], "'a': weight -1.0"),
        ([float("nan"), 1.0], "'a': weight nan"),
    ],
)
def test_bad_weights(weights: list[float], said: str) -> None:
    with pytest.raises(DataError, match=said):
        check_sources(weights, ["a", "b"])
    with pytest.raises(DataError, match="'a' is there twice"):
        check_sources([1.0, 1.0], ["a", "a"])
    with pytest.raises(DataError, match="513 sources are more than 512"):
        check_sources([1.0] * 513, [str(n) for n in range(513)])


def test_draws_belong_to_the_sample_its_epoch_and_the_purpose() -> None:
    order = make([3, 4], 2, 5)
    drawn = {(shard, sample): order.uniforms("crop", 0, shard, sample, 2) for shard, sample in lane_epoch(order, 0, 0)}
    values = np.array(list(drawn.values()))
    assert len(np.unique(values)) == values.size and ((values > 0) & (values < 1)).all()
    for other in (make([3, 4], 7, 1), make([3, 4], 1, 2)):  # other lanes and blocks
        assert (other.uniforms("crop", 0, 1, 2, 2) == order.uniforms("crop", 0, 1, 2, 2)).all()
    for epoch, purpose in ((1, "crop"), (0, "caption")):
        assert (order.uniforms(purpose, epoch, 1, 2, 2) != order.uniforms("crop", 0, 1, 2, 2)).all()


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ((16, 8, 3), "3 ranks do not divide data.lanes 8: the nearest allowed is 2 or 4"),
        ((16, 8, 16), "16 ranks do not divide data.lanes 8: the nearest allowed is 8"),
        ((20, 8, 1), "batch_size 20.*nearest allowed is 16 or 24"),
        ((4, 8, 1), "batch_size 4.*nearest allowed is 8"),
        ((16, 8, 0), "at least 1"),
    ],
)
def test_wrong_layouts_name_the_nearest_right_one(layout: tuple[int, int, int], said: str) -> None:
    check_layout(16, 8, 4)
    with pytest.raises(DataError, match=said):
        check_layout(*layout)
