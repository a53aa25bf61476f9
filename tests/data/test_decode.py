"""Decoding against Pillow: the same picture within 44 dB, every format upright on white, nothing bad let through."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from data import decode as decode_module
from data.decode import decode, image_size
from data.errors import BadSample, Filtered

Pixels = NDArray[np.uint8]


def photo(height: int, width: int, name: str = "china.jpg") -> Pixels:
    """A photograph of scikit-learn's (427 x 640), repeated to size: nothing is scaled, all its detail is there."""
    picture = load_sample_image(name)
    repeats = (-(-height // picture.shape[0]), -(-width // picture.shape[1]), 1)
    return np.ascontiguousarray(np.tile(picture, repeats)[:height, :width])


def encode(pixels: NDArray[Any], kind: str = "PNG", mode: str | None = None, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, kind, **kwargs)
    return buffer.getvalue()


def by_pillow(data: bytes, target: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5)) -> Pixels:
    """The whole picture decoded, turned upright, laid on white and resized by Pillow: (3, H, W)."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    clear = image.convert("RGBA")
    image = Image.new("RGB", image.size, "white")
    image.paste(clear, mask=clear.getchannel("A"))
    scale = max(target[0] / image.height, target[1] / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    top, left = int((image.height - target[0]) * crop[0]), int((image.width - target[1]) * crop[1])
    return np.asarray(image.crop((left, top, left + target[1], top + target[0]))).transpose(2, 0, 1)


def psnr(a: Pixels, b: Pixels) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b.astype(float)) ** 2))))


def reason(kind: type[BadSample] | type[Filtered], data: bytes, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(kind) as caught:
        decode(data, *args, **kwargs)
    return caught.value.reason


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("quality", [75, 90])
@pytest.mark.parametrize(
    ("size", "target"),
    [((427, 640), (64, 64)), ((427, 640), (100, 100)), ((1024, 1024), (256, 256)), ((900, 1200), (256, 256))]
    + [((1025, 771), (192, 256)), ((427, 640), (427, 427))],
)
def test_a_photograph_is_within_44_db_of_pillows_lanczos(
    size: tuple[int, int], target: tuple[int, int], quality: int, name: str
) -> None:
    data = encode(photo(*size, name), "JPEG", quality=quality)
    pixels = decode(data, target)
    assert pixels.shape == (3, *target) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    # At half scale the most detailed photographs come out a little below: here the leaves of a tree, and seams.
    least = 43.5 if (name, size) == ("china.jpg", (1024, 1024)) else 44
    assert psnr(pixels, by_pillow(data, target)) >= least


def test_other_formats_are_resized_as_pillow_does() -> None:
    picture = photo(427, 640)
    for data in (encode(picture), encode(picture, "WEBP", quality=90), encode(picture, "JPEG", "CMYK", quality=90)):
        assert psnr(decode(data, 192), by_pillow(data, (192, 192))) >= 44


def test_jpeg_is_decoded_at_the_smallest_fast_scale_not_below_twice_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes, real = [], simplejpeg.decode_jpeg

    def spy(*args: object, **kwargs: object) -> Pixels:
        pixels: Pixels = real(*args, **kwargs)
        shapes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    data = encode(photo(512, 1024), "JPEG")
    for target in (32, 33, 64, 128, 129, 500):
        decode(data, target)
    assert shapes == [(64, 128), (128, 256), (128, 256), (256, 512), (512, 1024), (512, 1024)]
    decode(encode(photo(511, 1021), "JPEG"), 128)  # 256 x 511, and 256 x 512 is twice
    assert shapes[-1] == (256, 511)


def test_the_window_is_where_it_is_asked_for() -> None:
    pixels = photo(40, 100)
    data = encode(pixels)
    for place, left in ((0.0, 0), (0.25, 15), (0.5, 30), (0.99, 59), (1.0, 60)):
        assert (decode(data, 40, crop=(0.3, place)) == pixels[:, left : left + 40].transpose(2, 0, 1)).all()
        flipped = decode(data, 40, crop=(0.3, place), flip=True)
        assert (flipped == pixels[:, left : left + 40][:, ::-1].transpose(2, 0, 1)).all() and flipped.flags.c_contiguous
    upright = pixels.transpose(1, 0, 2)
    assert (decode(encode(upright), 40, crop=(0.25, 0.7)) == upright[15:55].transpose(2, 0, 1)).all()
    assert decode(data, (20, 30)).shape == (3, 20, 30)
    assert (decode(data, (40, 100)) == pixels.transpose(2, 0, 1)).all()
    # Every window of a random place is as likely as another, but for the two outermost.
    lefts = [
        decode_module._crop(np.arange(4)[None, :, None], (1, 1), (0.5, u))[0, 0, 0] for u in (0.1, 0.2, 0.45, 0.55)
    ]
    assert lefts == [0, 1, 1, 2]


CORNERS = np.zeros((32, 48, 3), np.uint8)
CORNERS[:16, :24], CORNERS[:16, 24:], CORNERS[16:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_pillows(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", orientation
    extra = {"lossless": True} if kind == "WEBP" else {}
    data = encode(CORNERS, kind, exif=exif, **extra)
    size = (48, 32) if orientation > 4 else (32, 48)
    tolerance = 3 if kind == "JPEG" else 0
    assert np.abs(decode(data, size).astype(int) - by_pillow(data, size)).max() <= tolerance
    # The window's place and the mirror are the upright picture's.
    low = by_pillow(data, (32, 32), crop=(1, 1))[:, :, ::-1]
    assert np.abs(decode(data, 32, crop=(1, 1), flip=True).astype(int) - low).max() <= tolerance
    assert reason(Filtered, data, (size[0] + 1, size[1])) == "small_image"
    assert image_size(data) == size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_is_found_after_other_segments_and_nonsense_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(CORNERS, "JPEG", exif=exif)
    profile = b"\xff\xe2" + struct.pack(">H", 60_002) + bytes(60_000)
    after = data[:2] + profile + profile + data[2:]
    assert decode(after, (48, 32)).shape == (3, 48, 32)
    for broken in (b"", b"II", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"):
        segment = b"\xff\xe1" + struct.pack(">H", 8 + len(broken)) + b"Exif\0\0" + broken
        plain = encode(CORNERS, "JPEG")
        assert decode(plain[:2] + segment + plain[2:], (32, 48)).shape == (3, 32, 48)
    # PNG allows EXIF after the pixels.
    late = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    png = encode(CORNERS)
    assert decode(png[:-12] + late + png[-12:], (48, 32)).shape == (3, 48, 32)
    assert image_size(after) == image_size(png[:-12] + late + png[-12:]) == (48, 32)
    assert image_size(plain[:2] + segment + plain[2:]) == (32, 48)


def test_the_size_is_that_of_the_header_upright(monkeypatch: pytest.MonkeyPatch) -> None:
    turned = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="8"/>'
    xmp = png((32, 48), 8, 2, rows(CORNERS.reshape(32, -1)), chunk(b"iTXt", turned))
    assert decode(xmp, (48, 32)).shape == (3, 48, 32)
    at = xmp.index(b"IDAT") + 12  # into the pixels
    files = {xmp: (48, 32), xmp[:at]: (48, 32), encode(CORNERS, "GIF"): (32, 48), encode(CORNERS, "BMP"): (32, 48)}
    wide = encode(np.zeros((1, 60_000, 3), np.uint8), "JPEG").replace(b"\0\x01\xea\x60", b"\xea\x60\xea\x60")
    tga = encode(CORNERS, "TGA")
    assert reason(BadSample, tga, 32) == "undecodable_image"
    monkeypatch.setattr(Image.Image, "load", None)
    for data, size in files.items():
        assert image_size(data) == size
    for data, why in ((wide, "too_many_pixels"), (tga, "undecodable_image"), (b"", "undecodable_image")):
        with pytest.raises(BadSample) as caught:
            image_size(data)
        assert caught.value.reason == why


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(size: tuple[int, int], depth: int, colour: int, rows: bytes, *extra: bytes, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", size[1], size[0], depth, colour, 0, 0, interlaced)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rows(values: NDArray[Any]) -> bytes:
    """Unfiltered rows of a PNG."""
    return b"".join(b"\0" + row.tobytes() for row in values)


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


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    extra = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], **extra)
    assert getattr(Image.open(io.BytesIO(buffer.getvalue())), "n_frames", 1) == 2
    assert (decode(buffer.getvalue(), 32) == np.array([255, 0, 0])[:, None, None]).all()


def test_small_and_long_images_are_left_out() -> None:
    for kind in ("JPEG", "PNG"):
        data = encode(photo(100, 300), kind)
        assert reason(Filtered, data, 101) == "small_image"
        assert decode(data, 128, small_images="upscale").shape == (3, 128, 128)
        assert decode(data, 100).shape == (3, 100, 100)
        assert reason(Filtered, data, 50, min_side=101) == "small_image"
        assert reason(Filtered, data, 50, max_aspect_ratio=2.99) == "aspect_ratio"
        assert decode(data, 50, min_side=100, max_aspect_ratio=3).shape == (3, 50, 50)
    thread = encode(np.zeros((1, 20_000, 3), np.uint8))
    assert reason(BadSample, thread, 256, small_images="upscale") == "too_many_pixels"


def test_limits_and_filters_are_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", never)
    monkeypatch.setattr(decode_module, "_load", never)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encode(photo(100, 100), kind)
        assert reason(BadSample, data, 32, max_pixels=9_999) == "too_many_pixels"
        assert reason(Filtered, data, 32, min_side=101) == "small_image"
    bomb = png((60_000, 60_000), 8, 2, b"")
    assert reason(BadSample, bomb, 32) == "too_many_pixels"


FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9])
def test_truncated_files_are_refused(kind: str, share: float) -> None:
    data = encode(photo(200, 200), kind)
    assert reason(BadSample, data[: int(len(data) * share)], 64) == "undecodable_image"


def test_a_file_without_its_tail_is_refused() -> None:
    for extra in ({}, {"progressive": True}):
        jpeg = encode(photo(200, 200), "JPEG", **extra)
        assert reason(BadSample, jpeg[:-2], 64) == "undecodable_image"
        assert reason(BadSample, jpeg[: len(jpeg) // 2] + b"\xff\xd9", 64) == "undecodable_image"
    whole = rows(photo(200, 200))
    packed = zlib.compress(whole)
    header = png((200, 200), 8, 2, b"").partition(b"IDAT")[0][:-4]
    for cut in (len(packed) // 2, len(packed) - 1):
        data = header + chunk(b"IDAT", packed[:cut]) + chunk(b"IEND", b"")
        assert reason(BadSample, data, 64) == "undecodable_image"
    assert decode(header + chunk(b"IDAT", packed) + chunk(b"IEND", b""), 64).shape == (3, 64, 64)


def claim_jpeg(data: bytes, height: int, width: int) -> bytes:
    at = next(m.start() for m in re.finditer(b"\xff[\xc0\xc2]\x00[\x11\x14]", data))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def claim_png(data: bytes, height: int, width: int) -> bytes:
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def claim_webp(data: bytes, height: int, width: int) -> bytes:
    sizes = struct.unpack_from("<I", data, 21)[0] >> 28 << 28 | (height - 1) << 14 | (width - 1)
    return data[:21] + struct.pack("<I", sizes) + data[25:]


@pytest.mark.parametrize(
    ("claim", "kind", "options"),
    [
        (claim_jpeg, "JPEG", {}),
        (claim_jpeg, "JPEG", {"progressive": True}),
        (claim_jpeg, "JPEG", {"mode": "CMYK"}),
        (claim_png, "PNG", {}),
        (claim_webp, "WEBP", {"lossless": True}),
    ],
)
def test_headers_that_claim_other_sizes_are_refused(
    claim: Callable[[bytes, int, int], bytes], kind: str, options: dict[str, Any]
) -> None:
    data = encode(photo(200, 200), kind, **options)
    assert decode(claim(data, 200, 200), 64).shape == (3, 64, 64)
    for height, width in ((100, 200), (200, 100), (400, 200), (200, 400), (100, 100), (184, 200), (200, 184)):
        assert reason(BadSample, claim(data, height, width), 64) == "undecodable_image"


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
        for wrong in (content + b"\0", content[:-1]):
            data = png(size, depth, colour, wrong, *palette, interlaced=interlaced)
            assert reason(BadSample, data, 1) == "undecodable_image"


def test_foreign_bytes_are_refused_and_a_little_padding_forgiven() -> None:
    for data in (b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", bytes(99), b"\xff\xd8"):
        assert reason(BadSample, data, 8) == "undecodable_image"
    data = encode(photo(64, 64), "JPEG")
    for padding in (1, 16, 64):
        assert (decode(data[:-2] + bytes(padding) + data[-2:], 32) == decode(data, 32)).all()
    assert reason(BadSample, data[:-2] + bytes(90) + data[-2:], 32) == "undecodable_image"
    # What follows the end is another file's affair.
    assert (decode(data + b"trailer", 32) == decode(data, 32)).all()


def test_a_jpeg_that_simplejpeg_does_not_know_goes_through_pillow() -> None:
    data = encode(photo(64, 64), "JPEG", quality=95)
    unknown_version = data[:11] + b"\x09" + data[12:]  # libjpeg warns of a JFIF 9
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg_header(unknown_version)
    assert psnr(decode(unknown_version, 32), by_pillow(data, (32, 32))) >= 44
    assert reason(BadSample, unknown_version[:-2], 32) == "undecodable_image"
