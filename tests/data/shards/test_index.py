"""A source opens from its manifest or by indexing it, and its offsets are the samples', whatever threads ask."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tar_samples import MemoryStore, jpeg, tar_bytes, write_source

import data.shards.index
from data.errors import DataError
from data.shards.index import SourceIndex, check_listing, open_index
from data.shards.manifest import build_manifest, offsets_to_bytes
from data.shards.tar import parse_sample
from data.store import ObjectInfo, Store, open_store


def shard(first: int, count: int) -> bytes:
    return tar_bytes((f"{i:04d}.{end}", b"%d" % i) for i in range(first, first + count) for end in ("jpg", "txt"))


def captions(source: SourceIndex) -> list[str]:
    found = []
    for number, name in enumerate(source.names):
        offsets = source.offsets(number)
        assert len(offsets) == source.counts[number] + 1
        for a, b in pairwise(offsets):
            sample = parse_sample(source.store.read(name, int(a), int(b), version=source.versions[number]))
            found.append(sample.members["txt"].decode())
    return found


def test_every_sample_of_every_shard(tmp_path: Path) -> None:
    source = write_source(tmp_path, [3, 1, 5])
    assert source.names == ("00000.tar", "00001.tar", "00002.tar")
    assert source.counts.tolist() == [3, 1, 5] and source.counts.dtype == np.int64
    assert source.sizes.tolist() == [path.stat().st_size for path in sorted(tmp_path.iterdir())]
    assert captions(source) == [f"caption {n}" for n in range(9)]
    a, b = source.offsets(2)[3:5]
    assert parse_sample(source.store.read("00002.tar", int(a), int(b))).members["jpg"] == jpeg(7)
    assert source.mean_bytes == sum(source.sizes) / 9
    assert [path.suffix for path in tmp_path.iterdir()] == [".tar"] * 3, "indexing at a start writes nothing"


def test_the_fingerprint_changes_with_names_and_counts(tmp_path: Path) -> None:
    prints = {write_source(tmp_path / str(counts), counts).fingerprint for counts in ([3, 1], [1, 3], [3, 1, 1])}
    assert len(prints) == 3 and all(len(it) == 16 for it in prints)
    assert write_source(tmp_path / "again", [3, 1]).fingerprint in prints


def test_a_manifest_at_the_root_is_found_and_no_shard_is_touched() -> None:
    store = MemoryStore({f"{n}.tar": shard(10 * n, n + 1) for n in range(3)})
    build_manifest([store], store)
    store.reads.clear()
    source = open_index(store, "s", notice=pytest.fail)
    assert [name for name, _, _ in store.reads] == ["index.json"]
    store.reads.clear()
    assert captions(source) == ["0", "10", "11", "20", "21", "22"]
    assert sum(name.endswith(".idx") for name, _, _ in store.reads) == 3
    captions(source)
    assert sum(name.endswith(".idx") for name, _, _ in store.reads) == 3, "offsets are read once"


def test_it_pickles_small_whole_and_without_its_cache() -> None:
    store = MemoryStore({f"{n}.tar": shard(10 * n, 4) for n in range(2)})
    build_manifest([store], store)
    scanned = open_index(MemoryStore({f"{n}.tar": shard(10 * n, 4) for n in range(2)}), "s")
    for source in (open_index(store, "s"), scanned):
        fresh = pickle.dumps(source)
        wanted = captions(source)
        assert source.fingerprint == scanned.fingerprint
        assert abs(len(pickle.dumps(source)) - len(fresh)) < 500, "the cache stays behind"
        twin = pickle.loads(fresh)
        assert captions(twin) == wanted and twin.fingerprint == source.fingerprint


def test_threads_share_a_bounded_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore({f"{n:02d}.tar": shard(10 * n, 9) for n in range(20)})
    build_manifest([store], store)
    source = open_index(store, "s")
    expected = [source.offsets(n).tolist() for n in range(20)]
    monkeypatch.setattr(data.shards.index, "_CACHE_BYTES", 5 * 80)
    source = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda n: source.offsets(n % 20).tolist(), range(2000)))
    assert got == expected * 100
    cache = source.__dict__["_cache"]
    assert len(cache._arrays) == 5 and cache._bytes == 400


def test_what_was_used_last_stays_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.shards.index, "_CACHE_BYTES", 3 * 80)
    cache, array = data.shards.index._Cache(), np.zeros(10, np.int64)
    for shard_number in (0, 1, 2, 2, 2):  # as when threads read the same at once
        cache.put(shard_number, array)
    assert cache.get(0) is array
    cache.put(3, array)
    assert [cache.get(n) is None for n in range(4)] == [False, True, False, False]


def test_offsets_that_are_gone_or_wrong_are_scanned_for_and_a_changed_shard_is_said() -> None:
    store = MemoryStore({"a.tar": shard(0, 3), "b.tar": shard(5, 2), "c.tar": shard(9, 2)})
    build_manifest([store], store)
    del store._objects["a.tar.idx"]
    store.write("b.tar.idx", b"\0" * 16)
    assert captions(open_index(store, "s")) == ["0", "1", "2", "5", "6", "9", "10"]
    store.write("c.tar.idx", np.array([0, 512], "<u8").tobytes())  # one sample: of another content
    assert captions(open_index(store, "s"))[-2:] == ["9", "10"]
    del store._objects["b.tar.idx"]
    manifest = json.loads(store.read("index.json"))
    manifest["shardlist"][1]["nsamples"] += 1
    store.write("index.json", json.dumps(manifest).encode())
    with pytest.raises(DataError, match=r"b\.tar has 2 samples, and its manifest says 3: run launch/index\.py"):
        open_index(store, "s").offsets(1)
    content, version, modified = store._objects["c.tar"]
    store._objects["c.tar"] = (content, version + "?", modified)
    with pytest.raises(DataError, match="changed since it was indexed"):
        open_index(store, "s").offsets(2)


def test_an_unindexed_source_is_indexed_with_a_notice_up_to_a_number_of_shards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryStore({f"{n}.tar": shard(10 * n, 1) for n in range(3)})
    said: list[str] = []
    assert len(captions(open_index(store, "s", notice=said.append))) == 3
    assert len(said) == 1 and "'s'" in said[0] and "3 shards" in said[0]
    assert "python launch/index.py s3://bucket/p" in said[0] and not store.writes
    assert data.shards.index._MOST_UNINDEXED == 1000
    monkeypatch.setattr(data.shards.index, "_MOST_UNINDEXED", 2)
    with pytest.raises(DataError, match=r"'s': 3 shards .* run python launch/index\.py s3://bucket/p first"):
        open_index(store, "s", notice=pytest.fail)


def test_a_manifest_that_is_named_and_missing_is_said(tmp_path: Path) -> None:
    store = MemoryStore({"a.tar": shard(0, 1)})
    with pytest.raises(DataError, match="gone.json"):
        open_index(store, "s", str(tmp_path / "gone.json"))
    with pytest.raises(DataError, match="is not a directory"):
        open_index(store, "s", str(tmp_path / "no" / "index.json"))


def test_a_source_without_tars_is_read_as_a_folder_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{n}.{end}": b"%d" % n for n in range(3) for end in ("jpg", "txt")}
    said: list[str] = []
    source = open_index(MemoryStore(files), "s", notice=said.append)
    assert captions(source) == ["0", "1", "2"] and len(said) == 1 and "launch/pack.py" in said[0]
    with pytest.raises(DataError, match=r"'s': no \.tar shard and no image below s3://bucket/p"):
        open_index(MemoryStore({"a.mp3": b""}), "s", notice=pytest.fail)
    assert data.shards.index._MOST_VIRTUAL == 100
    monkeypatch.setattr(data.shards.index, "_MOST_VIRTUAL", 1)
    open_index(MemoryStore(files), "s", notice=said.append)
    with pytest.raises(DataError, match=r"2 shards of up to 1000, .* launch/pack\.py folder s3://bucket/p first"):
        open_index(MemoryStore({**files, "sub/0.jpg": b""}), "s", notice=pytest.fail)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"this is not a tar " * 100, "not a tar"),
        (b"\x1f\x8b\x08" + bytes(2000), "compressed"),
        (bytes(10240), "no member"),
        (tar_bytes([("a.jpg", bytes(4000))])[:2000], r"cut off at byte 2000, inside member 'a\.jpg'"),
        (tar_bytes([("readme", b"1")]), "no member that belongs to a sample"),
    ],
)
def test_a_useless_shard_stays_in_the_table_and_is_named(content: bytes, said: str) -> None:
    store = MemoryStore({"a.tar": shard(0, 2), "b.tar": content})
    source = open_index(store, "s")
    assert source.names == ("a.tar", "b.tar") and source.counts.tolist() == [2, 0]
    assert source.offsets(1).shape == (1,)
    assert list(source.corruption) == [1]
    with pytest.raises(DataError, match=rf"'s': no shard below s3://bucket/p has a sample: b\.tar: .*{said}"):
        open_index(MemoryStore({"b.tar": content}), "s")
    build_manifest([store], store)
    listed = open_index(store, "s")
    assert listed.corruption == source.corruption and listed.offsets(1).shape == (1,)


def test_no_shards_and_names_that_ids_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'source'.*no \.tar shard"):
        open_index(open_store(str(tmp_path)), "source")
    for name in ("", "a/b"):
        with pytest.raises(DataError, match="source name"):
            open_index(MemoryStore({"a.tar": shard(0, 1)}), name)


def test_a_cut_shard_gives_its_whole_samples(tmp_path: Path) -> None:
    write_source(tmp_path, [6])
    path = tmp_path / "00000.tar"
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
        cut = tar.getmember("000004.txt").offset_data + 3
    path.write_bytes(path.read_bytes()[:cut])
    store: Store = open_store(str(tmp_path))
    source = open_index(store, "s")
    assert captions(source) == [f"caption {n}" for n in range(4)]
    assert source.corruption == {0: f"cut off at byte {cut}, inside member '000004.txt'"}


# --- manifests that others wrote ---


def foreign(store: MemoryStore, sizes: bool = True, more: int = 0) -> None:
    """An index.json as wids_index writes it: a hash, and no version."""
    shards = [info for info in store.list(".tar") if info.size]
    entries = [{"url": info.name, "md5sum": "?", "nsamples": 3 + more, "filesize": info.size} for info in shards]
    if not sizes:
        entries = [{"url": entry["url"], "nsamples": entry["nsamples"]} for entry in entries]
    content = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": entries, "name": "theirs"}
    store.write("index.json", json.dumps(content, indent=2).encode())


@pytest.mark.parametrize("sizes", [True, False])
def test_a_manifest_of_wids_is_completed_by_one_listing(sizes: bool) -> None:
    store = MemoryStore({f"{n}.tar": shard(10 * n, 3) for n in range(3)})
    foreign(store, sizes)
    store.reads.clear()
    store.lists = 0
    source = open_index(store, "s", notice=pytest.fail)
    assert [name for name, *_ in store.reads] == ["index.json"] and store.lists == 1
    ours = open_index(MemoryStore({f"{n}.tar": shard(10 * n, 3) for n in range(3)}), "s", notice=lambda _: None)
    assert (source.names, source.versions, source.sizes.tolist()) == (ours.names, ours.versions, ours.sizes.tolist())
    assert source.fingerprint == ours.fingerprint and captions(source) == captions(ours)
    assert check_listing(source) is None


def test_offsets_beside_the_shards_of_others_are_checked() -> None:
    store = MemoryStore({f"{n}.tar": shard(10 * n, 3) for n in range(2)})
    foreign(store)
    good, wrong = np.array([0, 2048, 4096, 6144]), np.array([0, 512, 4096, 6144])
    store.write("0.tar.idx", offsets_to_bytes(good))
    store.write("1.tar.idx", offsets_to_bytes(wrong))
    source = pickle.loads(pickle.dumps(open_index(store, "s")))
    store = source.store
    store.reads.clear()
    assert source.offsets(0).tolist() == good.tolist() and source.offsets(1).tolist() == good.tolist()
    assert [name for name, *_ in store.reads].count("0.tar.idx") == 1


def test_what_a_manifest_of_others_says_wrongly_is_said() -> None:
    store = MemoryStore({"0.tar": shard(0, 3), "1.tar": shard(5, 3)})
    foreign(store, more=1)
    with pytest.raises(DataError, match=r"0\.tar has 3 samples, and its manifest says 4: run launch/index\.py"):
        open_index(store, "s").offsets(0)
    foreign(store)
    store.write("1.tar", shard(5, 30))
    with pytest.raises(DataError, match=r"p/1\.tar has [\d,]+ bytes, not 10,240, .*run launch/index\.py"):
        open_index(store, "s")
    manifest = json.loads(store.read("index.json"))
    manifest["shardlist"][1] |= {"version": "of old", "filesize": len(shard(5, 30))}
    store.write("index.json", json.dumps(manifest).encode())
    with pytest.raises(DataError, match=r"1\.tar changed since it was indexed"):
        check_listing(open_index(store, "s"))
    del store._objects["1.tar"]
    with pytest.raises(DataError, match=r"p/1\.tar is not there, .*run launch/index\.py"):
        open_index(store, "s")


# --- the listing and the table ---


def test_a_listing_that_differs_from_the_table_is_said() -> None:
    def store() -> MemoryStore:
        it = MemoryStore({f"{n}.tar": shard(10 * n, 3) for n in range(3)})
        build_manifest([it], it)
        return it

    same = store()
    source = open_index(same, "s")
    same.lists = 0
    same.reads.clear()
    assert check_listing(source) is None and same.lists == 1 and not same.reads

    gone = store()
    source = open_index(gone, "s")
    del gone._objects["1.tar"]
    with pytest.raises(DataError, match=r"'s': s3://bucket/p/1\.tar is gone .*: run launch/index\.py again"):
        check_listing(source)
    gone.write("2.tar", shard(20, 3))
    with pytest.raises(DataError, match=r"/1\.tar is gone since it was indexed, and 1 more: run"):
        check_listing(source)

    for change in ((shard(10, 3), "2", 100.0), (shard(10, 30), "1", 100.0)):  # version; size
        changed = store()
        source = open_index(changed, "s")
        changed._objects["1.tar"] = change
        with pytest.raises(DataError, match=r"/1\.tar changed since it was indexed: run launch/index\.py again"):
            check_listing(source)

    more = store()
    source = open_index(more, "s")
    more.write("new/a.tar", shard(0, 1))
    more.write("b.tar", shard(0, 1))
    notice = check_listing(source)
    assert notice is not None and "'s': 2 shards below s3://bucket/p are not in its manifest" in notice


def test_40000_shards_are_compared_at_once() -> None:
    names = [f"{n:06d}.tar" for n in range(40_000)]
    infos = [ObjectInfo(name, n, f"{n:032x}", 0.0) for n, name in enumerate(names)]
    store = MemoryStore({})
    store.list = lambda suffix="": infos
    sizes = np.arange(40_000)
    source = SourceIndex(
        "s", store, tuple(names), sizes, tuple(i.version for i in infos), np.ones(40_000, np.int64), {}
    )
    begin = time.process_time()
    assert check_listing(source) is None
    assert time.process_time() - begin < 0.5


def test_a_source_that_moved_with_its_times_is_the_same_and_without_them_is_said(tmp_path: Path) -> None:
    write_source(tmp_path / "a", [3])
    build_manifest([open_store(str(tmp_path / "a"))], open_store(str(tmp_path / "a")))
    os.rename(tmp_path / "a", tmp_path / "b")
    source = open_index(open_store(str(tmp_path / "b")), "s")
    assert check_listing(source) is None and captions(source) == ["caption 0", "caption 1", "caption 2"]
    os.utime(tmp_path / "b" / "00000.tar")
    with pytest.raises(DataError, match=r"00000\.tar changed since it was indexed: run launch/index\.py again"):
        check_listing(source)
