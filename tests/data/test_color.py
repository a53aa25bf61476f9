"""Colours: 16 bits, transparency, CMYK, and ICC profiles against what their numbers say."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from pictures import (
    ADOBE_RGB,
    SRGB,
    Pixels,
    by_pillow,
    chunk,
    encode,
    encoded,
    gamma,
    lut_profile,
    png,
    profile,
    reason,
    rgb_profile,
    rows,
)
from PIL import Image, ImageCms

from data.decode import decode, image_size
from data.errors import BadSample

GRAY = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
GRAY_CHW = np.repeat(GRAY[None], 3, axis=0)


def test_gray_and_16_bits() -> None:
    assert (decode(encode(GRAY), 32) == GRAY_CHW).all()
    assert np.abs(decode(encode(GRAY, "JPEG", quality=100), 32).astype(int) - GRAY_CHW).max() <= 2
    assert (decode(encode(GRAY, "WEBP", mode="RGB", lossless=True), 32) == GRAY_CHW).all()
    assert (decode(encode((GRAY > 99).astype(bool)), 32) == 255 * (GRAY_CHW > 99)).all()
    wide = GRAY.astype(">u2") * 257
    assert (decode(encode(wide.astype(np.uint16)), 32) == GRAY_CHW).all()
    assert (decode(png((32, 32), 16, 0, rows(wide.astype(">u2"))), 32) == GRAY_CHW).all()
    nearest = np.full((32, 32), 1000, ">u2")  # 3.89 of 255
    assert (decode(png((32, 32), 16, 0, rows(nearest)), 32) == 4).all()
    colours = np.stack([wide, wide[:, ::-1], wide.T], axis=2).astype(">u2")
    expected = (colours >> 8).astype(np.uint8).transpose(2, 0, 1)
    assert (decode(png((32, 32), 16, 2, rows(colours)), 32) == expected).all()


def test_alpha_is_laid_on_white() -> None:
    clear = np.zeros((32, 32, 4), np.uint8)
    clear[:, 8:] = (10, 20, 30, 128)
    clear[:, 16:] = (10, 20, 30, 255)
    options: list[tuple[str, dict[str, Any]]] = [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})]
    for kind, extra in options:
        data = encode(clear, kind, **extra)
        got = decode(data, 32)
        assert (got[:, :, :8] == 255).all()
        assert (got[:, :, 16:] == np.array([10, 20, 30])[:, None, None]).all()
        assert np.abs(got.astype(int) - by_pillow(data, (32, 32))).max() <= 1
    assert (decode(encode(np.zeros((32, 32), np.uint8), mode="P", transparency=0), 32) == 255).all()
    # A palette whose entries are opaque, half clear and clear.
    palette = (chunk(b"PLTE", bytes([0, 0, 0, 200, 100, 0, 9, 9, 9])), chunk(b"tRNS", bytes([255, 128, 0])))
    indices = np.repeat(np.arange(32, dtype=np.uint8)[None] // 12, 32, axis=0)
    data = png((32, 32), 8, 3, rows(indices), *palette)
    assert np.abs(decode(data, 32).astype(int) - by_pillow(data, (32, 32))).max() <= 1
    assert list(decode(data, 32)[:, 0, 13]) == [227, 177, 127]
    # Gray and colour with one value that is clear, at 8 and 16 bits.
    for depth, kind in ((8, ">u1"), (16, ">u2")):
        gray = np.full((32, 32), 70, kind)
        assert (decode(png((32, 32), depth, 0, rows(gray), chunk(b"tRNS", struct.pack(">H", 70))), 32) == 255).all()
    gray_alpha = np.zeros((32, 32, 2), ">u2")
    assert (decode(png((32, 32), 16, 4, rows(gray_alpha)), 32) == 255).all()


def test_cmyk_and_ycck_are_pillows_colours() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 4), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    buffer = io.BytesIO()
    Image.fromarray(picture, "CMYK").save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    assert simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK")
    assert np.abs(decode(data, (32, 48)).astype(int) - by_pillow(data, (32, 48))).max() <= 1


COLOURS = np.array([(60, 180, 60), (200, 120, 90), (10, 20, 200), (255, 255, 255), (128, 128, 128)], np.uint8)
ADOBE, WIDE = rgb_profile(ADOBE_RGB, 563 / 256), rgb_profile(ADOBE_RGB[:, [2, 0, 1]], 1.0)
OPAQUE: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {"quality": 100, "subsampling": 0}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}),
    ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
]  # fmt: skip


def by_numbers(colours: Pixels, primaries: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    """A matrix profile's colours (n, 3) in sRGB."""
    return encoded((colours / 255.0) ** exponent @ primaries.T @ np.linalg.inv(SRGB).T)


def stripes(colours: Pixels) -> Pixels:
    """32 x 32 for each colour, side by side."""
    return np.repeat(np.repeat(colours[None], 32, axis=0), 32, axis=1)


def seen(data: bytes, size: int = 32) -> Pixels:
    """The colours of `stripes` as they are decoded, (n, 3)."""
    pixels = decode(data, (size, size * len(COLOURS)))
    return pixels[:, size // 2, size // 2 :: size].T.astype(int)


@pytest.mark.parametrize(("kind", "options"), OPAQUE)
@pytest.mark.parametrize("size", [32, 8])
def test_colours_are_srgbs_by_their_profile(kind: str, options: dict[str, Any], size: int) -> None:
    for icc, primaries, exponent in ((ADOBE, ADOBE_RGB, 563 / 256), (WIDE, ADOBE_RGB[:, [2, 0, 1]], 1.0)):
        data = encode(stripes(COLOURS), kind, icc_profile=icc, **options)
        assert image_size(data) == (32, 160)
        expected = by_numbers(seen(encode(stripes(COLOURS), kind, **options)).astype(np.uint8), primaries, exponent)
        assert np.abs(seen(data, size) - expected).max() <= 2.5


def test_profiles_that_are_srgbs_change_nothing() -> None:
    exact = encode(stripes(COLOURS), "JPEG")
    shipped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert (seen(encode(stripes(COLOURS), "JPEG", icc_profile=shipped)) == seen(exact)).all()


@pytest.mark.parametrize(
    "icc",
    [b"", b"what", bytes(200), ADOBE[:300], ADOBE[:16] + b"CMYK" + ADOBE[20:], ADOBE[:16] + b"Lab " + ADOBE[20:]]
    + [profile(b"RGB ", {}), ADOBE.replace(b"rTRC", b"xTRC"), lut_profile(b"CMYK", np.zeros((2,) * 4, np.uint8))],
)
def test_broken_and_foreign_profiles_are_ignored(icc: bytes) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        extra: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        plain = seen(encode(stripes(COLOURS), kind, **extra))
        assert (seen(encode(stripes(COLOURS), kind, icc_profile=icc, **extra)) == plain).all()


def test_a_profile_in_several_parts() -> None:
    """In any order; one of which a part is missing counts as broken."""
    plain = encode(stripes(COLOURS), "JPEG", quality=100, subsampling=0)
    half = len(ADOBE) // 2
    parts = [(1, ADOBE[:half]), (2, ADOBE[half:])]

    def holding(some: list[tuple[int, bytes]]) -> bytes:
        segments = [b"ICC_PROFILE\0" + bytes((n, 2)) + part for n, part in some]
        return plain[:2] + b"".join(struct.pack(">HH", 0xFFE2, 2 + len(one)) + one for one in segments) + plain[2:]

    whole = encode(stripes(COLOURS), "JPEG", quality=100, subsampling=0, icc_profile=ADOBE)
    assert (seen(holding(parts)) == seen(whole)).all() and (seen(holding(parts[::-1])) == seen(whole)).all()
    assert (seen(holding(parts[:1])) == seen(plain)).all() and (seen(whole) != seen(plain)).any()


def test_gray_by_its_profile_and_by_one_of_rgb() -> None:
    linear = profile(b"GRAY", {b"kTRC": gamma(1.0)})
    expected = encoded(GRAY[0] / 255)
    for kind, tolerance in (("PNG", 1), ("JPEG", 3), ("TIFF", 1)):
        for mode in ("L", "LA") if kind == "PNG" else ("L",):
            got = decode(encode(GRAY, kind, mode=mode, icc_profile=linear), 32)[:, 9]
            # Of dark ones a step is many.
            assert np.abs(got[:, 4:] - expected[4:]).max() <= 3 * tolerance and (got == got[0]).all()
    wide = png((32, 32), 16, 0, rows(GRAY.astype(">u2") * 257), chunk(b"iCCP", b"p\0\0" + zlib.compress(linear)))
    assert np.abs(decode(wide, 32)[:, 9, 4:] - expected[4:]).max() <= 2
    got = decode(encode(GRAY, icc_profile=rgb_profile(SRGB, 1.0)), 32)[:, 9]
    assert np.abs(got[:, 4:] - expected[4:]).max() <= 2
    assert (
        decode(encode(COLOUR_PALETTE, icc_profile=linear, mode="P"), 32) == decode(encode(COLOUR_PALETTE, mode="P"), 32)
    ).all()


COLOUR_PALETTE = np.repeat(np.repeat(COLOURS[None, :4], 32, 0), 8, 1)


def test_palettes_by_their_profile() -> None:
    got = decode(encode(COLOUR_PALETTE, mode="P", icc_profile=ADOBE), 32)[:, 9, ::8].T
    palette = np.asarray(Image.open(io.BytesIO(encode(COLOUR_PALETTE, mode="P"))).convert("RGB"))[9, ::8]
    assert np.abs(got - by_numbers(palette, ADOBE_RGB, 563 / 256)).max() <= 2


def test_cmyk_by_its_profile() -> None:
    lightness = np.zeros((2, 2, 2, 2), np.uint8)
    lightness[0, 0, 0, 0], lightness[1, 0, 0, 0] = 255, 137  # L* 53.7, of which gray is 128
    icc = lut_profile(b"CMYK", lightness)
    inks = np.zeros((32, 96, 4), np.uint8)
    inks[:, 32:64, 0], inks[:, 64:, 3] = 255, 255
    for kind, options in (("JPEG", {"quality": 100}), ("TIFF", {})):
        buffer = io.BytesIO()
        Image.fromarray(inks, "CMYK").save(buffer, kind, icc_profile=icc, **options)
        got = decode(buffer.getvalue(), (32, 96))[:, 9, 16::32].T.astype(int)
        assert np.abs(got - [[255] * 3, [128] * 3, [0] * 3]).max() <= 3
        buffer = io.BytesIO()
        Image.fromarray(inks, "CMYK").save(buffer, kind, **options)
        got = decode(buffer.getvalue(), (32, 96))[:, 9, 16::32].T.astype(int)
        assert np.abs(got - [[255] * 3, [0, 255, 255], [0] * 3]).max() <= 3


def test_transparency_is_laid_on_srgbs_white() -> None:
    clear = np.dstack([stripes(COLOURS), np.full((32, 160), 128, np.uint8)])
    opaque = by_numbers(COLOURS, ADOBE_RGB, 563 / 256)
    for data in (encode(clear, icc_profile=ADOBE), encode(clear, "WEBP", icc_profile=ADOBE, lossless=True)):
        got = seen(data)
        assert np.abs(got - (opaque * 128 + 255 * 127) / 255).max() <= 2


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("colour", [0, 2])
def test_one_clear_colour_at_any_depth(depth: int, colour: int) -> None:
    """The clear value is white, its neighbours are what they were: at 16 bits those of the same upper byte, too."""
    if colour == 2 and depth < 8:
        return
    channels = 3 if colour else 1
    most = 2**depth - 1
    values = np.arange(min(most + 1, 4)) + (256 if depth == 16 else 0)
    line = np.repeat(values, 8)
    samples = np.repeat(np.resize(line, (32, len(line)))[..., None], channels, axis=2)
    if depth == 16:
        content = rows(samples.astype(">u2"))
    else:
        bits = (samples[..., None] >> np.arange(depth)[::-1]) & 1
        content = rows(np.packbits(bits.astype(np.uint8).reshape(32, -1), axis=1))
    for clear in values.tolist():
        for high in (0, 0xFF00 if depth <= 8 else 0):  # bits above the depth do not count
            told = chunk(b"tRNS", struct.pack(">H", clear | high) * channels)
            got = decode(png((32, len(line)), depth, colour, content, told), (32, len(line)))
            expected = np.where(line == clear, 255, np.round(line * 255 / most))
            assert np.abs(got - expected).max() <= (1 if depth == 16 else 0)
            assert (got[:, :, line == clear] == 255).all()


def test_tiffs_of_many_kinds() -> None:
    ramp = np.resize(np.arange(0, 256, 8, dtype=np.uint8), (32, 32))
    expected = np.repeat(ramp[None], 3, axis=0)
    for pixels in (ramp, ramp.astype(np.uint16) * 257, (ramp / 255).astype(np.float32)):
        for options in ({}, {"compression": "tiff_deflate"}):
            assert (decode(encode(pixels, "TIFF", **options), 32) == expected).all()
        negative = encode(pixels, "TIFF", tiffinfo={262: 0})
        # Pillow writes 8 bits so that they mean the same.
        assert (decode(negative, 32) == (expected if pixels.dtype == np.uint8 else 255 - expected)).all()
    for pixels in (ramp.astype(np.int32) * 70_000, ramp.astype(np.float32), ramp / np.float32(-255)):
        assert reason(BadSample, encode(pixels, "TIFF"), 32) == "undecodable_image"
    assert reason(BadSample, encode(np.full((32, 32), np.nan, np.float32), "TIFF"), 32) == "undecodable_image"
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for mode in ("RGB", "P", "1", "RGBA", "LA"):
        image = Image.fromarray(picture).convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, "TIFF")
        assert (decode(buffer.getvalue(), 32) == np.asarray(image.convert("RGB")).transpose(2, 0, 1)).all()
    pages = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(pages, "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert (decode(pages.getvalue(), 32) == np.array([255, 0, 0])[:, None, None]).all()
