"""The loader's promises: the same global batches whatever the layout, exact resumption anywhere, nothing lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import torch
from tar_samples import jpeg, tar_bytes, write_source

from data.decode import decode
from data.errors import DataError
from data.filters import Filters
from data.lane import RawSample, Source
from data.loader import PREFETCH, Batch, Loader, merge_states
from data.preview import ValidationSet, read_validation_set
from data.sample import ImageSettings, make_sample
from data.shards.index import SourceIndex, open_index
from data.store import StoreOptions, open_store

BATCH, LANES = 16, 8
Global = list[tuple[int, str, str, bytes]]  # (slot, id, caption, pixels) of one global batch


def loader(indices: Sequence[SourceIndex], rank: int = 0, world: int = 1, **kwargs: Any) -> Loader:
    options: dict[str, Any] = {
        "batch_size": BATCH, "lanes": LANES, "seed": 3, "stage": "pretrain",
        "workers": 0, "shuffle_block": 4, "buffer_bytes": 4 << 30,
        "images": ImageSettings(8), "weights": [1.0] * len(indices), "filters": Filters(),
    }  # fmt: skip
    options |= kwargs
    weights, filters, state = options.pop("weights"), options.pop("filters"), options.pop("state", None)
    sources = [Source(index, weight, filters) for index, weight in zip(indices, weights, strict=True)]
    made = Loader(sources, rank=rank, world_size=world, **options)
    if state is not None:
        made.load_state_dict(state)
    return made


def run(
    indices: Sequence[SourceIndex], batches: int, world: int = 1, **kwargs: Any
) -> tuple[list[Global], dict[str, Any]]:
    """The global batches and the merged state after them, put together from all ranks."""
    per_rank: list[list[Batch]] = []
    for rank in range(world):
        with loader(indices, rank, world, **kwargs) as source:
            per_rank.append([next(source) for _ in range(batches)])
    merged = []
    for shares in zip(*per_rank, strict=True):
        rows: Global = []
        for share in shares:
            assert share.slots.tolist() == sorted(share.slots.tolist())
            (pixels,) = share.pixels
            assert pixels.shape == (BATCH // world, 3, 8, 8) and pixels.dtype == torch.uint8
            numpy = pixels.numpy()
            rows += [
                (int(slot), id_, caption, numpy[n].tobytes())
                for n, (slot, id_, caption) in enumerate(zip(share.slots, share.ids, share.captions, strict=True))
            ]
        merged.append(sorted(rows))
    return merged, merge_states([shares[-1].state for shares in per_rank])


BAD: Mapping[int, Mapping[str, bytes]] = {
    4: {"jpg": b"no image"},
    9: {"jpg": jpeg(9)[:100]},
    17: {"txt": b"\xff\xfe broken"},
    23: {"txt": b"  \n"},
    30: {"jpg": jpeg(30, 7)},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[SourceIndex]:
    folder = tmp_path_factory.mktemp("sources")
    return [
        write_source(folder / "a", [13, 1, 7, 20, 2], "a", BAD),
        write_source(folder / "b", [5], "b"),  # fewer samples than lanes
    ]


@pytest.fixture(scope="module")
def reference(sources: list[SourceIndex]) -> tuple[list[Global], dict[str, Any]]:
    return run(sources, 12, weights=[3.0, 1.0])


def test_batches_hold_the_right_pixels_and_slots(reference: tuple[list[Global], dict[str, Any]]) -> None:
    for g, rows in enumerate(reference[0]):
        assert [slot for slot, *_ in rows] == list(range(g * BATCH, (g + 1) * BATCH))
        for _, id_, caption, pixels in rows:
            source, shard, key = id_.split("/")
            assert caption == f"caption {int(key)}" and shard.endswith(".tar") and source in "ab"
            colour = np.frombuffer(pixels, np.uint8).reshape(3, -1).mean(axis=1)
            number = int(key)
            expected = [40 * (number % 6) + 20, 40 * (number // 6 % 6) + 20, 40 * (number // 36 % 6) + 20]
            assert np.abs(colour - expected).max() < 8


def test_bad_samples_are_passed_over_and_counted(tmp_path: Path) -> None:
    index = write_source(tmp_path, [20, 20], replaced=BAD)
    with loader([index], lanes=1, batch_size=35, workers=2) as source:
        batch = next(source)  # one lane: its first 35 good samples are the whole epoch's
        numbers = {int(id_.rsplit("/", 1)[1]) for id_ in batch.ids}
        assert len(numbers) == 35 and not numbers & set(BAD)
        next(source)
        # After two epochs' good samples; the second's last bad ones may still be unread.
        counters = source.counters()
    assert counters["samples"] == 70
    reasons = {reason: -(-count // 2) for reason, count in counters.items() if reason not in ("samples", "bad")}
    assert reasons == {"undecodable_image": 2, "bad_caption": 1, "empty_caption": 1, "small_image": 1}
    bad = {reason: counters[reason] for reason in ("undecodable_image", "bad_caption")}
    assert counters["bad"] == sum(bad.values())
    with loader([index], lanes=1, batch_size=36, images=ImageSettings(8, "upscale")) as source:
        assert any(id_.endswith("000030") for id_ in next(source).ids)
        assert "small_image" not in source.counters()


def test_samples_that_lack_a_member_are_passed_over_and_bad_ones_listed(tmp_path: Path) -> None:
    parts = [
        ("a.jpg", jpeg(0)),
        ("b.txt", b"no image"),
        ("c.jpg", jpeg(1)),
        ("c.txt", b"whole"),
        ("d.jpg", b"?"),
        ("d.txt", b"broken"),
    ]
    (tmp_path / "0.tar").write_bytes(tar_bytes(parts))
    with loader([open_index(open_store(str(tmp_path)), "s")], lanes=1, batch_size=3) as source:
        batch = next(source)
    assert set(batch.ids) == {"s/0.tar/c"}
    assert set(source.counters()) == {"missing_caption", "missing_image", "undecodable_image", "samples", "bad"}
    listed = {(it.shard, it.key, it.offset, it.reason) for it in batch.bad}
    before_d = sum(512 + -(-len(content) // 512) * 512 for _, content in parts[:4])
    assert listed == {("0.tar", "d", before_d, "undecodable_image")}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_with_nothing_usable_is_an_error_that_says_what_would_be_right(tmp_path: Path, workers: int) -> None:
    index = write_source(tmp_path, [6], "tiny", size=4)
    with (
        loader([index], workers=workers) as source,
        pytest.raises(DataError, match=r"'tiny'.*small_image: 1000.*small_images: upscale"),
    ):
        next(source)


def test_an_error_in_a_thread_reaches_the_consumer_in_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.loader.PREFETCH", 1)
    index = write_source(tmp_path / "a", [400])
    with loader([index], workers=2, batch_size=8) as source:
        next(source)
        (tmp_path / "a" / "00000.tar").unlink()
        with pytest.raises(DataError, match=r"00000\.tar"):
            for _ in range(49):  # what was read ahead is still good
                next(source)


def test_read_ahead_is_bounded_and_close_ends_the_threads(sources: list[SourceIndex]) -> None:
    source = loader(sources, workers=2)
    next(source)
    threads = source._threads
    assert len(source._partial) <= PREFETCH
    source.close()
    assert not any(thread.is_alive() for thread in threads)
    with pytest.raises(RuntimeError, match="closed"):
        next(source)


def test_a_batch_follows_the_weights(sources: list[SourceIndex]) -> None:
    rows, _ = run(sources, 8, weights=[0.75, 0.25])
    for n, batch in enumerate(rows):
        from_a = sum(id_.startswith("a/") for _, id_, _, _ in batch)
        assert from_a == 12, n


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"world": 3}, "nearest allowed is 2 or 4"),
        ({"batch_size": 20}, "nearest allowed is 16 or 24"),
        ({"rank": 2, "world": 2}, "rank 2"),
        ({"weights": [1.0, 0.0]}, "'b': weight 0.0"),
        ({"workers": -1}, "workers"),
    ],
)
def test_wrong_arguments_are_refused(sources: list[SourceIndex], options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        loader(sources, **options)


def test_a_state_of_something_else_is_refused(sources: list[SourceIndex]) -> None:
    _, state = run(sources, 2)
    for other, said in (
        ({"seed": 4}, "seed"),
        ({"stage": "sft"}, "stage"),
        ({"lanes": 4}, "data.lanes is 4, but .* 8:"),
        ({"shuffle_block": 5}, "data.shuffle_block is 5"),
    ):
        with pytest.raises(DataError, match=said):
            loader(sources, state=state, **other)
    a, b = sources
    for now, said in (
        ([a], "source 'b' is not in data.sources, but was when"),
        ([a, b, replace(a, name="c")], "source 'c' of data.sources is new since"),
        ([a, replace(b, name="c")], "source 'c' of data.sources has another name than when .*, 'b': give it that"),
        ([a, replace(a, name="b")], "source 'b' has other shards than when"),
        ([replace(b, name="a")], "source 'b' is not in data.sources, but was when"),
    ):
        with pytest.raises(DataError, match=said):
            loader(now, state=state)
    half = next(loader(sources, 0, 2)).state
    with pytest.raises(DataError, match="4 of 8 lanes"):
        loader(sources, state=half)
    with pytest.raises(ValueError, match="4 of 8 lanes"):
        merge_states([half])
    assert next(loader(sources, state=state)).slots[0] == 2 * BATCH


def test_fixed_samples_are_different_readable_and_repeatable(sources: list[SourceIndex]) -> None:
    def fixed(n: int) -> ValidationSet:
        return read_validation_set([Source(index) for index in sources], n, ImageSettings(8))

    first = fixed(20)
    again = fixed(20)
    assert first.ids == again.ids and torch.equal(first.pixels, again.pixels)
    assert len(set(first.ids)) == 20 and first.pixels.shape == (20, 3, 8, 8)
    assert fixed(7).ids == first.ids[:7]
    assert len(fixed(43).ids) == 43  # 48 less the 5 bad ones
    with pytest.raises(DataError, match="44 were asked for, but of 'a', 'b' only 43 can be used"):
        fixed(44)


def test_from_s3_as_from_disk(tmp_path: Path, endpoint: str) -> None:
    local = write_source(tmp_path, [9, 8], replaced={3: {"jpg": b"?"}})
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="tars")
    for name in os.listdir(tmp_path):
        client.put_object(Bucket="tars", Key=f"set/{name}", Body=(tmp_path / name).read_bytes())
    remote = open_index(open_store("s3://tars/set", StoreOptions(endpoint=endpoint)), "source")
    assert run([remote], 3, 2, workers=2) == run([local], 3)


def test_source_names_are_checked(tmp_path: Path) -> None:
    index = write_source(tmp_path, [2])
    with pytest.raises(DataError, match="'source' is there twice"):
        loader([index, index])
    with pytest.raises(DataError, match="without '/'"):
        open_index(open_store(str(tmp_path)), "a/b")


def test_a_fault_nobody_thought_of_is_a_bad_sample_not_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, whole = write_source(tmp_path, [20]), decode

    def odd(data: bytes, *args: Any, **kwargs: Any) -> Any:
        if data == jpeg(7):
            raise KeyError(6)
        return whole(data, *args, **kwargs)

    monkeypatch.setattr("data.sample.decode", odd)
    with loader([index], lanes=1, batch_size=19) as source:
        batch = next(source)
    assert [(it.key, it.reason, it.detail) for it in batch.bad] == [("000007", "undecodable_image", "KeyError: 6")]
    assert "source/00000.tar/000007" not in batch.ids


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_cannot_be_allocated_is_an_error_not_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    index = write_source(tmp_path, [20])

    def full(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no pinned memory")

    monkeypatch.setattr("torch.empty", full)
    with loader([index], workers=workers) as source, pytest.raises(MemoryError):
        next(source)


def test_taking_gives_up_waiting_and_says_what_was_read_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write_source(tmp_path, [30], replaced={n: {"jpg": b"?"} for n in range(20)})
    go = threading.Event()

    def waiting(visit: RawSample, images: ImageSettings) -> Any:
        if visit.members["jpg"] != b"?":
            assert go.wait(20)
        return make_sample(visit, images)

    monkeypatch.setattr("data.sample.make_sample", waiting)
    with loader([index], lanes=1, batch_size=4, workers=1) as source:
        assert source.take(0.05) is None
        assert source.counters() == {}
        found = source.read_so_far()  # those before the first good one
        assert set(found) <= {"undecodable_image", "bad"}
        go.set()
        batch = source.take(20)
        assert batch is not None and batch.wait_s > 0.05
        assert source.read_so_far()["samples"] >= 4 == source.counters()["samples"]


def test_the_start_does_not_read_a_whole_source_to_find_a_wrong_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.preview._MOST_SKIPPED", 50)
    index = write_source(tmp_path, [100])
    with pytest.raises(
        DataError, match=r"none of 50 samples in a row is usable \(missing_caption: 50; the last: source/00000"
    ):
        read_validation_set([Source(index, filters=Filters(captions={"text": 1.0}))], 1, ImageSettings(8))


def test_samples_in_pieces_are_what_is_said_to_be_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.preview._MOST_SKIPPED", 50)
    members = [(f"{n}.{end}", jpeg(n) if end == "jpg" else b"words") for end in ("jpg", "txt") for n in range(100)]
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    index = open_index(open_store(str(tmp_path)), "source", notice=lambda _: None)
    with pytest.raises(
        DataError, match=r"none of 50 samples .*; left out: 100 samples in pieces \(.* sort them by name"
    ):
        read_validation_set([Source(index)], 1, ImageSettings(8))
