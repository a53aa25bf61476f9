"""Where a shard's samples lie, in Megatron-Energon's `.tar.idx` files: read if they can be trusted, else scanned.

The layout: one little-endian uint64 for each sample, the first byte of its first header; then one for the end of the
last member, where the closing zeros begin. `00000.tar.idx` lies beside `00000.tar`. A shard that ends early keeps its
whole samples: its last number is the end of the last of them, and the fault is found there again.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from data.shards.tar import BLOCK, TarScan, scan_tar
from data.store import ObjectInfo, Store

SHARD_SUFFIX = ".tar"
OFFSETS_SUFFIX = ".idx"
"""Appended to the shard's name."""


def to_bytes(offsets: NDArray[np.int64]) -> bytes:
    """The bytes of a `.tar.idx` file."""
    return offsets.astype("<u8").tobytes()


def from_bytes(content: bytes | bytearray, size: int) -> NDArray[np.int64] | None:
    """Read a `.tar.idx` file, int64 (samples + 1,); None if it cannot be that of a shard of `size` bytes."""
    if len(content) < 16 or len(content) % 8:
        return None
    raw = np.frombuffer(content, "<u8")
    if raw[-1] > size or (raw[1:] <= raw[:-1]).any() or (raw[:-1] % BLOCK).any():
        return None
    return raw.astype(np.int64)


def read_offsets(store: Store, info: ObjectInfo, beside: Store, written: ObjectInfo | None) -> TarScan | None:
    """Read a shard's offsets from the file `written` of the store `beside`, if there is one that fits the shard.

    It must not be older than the shard; and samples must begin where it says: the first two, two pairs within, and the
    last two, behind which the archive must end or be damaged. A pair takes one request where it is shorter than the
    store's readahead. So offsets of other content are found out even where that was as long.

    Raises:
        DataError, StoreError: either store cannot be read.
    """
    if written is None or written.modified < info.modified:
        return None
    offsets = from_bytes(beside.read(written.name), info.size)
    if offsets is None:
        return None
    last = max(0, len(offsets) - 3)  # of the pairs of samples
    for n in sorted({0, last // 3, 2 * last // 3} - {last}):
        two = scan_tar(store, replace(info, size=int(offsets[n + 2])), int(offsets[n]) if n else 0)
        if two.damage or not np.array_equal(two.offsets[:-1], offsets[n : n + 2]):
            return None
    rest = scan_tar(store, info, int(offsets[last]) if last else 0)
    return TarScan(offsets, rest.damage) if np.array_equal(rest.offsets, offsets[last:]) else None


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
