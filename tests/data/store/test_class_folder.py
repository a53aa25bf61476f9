"""A folder of classes: labels by sorted folder, every image once, the same bytes however they are read."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from tar_samples import MemoryStore, jpeg

from data.errors import DataError
from data.shards.index import open_index
from data.shards.tar import parse_sample, scan_tar
from data.store import open_store
from data.store.virtual import SAMPLES_A_SHARD, ClassFolderStore

CLASSES = {"n02": 3, "n01": 700, "n10": 600}


def files() -> dict[str, bytes]:
    images = [(name, i) for name, n in CLASSES.items() for i in range(n)]
    other = {"n01/deep/er/y.png": b"deep", "n02/notes.txt": b"", ".git/a.jpg": b"", "n03/readme.md": b""}
    return {f"{name}/x{i}.JPEG": f"{name} {i}".encode() * (1 + i % 60) for name, i in images} | other


def store() -> ClassFolderStore:
    return ClassFolderStore(MemoryStore(files(), readahead=1, url="memory"))


def test_every_image_comes_once_with_its_class() -> None:
    folder = store()
    assert folder.classes == ("n01", "n02", "n10")  # not n03, which has no image
    left_out = Counter[str]()
    infos = folder.list(".tar", left_out)
    assert left_out == {"hidden": 1, "files without an image of their name": 2}
    assert [info.name for info in infos] == ["00000.tar", "00001.tar"]
    seen: Counter[str] = Counter()
    for info in infos:
        with tarfile.open(fileobj=io.BytesIO(folder.read(info.name)), mode="r:") as tar:
            contents = {member.name: tar.extractfile(member).read() for member in tar}
        for name, content in contents.items():
            if not name.endswith(".cls"):
                key, label = name.rpartition(".")[0], contents[name.rpartition(".")[0] + ".cls"]
                seen[key] += 1
                assert folder.classes[int(label)] == key.partition("/")[0]
                assert content == b"deep" or content.startswith(key.replace("/x", " ").encode())
    assert len(seen) == sum(CLASSES.values()) + 1 and set(seen.values()) == {1}


def test_classes_are_mixed() -> None:
    folder = store()
    labels = [
        int(parse_sample(folder.read("00000.tar", *map(int, pair))).members["cls"])
        for pair in zip(folder.offsets("00000.tar"), folder.offsets("00000.tar")[1:], strict=False)
    ]
    assert len(labels) == SAMPLES_A_SHARD
    for part in (labels[:500], labels[500:]):
        assert Counter(part)[0] == pytest.approx(500 * 701 / 1304, abs=60)


def test_offsets_are_those_that_a_scan_finds_and_any_range_is_the_wholes() -> None:
    folder = store()
    for info in folder.list():
        scan = scan_tar(folder, info)
        assert scan.corruption is None and scan.offsets.tolist() == folder.offsets(info.name).tolist()
        whole = bytes(folder.read(info.name))
        assert len(whole) == info.size
        for start, stop in ((0, 700), (511, 513), (1024, 1536), (1500, 90_001), (info.size - 1030, info.size)):
            assert bytes(folder.read(info.name, start, stop, version=info.version)) == whole[start:stop]


def test_it_pickles_and_a_changed_tree_has_other_versions() -> None:
    folder = store()
    copy = pickle.loads(pickle.dumps(folder))
    assert copy.list() == folder.list() and copy.read("00001.tar") == folder.read("00001.tar")
    renamed = {name.replace("n10/", "n00/"): content for name, content in files().items()}
    other = ClassFolderStore(MemoryStore(renamed, readahead=1, url="memory"))
    assert {info.version for info in other.list()}.isdisjoint({info.version for info in folder.list()})


@pytest.mark.parametrize(
    ("tree", "words"), [({"a.jpg": b""}, "lies in no folder"), ({"n01/a.txt": b""}, "holds no folder with an image")]
)
def test_what_is_no_folder_of_classes(tree: dict[str, bytes], words: str) -> None:
    with pytest.raises(DataError, match=words):
        ClassFolderStore(MemoryStore(tree, readahead=1, url="memory"))


def test_a_source_of_it_opens_without_reading_an_image(tmp_path: Path) -> None:
    for name, n in (("b", 4), ("a", 2)):
        (tmp_path / name).mkdir()
        for i in range(n):
            (tmp_path / name / f"{i}.jpg").write_bytes(jpeg(i))
    index = open_index(open_store(str(tmp_path)), "pets", notice=lambda _: None, classes=True)
    assert index.counts.tolist() == [6] and index.names == ("00000.tar",)
    offsets = index.offsets(0)
    samples = [parse_sample(index.store.read("00000.tar", *offsets[i : i + 2].tolist())) for i in range(6)]
    assert sorted((sample.key, sample.members["cls"]) for sample in samples) == [
        *((f"a/{i}", b"0") for i in range(2)),
        *((f"b/{i}", b"1") for i in range(4)),
    ]
    with pytest.raises(DataError, match="has no index"):
        open_index(open_store(str(tmp_path)), "pets", "index.json", classes=True)
    (tmp_path / "a" / "0.jpg").write_bytes(b"longer than it was" * 100)
    with pytest.raises(DataError):
        index.store.read("00000.tar")
