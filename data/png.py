"""PNG: what decides its picture, checked and apart from all else.

Decoders refuse a PNG for text, a profile or a checksum that no pixel depends on, and read one whose header claims
other sizes than its pixels have. So a PNG is decoded from a copy of its critical chunks alone, whose checksums are
right and whose bytes of pixels have been counted. Pixels have two checksums, their chunks' and their stream's: one of
them has to be right. An ancillary chunk that is damaged counts as absent.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

MAGIC = b"\x89PNG\r\n\x1a\n"
_CRITICAL = (b"IHDR", b"PLTE")
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Values a pixel, by colour type."""
_GRAY, _RGB = 0, 2
_ADAM7 = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
"""First row, rows apart, first column, columns apart of each pass of an interlaced PNG."""
_MOST_METADATA = 4 << 20
"""Bytes of a profile, EXIF or XMP, inflated; a larger one counts as absent."""


@dataclass(frozen=True)
class Png:
    """A PNG's picture as a file of its own, and what else is to be known of it."""

    file: bytes
    icc: bytes | None
    exif: bytes | None
    xmp: bytes | None
    clear_rgb16: bool
    """Whether it is RGB at 16 bits with a transparent colour, which Pillow compares at 8."""

    def rgba(self) -> NDArray[np.uint8]:
        """(H, W, 4) of one with `clear_rgb16`."""
        bgra = cv2.imdecode(np.frombuffer(self.file, np.uint8), cv2.IMREAD_UNCHANGED)
        if bgra is None:
            raise ValueError("OpenCV does not read it")
        return ((bgra[..., [2, 1, 0, 3]].astype(np.uint32) + 128) // 257).astype(np.uint8)


def read_png(data: bytes, *, pixels: bool = True) -> Png:
    """Read a PNG; without pixels only what its header says.

    Raises:
        ValueError, zlib.error: a critical chunk is damaged, or pixels are missing.
    """
    chunks, parts, metadata = [], [], dict[str, bytes]()
    trusted = True
    header = transparency = None
    for kind, start, end in _chunks(data):
        if kind == b"IDAT" and not pixels:
            continue
        content = data[start:end]
        checksum = data[end : end + 4]
        whole = len(checksum) == 4 and zlib.crc32(content, zlib.crc32(kind)) == int.from_bytes(checksum, "big")
        if kind == b"IDAT":
            trusted &= whole
            parts.append(content)
        elif kind in _CRITICAL:
            if not whole:
                raise ValueError(f"its {kind.decode()} chunk is cut or damaged")
            if kind == b"IHDR":
                header = content
            chunks.append(_chunk(kind, content))
        elif whole and kind == b"tRNS" and header:
            if transparency := _transparency(header, content):
                chunks.append(_chunk(kind, transparency))
        elif whole:
            metadata |= _metadata(kind, content)
    if header is None:
        raise ValueError("it has no header")
    if pixels:
        parts = _checked(header, parts, trusted)
    return Png(
        file=b"".join([MAGIC, *chunks, *(_chunk(b"IDAT", part) for part in parts), _chunk(b"IEND", b"")]),
        icc=metadata.get("icc"),
        exif=metadata.get("exif"),
        xmp=metadata.get("xmp"),
        clear_rgb16=header[8:10] == bytes((16, _RGB)) and transparency is not None,
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte and end of each chunk's content up to IEND; the last one's end may lie behind the data's."""
    at = len(MAGIC)
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return
        yield kind, at + 8, at + 8 + size
        at += 12 + size


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return len(content).to_bytes(4, "big") + kind + content + checksum.to_bytes(4, "big")


def _transparency(header: bytes, content: bytes) -> bytes | None:
    """tRNS as Pillow takes it: a gray of 2 or 4 bits at 8 of them."""
    depth, colour = header[8:10]
    if colour in (_GRAY, _RGB) and len(content) != 2 * _CHANNELS[colour]:
        return None
    if colour == _GRAY and depth < 16:
        most = 2**depth - 1
        gray = int.from_bytes(content, "big") & most
        return (gray if depth == 1 else gray * 255 // most).to_bytes(2, "big")
    return content


def _metadata(kind: bytes, content: bytes) -> dict[str, bytes]:
    """The profile, EXIF or XMP of a chunk, if it holds one."""
    name, _, rest = content.partition(b"\0")
    try:
        if kind == b"eXIf":
            return {"exif": content}
        if kind == b"iCCP":
            return {"icc": _inflate(rest[1:])}
        if kind == b"iTXt" and name == b"XML:com.adobe.xmp":
            text = rest[2:].split(b"\0", 2)[2]
            return {"xmp": _inflate(text) if rest[0] else text}
        # ImageMagick's way before there was eXIf.
        if kind in (b"zTXt", b"tEXt") and name in (b"Raw profile type exif", b"Raw profile type APP1"):
            text = _inflate(rest[1:]) if kind == b"zTXt" else rest
            found = bytes.fromhex(re.sub(rb"^\s*\w+\s+\d+\s", b"", text).decode("ascii"))
            return {"exif": found} if found.startswith(b"Exif\0\0") else {"xmp": found}
    except (IndexError, ValueError, zlib.error):  # no pixel depends on it
        pass
    return {}


def _inflate(content: bytes) -> bytes:
    inflate = zlib.decompressobj()
    found = inflate.decompress(content, _MOST_METADATA)
    if not inflate.eof:
        raise ValueError("cut or too large")
    return found


def _checked(header: bytes, parts: list[bytes], trusted: bool) -> list[bytes]:
    """The pixels' stream as libraries take it: written anew where it holds too much or its own checksum is wrong.

    Args:
        header: IHDR's content.
        parts: the IDATs'.
        trusted: whether their checksums are right.

    Raises:
        ValueError, zlib.error: it holds fewer bytes of pixels than the header promises, or as many more as a larger
            picture would; or no checksum is right.
    """
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    promised = 0
    for top, down, left, right in _ADAM7 if interlaced else ((0, 1, 0, 1),):
        rows, columns = -(-(height - top) // down), -(-(width - left) // right)
        if rows > 0 and columns > 0:
            promised += rows * (1 + -(-columns * depth * _CHANNELS[colour] // 8))
    bits = depth * _CHANNELS[colour]
    larger = promised + min(1 + -(-width * bits // 8), height * max(1, bits // 8))  # by a row or a column
    inflate, found, step = zlib.decompressobj(), 0, 1 << 18
    try:
        for part in parts:
            size = step
            while size == step and found < larger:
                size = len(inflate.decompress(part, step))
                found += size
                part = inflate.unconsumed_tail
    except zlib.error:  # perhaps its checksum alone
        pass
    if found == promised and inflate.eof:
        return parts
    if found >= larger:
        raise ValueError(f"its header promises {promised} bytes of pixels and it holds more")
    if not (trusted or inflate.eof):
        raise ValueError("its pixels are cut or damaged")
    rows = zlib.decompressobj(-zlib.MAX_WBITS).decompress(b"".join(parts)[2:], larger)  # no checksum is looked at
    if not promised <= len(rows) < larger:
        raise ValueError(f"its header promises {promised} bytes of pixels and it holds {len(rows)}")
    return [zlib.compress(rows[:promised], 1)]
