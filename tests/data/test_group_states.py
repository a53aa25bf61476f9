"""What waits for a group in the state of a lane, and what the groups make of shares, micro-batches and memory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import boto3
import numpy as np
import pytest
from grouped import FILTERS, LANES, SHAPES, SIZES, Case, bucket, came_and_waits, number_of
from tar_samples import jpeg, write_source

from data.errors import DataError
from data.fetch import MOST_AT_ONCE
from data.filters import Buckets
from data.lane import Source
from data.prefetch import request_bytes
from data.preview import read_validation_set
from data.sample import ImageSettings
from data.shards.index import SourceIndex, open_index
from data.store import StoreOptions, open_store

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
