"""Decoding against Pillow: the same picture within 44 dB, every format upright on white, nothing bad let through."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from data import decode as decode_module
from data.decode import decode
from data.errors import BadSample

Pixels = NDArray[np.uint8]


def photo(height: int, width: int) -> Pixels:
    """scikit-learn's photograph where it is installed, enlarged to size; else a smooth synthetic picture."""
    try:
        from sklearn.datasets import load_sample_image

        picture = Image.fromarray(load_sample_image("china.jpg"))
    except ImportError:
        y, x = np.mgrid[0:427, 0:640] / 100.0
        waves = np.stack([np.sin(x * 3 + y), np.cos(y * 4 - x), np.sin(x * y)], axis=2)
        picture = Image.fromarray((127 + 120 * waves).astype(np.uint8))
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))


def encode(pixels: NDArray[Any], kind: str = "PNG", mode: str | None = None, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, kind, **kwargs)
    return buffer.getvalue()


def by_pillow(data: bytes, side: int) -> Pixels:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1)


def psnr(a: Pixels, b: Pixels) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


@pytest.mark.parametrize("size", [(1024, 1024), (900, 1200), (1200, 800)])
def test_a_photograph_is_within_44_db_of_pillow_lanczos(size: tuple[int, int]) -> None:
    data = encode(photo(*size), "JPEG", quality=90)
    pixels = decode(data, 256)
    assert pixels.shape == (3, 256, 256) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert psnr(pixels, by_pillow(data, 256)) >= 44


def test_jpeg_is_decoded_at_the_smallest_scale_not_below_twice_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes, real = [], simplejpeg.decode_jpeg

    def spy(*args: object, **kwargs: object) -> Pixels:
        pixels: Pixels = real(*args, **kwargs)
        shapes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    data = encode(photo(512, 1024), "JPEG")
    decode(data, 128)
    decode(data, 64)
    decode(data, 500)
    assert shapes == [(256, 512), (128, 256), (512, 1024)]


def test_centre_crop_to_a_rectangle() -> None:
    pixels = np.zeros((40, 100, 3), np.uint8)
    pixels[:, 30:70] = (200, 100, 50)
    assert (decode(encode(pixels), 40) == np.array([200, 100, 50])[:, None, None]).all()
    assert decode(encode(pixels), (20, 30)).shape == (3, 20, 30)
    assert (decode(encode(pixels), (40, 100)) == pixels.transpose(2, 0, 1)).all()


CORNERS = np.zeros((32, 48, 3), np.uint8)
CORNERS[:16, :24], CORNERS[:16, 24:], CORNERS[16:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_pillows(kind: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(CORNERS, kind, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    got = decode(data, upright.shape[:2])
    assert np.abs(got.astype(int) - upright.transpose(2, 0, 1)).max() <= (3 if kind == "JPEG" else 0)


def test_formats_end_as_rgb_on_white() -> None:
    gray = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    expected = np.repeat(gray[None], 3, axis=0)
    assert (decode(encode(gray), 32) == expected).all()
    assert (decode(encode(gray.astype(np.uint16) * 257), 32) == expected).all()
    assert np.abs(decode(encode(gray, "JPEG", quality=100), 32).astype(int) - expected).max() <= 2
    assert (decode(encode(gray, "WEBP", mode="RGB", lossless=True), 32) == expected).all()

    clear = np.zeros((32, 32, 4), np.uint8)
    clear[:, 16:] = (10, 20, 30, 255)
    options: list[tuple[str, dict[str, Any]]] = [("PNG", {}), ("WEBP", {"lossless": True})]
    for kind, extra in options:
        got = decode(encode(clear, kind, **extra), 32)
        assert (got[:, :, :16] == 255).all()
        assert (got[:, :, 16:] == np.array([10, 20, 30])[:, None, None]).all()

    palette = encode(np.zeros((32, 32), np.uint8), mode="P", transparency=0)
    assert (decode(palette, 32) == 255).all()

    cmyk = encode(CORNERS, "JPEG", mode="CMYK", quality=95)
    assert np.abs(decode(cmyk, (32, 48)).astype(int) - CORNERS.transpose(2, 0, 1)).mean() < 3

    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (decode(buffer.getvalue(), 32)[0] == 255).all()


def test_small_images_are_dropped_or_enlarged() -> None:
    data = encode(photo(100, 300), "JPEG")
    with pytest.raises(BadSample) as caught:
        decode(data, 101)
    assert caught.value.reason == "small_image"
    assert decode(data, 128, small_images="upscale").shape == (3, 128, 128)
    assert decode(data, 100).shape == (3, 100, 100)
    thread = encode(np.zeros((1, 20_000, 3), np.uint8))
    with pytest.raises(BadSample, match="too_many_pixels"):
        decode(thread, 256, small_images="upscale")


def test_the_pixel_limit_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", never)
    monkeypatch.setattr(decode_module, "_to_rgb", never)
    for kind in ("JPEG", "PNG", "WEBP"):
        with pytest.raises(BadSample) as caught:
            decode(encode(photo(100, 100), kind), 32, max_pixels=9_999)
        assert caught.value.reason == "too_many_pixels"
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(BadSample, match="too_many_pixels"):
        decode(bomb + struct.pack(">I", 100) + b"IDAT" + bytes(104), 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9])
def test_truncated_files_are_refused(kind: str, share: float) -> None:
    data = encode(photo(200, 200), kind)
    with pytest.raises(BadSample) as caught:
        decode(data[: int(len(data) * share)], 64)
    assert caught.value.reason == "undecodable_image"


def test_foreign_bytes_are_refused_and_stray_bytes_forgiven() -> None:
    for data in (b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", bytes(99)):
        with pytest.raises(BadSample, match="undecodable_image"):
            decode(data, 8)
    data = encode(photo(64, 64), "JPEG")
    stray = data[:-2] + b"\x00\x00" + data[-2:]
    assert (decode(stray, 64) == decode(data, 64)).all()
