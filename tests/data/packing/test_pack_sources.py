"""Packing folders, tables and tars: the same bytes come out, bad rows are left out, S3 is a place like any other."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import resource
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from pictures import ADOBE_RGB, encode, rgb_profile
from PIL import Image
from tar_samples import MemoryStore, jpeg, tar_bytes

from data.packing import pack
from data.packing.csv_table import csv_table
from data.packing.parquet_table import parquet_table
from data.packing.spec import ImageEncoder, PackOptions, SplitRows, name_below, sample_key, split_rows
from data.packing.table import Columns, Files
from data.packing.tars import samples_of_tars
from data.shards.index import index_source, open_index
from data.shards.tar import TarSample, parse_sample
from data.store import StoreOptions, open_store
from launch.pack import main


def samples(url: str, split: str = "train") -> list[TarSample]:
    """All samples of a split, through its index."""
    index = open_index(open_store(f"{url}/{split}"), "packed", notice=pytest.fail)
    return [
        parse_sample(index.store.read(name, int(offsets[n]), int(offsets[n + 1])))
        for shard, name in enumerate(index.names)
        for offsets in [index.offsets(shard)]
        for n in range(len(offsets) - 1)
    ]


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "dataset.json").read_text())
    return found


def packed(words: str, **paths: Path | str) -> None:
    assert main(words.format(**paths).split()) == 0


def encoded(form: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 128 if mode == "L" else None).save(buffer, form, **options)
    return buffer.getvalue()


# --- rows ---


@pytest.mark.parametrize("rows, share", [(1, 0.0), (10, 0.1), (1000, 0.03), (997, 0.5), (100, 0.9), (7, 0.99)])
def test_parts_are_disjoint_and_complete(rows: int, share: float) -> None:
    split = split_rows(rows, share, seed=5)
    train, heldout = list(split["train"]), list(split["heldout"])
    assert len(heldout) == round(rows * share)
    assert train == sorted(set(range(rows)) - set(heldout)) and heldout == sorted(heldout)
    assert list(split["train"][2:7]) == train[2:7]


def test_what_is_held_out_depends_on_the_seed_and_is_spread() -> None:
    first, second = (list(split_rows(10_000, 0.01, seed)["heldout"]) for seed in (0, 1))
    assert first != second
    gaps = np.diff(first)
    assert gaps.max() < 200 and len(set(gaps.tolist())) > 50
    assert len(split_rows(10**12, 0.01, 0)["train"]) == 99 * 10**10  # nothing of it is in memory


def test_keys_are_unique_and_safe() -> None:
    names = ["../../etc/passwd", "a.b/c d", "ä", "", "x" * 300, "/abs", "a\0b", "__meta__"]
    keys = [sample_key(n, name) for n, name in enumerate(names)]
    assert len(set(keys)) == len(keys) and keys[0] == "000000000-etc_passwd" and keys[3] == "000000003"
    assert all(re.fullmatch(r"\d{9}(-[A-Za-z0-9_-]{1,60})?", key) for key in keys)


def test_paths_lead_nowhere_outside() -> None:
    assert name_below("/data", "a", "b/../c.jpg") == "a/c.jpg"
    assert name_below("/data", "a", "../c.jpg") == "c.jpg"
    assert name_below("/data", "a", "/data/x/c.jpg") == "x/c.jpg"
    assert name_below("s3://bucket/p", "", "s3://bucket/p/c.jpg") == "c.jpg"
    assert name_below("/data", "a", "/data/../data/x/./c.jpg") == "x/c.jpg"
    assert name_below("/", "", "/etc/hosts") == "etc/hosts"
    assert name_below("data/set", "a", os.path.abspath("data/set/x/c.jpg")) == "x/c.jpg"
    assert name_below(".", "", os.path.abspath("c.jpg")) == "c.jpg"
    for path in ("../../c.jpg", "/database/c.jpg", "/data/../etc/passwd", "s3://other/c.jpg", "../..", "/etc/passwd"):
        with pytest.raises(Exception, match="outside_root"):
            name_below("/data", "a", path)


# --- folders ---


def write_folder(folder: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    for n, name in enumerate(["b", "a", "deep/c.1", "deep/c.2", "deep/er/d"]):
        (folder / f"{name}.jpg").write_bytes(jpeg(n))
        (folder / f"{name}.txt").write_text(f"caption {name}")
    (folder / "a.json").write_text('{"score": 1}')
    (folder / "deep" / "P.PNG").write_bytes(encoded("PNG"))
    (folder / "deep" / "P.txt").write_text("caption P")


def test_a_folder_is_indexed_without_a_word_whatever_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data.shards.index._MOST_UNINDEXED", 2)  # virtual tars; it has three
    write_folder(tmp_path / "in")
    packed("folder {i} --out {o} --workers 1", i=tmp_path / "in", o=tmp_path / "out")
    assert capsys.readouterr().out == f"{tmp_path}/out packed: 6 train, 0 heldout\n"
    write_tars(tmp_path / "tars", [1, 1, 1])
    packed("tars {i} --out {o} --workers 1", i=tmp_path / "tars", o=tmp_path / "out2")
    assert capsys.readouterr().out == f"{tmp_path}/out2 packed: 3 train, 0 heldout\n"


def test_a_folder_is_packed_byte_by_byte(tmp_path: Path) -> None:
    write_folder(tmp_path / "in")
    packed("folder {i} --out {o} --shard_size 4 --workers 1", i=tmp_path / "in", o=tmp_path / "out")
    found = samples(f"{tmp_path}/out")
    assert [s.key for s in found] == [
        f"{n:09d}-{name}" for n, name in enumerate(["a", "b", "deep_P", "deep_c_1", "deep_c_2", "deep_er_d"])
    ]
    assert found[0].members == {"jpg": jpeg(1), "txt": b"caption a", "json": b'{"score": 1}'}
    assert found[2].members == {"png": encoded("PNG"), "txt": b"caption P"}
    assert found[4].members == {"jpg": jpeg(3), "txt": b"caption deep/c.2"}
    said = summary(tmp_path / "out")
    assert said["left_out"] == {} and said["shards"] == {"train": 2, "heldout": 0} and said["source"] == "folder"


def test_of_a_folder_only_images_that_are_none_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_folder(folder)
    others = {"no_text.jpg": jpeg(9), ".hidden.jpg": jpeg(1), "a.npy": b"features", "none.txt": b"no image"}
    for name, content in {**others, "deep/not.a.jpg": b"<html>", "b.txt": b"\xff\xfe caption"}.items():
        (folder / name).write_bytes(content)
    packed("folder {i} --out {o} --workers 1", i=folder, o=tmp_path / "out")
    beside = "files without an image of their name"
    assert summary(tmp_path / "out")["left_out"] == {"other_format": 1, "hidden": 1, beside: 1}
    assert summary(tmp_path / "out")["without_caption"] == 1
    listed = json.loads((tmp_path / "out/train/00000.left_out.json").read_text())["other_format"]
    assert len(listed) == 1 and listed[0].startswith("deep/00000.tar sample 3 (deep/not.a): ")
    found = {s.key[10:]: s.members for s in samples(f"{tmp_path}/out")}
    assert set(found) == {"a", "b", "no_text", "deep_P", "deep_c_1", "deep_c_2", "deep_er_d"}
    assert found["a"] == {"jpg": jpeg(1), "txt": b"caption a", "json": b'{"score": 1}', "npy": b"features"}
    assert found["no_text"] == {"jpg": jpeg(9)} and found["b"]["txt"] == b"\xff\xfe caption"


def test_a_folder_that_changed_does_not_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "in")
    packed("folder {i} --out {o} --workers 1", i=tmp_path / "in", o=tmp_path / "in/packed")  # not its own source
    packed("folder {i} --out {o} --workers 1", i=tmp_path / "in", o=tmp_path / "in/packed")
    assert "nothing to do" in capsys.readouterr().out
    for option in ("resize", "quality", "seed"):
        assert main(["folder", str(tmp_path / "in"), "--out", str(tmp_path / "in/packed"), f"--{option}", "50"]) == 2
        assert f"a pack whose {option} is" in capsys.readouterr().err
    (tmp_path / "in/a.txt").write_text("another caption")
    assert main(["folder", str(tmp_path / "in"), "--out", str(tmp_path / "in/packed")]) == 2
    assert "a pack whose contents is" in capsys.readouterr().err


# --- images ---


def test_images_are_made_smaller_never_larger(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 256, (6, 9, 3), np.uint8), np.ones((16, 16, 1), np.uint8))  # 144 x 96
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (kind, small), (same, untouched) = (
        ImageEncoder(resize=48)(buffer.getvalue()),
        ImageEncoder(resize=96)(buffer.getvalue()),
    )
    assert (same, untouched) == ("png", buffer.getvalue())
    assert kind == "jpg" and simplejpeg.decode_jpeg_header(small)[:2] == (48, 72)
    expected = np.asarray(Image.fromarray(pixels).resize((72, 48), Image.Resampling.BOX), float)
    assert np.abs(simplejpeg.decode_jpeg(small) - expected).mean() < 8
    kind, again = ImageEncoder(quality=30)(buffer.getvalue())
    assert kind == "jpg" and simplejpeg.decode_jpeg_header(again)[:2] == (96, 144)
    assert len(again) < len(ImageEncoder(quality=95)(buffer.getvalue())[1])
    kind, same_size = ImageEncoder(resize=512, quality=90)(jpeg(3))
    assert kind == "jpg" and simplejpeg.decode_jpeg_header(same_size)[:2] == (16, 16)
    assert (
        ImageEncoder(resize=512)(encoded("GIF")) == ("gif", encoded("GIF"))
        and ImageEncoder(resize=8)(encoded("GIF"))[0] == "jpg"
    )


def test_an_image_is_named_after_its_content(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    forms = {"a.jpg": "PNG", "b.png": "JPEG", "c.jpeg": "JPEG", "d.jpg": "WEBP", "e.jpg": "TIFF", "f.JFIF": "AVIF"}
    for name, form in {**forms, "g.jpg": "TGA"}.items():
        (tmp_path / "in" / name).write_bytes(encoded(form))
    packed("folder {i} --out {o} --workers 1", i=tmp_path / "in", o=tmp_path / "out")
    assert [[*s.members] for s in samples(f"{tmp_path}/out")] == [
        ["png"], ["jpg"], ["jpg"], ["webp"], ["tif"], ["avif"]
    ]  # fmt: skip
    assert summary(tmp_path / "out")["left_out"] == {"other_format": 1}
    packed("folder {i} --out {o} --workers 1 --resize 20", i=tmp_path / "in", o=tmp_path / "out2")
    assert summary(tmp_path / "out2")["left_out"] == {"other_format": 1}
    assert [[*s.members] for s in samples(f"{tmp_path}/out2")] == [["jpg"]] * 6


def test_encoded_images_are_in_srgb_and_others_keep_their_bytes() -> None:
    adobe = rgb_profile(ADOBE_RGB, 563 / 256)
    picture = np.full((64, 64, 3), (60, 180, 60), np.uint8)
    for whole in (encode(picture, icc_profile=adobe), encode(picture, "JPEG", quality=100, icc_profile=adobe)):
        assert ImageEncoder()(whole)[1] == ImageEncoder(resize=64)(whole)[1] == whole
        for images in (ImageEncoder(resize=32), ImageEncoder(quality=95)):
            _, again = images(whole)
            assert "icc_profile" not in Image.open(io.BytesIO(again)).info
            # The linear values by hand: 60 and 180 of Adobe RGB at its gamma are more green than sRGB has.
            assert np.abs(simplejpeg.decode_jpeg(again)[9, 9].astype(int) - (0, 180, 41)).max() <= 2


def test_a_turned_image_is_encoded_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _, small = ImageEncoder(resize=20)(encoded("JPEG", size=(80, 40), exif=exif))
    assert simplejpeg.decode_jpeg_header(small)[:2] == (40, 20)


def test_images_that_cannot_be_encoded_again_are_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "in")
    whole = encoded("PNG", size=(64, 64))
    (tmp_path / "in/a.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in/b.jpg").write_bytes(b"not an image")
    packed("folder {i} --out {o} --quality 80 --workers 1", i=tmp_path / "in", o=tmp_path / "out")
    assert summary(tmp_path / "out")["left_out"] == {"undecodable_image": 1, "other_format": 1}
    assert {tuple(s.members) for s in samples(f"{tmp_path}/out")} == {("jpg", "txt")}
    assert set(summary(tmp_path / "out")["versions"]) == {"contents", "pillow", "simplejpeg", "torch"}


# --- CSV ---


def write_csv(folder: Path, rows: int, name: str = "all.csv") -> list[dict[str, Any]]:
    (folder / "images").mkdir(parents=True)
    found = []
    for n in range(rows):
        (folder / f"images/{n:03d}.jpg").write_bytes(jpeg(n % 200))
        caption = f'a "quoted",\nbroken caption {n}' if n % 7 == 0 else f"caption {n}"
        found.append({"path": f"images/{n:03d}.jpg", "caption": caption, "score": n / 4, "id": f"00{n}", "none": ""})
    with open(folder / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), delimiter="\t" if name.endswith(".tsv") else ",")
        writer.writeheader()
        writer.writerows(found)
    return found


@pytest.mark.parametrize("name", ["all.csv", "all.tsv"])
def test_a_csv_is_packed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.packing.csv_table._ROWS_A_MARK", 10)
    rows = write_csv(tmp_path / "in", 95, name)
    packed("csv {i} --out {o} --heldout 0.2 --shard_size 20 --workers 1", i=tmp_path / "in" / name, o=tmp_path / "out")
    train, heldout = samples(f"{tmp_path}/out"), samples(f"{tmp_path}/out", "heldout")
    assert (len(train), len(heldout)) == (76, 19)
    by_row = {int(s.key[:9]): s for s in [*train, *heldout]}
    for n, row in enumerate(rows):
        assert by_row[n].members["jpg"] == jpeg(n % 200) and by_row[n].members["txt"].decode() == row["caption"]
        assert json.loads(by_row[n].members["json"]) == {"score": n / 4, "id": f"00{n}" if n else "000", "none": None}
        assert by_row[n].key.endswith(f"images_{n:03d}")


def test_bad_rows_of_a_csv_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(jpeg(1))
    (tmp_path / "secret.jpg").write_bytes(jpeg(2))
    rows = ["a.jpg,fine", "none.jpg,gone", "../secret.jpg,out", "a.jpg,", ",no path", "a.jpg", "", f"{'x' * 300},long"]
    (tmp_path / "in/all.csv").write_bytes(
        "\ufeffpath,caption\n".encode() + "\n".join(rows).encode() + b"\na.jpg,\xff\n"
    )
    packed("csv {i} --out {o} --workers 1", i=tmp_path / "in/all.csv", o=tmp_path / "out")
    left_out = {"missing_file": 3, "outside_root": 1, "missing_caption": 1, "bad_caption": 1, "wrong_cell_count": 1}
    assert summary(tmp_path / "out")["left_out"] == left_out
    assert [s.members["txt"] for s in samples(f"{tmp_path}/out")] == [b"fine"]
    packed("csv {i} --out {o} --root {r}/in --workers 1", i=tmp_path / "in/all.csv", o=tmp_path / "o2", r=tmp_path)
    packed("csv {i} --out {o} --root {r} --workers 1", i=tmp_path / "in/all.csv", o=tmp_path / "o3", r=tmp_path / "in")
    assert summary(tmp_path / "o2")["samples"] == summary(tmp_path / "o3")["samples"] == {"train": 1, "heldout": 0}


def test_a_csv_by_a_relative_path_may_name_absolute_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(jpeg(1))
    (tmp_path / "secret.jpg").write_bytes(jpeg(2))
    (tmp_path / "in/all.csv").write_text(f"path,caption\n{tmp_path}/in/a.jpg,in\n{tmp_path}/secret.jpg,out\n")
    for folder, words in ((tmp_path, "in/all.csv --out o1"), (tmp_path / "in", "all.csv --out o2")):
        monkeypatch.chdir(folder)
        packed(f"csv {words} --workers 1")
        out = folder / words.rpartition(" ")[2]
        assert [s.members["jpg"] for s in samples(str(out))] == [jpeg(1)]
        assert summary(out)["left_out"] == {"outside_root": 1}


# --- Parquet ---


def write_parquet(folder: Path, files: int = 2, rows: int = 50, kind: str = "struct", group: int = 7) -> None:
    for file in range(files):
        (folder / f"f{file}").mkdir(parents=True)
        numbers = range(file * rows, (file + 1) * rows)
        for n in numbers:
            (folder / f"f{file}/{n}.jpg").write_bytes(jpeg(n))
        images: dict[str, list[Any]] = {
            "struct": [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in numbers],
            "path_in_struct": [{"bytes": None, "path": f"{n}.jpg"} for n in numbers],
            "bytes": [jpeg(n) for n in numbers],
            "path": [f"{n}.jpg" for n in numbers],
        }
        table = pa.table(
            {
                "image": images[kind],
                "caption": pa.array([f"caption {n}" for n in numbers]).dictionary_encode(),
                "score": [float("nan") if n == 1 else n / 2 for n in numbers],
                "when": pa.array([n * 1001 for n in numbers], pa.timestamp("ns")),
                "vector": [[1.0, 2.0] for _ in numbers],
            }
        )
        pq.write_table(table, folder / f"f{file}/part.parquet", row_group_size=group)


@pytest.mark.parametrize("kind", ["struct", "path_in_struct", "bytes", "path"])
def test_parquet_is_packed(kind: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "in", kind=kind)
    packed("parquet {i} --out {o} --heldout 0.1 --shard_size 20 --workers 1", i=tmp_path / "in", o=tmp_path / "out")
    train, heldout = samples(f"{tmp_path}/out"), samples(f"{tmp_path}/out", "heldout")
    assert (len(train), len(heldout)) == (90, 10)
    by_row = {int(s.key[:9]): s for s in [*train, *heldout]}
    for n in range(100):
        assert by_row[n].members["jpg"] == jpeg(n) and by_row[n].members["txt"] == f"caption {n}".encode()
        meta = json.loads(by_row[n].members["json"])
        assert set(meta) == {"score", "when"} and meta["score"] == (None if n == 1 else n / 2)
        assert meta["when"] == f"1970-01-01 00:00:00.{n * 1001:09d}"
    assert [s.key for s in train] == sorted(s.key for s in train)


def test_a_corrupt_row_group_is_left_out(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in", files=1, rows=50, group=10, kind="bytes")
    path = tmp_path / "in/f0/part.parquet"
    at = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[at : at + 600] = b"\xff" * 600
    path.write_bytes(content)
    packed("parquet {i} --out {o} --workers 1", i=path, o=tmp_path / "out")
    assert summary(tmp_path / "out")["left_out"] == {"corrupt_parquet": 10}
    kept = [int(s.members["txt"][8:]) for s in samples(f"{tmp_path}/out")]
    assert kept == [*range(20), *range(30, 50)]


def test_a_row_group_as_large_as_the_file_is_not_held_in_memory(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2000, 40_000), np.uint8)
    table = pa.table({"image": [b"\xff\xd8\xff" + row.tobytes() for row in noise], "caption": ["c"] * 2000})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2000, write_batch_size=16)  # pages of about 1 MB
    del table, noise
    pa.default_memory_pool().release_unused()
    columns, store = Columns("image", "caption"), open_store(str(tmp_path))
    contents = parquet_table(store, ["a.parquet"], columns, Files(store), PackOptions())
    held = pa.total_allocated_bytes()
    most = 0
    tracemalloc.start()
    for n, row in enumerate(contents.read(contents.splits["train"])):
        assert row.key == f"{n:09d}"
        most = max(most, pa.total_allocated_bytes() - held)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 1999 and most < 20e6 and peak < 20e6  # of 80 MB


# --- tars ---


def write_tars(folder: Path, counts: Sequence[int]) -> None:
    folder.mkdir()
    for shard, count in enumerate(counts):
        members = []
        for n in range(count):
            name = f"{n:04d}"  # the same keys in every shard
            members += [(f"{name}.jpg", jpeg(n)), (f"{name}.txt", f"{shard} {n}".encode()), (f"{name}.seg.png", b"seg")]
        (folder / f"{shard}.tar").write_bytes(tar_bytes(members))


def test_tars_are_packed_anew_with_all_members(tmp_path: Path) -> None:
    write_tars(tmp_path / "in", [30, 1, 20, 49])
    odd = [
        ("a.txt", b"no image"),
        ("b.jpg", jpeg(1)),
        (f"b.{'x' * 90}", b"long"),
        ("c.jpg", jpeg(2)),
        ("d.jpg", jpeg(3)),
    ]
    content = tar_bytes(odd)
    (tmp_path / "in/9.tar").write_bytes(content[: content.index(jpeg(3)) + 10])
    packed("tars {i} --out {o} --shard_size 26 --workers 1", i=tmp_path / "in", o=tmp_path / "out")
    found = samples(f"{tmp_path}/out")
    expected = [f"{shard} {n}" for shard, count in enumerate([30, 1, 20, 49]) for n in range(count)]
    assert [s.members["txt"].decode() for s in found[:100]] == expected
    assert all(s.members["seg.png"] == b"seg" for s in found[:100]) and found[7].members["jpg"] == jpeg(7)
    assert len({s.key for s in found}) == len(found)
    left_out = {"missing_image": 1, "bad_member_name": 1, "rest of a corrupt shard": 1}
    assert summary(tmp_path / "out")["left_out"] == left_out
    assert len(found) == 101 and found[-1].members == {"jpg": jpeg(2)}


def test_of_a_tar_nothing_gets_lost(tmp_path: Path) -> None:
    mask = encoded("PNG", "L")
    as_told = [("a.jpg", encoded("PNG")), ("a.png", mask), ("a.json", b"[")]  # the image is a PNG, too
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.tar").write_bytes(tar_bytes([*as_told, ("b.jpg", jpeg(1)), ("b.json", b"{}"), ("b.txt", b"")]))
    packed("tars {i} --out {o} --workers 1", i=tmp_path / "in", o=tmp_path / "out")
    found = [s.members for s in samples(f"{tmp_path}/out")]
    assert found == [
        {"jpg": encoded("PNG"), "png": mask, "json": b"["},
        {"jpg": jpeg(1), "json": b"{}", "txt": b""},
    ]


def test_tars_that_changed_do_not_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tars(tmp_path / "in", [3])
    packed("tars {i} --out {o} --workers 1", i=tmp_path / "in", o=tmp_path / "out")
    content = (tmp_path / "in/0.tar").read_bytes()
    (tmp_path / "in/0.tar").write_bytes(content.replace(b"0 1", b"0 9"))  # as many samples, as many bytes
    assert main(["tars", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    assert "a pack whose contents is" in capsys.readouterr().err
    write_parquet(tmp_path / "pq", files=1, rows=3)
    packed("parquet {i} --out {o} --workers 1", i=tmp_path / "pq", o=tmp_path / "out2")
    os.utime(tmp_path / "pq/f0/part.parquet", (1, 1))
    assert main(["parquet", str(tmp_path / "pq"), "--out", str(tmp_path / "out2")]) == 2
    assert "a pack whose contents is" in capsys.readouterr().err


def test_neighbours_are_read_together_where_that_is_cheaper(tmp_path: Path) -> None:
    content = tar_bytes([(f"{n}.jpg", jpeg(n)) for n in range(12)])  # 2 KB each, with pax headers
    for readahead, most in ((0, 1), (2100, 2), (1 << 20, 12)):
        store = MemoryStore({"0.tar": content}, readahead)
        contents = samples_of_tars(index_source(store, "s"), PackOptions(heldout=0.25))
        store.reads.clear()
        made = [*contents.read(contents.splits["train"])]
        asked = [stop - start for _, start, stop in store.reads if stop - start > 512]
        assert len(made) == 9 and max(asked) // 2048 <= most and len(asked) >= 9 / most
        assert [s.members["jpg"] for s in made] == [jpeg(n) for n in contents.splits["train"]]


def test_repacking_what_was_packed_changes_no_member(tmp_path: Path) -> None:
    write_folder(tmp_path / "in")
    packed("folder {i} --out {o} --workers 1", i=tmp_path / "in", o=tmp_path / "a")
    packed("tars {i} --out {o} --shard_size 2 --workers 1", i=tmp_path / "a/train", o=tmp_path / "b")
    a, b = samples(f"{tmp_path}/a"), samples(f"{tmp_path}/b")
    assert [s.members for s in a] == [s.members for s in b] and len(list((tmp_path / "b/train").glob("*.tar"))) == 3
    packed("tars {i} --out {o} --heldout 0.5 --workers 1", i=tmp_path / "b/train", o=tmp_path / "c")
    c = [*samples(f"{tmp_path}/c"), *samples(f"{tmp_path}/c", "heldout")]
    assert [s.members for s in sorted(c, key=lambda s: s.key)] == [s.members for s in a]


# --- anywhere ---


def tars_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.tar")}


class Broken:
    def __init__(self, read: Any, after: int) -> None:
        self.read, self.after = read, after

    def __call__(self, items: Any) -> Iterator[Any]:
        for row in self.read(items):
            self.after -= 1
            if self.after < 0:
                raise KeyboardInterrupt
            yield row


def test_from_s3_to_s3_and_on_after_an_interruption(endpoint: str, tmp_path: Path, capsys: Any) -> None:
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="bucket")
    write_csv(tmp_path / "in", 40)
    for path in (tmp_path / "in").rglob("*.*"):
        client.upload_file(str(path), "bucket", f"in/{path.relative_to(tmp_path / 'in')}")
    options = StoreOptions(endpoint=endpoint)
    store = open_store("s3://bucket/in", options)
    contents = csv_table(store, "all.csv", Columns("path", "caption"), Files(store), PackOptions())
    broken = pack.DatasetSpec(**{**vars(contents), "read": Broken(contents.read, 25)})
    with pytest.raises(KeyboardInterrupt):
        pack.pack(broken, "s3://bucket/out", 10, options=options)
    out = open_store("s3://bucket/out", options)
    names = [f"train/0000{n}.tar{end}" for n in (0, 1) for end in ("", ".idx", ".left_out.json")]
    assert [info.name for info in out.list()] == ["dataset.json.partial", *names]
    client.delete_object(Bucket="bucket", Key="out/train/00001.tar.idx")  # as if it was stopped before that
    before = out.info("train/00000.tar")

    again = pack.DatasetSpec(**{**vars(contents), "read": Broken(contents.read, 20)})  # only what is missing is read
    pack.pack(again, "s3://bucket/out", 10, options=options)
    assert out.info("train/00000.tar") == before and out.info("train/00001.tar.idx") is not None
    packed(f"csv s3://bucket/in/all.csv --out s3://bucket/out --endpoint {endpoint} --workers 1 --shard_size 10")
    assert "nothing to do" in capsys.readouterr().out

    packed("csv {i} --out {o} --shard_size 10 --workers 1", i=tmp_path / "in/all.csv", o=tmp_path / "out")
    assert tars_of(tmp_path / "out") == {i.name: bytes(out.read(i.name)) for i in out.list(".tar")}


@pytest.mark.parametrize(
    "words, said",
    [
        ("folder {t}/none --out {t}/o", "none"),
        ("folder {t}/empty --out {t}/o", "a folder with images"),
        ("folder {t}/in --out {t}/o --resize 4", "resize is 4"),
        ("folder {t}/in --out {t}/o --quality 101", "quality is 101"),
        ("folder {t}/in --out {t}/o --heldout 1", "heldout is 1"),
        ("folder {t}/in --out gs://bucket/o", "should be a folder or s3://"),
        ("folder {t}/in", "out"),
        ("csv {t}/none.csv --out {t}/o", "does not exist"),
        ("csv {t}/in/all.csv --out {t}/o --image_column url", "image_column is 'url'.*path, caption, score"),
        ("csv {t}/in/all.csv --out {t}/o --root {t}/empty", r"40 \(missing_file\)"),
        ("csv {t}/quote.csv --out {t}/o", r"1 \(bad_quotes\), 20 \(missing_file\)"),
        ("csv {t}/header.csv --out {t}/o", "no row below its header"),
        ("parquet {t}/empty --out {t}/o", "Parquet files with rows"),
        ("parquet {t}/bad.parquet --out {t}/o", "should be a Parquet file"),
        ("parquet {t}/pq --out {t}/o --caption_column text", "caption_column is 'text'.*image, caption"),
        ("parquet {t}/pq --out {t}/o --caption_column score", r"caption_column is 'score' \(double"),
        ("parquet {t}/pq --out {t}/o --image_column vector", "should be a column of bytes, of paths"),
        ("tars {t}/empty --out {t}/o", "empty"),
    ],
)
def test_mistakes_are_told_in_one_sentence(words: str, said: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    write_csv(tmp_path / "in", 40)
    if "pq" in words:
        write_parquet(tmp_path / "pq", files=1, rows=3)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not")
    (tmp_path / "header.csv").write_text("path,caption\n")
    (tmp_path / "quote.csv").write_text('path,caption\na.jpg,"open\n' + "b.jpg,b\n" * 20)
    with_caption = tmp_path / "in/images/000.txt"
    with_caption.write_text("caption")
    assert main(words.format(t=tmp_path).split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and re.search(said, err)


def test_a_part_of_many_rows_costs_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    part: SplitRows = split_rows(10**9, 0.1, 0)["train"]
    assert part[len(part) - 1] <= 10**9 - 1 and part[5 * 10**8 : 5 * 10**8 + 3][0] > 5 * 10**8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000
