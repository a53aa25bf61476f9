"""Where a shard's samples lie, in Megatron-Energon's `.tar.idx` files: read if they can be trusted, else scanned.

The layout: one little-endian uint64 for each sample, the first byte of its first header; then one for the end of the
last member, where the closing zeros begin. `00000.tar.idx` lies beside `00000.tar`. A shard that ends early keeps its
whole samples: its last number is the end of the last of them, and the fault is found there again.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.shards.tar import BLOCK, TarScan, is_header, scan_tar
from data.store import ObjectInfo, Store

SHARD_SUFFIX = ".tar"
OFFSETS_SUFFIX = ".idx"
"""Appended to the shard's name."""


def encode(offsets: NDArray[np.int64]) -> bytes:
    """The bytes of a `.tar.idx` file."""
    return offsets.astype("<u8").tobytes()


def decode(content: bytes | bytearray, size: int) -> NDArray[np.int64] | None:
    """Read a `.tar.idx` file, int64 (samples + 1,); None if it cannot be that of a shard of `size` bytes."""
    if len(content) < 16 or len(content) % 8:
        return None
    raw = np.frombuffer(content, "<u8")
    if raw[-1] > size or (raw[1:] <= raw[:-1]).any() or (raw[:-1] % BLOCK).any():
        return None
    return raw.astype(np.int64)


def read_offsets(store: Store, info: ObjectInfo, beside: Store, written: ObjectInfo | None) -> TarScan | None:
    """Read a shard's offsets from the file `written` of the store `beside`, if there is one that fits the shard.

    It must not be older than the shard, begin at a header, and end where the archive ends or is damaged.

    Raises:
        DataError, StoreError: either store cannot be read.
    """
    if written is None or written.modified < info.modified:
        return None
    offsets = decode(beside.read(written.name), info.size)
    if offsets is None:
        return None
    first, end = int(offsets[0]), int(offsets[-1])
    if not is_header(bytes(store.read(info.name, first, min(first + BLOCK, info.size), version=info.version))):
        return None
    rest = scan_tar(store, info, end)
    # With whole samples past the end, these are the offsets of another content.
    return TarScan(offsets, rest.damage) if len(rest.offsets) == 1 else None


def scan_shard(store: Store, info: ObjectInfo) -> TarScan:
    """Scan a shard; one without any sample has a damage that says so.

    Raises:
        DataError, StoreError: the store cannot be read.
    """
    scan = scan_tar(store, info)
    if len(scan.offsets) > 1:
        return scan
    words = scan.damage or "no member that belongs to a sample"
    magic = bytes(store.read(info.name, 0, min(4, info.size), version=info.version))
    if magic[:2] == b"\x1f\x8b" or magic == b"\x28\xb5\x2f\xfd":
        words = "compressed, not a plain tar: decompress it"
    elif words.endswith("header at byte 0"):
        words += ": not a tar"
    return TarScan(scan.offsets, words)
