"""Image formats that are decoded: what Pillow calls them, how their files are named, how their bytes begin.

One table for the decoder, for every listing of images and for packing, so that no format is known to one of them alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """An image format.

    Attributes:
        name: as a report shows it.
        extensions: of its files, in lower case without the dot; the first is given to members that are packed.
        matches: whether a file's bytes begin as the format's do.
    """

    name: str
    extensions: tuple[str, ...]
    matches: Callable[[bytes], bool]


def _begins(*magic: bytes) -> Callable[[bytes], bool]:
    return lambda content: content.startswith(magic)


def _is_avif(content: bytes) -> bool:
    # The first box lists the brands; HEIC has the same box with others.
    brands = content[8 : min(int.from_bytes(content[:4], "big"), 256)]
    return content[4:8] == b"ftyp" and (b"avif" in brands or b"avis" in brands)


FORMATS = {
    "JPEG": Format("JPEG", ("jpg", "jpeg", "jpe", "jfif"), _begins(b"\xff\xd8")),
    "PNG": Format("PNG", ("png", "apng"), _begins(b"\x89PNG\r\n\x1a\n")),
    "WEBP": Format("WebP", ("webp",), lambda content: content[:4] == b"RIFF" and content[8:12] == b"WEBP"),
    "AVIF": Format("AVIF", ("avif", "avifs"), _is_avif),
    "GIF": Format("GIF", ("gif",), _begins(b"GIF87a", b"GIF89a")),
    "BMP": Format("BMP", ("bmp", "dib"), _begins(b"BM")),
    "TIFF": Format("TIFF", ("tif", "tiff"), _begins(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
}
"""By Pillow's name. Formats outside this table may start another program (EPS runs Ghostscript)."""

_COMMON = ("jpg", "jpeg", "png", "webp")
IMAGE_EXTENSIONS = tuple(dict.fromkeys((*_COMMON, *(ext for it in FORMATS.values() for ext in it.extensions))))
"""All of the table's; where a sample has several, the first of them is its image."""

UNDECODED_EXTENSIONS = (
    "heic", "heif", "jxl", "jp2", "j2k", "jpx", "svg", "psd", "ico", "tga", "exr", "hdr",
    "raw", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2",
)  # fmt: skip
"""Of images in formats that are not decoded."""


def format_of(content: bytes) -> Format | None:
    """The format of a file by its first bytes, whatever its name says; None for one that is not decoded."""
    return next((it for it in FORMATS.values() if it.matches(content)), None)
