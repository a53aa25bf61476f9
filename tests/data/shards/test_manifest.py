"""Manifests are wids', offsets Energon's; building goes on where it stopped; and nothing stale is believed."""

from __future__ import annotations

import json
import os
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wids
from tar_samples import MemoryStore, jpeg, tar_bytes, write_source

import launch.index
from data.errors import DataError
from data.shards.index import open_index
from data.shards.manifest import (
    build_manifest,
    offsets_from_bytes,
    offsets_name,
    offsets_to_bytes,
    open_place,
    read_manifest,
    read_offsets,
    scan_shard,
)
from data.shards.tar import scan_tar
from data.store import open_store


def shard(first: int, count: int) -> bytes:
    return tar_bytes((f"{i:04d}.{end}", b"%d" % i) for i in range(first, first + count) for end in ("jpg", "txt"))


def listed(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_bytes())["shardlist"]


def build(source: MemoryStore, place: MemoryStore | None = None) -> dict[str, dict[str, Any]]:
    place = place or source
    build_manifest([source], place)
    return {entry["url"]: entry for entry in json.loads(place.read("index.json"))["shardlist"]}


def tar_reads(store: MemoryStore) -> int:
    return sum(stop - start for name, start, stop in store.reads if name.endswith(".tar"))


# --- the forms ---


def test_the_manifest_opens_with_wids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "cache"))
    inside, outside = tmp_path / "data" / "inside", tmp_path / "outside"
    write_source(inside / "a:b 1", [3, 2])
    write_source(outside, [4])
    manifest = tmp_path / "data" / "index.json"
    build_manifest([open_store(str(it)) for it in (inside, outside)], open_store(str(manifest.parent)))
    urls = [entry["url"] for entry in listed(manifest)]
    assert urls == ["inside/a:b 1/00000.tar", "inside/a:b 1/00001.tar", f"{outside}/00000.tar"]
    top = json.loads(manifest.read_bytes())
    assert top["__kind__"] == "wids-shard-index-v1" and top["wids_version"] == 1
    for path in (str(manifest), "index.json", "./index.json"):
        monkeypatch.chdir(manifest.parent)
        dataset = wids.ShardListDataset(path, transformations=[])
        assert len(dataset) == 9
        numbers = [0, 1, 2, 0 + 3, 1 + 3, 0, 1, 2, 3]  # as write_source counts in each of the sources
        assert [dataset[i][".txt"].read().decode() for i in range(9)] == [f"caption {n}" for n in numbers]
        assert dataset[4][".jpg"].read() == jpeg(4)


@pytest.mark.parametrize(
    ("base", "source", "url"),
    [
        ("s3://b/p", "s3://b/p/q", "q/x.tar"),
        ("s3://b", "s3://b", "x.tar"),
        ("s3://b/p", "s3://b/pq", "s3://b/pq/x.tar"),
        ("s3://b/p", "s3://c/p", "s3://c/p/x.tar"),
        ("/m", "s3://c/p", "s3://c/p/x.tar"),
        ("/m", "/m/n", "n/x.tar"),
        ("/m", "/mn", "/mn/x.tar"),
        ("/", "/mn", "mn/x.tar"),
        ("s3://b/p", "/mn", "file:///mn/x.tar"),
        ("s3://b", "s3://b/a:b", "./a:b/x.tar"),
    ],
)
def test_addresses_are_relative_below_the_manifest_as_wids_resolves_them(base: str, source: str, url: str) -> None:
    store = MemoryStore({"x.tar": shard(0, 1)}, url=source)
    place = MemoryStore({}, url=base)
    assert build(store, place).keys() == {url}
    table = read_manifest(place, "index.json", source)
    assert table.names == ("x.tar",)
    theirs = wids.wids_specs.urlmerge(base, url)
    assert theirs.replace("file://b/", "/").replace("file:///", "/") == f"{source}/x.tar"


def test_offsets_are_energons_file(tmp_path: Path) -> None:
    content = shard(0, 3)
    (tmp_path / "a.tar").write_bytes(content)
    build_manifest([open_store(str(tmp_path))], open_store(str(tmp_path)))
    raw = (tmp_path / "a.tar.idx").read_bytes()
    # Two members of one block each, plain headers: 2 * (512 + 512) bytes a sample.
    assert struct.unpack("<4Q", raw) == (0, 2048, 4096, 6144)
    assert raw == offsets_to_bytes(np.array([0, 2048, 4096, 6144]))


def test_offsets_that_cannot_be_are_refused() -> None:
    good = [0, 1024, 4096]
    assert offsets_from_bytes(offsets_to_bytes(np.array(good)), 4096).tolist() == good
    for wrong in ([], [0], [0, 1024, 1024], [1024, 0, 4096], [0, 1000, 4096], [-512, 1024, 4096], [0, 1024, 4097]):
        assert offsets_from_bytes(offsets_to_bytes(np.array(wrong, np.int64)), 4096) is None
    assert offsets_from_bytes(offsets_to_bytes(np.array(good))[:-1], 4096) is None


# --- building ---


def test_a_second_run_reads_what_the_first_wrote() -> None:
    broken = shard(20, 4)
    cut = 3 * 2048 + 1024 + 512 + 1
    objects = {"a.tar": shard(0, 300), "b.tar": shard(500, 200), "c.tar": broken[:cut], "d.tar": b"junk" * 999}
    store = MemoryStore(objects)
    first = build(store)
    assert [entry["nsamples"] for entry in first.values()] == [300, 200, 3, 0]
    assert [entry.get("corruption") for entry in first.values()] == [
        None,
        None,
        f"cut off at byte {cut}, inside member '0023.txt'",
        "no tar header at byte 0: not a tar",
    ]
    assert sorted(store.writes) == [
        *(f"{name}.tar{end}" for name in "abc" for end in (".idx", ".left_out.json")),
        "index.json",
    ]
    assert store.writes[-1] == "index.json", "the manifest is last"
    scanned = tar_reads(store)
    store.reads.clear()
    store.writes.clear()
    assert build(store) == first
    assert store.writes == ["index.json"] and tar_reads(store) < scanned / 10
    # Stopped half way: only what is missing is scanned.
    del store._objects["b.tar.idx"], store._objects["index.json"]
    store.writes.clear()
    assert build(store) == first and store.writes == ["b.tar.left_out.json", "b.tar.idx", "index.json"]


def test_offsets_older_than_the_shard_or_of_another_content_are_scanned_again() -> None:
    store = MemoryStore({"a.tar": shard(0, 3)})
    build(store)
    idx = store._objects["a.tar.idx"][0]
    info = store.list(".tar")[0]
    store.now = info.modified - 1
    store.write("a.tar.idx", idx)
    assert read_offsets(store, info, store, store.info("a.tar.idx")) is None
    store.now = info.modified
    for wrong in ([0, 2048], [512, 2048, 6144], [2048 - 512, 4096, 6144]):  # samples follow; begins at no header
        store.write("a.tar.idx", offsets_to_bytes(np.array(wrong)))
        assert read_offsets(store, info, store, store.info("a.tar.idx")) is None
    assert build(store)["a.tar"]["nsamples"] == 3 and store._objects["a.tar.idx"][0] == idx


def lengths(captions: Sequence[int]) -> bytes:
    """A shard of samples whose captions have these sizes: three blocks and the padded caption each."""
    members = [
        (f"{n:04d}.{end}", bytes(size)) for n, it in enumerate(captions) for end, size in (("jpg", 1), ("txt", it))
    ]
    return tar_bytes(members, tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("readahead", [512, 1 << 20])
@pytest.mark.parametrize(("longer", "shorter"), [(0, 1), (5, 12), (9, 10), (15, 20), (27, 28), (28, 29)])
def test_offsets_of_other_content_that_was_as_long(longer: int, shorter: int, readahead: int) -> None:
    sizes = [1024] * 30
    new = lengths(sizes)
    sizes[longer] += 512
    sizes[shorter] -= 512
    old = lengths(sizes)
    assert len(old) == len(new)
    store = MemoryStore({"a.tar": new, "old.tar": old}, readahead)
    info, before = store.list(".tar")
    for content, fits in ((before, False), (info, True)):
        store.write("a.tar.idx", offsets_to_bytes(scan_tar(store, content).offsets))
        store.reads.clear()
        assert (read_offsets(store, info, store, store.info("a.tar.idx")) is not None) == fits
        assert len(store.reads) <= (1 + 4 if readahead > 512 else 1 + 4 * 4), "a request a pair, or a few"
        assert tar_reads(store) <= 4 * 2 * 2560 + 10240


@pytest.mark.parametrize(
    ("samples", "wrong"), [(1, [0, 1]), (2, [0, 1, 2]), (4, range(5)), (30, [0, 1, 2, 11, 20, 30])]
)
def test_an_offset_inside_a_sample_is_no_beginning(samples: int, wrong: Sequence[int]) -> None:
    store = MemoryStore({"a.tar": lengths([1024] * samples)})
    info = store.list(".tar")[0]
    for n in wrong:
        for into in (512, 1024):  # data, or the second member's header, which is a header as good
            offsets = np.arange(samples + 1) * 2560
            offsets[n] += into if n < samples else -into
            store.write("a.tar.idx", offsets_to_bytes(offsets))
            assert read_offsets(store, info, store, store.info("a.tar.idx")) is None, (n, into)


def test_offsets_of_read_only_shards_lie_beside_the_manifest_apart_for_each_prefix() -> None:
    sources = [MemoryStore({"x/0.tar": shard(10 * n, n + 2)}, url=f"s3://bucket/{n}", read_only=True) for n in range(2)]
    place = MemoryStore({}, url="s3://other/m")
    built = build_manifest(sources, place, "both.json")
    assert (built.shards, built.samples, built.corrupt) == (2, 5, [])
    assert sorted(place.writes) == [
        "both.json",
        *(f"both.offsets/s3/bucket/{n}/x/0.tar{end}" for n in (0, 1) for end in (".idx", ".left_out.json")),
    ]
    for n, source in enumerate(sources):
        table = read_manifest(place, "both.json", source.url)
        assert table.counts.tolist() == [n + 2] and table.offset_paths == {0: f"both.offsets/s3/bucket/{n}/x/0.tar.idx"}
    place.writes.clear()
    build_manifest(sources, place, "both.json")
    assert place.writes == ["both.json"]


def test_offsets_elsewhere_are_those_that_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale file beside a read-only shard, with as many samples, must not be taken."""
    store = MemoryStore({"a.tar": shard(0, 3)}, read_only=True)
    store._objects["a.tar.idx"] = (offsets_to_bytes(np.array([0, 512, 1024, 6144])), "1", 1.0)
    place = open_store(str(tmp_path))
    build_manifest([store], place)
    source = open_index(store, "s", str(tmp_path / "index.json"))
    store.reads.clear()
    assert source.offsets(0).tolist() == [0, 2048, 4096, 6144]
    assert not store.reads and (tmp_path / "index.offsets/s3/bucket/p/a.tar.idx").is_file()


def test_no_name_leads_out_of_the_folder() -> None:
    assert (
        offsets_name("m.json", "s3://b/p", "../../x/./a b.tar") == "m.offsets/s3/b/p/%2E%2E/%2E%2E/x/%2E/a%20b.tar.idx"
    )
    with pytest.raises(DataError, match=r"'a/\.\./b\.tar'.*plain path"):
        build(MemoryStore({"a/../b.tar": shard(0, 1)}))


def test_sources_without_a_sample_and_shards_listed_twice_are_refused() -> None:
    with pytest.raises(DataError, match=r"no \.tar shard below s3://bucket/p"):
        build(MemoryStore({}))
    with pytest.raises(DataError, match=r"no shard below s3://bucket/p has a sample: a\.tar: no tar header"):
        build(MemoryStore({"a.tar": b"junk" * 999}))
    twice = [MemoryStore({"q/a.tar": shard(0, 1)}), MemoryStore({"a.tar": shard(0, 1)}, url="s3://bucket/p/q")]
    with pytest.raises(DataError, match="lies inside another prefix"):
        build_manifest(twice, MemoryStore({}))


# --- reading ---


def test_a_source_takes_its_own_shards_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(tmp_path / "ab", [1, 2])
    write_source(tmp_path / "a", [3])
    monkeypatch.chdir(tmp_path)
    build_manifest([open_store("ab"), open_store("a")], open_store("."))
    assert read_manifest(open_store("."), "index.json", "a").counts.tolist() == [3]
    table = read_manifest(*open_place("index.json"), str(tmp_path))
    assert table.names == ("a/00000.tar", "ab/00000.tar", "ab/00001.tar") and table.counts.tolist() == [3, 1, 2]
    with pytest.raises(DataError, match=r"lists no shard below /elsewhere, but such as .*ab/00000\.tar"):
        read_manifest(open_store("."), "index.json", "/elsewhere")
    (tmp_path / "moved").mkdir()
    for name in ("a", "ab", "index.json"):
        os.rename(tmp_path / name, tmp_path / "moved" / name)
    source = open_index(open_store("moved/ab"), "s", "moved/index.json")
    assert source.counts.tolist() == [1, 2] and len(source.offsets(1)) == 3, "shards and manifest move together"


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        '{"wids_version": 1}',
        '{"shardlist": [{"url": "a.tar"}]}',
        '{"shardlist": [{"url": "a.tar", "nsamples": 3, "filesize": -1024, "version": "1"}]}',
        '{"shardlist": [{"url": "a.tar", "nsamples": 3, "filesize": null, "version": "1"}]}',
        '{"shardlist": [{"url": "a.tar", "nsamples": -3, "filesize": 1024, "version": "1"}]}',
        '{"shardlist": [{"url": "a.tar", "nsamples": "3", "filesize": 1024, "version": "1"}]}',
        '{"shardlist": [{"url": "a.tar", "nsamples": 3, "filesize": 1024, "version": 1}]}',
        '{"shardlist": [{"url": 5, "nsamples": 3, "filesize": 1024, "version": "1"}]}',
        '{"shardlist": ["a.tar"]}',
    ],
)
def test_what_is_no_manifest_is_said(content: str) -> None:
    place = MemoryStore({"index.json": content.encode()})
    with pytest.raises(
        DataError, match=r"s3://bucket/p/index\.json is no wids index .*write it anew with launch/index\.py"
    ):
        read_manifest(place, "index.json", place.url)


def test_a_shard_listed_twice_is_said() -> None:
    entry = {"url": "a.tar", "nsamples": 3, "filesize": 1024, "version": "1"}
    place = MemoryStore({"index.json": json.dumps({"shardlist": [entry, entry]}).encode()})
    with pytest.raises(DataError, match="twice"):
        read_manifest(place, "index.json", place.url)


def test_addresses_that_others_write_are_resolved() -> None:
    urls = ["./a.tar", "../p/b.tar", "s3://bucket/p/c.tar", "x/../d.tar", "../q/e.tar", "http://bucket/p/f.tar"]
    entries = [{"url": url, "nsamples": 1, "filesize": 1024, "version": "1"} for url in urls]
    place = MemoryStore({"index.json": json.dumps({"shardlist": entries}).encode()})
    assert read_manifest(place, "index.json", "s3://bucket/p").names == ("a.tar", "b.tar", "c.tar", "d.tar")


# --- the command ---


def test_the_command_writes_a_manifest_and_says_what_is_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source(tmp_path / "a", [3, 2])
    write_source(tmp_path / "b", [4])
    (tmp_path / "b" / "00001.tar").write_bytes(b"junk" * 500)
    out = tmp_path / "new" / "both.json"
    assert launch.index.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out), "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{out}: 4 shards, 9 samples, 43 kB; 1 corrupt: 00001.tar: no tar" in said
    assert [entry["nsamples"] for entry in listed(out)] == [3, 2, 4, 0]
    assert launch.index.main([str(tmp_path / "a")]) == 0
    assert len(open_index(open_store(str(tmp_path / "a")), "s", notice=pytest.fail).names) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "SOURCES"),
        (["nowhere"], "'nowhere' is not a directory"),
        (["a", "a"], "out is not given"),
        (["a", "--workers", "0"], "workers is 0"),
        (["a", "--out", "file/index.json"], "file/index.json: cannot be written"),
        (["a", "--out", "a/"], "should be a file"),
        (["empty"], "no .tar shard below"),
        (["a", "--anonymous", "perhaps"], "anonymous"),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path / "a", [1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert launch.index.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and said in error
    assert not list(tmp_path.glob("**/index.json"))


def test_a_corrupt_shard_scans_the_same_from_its_last_offset() -> None:
    """What a second run says of a corrupt shard comes from the header at its last offset alone."""
    content = shard(0, 5)
    for cut in range(2048, 5 * 2048, 100):
        store = MemoryStore({"a.tar": content[:cut]}, readahead=512)
        info = store.list()[0]
        whole = scan_shard(store, info)
        store.write("a.tar.idx", offsets_to_bytes(whole.offsets))
        again = read_offsets(store, info, store, store.info("a.tar.idx"))
        assert again is not None and again.corruption == whole.corruption
        assert again.offsets.tolist() == whole.offsets.tolist()
