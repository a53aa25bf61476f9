"""Where the samples of a tar lie (`scan_tar`), and what one of them holds (`parse_sample`).

- WebDataset's convention: neighbouring members whose names agree up to the first dot of the basename are one sample;
  the rest of the name, in lower case, is the member's extension. Folders, links, sparse files, hidden files and
  `__meta__` members belong to no sample; a scan counts what is lost.
- v7, ustar, GNU and pax headers are parsed here: WebDataset's writer puts a pax header before every member, which
  takes tarfile ten times as long.
- Zero blocks end an archive, and another archive may follow (`cat a.tar b.tar`); it is read as well.
- Every header field is checked before it is used. A member's name is only compared and shown.
- A scan skips a member's data where a new request is cheaper than reading on (`Store.readahead`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import BadSample
from data.listing import IMAGE_EXTENSIONS, excluded
from data.store import ObjectInfo, Store

BLOCK = 512
"""Bytes of a header; contents are padded to a multiple of it."""

_ZEROS = bytes(1 << 14)
_MOST_CLOSING_ZEROS = 1 << 20
"""Bytes. Tars are padded to records, of 10,240 bytes by default; more zeros mean a file that was never filled."""
_PREFIXED = b"ustar\0"
"""Magic at byte 257 of a header with a name prefix; old GNU headers ("ustar  ") have times in its place."""
_REGULAR = (b"0", b"\0", b"7")
_EXTENSIONS = (b"x", b"X", b"L", b"K", b"g")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_NO_FILES = (b"3", b"4", b"5", b"6", b"D", b"V")
"""Devices, folders, FIFOs and volume labels, which are no part of a sample."""
_SPARSE = b"S"
_LOST = {
    b"1": "hard links in tars (write the files: tar --hard-dereference)",
    b"2": "symbolic links in tars (write the files: tar --dereference)",
    _SPARSE: "sparse files in tars (write them anew without tar --sparse)",
    b"M": "files in tars that begin in another volume (join the volumes)",
}
"""Member types that would belong to a sample if they were plain files; other types are counted by their letter."""
_NO_EXTENSION = "members of tars without an extension"
_FURTHER_IMAGES = "further images in samples (training takes one of each)"
_IMAGES = frozenset(IMAGE_EXTENSIONS)
_IN_PIECES = "samples in pieces (their members must be neighbours: sort them by name, as with tar --sort=name)"
_LARGEST_EXTENSION = 1 << 20
"""Bytes of a pax header or long name; a larger one is corrupt."""
_LARGEST_READ = 8 << 20
_META = re.compile(r"__[^/]*__(/|\Z)")


@dataclass(frozen=True)
class TarScan:
    """Where the samples of a shard lie.

    Attributes:
        offsets: int64 (samples + 1,): the first header byte of each sample, then the end of the last member, where the
            archive's closing zeros begin (in a corrupt shard: the end of its last whole sample).
        corruption: where and why reading ended early, or None. The samples before it are whole.
        left_out: members that belong to no sample, and samples whose members are not neighbours, by reason.
    """

    offsets: NDArray[np.int64]
    corruption: str | None
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class TarSample:
    """One sample: its key, folders included, and its members' contents by extension ("jpg", "txt", "seg.png")."""

    key: str
    members: dict[str, bytes]


class CorruptTar(Exception):
    """The tar ends early or is malformed from the member at byte `at` on; `name` is that member's, if known."""

    def __init__(self, words: str, at: int, name: str | None = None) -> None:
        super().__init__(words)
        self.at, self.name = at, name


def parse_sample(content: bytes | bytearray | memoryview) -> TarSample:
    """Split the bytes of one sample, tar headers included, into its members.

    Raises:
        BadSample: ("malformed_tar") the bytes are not those of exactly one sample.
    """
    view = memoryview(content)
    current: str | None = None
    members: dict[str, bytes] = {}
    try:
        for header, name, lost, at, size in walk(lambda start, stop: view[start:stop], 0, len(view)):
            if name is None or lost or (parts := split_name(name)) is None:
                continue
            if current is None and header:
                raise BadSample("malformed_tar", f"its first member begins at byte {header} of {len(view)}")
            key, extension = parts
            if extension in members or key != (current or key):
                raise BadSample("malformed_tar", f"member {name!r} belongs to another sample than {current!r}")
            current = key
            members[extension] = bytes(view[at : at + size])
    except CorruptTar as corruption:
        raise BadSample("malformed_tar", f"in the sample's bytes: {corruption}") from corruption
    if current is None:
        raise BadSample("malformed_tar", f"no member of a sample in {len(view)} bytes")
    return TarSample(current, members)


def scan_tar(store: Store, info: ObjectInfo, start: int = 0) -> TarScan:
    """Find the samples of a shard, from a header at byte `start` on, that are whole and precede the first fault.

    Bad content never raises: an unreadable shard has 0 samples, offsets [start] and a `corruption`. Raises DataError or
    StoreError if the shard cannot be read or changed meanwhile.
    """
    if info.size == 0:
        return TarScan(np.zeros(1, np.int64), "empty (0 bytes)")
    offsets: list[int] = []
    key: str | None = None
    extensions: set[str] = set()
    left_out: Counter[str] = Counter()
    earlier: dict[str, frozenset[str]] = {}  # extensions of the samples before this one, by key
    in_pieces: set[str] = set()
    end, corruption = start, None
    try:
        for header, name, lost, at, size in walk(_Reader(store, info), start, info.size):
            end = min(at + _padded(size), info.size)
            if name is None:
                continue
            parts = split_name(name)
            if parts is None:
                if not lost and not _META.match(name):
                    left_out[excluded(name) or _NO_EXTENSION] += 1
                continue
            if lost:
                left_out[lost] += 1
                continue
            # The same extension twice is two samples under one key, not one sample that lost a member.
            if parts[0] != key or parts[1] in extensions:
                if key is not None:
                    earlier[key] = earlier.get(key, frozenset()) | extensions
                key = parts[0]
                extensions.clear()
                offsets.append(header)
                if key in earlier and parts[1] not in earlier[key]:
                    in_pieces.add(key)
            if parts[1] in _IMAGES and not _IMAGES.isdisjoint(extensions):
                left_out[_FURTHER_IMAGES] += 1
            extensions.add(parts[1])
        if end == info.size and end % BLOCK:
            corruption = f"cut off at byte {end}, inside the padding of the last member"
    except CorruptTar as fault:
        corruption, end = str(fault), fault.at
        parts = split_name(fault.name) if fault.name is not None else None
        if parts is not None and offsets and parts[0] == key and parts[1] not in extensions:
            end = offsets.pop()  # it lost this member
    if not offsets:
        end = start
    if in_pieces:
        left_out[_IN_PIECES] = len(in_pieces)
    return TarScan(np.array([*offsets, end], np.int64), corruption, left_out)


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into its sample's key and its extension; None if it belongs to no sample."""
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    if dot <= slash or dot + 1 == len(name) or (name.startswith("__") and _META.match(name)):
        return None
    if slash and excluded(name):
        return None
    return name[:dot], name[dot + 1 :].lower()


def is_header(block: bytes) -> bool:
    """Whether 512 bytes are a tar header with the right checksum."""
    if len(block) != BLOCK:
        return False
    try:
        checksum = _number(block[148:156])
    except ValueError:
        return False
    # Without the zeros the sum is three times as fast.
    if checksum == 256 + sum(block.translate(None, b"\0")) - sum(block[148:156]):
        return True
    signed = np.frombuffer(block, np.int8).astype(np.int64)  # as some old writers summed
    return checksum == 256 + int(signed.sum() - signed[148:156].sum())


def walk(
    read: Callable[[int, int], bytes | memoryview], at: int, end: int
) -> Iterator[tuple[int, str | None, str | None, int, int]]:
    """Iterate over a tar's members, and those of archives that follow it, up to byte `end`.

    Args:
        read: maps (start, stop), stop <= end, to those bytes.
        at: first byte of a header.

    Yields:
        (first header byte, name, None, first byte and length of the content). The name is None for what is no file;
        the first None is replaced by the reason where a file is not stored in full, such as a link. The content lies
        before `end`.

    Raises:
        CorruptTar: what comes next is no header, or ends early.
    """
    begin = at  # the member's first header
    fields: dict[str, Any] = {}  # what extension headers said of the member
    while at < end:
        header = bytes(read(at, min(at + BLOCK, end)))
        if header == _ZEROS[: len(header)]:
            if begin != at:
                raise CorruptTar(f"the archive ends at byte {at}, after a header that announces a member", begin)
            begin = at = _next_archive(read, at, end)
            continue
        if len(header) < BLOCK:
            raise CorruptTar(f"cut off at byte {end}, inside the header at byte {at}", begin)
        name, kind, size = _fields(header, at, begin)
        data = at + BLOCK
        if kind in _EXTENSIONS:
            if size > _LARGEST_EXTENSION:
                raise CorruptTar(f"the header at byte {at} announces {size} bytes of names", begin)
            if data + size > end:
                raise CorruptTar(f"cut off at byte {end}, inside the header at byte {at}", begin)
            fields = {**_extension(kind, bytes(read(data, data + size)), at, begin), **fields}  # the first one counts
            if kind == b"g" and begin == at:
                begin = data + _padded(size)  # it belongs to the archive, not to the member
            at = data + _padded(size)
            continue
        name, size = fields.get("path", name), fields.get("size", size)
        if kind == _SPARSE:
            more = header[482]
            while more and data < end:
                more, data = (bytes(read(data, min(data + BLOCK, end))) + _ZEROS)[504], data + BLOCK
        if kind in _WITHOUT_DATA:
            size = 0
        if data + size > end:
            raise CorruptTar(f"cut off at byte {end}, inside member {name!r}", begin, name)
        if "sparse" in fields:
            lost = _LOST[_SPARSE]
        elif kind in _REGULAR or kind in _NO_FILES:
            lost = None
        else:
            lost = _LOST.get(kind) or f"members of tars of type {str(kind)[1:]}"
        file = (kind in _REGULAR and not name.endswith("/")) or lost is not None
        yield begin, name if file else None, lost, data, size
        begin = at = data + _padded(size)
        fields = {}
    if begin < at:
        raise CorruptTar(f"cut off at byte {end}, after a header that announces a member", begin)


def _next_archive(read: Callable[[int, int], bytes | memoryview], at: int, end: int) -> int:
    """The byte after the zeros that end an archive at `at`: the first header of another archive, or `end`."""
    closing = at
    while at < end:
        part = bytes(read(at, min(at + len(_ZEROS), end)))
        zeros = len(part) - len(part.lstrip(b"\0"))
        if zeros < len(part):
            at += zeros - zeros % BLOCK
            if not is_header(bytes(read(at, min(at + BLOCK, end)))):
                raise CorruptTar(
                    f"{end - at} bytes that are no tar follow the end of the archive, from byte {at}", closing
                )
            return at
        at += len(part)
    if end - closing > _MOST_CLOSING_ZEROS:
        raise CorruptTar(
            f"only zeros from byte {closing} on, {end - closing} of them: was the file ever filled?", closing
        )
    return end


def _fields(header: bytes, at: int, begin: int) -> tuple[str, bytes, int]:
    """Name, type and size of a header's member."""
    if not is_header(header):
        raise CorruptTar(f"no tar header at byte {at}", begin)
    name = header[: header.find(b"\0", 0, 100)] if b"\0" in header[:100] else header[:100]
    kind = header[156:157]
    if header[345] and header.startswith(_PREFIXED, 257) and kind not in _EXTENSIONS:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    try:
        size = _number(header[124:136])
    except ValueError:
        size = -1
    if size < 0:
        raise CorruptTar(f"the header at byte {at} has no valid size", begin)
    return _text(name), kind, size


def _extension(kind: bytes, content: bytes, at: int, begin: int) -> dict[str, Any]:
    """Fields of the next member ("path", "size", "sparse") in a long-name or pax header."""
    if kind == b"L":
        return {"path": _text(content.partition(b"\0")[0])}
    if kind not in (b"x", b"X"):
        return {}
    if b"path=" not in content and b"size=" not in content and b"sparse" not in content:
        return {}  # times and owners
    fields: dict[str, Any] = {}
    position = 0
    while position < len(content) and content[position]:
        try:
            length = int(content[position : content.index(b" ", position, position + 20)])
            record = content[content.index(b" ", position) + 1 : position + length - 1]
            keyword, equals, value = record.partition(b"=")
            if not (equals and 0 < length <= len(content) - position):
                raise ValueError
            if keyword == b"path":
                fields["path"] = _text(value)
            elif keyword == b"size":
                fields["size"] = int(value)
                if fields["size"] < 0:
                    raise ValueError
            elif keyword.startswith(b"GNU.sparse"):
                fields["sparse"] = True
        except ValueError:
            raise CorruptTar(f"the pax header at byte {at} is malformed", begin) from None
        position += length
    return fields


def _number(field: bytes) -> int:
    """Parse octal digits or, if the first bit is set, a binary number (two's complement)."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big") if field[0] == 0x80 else -1
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class _Reader:
    """Reads an object from front to back, for `walk`.

    A request begins where bytes are needed next, so skipped data costs nothing. Its length is `readahead`, and doubles
    while requests follow each other closely.
    """

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        self._store, self._info = store, info
        self._at, self._buffer = 0, memoryview(b"")
        self._length = store.readahead

    def __call__(self, start: int, stop: int) -> bytes | memoryview:
        buffered_until = self._at + len(self._buffer)
        if not self._at <= start <= stop <= buffered_until:
            dense = bool(self._buffer) and start <= buffered_until + self._store.readahead
            grown = 2 * self._length if dense else self._length // 2
            self._length = max(self._store.readahead, min(grown, _LARGEST_READ))
            until = min(max(stop, start + self._length), self._info.size)
            content = self._store.read(self._info.name, start, until, version=self._info.version)
            self._at, self._buffer = start, memoryview(content)
        return self._buffer[start - self._at : stop - self._at]
