"""Packing: the same bytes for the same arguments, nothing half-written, an honest hold-out."""

import errno
import io
import itertools
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import simplejpeg
import webdataset

from data.errors import DataError, UserError
from data.packing import openmoji, pack, shapes
from data.packing.pack import LOCK, PLAN, SUMMARY, Output
from data.packing.spec import DatasetSpec, Sample, Skipped
from data.shards.index import open_index
from data.shards.tar import parse_sample
from data.store import StoreOptions, open_store
from launch.pack import main

ROOT = Path(__file__).parents[3]


def read(directory: Path, split: str):
    """All samples of a split, as webdataset reads them."""
    urls = sorted(map(str, (directory / split).glob("*.tar")))
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)) if urls else []


def files(directory: Path):
    """All that a pack wrote but index.json, which holds the shards' modification times."""
    paths = (p for p in directory.rglob("*") if p.is_file() and p.name != "index.json")
    return {str(p.relative_to(directory)): p.read_bytes() for p in paths}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes") / "a"
    pack.pack(shapes.dataset_spec(100, size=64, heldout=0.1, seed=3), out, shard_size=40)
    return out


@pytest.fixture(scope="module")
def emojis():
    return openmoji.dataset_spec(size=32, heldout=0.05, seed=0)


def test_shards_are_balanced_and_webdataset_reads_them(scenes):
    assert [len(read_tar(p)) for p in sorted((scenes / "train").glob("*.tar"))] == [3 * 30] * 3
    shards = [f"{n:05d}.tar{end}" for n in range(3) for end in ("", ".idx", ".left_out.json")]
    assert [p.name for p in sorted((scenes / "train").iterdir())] == [*shards, "index.json"]
    samples = read(scenes, "train")
    assert len(samples) == 90 and len(read(scenes, "heldout")) == 10
    for index, sample in enumerate(samples):
        assert {"jpg", "txt", "json"} == {k for k in sample if not k.startswith("__")}
        it = shapes.scene(3, index)
        assert sample["txt"].decode() == it.caption
        assert json.loads(sample["json"]) == json.loads(json.dumps(it.truth()))
        image = simplejpeg.decode_jpeg(sample["jpg"])
        assert np.abs(image.astype(int) - shapes.draw(it, 64)).mean() < 4  # swapped channels: above 10
        assert simplejpeg.decode_jpeg_header(sample["jpg"])[2:] == ("YCbCr", "444")


def read_tar(path: Path):
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    assert all(m.isfile() and m.mtime == 0 and m.uid == 0 and "/" not in m.name for m in members)
    return members


def test_heldout_is_disjoint(scenes):
    train, heldout = read(scenes, "train"), read(scenes, "heldout")
    assert not {s["__key__"] for s in train} & {s["__key__"] for s in heldout}
    assert not {s["jpg"] for s in train} & {s["jpg"] for s in heldout}
    assert all(json.loads(s["json"])["index"] >= shapes.HELDOUT_START for s in heldout)


def test_same_bytes_whatever_the_workers_and_other_bytes_for_another_seed(scenes, tmp_path):
    pack.pack(shapes.dataset_spec(100, heldout=0.1, seed=3), tmp_path / "b", shard_size=40, workers=2)
    assert files(tmp_path / "b") == files(scenes)
    pack.pack(shapes.dataset_spec(100, heldout=0.1, seed=4), tmp_path / "c", shard_size=40)
    other = files(tmp_path / "c")
    assert other.keys() == files(scenes).keys()
    nothing = [name for name, content in files(scenes).items() if content == other[name]]
    assert nothing and all(name.endswith(".tar.left_out.json") and other[name] == b"{}" for name in nothing)


def test_finished_pack_is_left_alone(scenes):
    before = {p: p.stat().st_mtime_ns for p in scenes.rglob("*")}
    again = pack.pack(shapes.dataset_spec(100, heldout=0.1, seed=3), scenes, shard_size=40)
    assert again.was_finished and again.summary == json.loads((scenes / "dataset.json").read_text())
    assert {p: p.stat().st_mtime_ns for p in scenes.rglob("*")} == before
    with pytest.raises(UserError, match="a pack whose seed is 3, not 5"):
        pack.pack(shapes.dataset_spec(100, heldout=0.1, seed=5), scenes, shard_size=40)


class Interrupt:
    """Reads as it should until its nth sample, then breaks off."""

    def __init__(self, read, n):
        self.read, self.left = read, n

    def __call__(self, items):
        for sample in self.read(items):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            yield sample


def changed(contents, **changes):
    return DatasetSpec(**{**vars(contents), **changes})


def test_goes_on_after_an_interruption(scenes, tmp_path):
    whole = shapes.dataset_spec(100, size=64, heldout=0.1, seed=3)
    out = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt):
        pack.pack(changed(whole, read=Interrupt(whole.read, 40)), out, shard_size=40)
    assert [p.name for p in sorted((out / "train").iterdir())] == [
        "00000.tar", "00000.tar.idx", "00000.tar.left_out.json",
    ]  # fmt: skip
    assert not (out / "dataset.json").exists()
    (out / "train" / "00002.tar.1.partial").write_bytes(b"left by a process that was killed")
    with pytest.raises(UserError, match="a pack whose shard_size is 40, not 30"):
        pack.pack(whole, out, shard_size=30)

    # Shard 0 is whole and stays, so only the other 70 samples are drawn.
    pack.pack(changed(whole, read=Interrupt(whole.read, 70)), out, shard_size=40)
    assert files(out) == files(scenes)


def test_goes_on_after_a_kill(tmp_path):
    words = ["shapes", "--count", "200", "--size", "192", "--shard_size", "5", "--workers", "2", "--out"]
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "launch/pack.py", *words, str(out)], cwd=ROOT) as process:
        deadline = time.monotonic() + 60
        while not list(out.glob("train/*.tar")) and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(workers, timeout=30)  # one may yet begin a file
    whole = shapes.dataset_spec(200, size=192)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("train/*.tar.idx")}
    assert kept and not (out / "dataset.json").exists()
    pack.pack(whole, out, shard_size=5)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    pack.pack(whole, tmp_path / "reference", shard_size=5)
    assert files(out) == files(tmp_path / "reference")


def hold(out, ready, done):
    with Output(str(out), StoreOptions()).lock({"source": "x"}):
        ready.set()
        done.wait(20)


def test_one_process_at_a_time_and_a_lock_that_was_left_holds_nobody(tmp_path):
    (tmp_path / LOCK).touch()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    assert ready.wait(20)
    with pytest.raises(UserError, match="another process is packing"):
        pack.pack(shapes.dataset_spec(10), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {LOCK, PLAN}
    done.set()
    other.join()
    assert not list(tmp_path.iterdir())


def test_what_fills_the_disk_is_told(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(webdataset.TarWriter, "write", full)
    assert main(["shapes", "--out", str(tmp_path / "new"), "--count", "2", "--workers", "1"]) == 1
    assert re.fullmatch(
        r"error: .*/00000\.tar\.\d+\.partial cannot be written: No space left on device; the same command resumes\n",
        capsys.readouterr().err,
    )
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [PLAN, "train"]
    assert not list((tmp_path / "new/train").iterdir())


@pytest.mark.parametrize("name", [SUMMARY, PLAN])
@pytest.mark.parametrize("content", ["no json", "[]", '{"info": "COCO"}', '{"source": "shapes", "arguments": []}'])
def test_a_foreign_summary_is_told_in_one_sentence(name, content, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    (tmp_path / "other").touch()
    assert main(["shapes", "--out", str(tmp_path), "--count", "2"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"holds a {name} that this command did not write" in err and err.count("\n") == 1
    assert (tmp_path / name).read_text() == content


def test_the_index_is_written_along(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("data.shards.manifest.scan_shard", None)  # no shard may need a scan
    pack.pack(shapes.dataset_spec(100, size=64, heldout=0.1, seed=3), tmp_path / "a", shard_size=40)
    assert files(tmp_path / "a") == files(scenes)
    index = open_index(open_store(str(scenes / "train")), "scenes", notice=pytest.fail)
    assert index.counts.tolist() == [30, 30, 30] and not index.corruption
    offsets = index.offsets(1)
    raw = [
        parse_sample(index.store.read(index.names[1], int(start), int(stop)))
        for start, stop in itertools.pairwise(offsets)
    ]
    assert [sample.key for sample in raw] == [f"scene-{n:010d}" for n in range(30, 60)]
    assert all(set(sample.members) == {"jpg", "txt", "json"} for sample in raw)


def odd_rows(items):
    for item in items:
        unusable = item % 2 == 0 or 20 <= item < 30  # all of shard 2
        yield Skipped(f"row {item}", "even") if unusable else Sample(f"{item:09d}", {"txt": b"x"})


def test_rows_that_cannot_be_used_are_counted_and_listed(tmp_path):
    contents = DatasetSpec("odd", {}, {"train": range(50), "heldout": range(0)}, odd_rows, left_out={"seen before": 7})
    done = pack.pack(contents, tmp_path / "o", shard_size=10)
    assert done.summary["left_out"] == {"seen before": 7, "even": 30}
    assert done.summary["samples"] == {"train": 20, "heldout": 0} and done.summary["shards"]["train"] == 4
    assert not (tmp_path / "o/train/00002.tar").exists()
    assert json.loads((tmp_path / "o/train/00000.left_out.json").read_text()) == {
        "even": [f"row {n}" for n in range(0, 10, 2)]
    }
    # Shard 2 has no sample, and is not tried again for that.
    (tmp_path / "o/dataset.json").rename(tmp_path / "o/dataset.json.partial")
    again = pack.pack(changed(contents, read=None), tmp_path / "o", shard_size=10)
    assert again.summary == done.summary


def test_nothing_usable_is_a_mistake(tmp_path):
    contents = DatasetSpec("odd", {}, {"train": range(20, 30)}, odd_rows)
    with pytest.raises(DataError, match=r"no row of odd can be packed, all are left out: 10 \(even\)"):
        pack.pack(contents, tmp_path / "o")
    assert not (tmp_path / "o/dataset.json").exists()


def test_named_and_left_out_drawings_are_all_that_there_are(emojis):
    assert sum(map(len, emojis.splits.values())) + emojis.left_out["no English name"] == 4495
    assert emojis.left_out["no English name"] == 542
    codes = [d.code for split in emojis.splits.values() for d in split]
    assert len(set(codes)) == len(codes) == 3953


def test_captions_of_drawings(emojis):
    captions = {d.code: d.caption for split in emojis.splits.values() for d in split}
    assert captions["2764"] == "red heart"
    assert captions["1F44B-1F3FD"] == "waving hand, medium skin tone"
    assert captions["1F468-1F3FB-200D-1F9B0"] == "man, light skin tone, red hair"
    assert captions["1F468-200D-1F469-200D-1F467-200D-1F466"] == "family, man, woman, girl, boy"
    assert captions["1F48B"] == "kiss mark"
    assert captions["1F1F5-1F1EA"] == "Peru flag"
    assert captions["1F3FD"] == "medium skin tone"
    assert not any("_" in text or ":" in text for text in captions.values())
    assert len(set(captions.values())) == len(captions)


def test_variants_of_an_emoji_are_held_out_together(emojis):
    tones = {f"1F3F{d}" for d in "BCDEF"}

    def stem(drawing):  # by code point, where captions() goes by name
        return tuple(p for p in drawing.code.split("-") if p not in tones and p != "FE0F")

    train, heldout = ({stem(d) for d in emojis.splits[split]} for split in ("train", "heldout"))
    assert not train & heldout
    farmers = {openmoji.base(f"{who} farmer, dark skin tone") for who in ("man", "woman", "person")}
    assert farmers == {openmoji.base("farmer")}
    assert openmoji.base("man, dark skin tone, red hair") == openmoji.base("woman")
    share = len(emojis.splits["heldout"]) / 3953
    assert 0.045 < share <= 0.0501
    other = openmoji.dataset_spec(heldout=0.05, seed=1).splits["heldout"]
    assert {d.code for d in other} != {d.code for d in emojis.splits["heldout"]}


def test_drawings_are_packed_on_white(emojis, tmp_path):
    some = {split: list(items[:20]) for split, items in emojis.splits.items()}
    some["train"].append(next(d for d in emojis.splits["train"] if d.caption == "red circle"))
    done = pack.pack(changed(emojis, splits=some), tmp_path / "o")
    assert done.summary["left_out"] == {"no English name": 542}
    assert done.summary["licence"] == "CC BY-SA 4.0" and "OpenMoji" in done.summary["credit"]
    samples = read(tmp_path / "o", "train")
    for sample in samples:
        image = simplejpeg.decode_jpeg(sample["jpg"])
        assert image.shape == (32, 32, 3) and image.std() > 5
        assert image[[0, 0, -1, -1], [0, -1, 0, -1]].min() > 230
        assert json.loads(sample["json"])["licence"] == "CC BY-SA 4.0"
    circle = simplejpeg.decode_jpeg(samples[-1]["jpg"])
    red, green, blue = circle[16, 16].astype(int)
    assert samples[-1]["txt"] == b"red circle" and red > 180 > 80 > max(green, blue)


@pytest.mark.parametrize(
    "words, said",
    [
        ("shapes --out {new} --count 0", "count is 0"),
        ("shapes --out {new} --count few", "count"),
        ("shapes --out {new} --count 10 --heldout 1.0", "heldout is 1.0"),
        ("shapes --out {new} --count 10 --size 2", "size is 2"),
        ("shapes --out {new} --count 10 --shard_size 0", "shard_size is 0"),
        ("shapes --out {new} --count 10 --workers -1", "workers is -1"),
        ("shapes --out {new} --count 10 --workers 0", "workers is 0"),
        ("shapes --out gs://bucket/o --count 10", "should be a folder or s3://"),
        ("openmoji --out {new} --sise 64", "--sise"),
        ("openmoji --out {full}", "holds other files"),
        ("openmoji --out {full}/file", "should be a folder to write into: Not a directory"),
        ("openmoji --out {full}/file/new", "Not a directory"),
    ],
)
def test_mistakes_are_told_in_one_sentence_and_write_nothing(words, said, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(words.format(new=tmp_path / "new", full=tmp_path / "full").split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_package_of_the_demo_is_told_in_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "emoji", None)
    assert main(["openmoji", "--out", str(tmp_path / "new")]) == 2
    assert re.fullmatch(r"error: package emoji is not installed: .*'demo'.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("fault", [ValueError("a bug"), KeyError("a bug")])
def test_a_bug_is_not_told_as_a_mistake(tmp_path, monkeypatch, fault):
    def broken(*_):
        raise fault

    monkeypatch.setattr(shapes, "draw", broken)
    with pytest.raises(type(fault), match="a bug"):
        main(["shapes", "--out", str(tmp_path / "new"), "--count", "2", "--workers", "1"])


def test_the_command_says_what_it_did_and_does_nothing_twice(tmp_path, capsys):
    words = ["shapes", "--out", str(tmp_path / "s"), "--count", "10", "--heldout", "0", "--workers", "1"]
    assert main(words) == 0
    assert "packed: 10 train, 0 heldout" in capsys.readouterr().out
    assert [p.name for p in sorted((tmp_path / "s").iterdir())] == ["dataset.json", "train"]
    assert main(words) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_tar_is_plain_ustar(scenes):
    with tarfile.open(fileobj=io.BytesIO((scenes / "train" / "00000.tar").read_bytes())) as tar:
        assert tar.pax_headers == {}
        assert tar.getnames()[:3] == [f"scene-0000000000.{end}" for end in ("jpg", "json", "txt")]
