"""Folders as people have them: captions under other names, several images of one name, other formats, hidden files."""

from __future__ import annotations

import gzip
import io
import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tar_samples import jpeg, tar_bytes

import launch.index
import launch.inspect_data
from data.shards.index import open_index
from data.shards.tar import TarSample, parse_sample
from data.store import open_store
from launch.pack import main


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def pack(kind: str, source: Path, *more: str) -> tuple[dict[str, object], list[TarSample]]:
    """The summary of a pack, and its samples."""
    out = source.with_name(f"{source.name}-packed")
    assert main([kind, str(source), "--out", str(out), "--workers", "1", *more]) == 0
    index = open_index(open_store(f"{out}/train"), "packed", notice=pytest.fail)
    content = index.store.read(index.names[0])
    found = [parse_sample(content[a:b]) for a, b in pairwise(index.offsets(0).tolist())]
    return json.loads((out / "dataset.json").read_text()), found


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), "red").save(buffer, form)
    return buffer.getvalue()


def test_captions_under_other_names_are_read(tmp_path: Path) -> None:
    files = {
        "a.jpg": jpeg(0), "a.jpg.txt": b"of a", "a.jpg.json": b"{}",
        "b.png": encoded("PNG"), "b.caption": b"of b",
        "c.jpg": jpeg(2), "c.txt": b"of c", "c.jpg.txt": b"again", "c.caption": b"and again",
        "d.jpg": jpeg(3), "d.txt": b" \n", "e.jpg": jpeg(4),
    }  # fmt: skip
    said, found = pack("folder", write(tmp_path / "in", files))
    assert [it.members.get("txt") for it in found] == [b"of a", b"of b", b"of c", b" \n", None]
    assert found[0].members.keys() == {"jpg", "txt", "json"} and found[1].members.keys() == {"png", "txt"}
    assert found[2].members["caption"] == b"and again"
    assert said["left_out"] == {"files beside an image that has another of their kind": 1}
    assert said["samples"] == {"train": 5, "heldout": 0} and said["without_caption"] == 2


def test_samples_without_a_caption_are_counted_over_an_interruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [(f"{n}.jpg", jpeg(n)) for n in range(4)] + [("4.jpg", jpeg(4)), ("4.txt", b"four")]
    source = write(tmp_path / "in", {"0.tar": tar_bytes(members)})
    out = tmp_path / "in-packed"
    said, found = pack("tars", source, "--shard_size", "2")
    assert said["without_caption"] == 4 and said["left_out"] == {} and len(found) > 0
    assert "5 train, 0 heldout, 4 of them without a caption (.txt)\n" in capsys.readouterr().out
    (out / "dataset.json").rename(out / "dataset.json.partial")
    (out / "train/00001.tar").unlink()
    assert pack("tars", source, "--shard_size", "2")[0] == said


def test_images_of_one_name_are_samples_of_their_own(tmp_path: Path) -> None:
    files = {"a.jpg": jpeg(0), "a.png": encoded("PNG"), "a.txt": b"both", "a.png.txt": b"the second"}
    files |= {"b.jpg": jpeg(1), "b.JPG": jpeg(2), "b.txt": b"alike", "a%jpg.jpg": jpeg(3), "a.jpg.png": encoded("PNG")}
    said, found = pack("folder", write(tmp_path / "in", files))
    assert len({it.key for it in found}) == 6 and said["left_out"] == {}
    captions = {next(iter(it.members.values())): it.members.get("txt") for it in found if "txt" in it.members}
    assert captions[jpeg(0)] == b"both" and captions[jpeg(1)] == captions[jpeg(2)] == b"alike"
    assert captions[encoded("PNG")] == b"the second"


def test_every_format_that_is_decoded_is_packed_and_the_rest_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300)
    images = {
        "0.jfif": encoded("JPEG"), "1.jpe": encoded("JPEG"), "2.TIF": encoded("TIFF"), "3.avif": encoded("AVIF"),
        "4.gif": encoded("GIF"), "5.BMP": encoded("BMP"), "6.tiff": encoded("JPEG"), "7.jpg": heic, "8.heic": heic,
    }  # fmt: skip
    captions = {f"{n}.txt": b"words" for n in range(9)}
    folder = write(tmp_path / "in", {**images, **captions, ".DS_Store": b"", "@eaDir/0.jfif": b"", "more.zip": b""})
    said, found = pack("folder", folder)
    assert [[*it.members] for it in found] == [[it, "txt"] for it in ("jpg", "jpg", "tif", "avif", "gif", "bmp", "jpg")]
    left_out = {
        "hidden": 1, "in system folders (snapshots, recycle bins)": 1, "files without an image of their name": 1,
        "archives (.zip: unpack it)": 1,
        "images of a format that is not decoded (.heic)": 1, "other_format": 1,
    }  # fmt: skip
    assert said["left_out"] == left_out
    assert "; left out: 1 hidden, 1 in system folders" in capsys.readouterr().out
    tars = write(tmp_path / "tars", {"0.tar": tar_bytes([*images.items()][:-1])})
    assert [[*it.members] for it in pack("tars", tars)[1]] == [[next(iter(it.members))] for it in found]


def test_what_lies_beside_shards_is_told_in_packing_index_and_inspect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = tar_bytes([("a.jpg", jpeg(0)), ("a.txt", b"words")])
    files = {"0.tar": shard, ".snapshot/h/0.tar": shard, ".Trash-1000/0.tar": shard, "1.tar.gz": gzip.compress(shard)}
    folder = write(tmp_path / "in", {**files, "preview.png": encoded("PNG"), "__MACOSX/0.tar": shard})
    beside = "images beside the shards (a source is read as tars or as a folder of images)"
    left_out = {"compressed (.tar.gz: gunzip it first)": 1, beside: 1, "hidden": 2}
    left_out["in system folders (snapshots, recycle bins)"] = 1
    for indexed in (False, True):
        assert launch.inspect_data.main([str(folder), "--out", str(tmp_path / "page.html")]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "samples: 1," in said
        page = (tmp_path / "page.html").read_text()
        for reason, count in left_out.items():
            assert f"{count} {reason}" in said and f"{count} {reason}" in page
        if not indexed:
            assert launch.index.main([str(folder)]) == 0
            said = capsys.readouterr().out
            assert "1 shards, 1 samples" in said and all(f"{n} {reason}" in said for reason, n in left_out.items())
    said, found = pack("tars", folder)
    assert said["left_out"] == left_out and len(found) == 1
    alone = write(tmp_path / "alone", {"1.tgz": b"", ".x": b""})
    for job in (
        ["tars", str(alone), "--out", str(tmp_path / "o")],
        ["folder", str(alone), "--out", str(tmp_path / "o")],
    ):
        assert main(job) == 2
        assert "compressed (.tgz: gunzip it first)" in capsys.readouterr().err


def test_hidden_tables_are_not_packed(tmp_path: Path) -> None:
    rows = [{"image": jpeg(n), "caption": f"caption {n}"} for n in range(3)]
    folder = tmp_path / "in"
    for name in ("a.parquet", ".ipynb_checkpoints/a-checkpoint.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    said, found = pack("parquet", folder)
    assert len(found) == 3 and said["left_out"] == {"hidden": 1}


@pytest.mark.parametrize("name", ["in", "in.parquet"])
def test_what_lies_beside_parquet_is_told(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = {
        "a.csv": b"",
        "b.parquet.gz": b"",
        "_SUCCESS": b"",
        "d/notes.txt": b"",
        "._SUCCESS.crc": b"",
        "0.jpg": jpeg(0),
    }
    folder = write(tmp_path / name, others)
    for n, file in enumerate(("part-0.parquet", "PART.PARQUET", "d/c.pq")):
        pq.write_table(pa.Table.from_pylist([{"image": jpeg(n), "caption": f"caption {n}"}]), folder / file)
    said, found = pack("parquet", folder)
    assert len(found) == 3
    assert said["left_out"] == {
        "hidden": 1, "tables (.csv: pack it with launch/pack.py csv)": 1, "compressed (.gz: gunzip it first)": 1,
        "files that are no Parquet": 2,
    }  # fmt: skip
    assert main(["parquet", str(tmp_path / "none.parquet"), "--out", str(tmp_path / "o")]) == 2
    assert "none.parquet does not exist" in capsys.readouterr().err
