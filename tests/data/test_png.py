"""PNGs: their pixels decide whether they are used, counted and by checksum; nothing else does."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from pictures import ADOBE_RGB, chunk, encode, photo, png, reason, rgb_profile, rows

from data.decode import decode, image_size
from data.errors import BadSample

SIZE = (60, 90)
PICTURE = photo(*SIZE)
DATA = encode(PICTURE)
HEAD, REST = DATA[:33], DATA[33:]
LARGE = b"{" + b'"node": 1,' * 140_000
NOISE = np.random.default_rng(0).integers(0, 4, 1_200_000, dtype=np.uint8).tobytes()
WRONG = b"\1\2\3\4"
"""A checksum."""


def spoiled(kind: bytes, content: bytes) -> bytes:
    return chunk(kind, content)[:-4] + WRONG


ODD = {
    "a large text": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LARGE)),
    "a large text in Unicode": chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LARGE)),
    "a large plain text": chunk(b"tEXt", b"workflow\0" + LARGE),
    "a hundred large texts": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LARGE)) * 100,
    "a large profile that is none": chunk(b"iCCP", b"profile\0\0" + zlib.compress(NOISE)),
    "a huge profile": chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(1 << 24))),
    "a profile that does not inflate": chunk(b"iCCP", b"profile\0\0what"),
    "a profile without a name's end": chunk(b"iCCP", b"profile"),
    "a text that does not inflate": chunk(b"zTXt", b"workflow\0\0what"),
    "a cut profile": chunk(b"iCCP", b"profile\0\0" + zlib.compress(NOISE)[:5000]),
    "wrong checksums": b"".join(spoiled(kind, bytes(9)) for kind in (b"tEXt", b"gAMA", b"pHYs", b"iCCP", b"eXIf")),
    "a transparent colour of the wrong length": chunk(b"tRNS", b"\0"),
    "a transparent colour of a wrong checksum": spoiled(b"tRNS", struct.pack(">HHH", *PICTURE[5, 5])),
    "XMP that is none": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1"),
    "EXIF that is none": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzzzz"),
    "an unknown critical chunk": chunk(b"ABCD", b"what"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_pixel_decides_nothing(odd: str) -> None:
    data = HEAD + ODD[odd] + REST
    assert image_size(data) == SIZE
    assert (decode(data, SIZE) == PICTURE.transpose(2, 0, 1)).all()
    assert reason(BadSample, data[:-40], 32) == "undecodable_image"


def test_files_without_their_end() -> None:
    for cut in (1, 4, 12):  # of IEND
        assert (decode(DATA[:-cut], SIZE) == PICTURE.transpose(2, 0, 1)).all()
    assert (decode(DATA[:-12] + chunk(b"tEXt", b"a\0" + LARGE)[:999], SIZE) == PICTURE.transpose(2, 0, 1)).all()
    assert (decode(DATA + b"trailer", SIZE) == PICTURE.transpose(2, 0, 1)).all()
    for cut in (13, 16):  # of the last pixels' checksum, which their stream's makes up for
        assert (decode(DATA[:-cut], SIZE) == PICTURE.transpose(2, 0, 1)).all()
    assert reason(BadSample, DATA[:-17], 32) == "undecodable_image"


def test_damaged_pixels_are_refused() -> None:
    at, header = DATA.index(b"IDAT"), DATA[16:29]
    palette = [chunk(b"PLTE", bytes(48))[:-4] + WRONG]
    damaged = {
        "header": DATA[:29] + WRONG + REST,
        "a byte of them": DATA[: at + 90] + bytes([DATA[at + 90] ^ 1]) + DATA[at + 91 :],
        "palette": png((9, 9), 8, 3, rows(np.zeros((9, 9), np.uint8)), *palette),
        "no pixels": HEAD + chunk(b"IEND", b""),
        "no header": DATA[:8] + REST,
        "a header of another kind": DATA[:8] + chunk(b"IHDR", header[:8] + bytes((8, 5, 0, 0, 0))) + REST,
    }
    for data in damaged.values():
        assert reason(BadSample, data, 9) == "undecodable_image"
    whole = rows(photo(200, 200))
    packed = zlib.compress(whole)
    before = png((200, 200), 8, 2, b"").partition(b"IDAT")[0][:-4]
    for cut in (len(packed) // 2, len(packed) - 99):
        data = before + chunk(b"IDAT", packed[:cut]) + chunk(b"IEND", b"")
        assert reason(BadSample, data, 64) == "undecodable_image"
    assert decode(before + chunk(b"IDAT", packed) + chunk(b"IEND", b""), 64).shape == (3, 64, 64)


@pytest.mark.parametrize(("depth", "interlaced"), [(8, 0), (8, 1), (16, 0)])
def test_complete_pixels_are_used_where_one_of_their_checksums_is_right(depth: int, interlaced: int) -> None:
    picture = PICTURE.astype(np.uint16).byteswap() if depth == 16 else PICTURE
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    content = b"".join(rows(picture[top::down, left::right]) for top, left, down, right in passes)
    before = png(SIZE, depth, 2, b"", interlaced=interlaced).partition(b"IDAT")[0][:-4]
    packed, more = zlib.compress(content), zlib.compress(content + bytes(10))
    larger = [zlib.compress(content + bytes(size)) for size in (271 * depth // 8, 1 << 22)]
    expected = decode(before + chunk(b"IDAT", packed), SIZE)
    if depth == 8:
        assert (expected == PICTURE.transpose(2, 0, 1)).all()
    complete = {
        "more than promised": chunk(b"IDAT", more),
        "more, its checksum wrong": spoiled(b"IDAT", more),
        "no checksum in the stream": chunk(b"IDAT", packed[:-4]),
        "half of it": chunk(b"IDAT", packed[:-2]),
        "a wrong one": chunk(b"IDAT", packed[:-4] + WRONG),
        "a wrong one, in chunks": chunk(b"IDAT", packed[:99]) + chunk(b"IDAT", packed[99:-4] + WRONG),
        "more behind the stream": chunk(b"IDAT", packed + b"more"),
        "a chunk's checksum wrong": spoiled(b"IDAT", packed),
        "one of two": spoiled(b"IDAT", packed[:99]) + chunk(b"IDAT", packed[99:]),
    }
    for name, chunks in complete.items():
        assert (decode(before + chunks + chunk(b"IEND", b""), SIZE) == expected).all(), name
    unproven = [packed[:-4], packed[:-2], packed[:-4] + WRONG, more[:-4]]
    wrong = [*larger, larger[0][:-4], zlib.compress(content[:-1]), zlib.compress(content[:-1])[:-4]]
    for chunks in (*(spoiled(b"IDAT", one) for one in unproven + wrong), *(chunk(b"IDAT", one) for one in wrong)):
        assert reason(BadSample, before + chunks + chunk(b"IEND", b""), 32) == "undecodable_image"


def test_a_profile_is_used_where_its_checksum_is_right() -> None:
    content = b"p\0\0" + zlib.compress(rgb_profile(ADOBE_RGB, 2.2) + bytes(1 << 20))  # above Pillow's limit
    turned = decode(HEAD + chunk(b"iCCP", content) + REST, SIZE)
    assert (turned == decode(encode(PICTURE, icc_profile=rgb_profile(ADOBE_RGB, 2.2)), SIZE)).all()
    assert np.abs(turned.astype(int) - PICTURE.transpose(2, 0, 1)).max() > 10
    assert (decode(HEAD + spoiled(b"iCCP", content) + REST, SIZE) == PICTURE.transpose(2, 0, 1)).all()


@pytest.mark.parametrize(("depth", "colour", "channels"), [(1, 0, 1), (2, 3, 1), (4, 3, 1), (8, 2, 3), (16, 6, 4)])
@pytest.mark.parametrize("size", [(33, 21), (5, 1), (1, 5), (1, 1)])
def test_the_bytes_a_png_promises_are_counted_as_pillow_reads_them(
    size: tuple[int, int], depth: int, colour: int, channels: int
) -> None:
    palette = [chunk(b"PLTE", bytes(48))] if colour == 3 else []
    passes = {0: [(0, 0, 1, 1)], 1: [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)]}
    passes[1] += [(2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    for interlaced in (0, 1):
        content = b""
        for top, left, down, right in passes[interlaced]:
            grid = np.zeros(size)[top::down, left::right]
            if grid.size:
                content += bytes(1 + -(-grid.shape[1] * depth * channels // 8)) * grid.shape[0]
        data = png(size, depth, colour, content, *palette, interlaced=interlaced)
        assert decode(data, 1).shape == (3, 1, 1)
        data = png(size, depth, colour, content[:-1], *palette, interlaced=interlaced)
        assert reason(BadSample, data, 1) == "undecodable_image"
