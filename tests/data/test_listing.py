"""What counts below a root by its name, and what is said of the rest."""

from __future__ import annotations

from collections import Counter

import pytest

from data.listing import HIDDEN, SYSTEM, drop_excluded, excluded, format_left_out, why_not_a_shard, why_not_an_image


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.tar", None), ("a/b.c/d.tar", None), ("./a.tar", None), ("../a.tar", None), ("a..b/c", None), ("a.", None),
        (".a.tar", HIDDEN), ("._a.tar", HIDDEN), ("a/.b/c.tar", HIDDEN), (".snapshot/a.tar", HIDDEN),
        ("a/.ipynb_checkpoints/b-checkpoint.jpg", HIDDEN), ("..2024_01/a.tar", HIDDEN), (".a", HIDDEN),
        ("__MACOSX/a.jpg", SYSTEM), ("a/@eaDir/b.jpg/SYNOPHOTO_THUMB_M.jpg", SYSTEM), ("lost+found/a", SYSTEM),
        ("#snapshot/daily/a.tar", SYSTEM), ("$RECYCLE.BIN/a", SYSTEM), ("a/lost+found.tar", None), ("@eaDirs/a", None),
    ],
)  # fmt: skip
def test_a_name_counts_or_says_why_not(name: str, reason: str | None) -> None:
    assert excluded(name) == reason


def test_a_folder_that_does_not_count_is_one_thing() -> None:
    left_out = Counter[str]()
    names = ["a", ".x/1", ".x/2/.y", "b/.x/1", "@eaDir/1", "@eaDir/.x", "b/c"]
    assert drop_excluded(names, str, left_out) == ["a", "b/c"]
    assert left_out == {HIDDEN: 2, SYSTEM: 1}
    assert format_left_out(left_out) == f"; left out: 2 {HIDDEN}, 1 {SYSTEM}" and format_left_out({}) == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.tar.gz", "compressed (.tar.gz: gunzip it first)"), ("d/a.tgz", "compressed (.tgz: gunzip it first)"),
        ("a.tar.zst", "compressed (.tar.zst: unzstd it first)"), ("a.tar.xz", "compressed (.tar.xz: unxz it first)"),
        ("a.b.tar.bz2", "compressed (.tar.bz2: bunzip2 it first)"), ("a.TAR", "tars that are not named .tar"),
        ("a.jpg", "images beside the shards"), ("a.TIFF", "images beside the shards"),
        ("a.gz", None), ("a.tar.idx", None), ("index.json", None), ("tar", None), ("tgz", None),
    ],
)  # fmt: skip
def test_what_somebody_may_miss_of_a_folder_of_shards(name: str, said: str | None) -> None:
    reason = why_not_a_shard(name)
    assert reason is None if said is None else reason is not None and reason.startswith(said)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("metadata.csv", "launch/pack.py csv"), ("d/metadata.parquet", "launch/pack.py parquet"),
        ("metadata.jsonl", "tables (.jsonl: write it as CSV"), ("0.mds", "not read (.mds"),
        ("a.zip", "unpack it"), ("a.heic", "not decoded (.heic)"),
        ("a.tar.gz", "gunzip it first"), ("a.txt", "without an image of their name"), ("README", "without an image"),
    ],
)  # fmt: skip
def test_what_is_no_part_of_a_folder_of_images(name: str, said: str) -> None:
    assert said in why_not_an_image(name)
