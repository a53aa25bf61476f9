"""Image files for tests, well formed and odd ones, and ICC profiles."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from data.decode import decode
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


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(size: tuple[int, int], depth: int, colour: int, rows: bytes, *extra: bytes, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", size[1], size[0], depth, colour, 0, 0, interlaced)
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rows(values: NDArray[Any]) -> bytes:
    """Unfiltered rows of a PNG."""
    return b"".join(b"\0" + row.tobytes() for row in values)


def profile(space: bytes, tags: Mapping[bytes, bytes], pcs: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 2 for a display, or for a printer if it is CMYK's."""
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    white = xyz((0.9642, 1.0, 0.8249))
    all_tags = {b"desc": b"desc\0\0\0\0\0\0\0\x02p\0" + bytes(79), b"cprt": b"text\0\0\0\0-\0", b"wtpt": white, **tags}
    table, content = b"", b""
    for name, tag in all_tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(all_tags) + len(content), len(tag))
        content += tag + bytes(-len(tag) % 4)
    size = 132 + len(table) + len(content)
    head = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x02400000, kind, space, pcs, b"acsp") + white[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(all_tags)) + table + content


def xyz(values: Sequence[float]) -> bytes:
    """The tag of a colour."""
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def gamma(value: float) -> bytes:
    """The tag of a tone curve."""
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
"""Linear sRGB to XYZ under D50, primaries by column."""
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])


def rgb_profile(primaries: NDArray[np.float64], exponent: float) -> bytes:
    """A profile of primaries (XYZ under D50 by column) and one gamma."""
    tags = {name + b"XYZ": xyz(column) for name, column in zip((b"r", b"g", b"b"), primaries.T, strict=True)}
    return profile(b"RGB ", tags | {name + b"TRC": gamma(exponent) for name in (b"r", b"g", b"b")})


def lut_profile(space: bytes, lightness: NDArray[np.uint8]) -> bytes:
    """A profile by table, from every combination of no and all of each channel to a gray of this lightness of 255."""
    channels = lightness.ndim
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65536)
    grays = b"".join(bytes((value, 128, 128)) for value in lightness.ravel().tolist())
    table = b"mft1\0\0\0\0" + bytes((channels, 3, 2, 0)) + matrix + channels * ramp + grays + 3 * ramp
    return profile(space, {b"A2B0": table}, b"Lab ")


def encoded(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear sRGB, 0 to 1, as its values from 0 to 255."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def foreign(side: int) -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """Squares of one colour as others write them, by file name, and that colour in sRGB."""
    green = np.full((side, side, 3), (60, 180, 60), np.uint8)
    adobe = rgb_profile(ADOBE_RGB, 563 / 256)
    gray = np.full((side, side), 100 * 257, np.uint16)
    return {
        "gray16.png": (encode(gray), (100, 100, 100)),
        "gray16.tif": (encode(gray, "TIFF"), (100, 100, 100)),
        "adobe.png": (encode(green, icc_profile=adobe), (0, 180, 41)),
        "adobe.webp": (encode(green, "WEBP", lossless=True, icc_profile=adobe), (0, 180, 41)),
        "clear.png": (encode(np.zeros((side, side, 4), np.uint8)), (255, 255, 255)),
        "odd.png": (encode(green)[:33] + chunk(b"tEXt", b"a\0b")[:-4] + bytes(4) + encode(green)[33:], (60, 180, 60)),
    }


BOMB = png((60_000, 60_000), 8, 2, b"")
"""An image over any pixel limit."""
