"""Which files count and what is said of the others; the table of image formats is the decoder's."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import data.decode
from data.decode import decode, image_size
from data.errors import BadSample
from data.filters import Filters
from data.listing import (
    FORMATS,
    HIDDEN,
    IMAGE_EXTENSIONS,
    SYSTEM,
    UNDECODED_EXTENSIONS,
    drop_excluded,
    excluded,
    format_left_out,
    format_of,
    is_image,
    why_not_a_shard,
    why_not_an_image,
    why_not_decoded,
)
from t2i.config.data import SourceConfig


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


PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_listed_is_decoded(form: str) -> None:
    content = encoded(form)
    assert format_of(content) is FORMATS[form]
    assert image_size(content) == (24, 40) and decode(content, (24, 40)).shape == (3, 24, 40)
    if form in ("PNG", "BMP", "TIFF"):
        assert (decode(content, (24, 40)) == PIXELS.transpose(2, 0, 1)).all()


def test_stray_bytes_behind_a_jpegs_first_marker_are_none_of_its_format() -> None:
    content = encoded("JPEG")
    odd = content[:2] + b"\0\0" + content[2:]
    assert format_of(odd) is FORMATS["JPEG"]
    assert (decode(odd, (24, 40)) == decode(content, (24, 40))).all()


def test_the_decoder_knows_no_other() -> None:
    assert {"JPEG", *data.decode._PILLOW_FORMATS} == set(FORMATS)
    assert format_of(encoded("ICO")) is format_of(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic") is format_of(b"") is None
    with pytest.raises(BadSample, match="undecodable_image"):
        decode(encoded("ICO"), 8)


def test_every_extension_counts_everywhere_in_any_case() -> None:
    for extension in ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"):
        assert is_image(f"a.b/c.{extension.upper()}") and extension in IMAGE_EXTENSIONS
    registered = {extension: form for extension, form in Image.registered_extensions().items() if form in FORMATS}
    assert {f".{extension}" for extension in IMAGE_EXTENSIONS} >= registered.keys()
    assert not any(map(is_image, ("jpg", ".jpg", "a.jpg/b", "a.jpg.txt", "a.heic")))
    assert Filters().images == SourceConfig(name="s", url="u").filters.images == IMAGE_EXTENSIONS
    assert IMAGE_EXTENSIONS[:4] == ("jpg", "jpeg", "png", "webp"), "of several the usual one is taken"
    assert why_not_decoded("d/a.HEIC") == "images of a format that is not decoded (.heic)"
    assert not {*IMAGE_EXTENSIONS} & {*UNDECODED_EXTENSIONS} and why_not_decoded("a.txt") is None
