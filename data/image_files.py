"""JPEG and PNG files, checked: metadata, and pixels only where all of them are there.

- JPEG. libjpeg gives the same warnings for missing pixels as for complete files that are oddly written: bytes between
  segments, wrong scan parameters, no end mark. So a file with warnings is rewritten, reduced to what decides the pixels
  and in the standard's form; if libjpeg still warns, pixels are missing. Nearly all files have no warning and cost
  nothing extra. libjpeg does not report scans that are missing at the end: in files of several scans they are counted.
- PNG. Decoders refuse a PNG for a damaged chunk or checksum that no pixel depends on, and accept one whose header
  states other sizes than its pixels have. So a PNG is decoded from a copy of its critical chunks alone, with right
  checksums and the number of pixel bytes verified. Of the pixels' two checksums, the chunks' and the stream's, one has
  to be right. A damaged ancillary chunk counts as absent.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from data.color import Pixels

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
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
    """A PNG reduced to its critical chunks, and its metadata."""

    file: bytes
    icc: bytes | None
    exif: bytes | None
    xmp: bytes | None
    clear_rgb16: bool
    """Whether it is 16-bit RGB with a transparent colour, which Pillow compares at 8 bits."""

    def rgba(self) -> NDArray[np.uint8]:
        """(H, W, 4), for a file with `clear_rgb16`."""
        bgra = cv2.imdecode(np.frombuffer(self.file, np.uint8), cv2.IMREAD_UNCHANGED)
        if bgra is None:
            raise ValueError("OpenCV does not read it")
        return ((bgra[..., [2, 1, 0, 3]].astype(np.uint32) + 128) // 257).astype(np.uint8)


def read_png(data: bytes, *, pixels: bool = True) -> Png:
    """Read a PNG, or its header and metadata alone.

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
        file=b"".join([_PNG_MAGIC, *chunks, *(_chunk(b"IDAT", part) for part in parts), _chunk(b"IEND", b"")]),
        icc=metadata.get("icc"),
        exif=metadata.get("exif"),
        xmp=metadata.get("xmp"),
        clear_rgb16=header[8:10] == bytes((16, _RGB)) and transparency is not None,
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte and end of each chunk's content up to IEND; the last may end past the data."""
    at = len(_PNG_MAGIC)
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
    """tRNS as Pillow expects it: a gray of 2 or 4 bits scaled to 8."""
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
        # what ImageMagick wrote before eXIf existed
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
    """The contents of the IDAT chunks, rewritten where the stream is too long or its own checksum is wrong.

    `trusted` says whether the chunks' checksums are right.

    Raises:
        ValueError, zlib.error: there are fewer pixel bytes than the header promises, or so many more that the picture
            is larger; or no checksum is right.
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
    except zlib.error:  # perhaps only its checksum is wrong
        pass
    if found == promised and inflate.eof:
        return parts
    if found >= larger:
        raise ValueError(f"its header promises {promised} bytes of pixels and it holds more")
    if not (trusted or inflate.eof):
        raise ValueError("its pixels are cut or damaged")
    rows = zlib.decompressobj(-zlib.MAX_WBITS).decompress(b"".join(parts)[2:], larger)  # ignores the checksum
    if not promised <= len(rows) < larger:
        raise ValueError(f"its header promises {promised} bytes of pixels and it holds {len(rows)}")
    return [zlib.compress(rows[:promised], 1)]


_SOI, _EOI, _SOS, _DRI, _APP0, _APP1, _APP2, _APP14 = 0xD8, 0xD9, 0xDA, 0xDD, 0xE0, 0xE1, 0xE2, 0xEE
_TABLES = (0xC4, 0xCC, 0xDB, _DRI)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = (0xC2, 0xCA)
_NO_SEGMENT = frozenset((0x00, 0x01, *range(0xD0, 0xD8), 0xFF))
_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_RESTART = re.compile(rb"\xff+([\xd0-\xd7])")

_STRAY_BYTES = 64
"""Most stray bytes after a scan. One column of blocks that the header does not mention would be more."""
_READ_AHEAD = 8
"""Bytes after a scan that libjpeg reads without a warning."""
_MOST_SCANS = 100
_MOST_WORK = 1 << 32
"""Pixels, over all scans or restart intervals, of a picture that may be rewritten: some seconds of work."""


@dataclass(frozen=True)
class Jpeg:
    """A JPEG by its header; height and width in pixels, as stored."""

    data: bytes
    height: int
    width: int
    components: tuple[int, ...]
    """Their identifiers."""
    progressive: bool
    one_scan: bool
    """Whether its first scan is the only one it needs."""
    exif: bytes | None
    xmp: bytes | None
    icc: bytes | None

    def load(self, least: tuple[int, int]) -> tuple[Pixels, int]:
        """Decode at the smallest of 1/8, 1/4, 1/2 and 1/1 of the size that is not below `least`, (height, width).

        Returns:
            (h, w, c): c is 1 for gray with a profile of its own, 3 for RGB, 4 for CMYK with 255 as full ink; and the
            divisor 8, 4, 2 or 1.

        Raises:
            ValueError: pixels are missing, or libjpeg cannot read it.
        """
        sizes = ((n, -(-self.height // n), -(-self.width // n)) for n in (8, 4, 2))
        shrink = next((n for n, height, width in sizes if height >= least[0] and width >= least[1]), 1)
        data = self.data
        try:
            pixels = self._decode(data, shrink)
        except ValueError as fault:
            if "subsampling" in str(fault):  # a rare one that simplejpeg does not know
                return self._load_by_pillow(), 1
            data = self._rewritten()
            pixels = self._decode(data, shrink)
        if not self.one_scan:
            self._check_scans(data)
        # Adobe stores CMYK inverted: 255 is no ink.
        return (255 - pixels if len(self.components) == 4 else pixels), shrink

    def _decode(self, data: bytes, shrink: int) -> Pixels:
        least = {"min_height": -(-self.height // shrink), "min_width": -(-self.width // shrink)}
        pixels: Pixels = simplejpeg.decode_jpeg(data, self._colours, **least)
        return pixels

    @property
    def _colours(self) -> str:
        """The colour space to decode to. Three equal channels are resized faster than one."""
        if len(self.components) == 1:
            return "GRAY" if self.icc and self.icc[16:20] == b"GRAY" else "RGB"
        return "CMYK" if len(self.components) == 4 else "RGB"

    def _load_by_pillow(self) -> Pixels:
        """Pillow refuses a cut file as simplejpeg does, but trusts an end mark and any size."""
        pixels = np.array(Image.open(io.BytesIO(self.data), formats=["JPEG"]))
        return pixels if pixels.ndim == 3 else pixels[..., None]

    def _check_scans(self, data: bytes) -> None:
        """Raise ValueError unless every bit of every coefficient of all components has its scan."""
        missing = {component: [True] * 64 for component in self.components}
        for segments, _ in _scans(data):
            _, start, end = segments[-1]
            first, last, bits = data[end - 3 : end] if self.progressive else (0, 63, 0)
            for at in range(start + 1, start + 1 + 2 * data[start], 2):
                missing[data[at]][first : last + 1] = [bits & 15 > 0] * (last + 1 - first)
        if any(any(coefficients) for coefficients in missing.values()):
            raise ValueError("it ends before the last of its scans")

    def _rewritten(self) -> bytes:
        """The file reduced to what decides its pixels: if libjpeg still warns, pixels are missing."""
        parts = []
        for segments, (start, end) in _scans(self.data):
            header = b"".join(self._segment(*segment) for segment in segments)
            parts.append((header, self.data[start:end].rstrip(b"\xff")))  # markers may follow fill bytes
        written = b"\xff\xd8"
        if len(parts) > _MOST_SCANS or len(parts) * self.height * self.width > _MOST_WORK:
            raise ValueError(f"it is faulty and has {len(parts)} scans")
        for header, scan in parts:
            written += header
            if len(parts) == 1 and not self.progressive:
                scan = self._without_stray_bytes(written, scan)
            written += self._trimmed(written, scan)
        return written + b"\xff\xd9"

    def _segment(self, marker: int, start: int, end: int) -> bytes:
        content = bytearray(self.data[start:end])
        if marker == _SOS and not self.progressive:
            content[-3:] = 0, 63, 0
        elif marker == _APP0 and content.startswith(b"JFIF\0") and len(content) > 6:
            content[5:7] = 1, 1  # the version
        elif marker == _APP14 and content.startswith(b"Adobe") and len(content) > 11:
            transforms = (0, 2) if len(self.components) == 4 else (0, 1)
            content[11] = content[11] if content[11] in transforms else transforms[1]
        elif marker not in (_SOS, *_TABLES, *_FRAMES):
            return b""
        return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2, "big") + content

    def _stray_bytes(self, data: bytes) -> int:
        """The number of bytes after the last scan that do not belong to it; ValueError if something else is wrong."""
        try:
            self._decode(data + b"\xff\xd9", 8)
        except ValueError as fault:
            if found := re.search(r"(\d+) extraneous bytes before marker 0xd9", str(fault)):
                return int(found[1])
            if "found marker 0xd9 instead of RST" not in str(fault):  # complete up to there
                raise
        return 0

    def _trimmed(self, header: bytes, scan: bytes, restarts: bool = False) -> bytes:
        """The data of a scan, or of an interval before a restart marker, without the bytes that libjpeg does not use.

        Raises:
            ValueError: pixels are missing, or there are so many unused bytes that they may be pixels.
        """
        end = len(scan)
        stray = self._stray_bytes(header + scan)
        if stray or (not restarts and scan.endswith(b"\0\0")):
            rest = len(scan.rstrip(scan[-1:]))
            if end - rest >= stray:
                # One repeated byte is padding, or fills a file that was not written to its end, and libjpeg may have
                # decoded some of it: the scan must be complete without it. Inside a scan nothing was filled, so an
                # interval keeps one such byte, which may be its own; so does a scan whose 0 belongs to an ff.
                end = rest + (restarts or scan[rest - 1 : rest] == b"\xff")
            elif stray <= _STRAY_BYTES:
                end -= stray
            else:
                raise ValueError(f"{stray} bytes too many in a scan")
            self._stray_bytes(header + scan[:end])
        for _ in range(_READ_AHEAD):
            try:
                self._stray_bytes(header + scan[: end - 1])
            except ValueError:
                break
            end -= 1
        return scan[:end]

    def _without_stray_bytes(self, header: bytes, scan: bytes) -> bytes:
        """A sequential scan without stray bytes before its restart markers.

        Each interval is decoded by itself, apart from the last, which may be shorter.
        """
        pieces = _RESTART.split(scan)  # interval, marker, interval ...
        if len(pieces) * self.height * self.width // 2 > _MOST_WORK:
            return scan
        for at in range(0, len(pieces) - 1, 2):
            pieces[at] = self._trimmed(header, pieces[at], restarts=True)
            pieces[at + 1] = b"\xff" + pieces[at + 1]
        return b"".join(pieces)


def read_jpeg(data: bytes) -> Jpeg:
    """Read a JPEG's header.

    Raises:
        ValueError: it has none.
    """
    frame = scan = exif = xmp = None
    profile: dict[int, bytes] = {}
    for marker, start, end in _segments(data, 2):
        if marker in _TABLES:
            continue
        if marker in _FRAMES:
            frame = frame or (marker, start, end)
        elif marker == _SOS:
            scan = start
        elif marker == _APP1 and exif is None and data.startswith(b"Exif\0\0", start):
            exif = data[start:end]
        elif marker == _APP1 and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", start):
            xmp = data[start:end]
        elif marker == _APP2 and data.startswith(b"ICC_PROFILE\0", start) and end > start + 14:
            profile[data[start + 12]] = data[start + 14 : end]
            parts = data[start + 13]
    if frame is None or scan is None or end > len(data):
        raise ValueError("it ends before its pixels begin")
    kind, start, end = frame
    components = tuple(data[start + 6 : end : 3])
    if len(components) not in (1, 3, 4):  # 0 of a frame that is cut
        raise ValueError(f"it has {len(components)} components")
    progressive = kind in _PROGRESSIVE
    return Jpeg(
        data=data,
        height=int.from_bytes(data[start + 1 : start + 3], "big"),
        width=int.from_bytes(data[start + 3 : start + 5], "big"),
        components=components,
        progressive=progressive,
        one_scan=not progressive and data[scan] == len(components),
        exif=exif,
        xmp=xmp,
        icc=b"".join(profile[n] for n in sorted(profile)) if profile and len(profile) == parts else None,
    )


def _segments(data: bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """Marker, first byte and end of each segment's content, up to a scan or the file's end.

    As libjpeg does, it skips fill bytes before markers and stray bytes between segments.
    """
    last = len(data) - 4
    while at <= last:
        marker = data[at + 1]
        if data[at] != 0xFF or marker in _NO_SEGMENT:
            if not (found := _SEGMENT.search(data, at)) or found.start() > last:
                return
            at = found.start()
            marker = data[at + 1]
        if marker in (_SOI, _EOI):
            return
        start, at = at + 4, at + 2 + max(2, data[at + 2] << 8 | data[at + 3])
        yield marker, start, at
        if marker == _SOS:
            return


def _scans(data: bytes) -> Iterator[tuple[list[tuple[int, int, int]], tuple[int, int]]]:
    """For each scan, the segments before it, its own last, and the first byte and end of its data."""
    at = 2
    while (segments := list(_segments(data, at))) and segments[-1][0] == _SOS and segments[-1][2] <= len(data):
        start = segments[-1][2]
        found = _AFTER_SCAN.search(data, start)
        at = found.start() if found else len(data)
        yield segments, (start, at)
