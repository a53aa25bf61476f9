"""What is in a source: its shards, and where in each the samples lie.

- In memory is only the table of shards; a shard's offsets are read when it is come by, and a sample's members are
  found in its bytes. So 36 million samples in 40,000 shards open in a second and pickle to other ranks in a few MB.
- The table comes from a manifest (`launch/index.py` writes it); a source of up to 1,000 shards without one is indexed
  at the start, with a notice.
- A source without any .tar, but with images, is read as if it were shards (`data/store/folder.py`).
"""

from __future__ import annotations

import hashlib
import shlex
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.shards.manifest import MANIFEST, open_place, read_manifest, scan_all
from data.shards.offsets import OFFSETS_SUFFIX, SHARD_SUFFIX, decode, read_offsets, scan_shard
from data.shards.tar import TarScan, scan_tar
from data.store import ObjectInfo, OnFault, Store, StoreOptions, changed
from data.store.folder import FolderStore

_MOST_UNINDEXED = 1000
_THREADS = 8
_CACHE_BYTES = 32 << 20
"""Of offsets, in a process; each of a rank's lanes reads one or two shards at a time."""


@dataclass(frozen=True, eq=False)
class SourceIndex:
    """A source as the loader wants it. Pickles without what it has cached; thread-safe.

    Attributes:
        name: the source's name, the first part of its samples' ids.
        store: what holds the shards.
        names: the shards, sorted, relative to store.url.
        sizes: int64 (shards,), bytes.
        versions: what the store must still say of each.
        counts: int64 (shards,), samples.
        damage: where and why a shard ends early, by its number.
        held: offsets that are in memory, by shard.
        elsewhere: where in `place` a shard's offsets lie, if not beside it.
        place: the manifest's folder.
    """

    name: str
    store: Store
    names: tuple[str, ...]
    sizes: NDArray[np.int64]
    versions: tuple[str, ...]
    counts: NDArray[np.int64]
    damage: dict[int, str]
    held: Mapping[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)
    elsewhere: Mapping[int, str] = field(default_factory=dict, repr=False)
    place: Store | None = None
    _cache: _Cache = field(default_factory=lambda: _Cache(), repr=False)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise DataError(f"source name {self.name!r} must be non-empty and without '/': ids are source/shard/key")
        if not self.counts.any():
            first = f"{self.names[0]}: {self.damage.get(0)}" if self.names else "there is none"
            raise DataError(f"source {self.name!r}: no shard below {self.store.url} has a sample: {first}")

    def offsets(self, shard: int, on_fault: OnFault = None) -> NDArray[np.int64]:
        """The first byte of each sample of a shard, then the end of the last: int64 (counts[shard] + 1,).

        Args:
            on_fault: as `Store.read` has it.

        Raises:
            DataError: the shard is gone, or changed since it was indexed.
            StoreError: the network or a disk failed for longer than the retries last.
        """
        if (held := self.held.get(shard)) is not None:
            return held
        if (cached := self._cache.get(shard)) is None:
            cached = self._load(shard, on_fault)
            self._cache.put(shard, cached)
        return cached

    def _load(self, shard: int, on_fault: OnFault) -> NDArray[np.int64]:
        if not self.counts[shard]:
            return np.zeros(1, np.int64)
        info = ObjectInfo(self.names[shard], int(self.sizes[shard]), self.versions[shard], 0.0)
        store, name = self.store, info.name + OFFSETS_SUFFIX
        if self.place is not None and shard in self.elsewhere:
            store, name = self.place, self.elsewhere[shard]
        offsets = decode(store.read(name, on_fault=on_fault), info.size) if store.info(name) else None
        if offsets is None or len(offsets) != self.counts[shard] + 1:
            offsets = scan_tar(self.store, info).offsets
        if len(offsets) != self.counts[shard] + 1:
            raise changed(self.store.url, info.name)
        return offsets

    @cached_property
    def fingerprint(self) -> str:
        """Shard names and sample counts, hashed: 16 hex digits that change whenever the order of samples would."""
        lines = (f"{name}\t{count}" for name, count in zip(self.names, self.counts.tolist(), strict=True))
        return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()

    @property
    def mean_bytes(self) -> float:
        """Bytes of a sample as it is read, on average."""
        return float(self.sizes.sum() / self.counts.sum())


class _Cache:
    """The offsets that were used last, up to `_CACHE_BYTES`; pickles empty."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrays: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._bytes = 0

    def __reduce__(self) -> tuple[type[_Cache], tuple[()]]:
        return _Cache, ()

    def get(self, shard: int) -> NDArray[np.int64] | None:
        with self._lock:
            if (array := self._arrays.get(shard)) is not None:
                self._arrays.move_to_end(shard)
            return array

    def put(self, shard: int, array: NDArray[np.int64]) -> None:
        with self._lock:
            if (before := self._arrays.pop(shard, None)) is not None:  # two threads may have read it
                self._bytes -= before.nbytes
            self._arrays[shard] = array
            self._bytes += array.nbytes
            while self._bytes > _CACHE_BYTES and len(self._arrays) > 1:
                self._bytes -= self._arrays.popitem(last=False)[1].nbytes


def open_index(
    store: Store,
    name: str,
    manifest: str | None = None,
    notice: Callable[[str], None] = print,
    options: StoreOptions = StoreOptions(),  # noqa: B008 (frozen)
) -> SourceIndex:
    """Open a source by its manifest or, where it has none and is small, by indexing it here.

    Args:
        store: what holds the shards, at any depth, or images and captions.
        name: the source's name, without "/".
        manifest: path or s3:// URL of a manifest; None takes index.json at the root of the source, if it is there.
        notice: is told before anything that takes long.
        options: how to reach the manifest where it is on S3.

    Raises:
        DataError: there is nothing in it, or too many shards to index now, or the manifest does not fit.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    if manifest is not None:
        return _listed(store, name, *open_place(manifest, options))
    if store.info(MANIFEST) is not None:
        return _listed(store, name, store, MANIFEST)
    infos, remedy = store.list(SHARD_SUFFIX), f"run python launch/index.py {shlex.quote(store.url)}"
    if not infos:
        store, remedy = FolderStore(store), "pack them with python launch/pack.py"
        infos = store.list(SHARD_SUFFIX)
    if not infos:
        raise DataError(f"source {name!r}: no {SHARD_SUFFIX} shard and no image below {store.url}")
    if len(infos) > _MOST_UNINDEXED:
        raise DataError(
            f"source {name!r}: {len(infos):,} shards below {store.url} and no {MANIFEST} there: {remedy} first"
        )
    notice(f"source {name!r}: no {MANIFEST} at {store.url}, reading {len(infos)} shards; to do it once, {remedy}")
    return _indexed(store, name, infos)


def _listed(store: Store, name: str, place: Store, manifest: str) -> SourceIndex:
    it = read_manifest(place, manifest, store.url)
    return SourceIndex(
        name, store, it.names, it.sizes, it.versions, it.counts, it.damage, elsewhere=it.elsewhere, place=place
    )


def _indexed(store: Store, name: str, infos: Sequence[ObjectInfo]) -> SourceIndex:
    if not infos:
        raise DataError(f"source {name!r}: no {SHARD_SUFFIX} shard below {store.url}")
    beside = {info.name: info for info in store.list(SHARD_SUFFIX + OFFSETS_SUFFIX)}

    def index(info: ObjectInfo) -> TarScan:
        written = beside.get(info.name + OFFSETS_SUFFIX)
        return read_offsets(store, info, store, written) or scan_shard(store, info)

    scans = scan_all(infos, index, _THREADS)
    return SourceIndex(
        name,
        store,
        tuple(info.name for info in infos),
        np.array([info.size for info in infos], np.int64),
        tuple(info.version for info in infos),
        np.array([len(scan.offsets) - 1 for scan in scans], np.int64),
        {shard: scan.damage for shard, scan in enumerate(scans) if scan.damage},
        held={shard: scan.offsets for shard, scan in enumerate(scans)},
    )
