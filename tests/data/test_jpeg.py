"""JPEGs that libjpeg warns about: used if all their pixels are there, refused if not."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import simplejpeg
from pictures import Pixels, encode, photo, psnr, reason

from data.decode import decode, image_size
from data.errors import BadSample

SIZE = (203, 301)
KINDS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "own tables": {"optimize": True},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "gray": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
}
FILES = {name: encode(photo(*SIZE), "JPEG", quality=90, **options) for name, options in KINDS.items()}
SOS, EOI = b"\xff\xda", b"\xff\xd9"


def pixels(data: bytes) -> Pixels:
    assert image_size(data) == SIZE
    return decode(data, SIZE)


def scan_parameters(data: bytes, *values: int) -> bytes:
    at = data.index(SOS)
    at += 5 + 2 * data[at + 4]
    return data[:at] + bytes(values) + data[at + 3 :]


def before(data: bytes, marker: int, what: bytes) -> bytes:
    at = data.index(bytes((0xFF, marker)))
    return data[:at] + what + data[at:]


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content


def adobe(transform: int) -> bytes:
    return segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes((transform,)))


ODD: dict[str, Callable[[bytes], bytes]] = {
    "no end mark": lambda data: data[:-2],
    "half an end mark": lambda data: data[:-1],
    "text after the end": lambda data: data + b"trailer",
    "another picture after the end": lambda data: data + data[: len(data) // 2],
    "JFIF 9": lambda data: data[:11] + b"\x09" + data[12:] if data[6:10] == b"JFIF" else data,
    "an empty comment": lambda data: data[:2] + segment(0xFE, b"") + data[2:],
    "a profile that lacks a part": lambda data: data[:2] + segment(0xE2, b"ICC_PROFILE\0\1\2what") + data[2:],
    "fill bytes": lambda data: before(before(data, 0xDB, b"\xff"), 0xDA, b"\xff" * 9),
    "padding before the end": lambda data: data[:-2] + bytes(5000) + EOI,
    "fill bytes before the end": lambda data: data[:-2] + b"\xff" * 700 + EOI,
    "spaces and no end": lambda data: data[:-2] + b" " * 700,
    "stray bytes before tables": lambda data: before(data, 0xDB, b"what is this"),
    "many stray bytes before the scan": lambda data: before(data, 0xDA, b"stray" * 99),
    "stray bytes before the end": lambda data: data[:-2] + b"a few stray bytes" + EOI,
    "all of it": lambda data: before(data, 0xC4, b"stray")[:-2] + b"xyz" + bytes(30),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", KINDS)
def test_a_complete_picture_is_used_whatever_else_its_file_holds(kind: str, odd: str) -> None:
    data = ODD[odd](FILES[kind])
    np.testing.assert_array_equal(pixels(data), pixels(FILES[kind]))
    assert (decode(data, 25) == decode(FILES[kind], 25)).all()  # at an eighth


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "progressive"])
def test_scan_parameters_of_sequential_jpegs_do_not_matter(kind: str) -> None:
    for values in ((0, 0, 0), (0, 63, 17), (255, 255, 255), (63, 0, 0)):
        data = scan_parameters(FILES[kind], *values)
        with pytest.raises(ValueError, match="Invalid SOS parameters"):
            simplejpeg.decode_jpeg(data, "CMYK" if kind == "cmyk" else "RGB")
        np.testing.assert_array_equal(pixels(data), pixels(FILES[kind]))
        assert reason(BadSample, data[: len(data) // 2] + EOI, 64) == "undecodable_image"


@pytest.mark.parametrize("transform", [1, 3, 200])
def test_unknown_colour_transforms_are_the_usual_ones(transform: int) -> None:
    plain = FILES["sequential"]
    plain = plain[:2] + plain[20:]  # without JFIF, so that Adobe's word counts
    np.testing.assert_array_equal(
        pixels(plain[:2] + adobe(transform) + plain[2:]), pixels(plain[:2] + adobe(1) + plain[2:])
    )


def test_stray_bytes_before_restart_markers() -> None:
    for kind in ("sequential", "gray"):
        whole = encode(photo(*SIZE), "JPEG", restart_marker_rows=1, **KINDS[kind])
        for stray in (b"x", b"stray", b"stray bytes", bytes(1), bytes(8), bytes(3000)):
            data = re.sub(rb"(\xff[\xd0-\xd7])", stray.replace(b"\0", rb"\000") + rb"\1", whole)
            assert len(data) >= len(whole) + 12 * len(stray)
            np.testing.assert_array_equal(pixels(data), pixels(whole))
        cuts = [found.start() for found in re.finditer(rb"\xff[\xd0-\xd7]", whole)]
        for at, after in pairwise(cuts):
            for missing in (at, after - 20):  # an interval, or its end
                assert reason(BadSample, whole[:missing] + whole[after:], 64) == "undecodable_image"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", [b"", EOI, bytes(20_000), bytes(20_000) + EOI, b"\xff" * 50 + EOI, b"x" * 30 + EOI])
def test_a_picture_that_misses_pixels_is_refused(kind: str, tail: bytes) -> None:
    data = FILES[kind]
    for cut in (data.index(SOS), data.index(SOS) + 40, len(data) // 2, len(data) - 200, len(data) - 60):
        assert reason(BadSample, data[:cut] + tail, 64) == "undecodable_image"
        assert reason(BadSample, before(data[:cut] + tail, 0xDB, b"stray"), 64) == "undecodable_image"


def test_scans_that_are_missing_are_noticed() -> None:
    data = FILES["progressive"]
    scans = [found.start() for found in re.finditer(SOS, data)]
    assert len(scans) == 10
    for at in scans[1:]:
        cut = data[: data.rindex(b"\xff\xc4", 0, at) if data[at - 40 : at].count(b"\xff\xc4") else at] + EOI
        assert reason(BadSample, cut, 64) == "undecodable_image"
    apart = three_scans()
    assert psnr(decode(apart, 64), decode(FILES["sequential"], 64)) > 15  # gray: the same in all three
    for at in [found.start() for found in re.finditer(SOS, apart)][1:]:
        assert reason(BadSample, apart[:at] + EOI, 64) == "undecodable_image"


def three_scans(sampling: int = 0x11) -> bytes:
    """RGB whose components lie in scans of their own, each with the gray picture's data."""
    gray = FILES["gray"]
    frame, scan = gray.index(b"\xff\xc0"), gray.index(SOS)
    head = gray[:2] + gray[20:frame] + adobe(0)
    components = b"".join(bytes((n, sampling if n == 1 else 0x11, 0)) for n in (1, 2, 3))
    head += segment(0xC0, b"\x08" + struct.pack(">HHB", *SIZE, 3) + components) + gray[frame + 13 : scan]
    content = gray[scan + 10 : -2]
    return head + b"".join(segment(0xDA, bytes((1, n, 0, 0, 63, 0))) + content for n in (1, 2, 3)) + EOI


def test_rare_subsampling_goes_through_pillow() -> None:
    """Of a first component three times as wide as it is, Pillow makes it as the file has it."""
    data = three_scans(0x31)
    with pytest.raises(ValueError, match="subsampling"):
        simplejpeg.decode_jpeg(data, "RGB")
    assert image_size(data) == SIZE
    assert reason(BadSample, data[: len(data) // 2], 64) == "undecodable_image"


def test_bytes_that_may_be_pixels_are_not_taken_for_stray_ones() -> None:
    data = FILES["sequential"]
    noise = bytes(np.random.default_rng(0).integers(1, 255, 90, dtype=np.uint8))
    assert reason(BadSample, data[:-2] + noise + EOI, 64) == "undecodable_image"
    np.testing.assert_array_equal(pixels(data[:-2] + noise[:60] + EOI), pixels(data))
    for cut in (0, 1, data.index(b"\xff\xc0") + 5, data.index(SOS)):
        assert reason(BadSample, data[: cut + 2], 8) == "undecodable_image"


def test_what_is_no_jpeg_that_libjpeg_knows() -> None:
    data = FILES["sequential"]
    at = data.index(b"\xff\xc0")
    for frame in (b"\x0c" + data[at + 5 : at + 19], data[at + 4 : at + 9] + b"\2" + data[at + 10 : at + 16]):
        assert reason(BadSample, data[:at] + segment(0xC0, frame) + data[at + 19 :], 64) == "undecodable_image"
