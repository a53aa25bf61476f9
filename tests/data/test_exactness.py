"""The order's promises on random sources, layouts, filters and faults, through real tars and a real loader."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tar_samples import jpeg, write_source

from data.filters import Filters
from data.lane import Quarantined, Source
from data.loader import Loader, merge_states
from data.sample import ImageSettings
from data.shards.index import SourceIndex

LANES = [1, 2, 3, 4, 6, 12]


@dataclass(frozen=True)
class Case:
    """Sources with a number of samples in each shard, and what is wrong with some of the samples."""

    counts: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]
    lanes: int
    per_lane: int
    block: int
    undecodable: frozenset[int]
    short: frozenset[int]
    """Samples with captions that the filters leave out."""

    def usable(self, source: int) -> set[int]:
        return set(range(sum(self.counts[source]))) - self.undecodable - self.short


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sources = draw(st.integers(1, 3))
    shards = st.lists(st.integers(1, 9), min_size=1, max_size=7).map(tuple)
    counts = tuple(draw(shards) for _ in range(sources))
    some = st.frozensets(st.integers(0, 30), max_size=4)
    case = Case(
        counts,
        tuple(draw(st.floats(0.2, 5)) for _ in range(sources)),
        draw(st.sampled_from(LANES)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 12)),
        draw(some),
        draw(some),
    )
    usable = [case.usable(source) for source in range(sources)]
    if not all(usable):  # at least one sample of each must be left
        case = Case(counts, case.weights, case.lanes, case.per_lane, case.block, frozenset(), frozenset())
    return case


def write(case: Case, folder: Path) -> list[SourceIndex]:
    replaced = {n: {"jpg": jpeg(n)[:90]} for n in case.undecodable} | {n: {"txt": b"short"} for n in case.short}
    return [
        write_source(folder / f"s{n}", counts, f"s{n}", {k: v for k, v in replaced.items() if k < sum(counts)})
        for n, counts in enumerate(case.counts)
    ]


def read(
    case: Case, indices: list[SourceIndex], batches: int, world: int = 1, workers: int = 0, state: Any = None
) -> tuple[list[Any], list[Quarantined], dict[str, Any]]:
    """The global batches, what was set aside, and the state after them."""
    filters = Filters(min_caption_words=2)
    per_rank, states, aside = [], [], []
    for rank in range(world):
        with Loader(
            [Source(index, weight, filters) for index, weight in zip(indices, case.weights, strict=True)],
            ImageSettings(8, crop="random", horizontal_flip=True),
            batch_size=case.lanes * case.per_lane,
            lanes=case.lanes,
            seed=1,
            stage="s",
            rank=rank,
            world_size=world,
            workers=workers,
            shuffle_block=case.block,
            buffer_bytes=1 << 30,
        ) as loader:
            if state is not None:
                loader.load_state_dict(state)
            read = [next(loader) for _ in range(batches)]
        per_rank.append(read)
        states.append(read[-1].state)
        aside += [it for batch in read for it in batch.bad]
    merged = [
        sorted(
            (int(slot), id_, caption, pixels.numpy().tobytes())
            for share in shares
            for slot, id_, caption, pixels in zip(share.slots, share.ids, share.captions, *share.pixels, strict=True)
        )
        for shares in zip(*per_rank, strict=True)
    ]
    return merged, sorted(aside, key=str), json.loads(json.dumps(merge_states(states)))


FIXTURES_ARE_FRESH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=40, deadline=None, suppress_health_check=FIXTURES_ARE_FRESH)
@given(case=cases(), data=st.data())
def test_any_layout_and_any_resumption_give_the_same_batches(
    case: Case, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    indices = write(case, tmp_path_factory.mktemp("case"))
    worlds = st.sampled_from([n for n in range(1, case.lanes + 1) if case.lanes % n == 0])
    batches = 6
    expected, aside, end = read(case, indices, batches)
    slots = [slot for batch in expected for slot, *_ in batch]
    assert slots == list(range(batches * case.lanes * case.per_lane))
    assert read(case, indices, batches, data.draw(worlds), data.draw(st.integers(0, 3))) == (expected, aside, end)
    cut = data.draw(st.integers(1, batches - 1))
    first, aside_1, state = read(case, indices, cut, data.draw(worlds), data.draw(st.integers(0, 2)))
    rest, aside_2, last = read(case, indices, batches - cut, data.draw(worlds), data.draw(st.integers(0, 2)), state)
    assert (first + rest, last) == (expected, end)
    assert sorted(aside_1 + aside_2, key=str) == aside


@settings(max_examples=40, deadline=None, suppress_health_check=FIXTURES_ARE_FRESH)
@given(case=cases())
def test_every_usable_sample_exactly_once_in_a_sources_epoch(
    case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    case = Case(case.counts[:1], (1.0,), case.lanes, 1, case.block, case.undecodable, case.short)
    total = sum(case.counts[0])
    if not case.usable(0):
        return
    (index,) = write(case, tmp_path_factory.mktemp("case"))
    # A lane's epoch is told by its cursor, so one lane is read at a time, until it has left the second epoch.
    seen: dict[int, Counter[int]] = {0: Counter(), 1: Counter()}
    for lane in range(case.lanes):
        with Loader(
            [Source(index, 1.0, Filters(min_caption_words=2))],
            ImageSettings(8),
            batch_size=case.lanes,
            lanes=case.lanes,
            seed=1,
            stage="s",
            rank=lane,
            world_size=case.lanes,
            workers=0,
            shuffle_block=case.block,
            buffer_bytes=1 << 30,
        ) as loader:
            while True:
                batch = next(loader)
                epoch, _ = batch.state["lanes"][str(lane)]["sources"]["s0"]
                if epoch > 1:
                    break
                seen[epoch][int(batch.ids[0].rsplit("/", 1)[1])] += 1
    for epoch in (0, 1):
        assert seen[epoch] == Counter(case.usable(0)), (epoch, total)


def test_a_caption_is_chosen_anew_each_epoch_and_alike_in_every_layout(tmp_path: Path) -> None:
    members = {n: {"a.txt": b"first one", "b.txt": b"second one"} for n in range(12)}
    index = write_source(tmp_path, [12], "s0", members)
    filters = Filters(captions={"a.txt": 1.0, "b.txt": 1.0})

    def captions(lanes: int, block: int) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        with Loader(
            [Source(index, 1.0, filters)], ImageSettings(8), batch_size=12, lanes=lanes, seed=1, stage="s", rank=0,
            world_size=1, workers=0, shuffle_block=block, buffer_bytes=1 << 30,
        ) as loader:  # fmt: skip
            for _ in range(8):
                batch = next(loader)
                for id_, caption in zip(batch.ids, batch.captions, strict=True):
                    found.setdefault(id_, []).append(caption)
        return found

    first = captions(1, 5)
    assert first == captions(4, 2)  # 12 samples over 4 lanes: an epoch ends with each batch
    assert all(set(chosen) == {"first one", "second one"} for chosen in first.values())
