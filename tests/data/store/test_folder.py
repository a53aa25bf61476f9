"""Virtual tars: the same bytes however they are read, whole for Python's tarfile, one key a sample."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tar_samples import MemoryStore

from data.errors import DataError
from data.shards.tar import parse_sample, scan_tar
from data.store import ObjectInfo, open_store
from data.store.virtual import FolderStore


def memory(files: dict[str, bytes]) -> MemoryStore:
    return MemoryStore(files, readahead=1, url="memory")


FOLDER = {
    "b.jpg": b"jpg of b" * 100,
    "b.txt": b"b",
    "a.b.PNG": b"png",
    "a.b.json": b"{}",
    "v1.5/x/a.webp": b"w" * 512,
    "v1.5/x/a.txt": b"",
    "orphan.txt": b"no image",
    ".hidden.jpg": b"",
    ".git/x.jpg": b"",
    "plain": b"",
    "dot.": b"",
}


def members(content: bytes | bytearray) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def test_images_and_what_lies_beside_them_are_the_samples_of_their_folder() -> None:
    store = FolderStore(memory(FOLDER))
    assert [info.name for info in store.list(".tar")] == ["00000.tar", "v1.5/x/00000.tar"]
    assert store.list(".jpg") == []
    root = members(store.read("00000.tar"))
    assert list(root) == ["a%2Eb.png", "a%2Eb.json", "b.jpg", "b.txt"]
    assert root["b.jpg"] == FOLDER["b.jpg"] and root["a%2Eb.png"] == b"png"
    assert members(store.read("v1.5/x/00000.tar")) == {"a.txt": b"", "a.webp": b"w" * 512}


STEM = st.text("a.B%é~ \n", min_size=1, max_size=4) | st.integers(60, 200).map(lambda n: "é" * (n // 2) + "." * (n % 3))
NAME = st.tuples(
    st.sampled_from(["", "d/", "d.e/", "d.e/f/"]), STEM, st.sampled_from(["jpg", "txt", "png", "x" * 20])
).map(lambda parts: f"{parts[0]}{parts[1]}.{parts[2]}")
FILES = st.dictionaries(NAME, st.integers(0, 1100).map(lambda n: bytes(i % 251 for i in range(n))), max_size=12)


@settings(max_examples=150, deadline=None)
@given(FILES, st.data())
def test_a_virtual_tar_is_one_tar_however_it_is_read(files: dict[str, bytes], data: st.DataObject) -> None:
    store = FolderStore(memory(files))
    held: list[bytes] = []
    for info in store.list(".tar"):
        content = store.read(info.name, version=info.version)
        assert len(content) == info.size and info.size % 512 == 0 and content[-1024:] == bytes(1024)
        cuts = data.draw(st.lists(st.integers(0, info.size), max_size=8))
        edges = [0, *sorted(cuts), info.size]
        assert b"".join(store.read(info.name, a, b) for a, b in itertools.pairwise(edges)) == content
        held += members(content).values()

        scan = scan_tar(store, info)
        assert scan.corruption is None and scan.offsets[-1] == info.size - 1024
        samples = [parse_sample(content[a:b]) for a, b in itertools.pairwise(scan.offsets)]
        assert len({sample.key for sample in samples}) == len(samples)
        assert all({"jpg", "png"} & set(sample.members) for sample in samples)
    seen = {name: content for name, content in files.items() if not name.rpartition("/")[2].startswith(".")}
    images = [name for name in seen if name.endswith((".jpg", ".png"))]
    expected = [seen[name] for name in images]
    for image in images:
        stem = image.rpartition(".")[0]
        for ending in ("txt", "x" * 20):
            beside = [seen[f"{it}.{ending}"] for it in (stem, image) if f"{it}.{ending}" in seen]
            expected += beside[:1]
    assert sorted(held) == sorted(expected)


def test_a_scan_opens_no_file() -> None:
    inner = memory(
        {f"{n:03}.{kind}": bytes(3000 if kind == "jpg" else 40) for n in range(40) for kind in ("jpg", "txt")}
    )
    store = FolderStore(inner)
    assert len(scan_tar(store, store.list(".tar")[0]).offsets) == 41
    assert inner.reads == []


def test_a_thousand_samples_a_shard() -> None:
    store = FolderStore(memory({f"{n:04}.{kind}": b"" for n in range(2001) for kind in ("jpg", "txt")}))
    counts = {info.name: len(scan_tar(store, info).offsets) - 1 for info in store.list()}
    assert counts == {"00000.tar": 1000, "00001.tar": 1000, "00002.tar": 1}
    assert next(iter(members(store.read("00001.tar", 0, 1 << 16)))) == "1000.jpg"


def test_odd_and_long_names_keep_apart_and_the_header_stays_plain() -> None:
    assert list(members(FolderStore(memory({"a.b.jpg": b"", "a%2Eb.jpg": b""})).read("00000.tar"))) == [
        "a%252Eb.jpg",
        "a%2Eb.jpg",
    ]
    long = "é" * 60
    files = {f"{long}{end}.{kind}": end.encode() for end in "ab" for kind in ("jpg", "txt")}
    content = FolderStore(memory(files)).read("00000.tar")
    found = members(content)
    assert len(found) == 4 and all(len(name.encode()) <= 100 for name in found)
    assert len({name.split(".")[0] for name in found}) == 2
    assert [content[at + 156] for at in range(0, 4 * 1024, 1024)] == [ord("0")] * 4


def test_what_a_tar_cannot_hold_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = memory({"a.jpg": b""})
    monkeypatch.setattr(inner, "list", lambda **_: [ObjectInfo("a.jpg", 8**11, "1", 7.0)])
    with pytest.raises(DataError, match=r"'a.jpg' is 8589934592 bytes"):
        FolderStore(inner)


def test_a_file_that_changed_since_it_was_listed_is_an_error(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"picture")
    store = pickle.loads(pickle.dumps(FolderStore(open_store(str(tmp_path)))))
    before = store.list()[0]
    (tmp_path / "b.jpg").write_bytes(b"PICTURE")
    os.utime(tmp_path / "b.jpg", ns=(1, 1))
    assert b"picture" in store.read(before.name, 0, 1024)
    with pytest.raises(DataError, match=r"b\.jpg changed"):
        store.read(before.name, 1024, 2048)

    after = FolderStore(open_store(str(tmp_path)))
    assert after.list()[0].version != before.version
    with pytest.raises(DataError, match=r"00000\.tar changed"):
        after.read(before.name, 0, 512, version=before.version)


def test_it_reads_like_a_store() -> None:
    store = FolderStore(memory(FOLDER))
    info = store.info("00000.tar")
    assert info is not None and info == store.list()[0] and info.modified == 100.0
    assert store.info("b.jpg") is None
    assert store.read("00000.tar", 9, 9) == b""
    with pytest.raises(DataError, match="ends before byte"):
        store.read("00000.tar", 0, info.size + 1)
    with pytest.raises(DataError, match=r"b\.jpg does not exist"):
        store.read("b.jpg")


def test_bytes_that_are_no_text_in_a_name(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xfe.jpg"
    try:
        Path(os.fsdecode(name)).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes text names only")
    store = FolderStore(open_store(str(tmp_path)))
    assert list(members(store.read("00000.tar")).values()) == [b"x"]
