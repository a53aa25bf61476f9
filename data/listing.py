"""Which files below a root count, and what a listing says of those that do not: one rule for disks, S3 and tars.

- A file counts unless its path below the root has a part that is hidden (`.ipynb_checkpoints`, `.snapshot`,
  `.Trash-1000`, `._0.tar`) or a folder that a system keeps for itself (`SYSTEM_FOLDERS`).
- Links are followed (`data/store/local.py`): each link to a file is a file, each real folder is listed once.
- What is left out is counted by reason. A reason is a phrase that a message can show; it holds the advice, if any.

Image formats that are decoded: what Pillow calls them, how their files are named, how their bytes begin.

One table for the decoder, for every listing of images and for packing, so that no format is known to one of them alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar


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


T = TypeVar("T")

SYSTEM_FOLDERS = (
    "__MACOSX", "lost+found", "@eaDir", "#snapshot", "#recycle", "@Recycle", "@Recently-Snapshot", "~snapshot",
    "$RECYCLE.BIN", "System Volume Information",
)  # fmt: skip
"""Snapshots, recycle bins, thumbnails and metadata of file systems, network storage and archivers."""

# A part that begins with a dot, "." and ".." aside, or is a system's folder.
_EXCLUDED = re.compile(rf"(?:\A|/)(\.(?!\.?(?:/|\Z))|(?:{'|'.join(map(re.escape, SYSTEM_FOLDERS))})(?=/|\Z))")
HIDDEN = "hidden"
SYSTEM = "in system folders (snapshots, recycle bins)"
IMAGE_BESIDE_SHARDS = "images beside the shards (a source is read as tars or as a folder of images)"

_DECOMPRESS = {
    "gz": "gunzip", "tgz": "gunzip", "zst": "unzstd", "tzst": "unzstd", "bz2": "bunzip2", "tbz": "bunzip2",
    "tbz2": "bunzip2", "xz": "unxz", "txz": "unxz", "lz4": "unlz4", "lzma": "unlzma", "z": "uncompress",
}  # fmt: skip
_ONE_WORD = ("tgz", "tzst", "tbz", "tbz2", "txz")  # for .tar.gz and so on
_ARCHIVES = ("zip", "7z", "rar")
_PARQUET = ("parquet", "pq")
_TABLES = {
    "csv": "pack it with launch/pack.py csv", "tsv": "pack it with launch/pack.py csv",
    **dict.fromkeys(_PARQUET, "pack it with launch/pack.py parquet"),
    "jsonl": "write it as CSV or Parquet, and pack that",
}  # fmt: skip
_OTHER_SHARDS = ("mds", "tfrecord", "tfrecords", "arrow", "beton")
LFS_POINTER = b"version https://git-lfs"
"""How the file begins that Git leaves in place of one it has not fetched."""
_MAGIC = {
    b"\x1f\x8b": "gzip-compressed: gunzip it first",
    b"\x28\xb5\x2f\xfd": "Zstandard-compressed: unzstd it first",
    b"BZh": "bzip2-compressed: bunzip2 it first",
    b"\xfd7zXZ\0": "xz-compressed: unxz it first",
    b"\x04\x22\x4d\x18": "LZ4-compressed: unlz4 it first",
    b"PK\x03\x04": "a ZIP archive or an Excel workbook: unpack it, or save it as CSV",
    b"7z\xbc\xaf": "a 7-Zip archive: unpack it",
    b"PAR1": "Parquet: pack it with launch/pack.py parquet",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"\x00\x05\x16\x07": "what macOS keeps beside a file (AppleDouble): remove it",
    LFS_POINTER: "a Git LFS pointer, not the file itself: run `git lfs pull`",
}


def excluded(name: str) -> str | None:
    """Why a path below a root does not count, by its name: `HIDDEN` or `SYSTEM`; None where it counts."""
    found = _EXCLUDED.search(name)
    return None if found is None else HIDDEN if found[1] == "." else SYSTEM


def drop_excluded(items: Iterable[T], name: Callable[[T], str], left_out: Counter[str]) -> list[T]:
    """The items of a flat listing whose names count; the others are counted, those of one folder as one."""
    counted, tops = [], dict[str, str]()
    for item in items:
        if (found := _EXCLUDED.search(name(item))) is None:
            counted.append(item)
        else:
            before, after = name(item)[: found.start(1)], name(item)[found.start(1) :]
            tops[before + after.partition("/")[0]] = HIDDEN if found[1] == "." else SYSTEM
    left_out.update(tops.values())
    return counted


def extension(name: str) -> str:
    """A path's extension in lower case, without the dot; "" where there is none."""
    stem, dot, found = name.rpartition("/")[2].rpartition(".")
    return found.lower() if dot and stem else ""


def is_image(name: str) -> bool:
    """Whether a path is, by its extension, that of an image in a format that is decoded."""
    return extension(name) in IMAGE_EXTENSIONS


def is_parquet(name: str) -> bool:
    """Whether a path is, by its extension, that of a Parquet file."""
    return extension(name) in _PARQUET


def why_not_parquet(name: str) -> str | None:
    """Why a path is left out of a folder of Parquet files; None for an image, which a row may name."""
    if is_image(name):
        return None
    ending = extension(name)
    if ending in _DECOMPRESS:
        return f"compressed (.{ending}: {_DECOMPRESS[ending]} it first)"
    return f"tables (.{ending}: {_TABLES[ending]})" if ending in _TABLES else "files that are no Parquet"


def why_not_a_shard(name: str) -> str | None:
    """Why a path that does not end in .tar is left out of a source of tars; None where it has nothing to do with it."""
    stem, _, suffix = name.rpartition(".")
    ending, tarred = extension(name), extension(stem) == "tar"
    if ending in _ONE_WORD or (tarred and ending in _DECOMPRESS):
        return f"compressed (.{'tar.' if tarred else ''}{ending}: {_DECOMPRESS[ending]} it first)"
    if ending == "tar":
        return f"tars that are not named .tar (.{suffix}: rename it)"
    if ending in _ARCHIVES:
        return f"archives (.{ending}: unpack it)"
    return IMAGE_BESIDE_SHARDS if is_image(name) else None


def why_not_an_image(name: str) -> str:
    """Why a path is no part of a folder of images, where no image has its name."""
    if (ending := extension(name)) in _TABLES:
        return f"tables (.{ending}: {_TABLES[ending]})"
    if ending in _OTHER_SHARDS:
        return f"shards in a form that is not read (.{ending}: convert it to tar)"
    return why_not_decoded(name) or why_not_a_shard(name) or "files without an image of their name"


def why_not_decoded(name: str) -> str | None:
    """Why the image of a path is left out, by its extension; None for what is no image or one that is decoded."""
    if (ending := extension(name)) in UNDECODED_EXTENSIONS:
        return f"images of a format that is not decoded (.{ending})"
    return None


def kind_of(content: bytes) -> str | None:
    """What a file that is not what it should be is, by its first bytes; None where they tell nothing."""
    return next((words for magic, words in _MAGIC.items() if content.startswith(magic)), None)


def format_left_out(left_out: Mapping[str, int]) -> str:
    """The end of a sentence, "; left out: 2 hidden, 1 compressed (...)"; "" where nothing is left out."""
    return f"; left out: {format_counts(left_out)}" if left_out else ""


def format_counts(left_out: Mapping[str, int]) -> str:
    """Numbers and reasons: "2 hidden, 1 compressed (.tar.gz: gunzip it first)"."""
    return ", ".join(f"{n:,} {reason}" for reason, n in left_out.items())
