"""Where a shard's samples lie, in Megatron-Energon's `.tar.idx` files: read if they can be trusted, else scanned.

The layout: one little-endian uint64 for each sample, the first byte of its first header; then one for the end of the
last member, where the closing zeros begin. `00000.tar.idx` lies beside `00000.tar`. A shard that ends early keeps its
whole samples: its last number is the end of the last of them, and the fault is found there again. What else a scan
found that is lost (links, samples in pieces) lies in `00000.tar.left_out.json`, {reason: number}. Other tools do not
write that: their offsets do for training, but whoever indexes a shard scans it.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from data.listing import kind_of, told, why_not_a_shard
from data.shards.tar import BLOCK, TarScan, scan_tar
from data.store import ObjectInfo, Store, WritableStore

SHARD_SUFFIX = ".tar"
OFFSETS_SUFFIX = ".idx"
"""Appended to the shard's name."""
_LEFT_OUT_SUFFIX = ".left_out.json"
"""Likewise."""
UNCOUNTED = "uncounted shards (another tool wrote their .tar.idx: run launch/index.py to count what they lose)"


def list_shards(store: Store, left_out: Counter[str]) -> tuple[list[ObjectInfo], dict[str, ObjectInfo]]:
    """List a source's shards, sorted by name, and the files of offsets beside them, by their names.

    What the source holds besides and somebody may miss (compressed shards, images) is added to `left_out`, by reason.

    Raises:
        DataError, StoreError: the store cannot be listed.
    """
    shards, offsets = [], {}
    for info in store.list(left_out=left_out):
        if info.name.endswith(SHARD_SUFFIX):
            shards.append(info)
        elif info.name.endswith(SHARD_SUFFIX + OFFSETS_SUFFIX):
            offsets[info.name] = info
        elif reason := why_not_a_shard(info.name):
            left_out[reason] += 1
    return shards, offsets


def write_offsets(store: WritableStore, name: str, scan: TarScan) -> None:
    """Write a `.tar.idx` file and, before it, what else the scan found.

    Raises:
        DataError, StoreError: the store cannot be written.
    """
    store.write(name.removesuffix(OFFSETS_SUFFIX) + _LEFT_OUT_SUFFIX, json.dumps(scan.left_out).encode())
    store.write(name, to_bytes(scan.offsets))


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


def read_offsets(
    store: Store, info: ObjectInfo, beside: Store, written: ObjectInfo | None, *, counted: bool = False
) -> TarScan | None:
    """Read a shard's offsets from the file `written` of the store `beside`, if there is one that fits the shard.

    It must not be older than the shard; and samples must begin where it says: the first two, two pairs within, and the
    last two, behind which the archive must end or be corrupt. A pair takes one request where it is shorter than the
    store's readahead. So offsets of other content are found out even where that was as long. Where what the shard
    leaves out was not counted, there is None if it should be `counted`, and else `UNCOUNTED` is left out.

    Raises:
        DataError, StoreError: either store cannot be read.
    """
    if written is None or written.modified < info.modified:
        return None
    offsets = from_bytes(beside.read(written.name), info.size)
    left_out = _read_left_out(beside, written.name, info)
    if offsets is None or (left_out is None and counted):
        return None
    last = max(0, len(offsets) - 3)  # of the pairs of samples
    for n in sorted({0, last // 3, 2 * last // 3} - {last}):
        two = scan_tar(store, replace(info, size=int(offsets[n + 2])), int(offsets[n]) if n else 0)
        if two.corruption or not np.array_equal(two.offsets[:-1], offsets[n : n + 2]):
            return None
    rest = _closed(scan_tar(store, info, int(offsets[last]) if last else 0), info)
    if not np.array_equal(rest.offsets, offsets[last:]):
        return None
    return TarScan(offsets, rest.corruption, Counter({UNCOUNTED: 1}) if left_out is None else left_out)


def _read_left_out(beside: Store, offsets_name: str, shard: ObjectInfo) -> Counter[str] | None:
    """What `write_offsets` wrote of a shard besides its offsets; None where it did not or that cannot be read."""
    noted = beside.info(offsets_name.removesuffix(OFFSETS_SUFFIX) + _LEFT_OUT_SUFFIX)
    if noted is None or noted.modified < shard.modified:
        return None
    try:
        found = json.loads(beside.read(noted.name))
    except ValueError:
        return None
    return Counter(found) if is_left_out(found) else None


def is_left_out(value: object) -> bool:
    """Whether a value of a JSON file gives numbers by reason."""
    return isinstance(value, dict) and all(type(n) is int for n in value.values())


def _closed(scan: TarScan, info: ObjectInfo) -> TarScan:
    """The scan of a shard, which is corrupt if it has no end."""
    if scan.corruption is None and scan.offsets[-1] == info.size > 0:
        words = f"it ends at byte {info.size} without the zeros that close a tar: it may be cut off"
        return replace(scan, corruption=words)
    return scan


def scan_shard(store: Store, info: ObjectInfo) -> TarScan:
    """Scan a shard; one without any sample has a corruption that says so.

    Raises:
        DataError, StoreError: the store cannot be read.
    """
    scan = _closed(scan_tar(store, info), info)
    if len(scan.offsets) > 1:
        return scan
    words = scan.corruption or "no member that belongs to a sample"
    if words.endswith("header at byte 0"):
        begin = bytes(store.read(info.name, 0, min(BLOCK, info.size), version=info.version))
        words = f"not a tar but {kind}" if (kind := kind_of(begin)) else f"{words}: not a tar"
    elif scan.left_out:
        words += told(scan.left_out)
    return replace(scan, corruption=words)
