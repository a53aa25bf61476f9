"""What is in a source: its shards, and where in each the samples lie.

- In memory is only the table of shards; a shard's offsets are read when it is come by, and a sample's members are
  found in its bytes. So 36 million samples in 40,000 shards open in a second and pickle to other ranks in a few MB.
- The table comes from a manifest (`launch/index.py` writes it, and other tools of wids do); a source of up to 1,000
  shards without one is indexed at the start, with a notice.
- A source without any .tar, but with up to 100,000 images, is read as if it were shards (`data/store/virtual.py`).
"""

from __future__ import annotations

import hashlib
import shlex
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.listing import told
from data.shards.manifest import MANIFEST, complete, for_each_shard, open_place, read_manifest
from data.shards.offsets import OFFSETS_SUFFIX, SHARD_SUFFIX, from_bytes, list_shards, read_offsets, scan_shard
from data.shards.tar import TarScan, scan_tar
from data.store import ObjectInfo, OnFault, Store, StoreOptions
from data.store.virtual import SAMPLES_A_SHARD, ClassFolderStore, FolderStore

_MOST_UNINDEXED = 1000
_MOST_VIRTUAL = 100
"""Shards of a folder of images: every process holds its files' names, and reads the files one by one."""
_MOST_CLASS_SHARDS = 2000
"""Of a folder of classes, whose images are read one by one, too: ImageNet makes 1,282."""
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
        corruption: where and why a shard ends early, by its number.
        held: offsets that are in memory, by shard.
        offset_paths: where in `place` a shard's offsets lie, if not beside it.
        place: the manifest's folder.
        verified: the offsets' files were compared with the shards when the manifest was written; else that is done when
            they are read.
        left_out: what the shards hold that is in no sample, by reason, as far as their manifest says.
    """

    name: str
    store: Store
    names: tuple[str, ...]
    sizes: NDArray[np.int64]
    versions: tuple[str, ...]
    counts: NDArray[np.int64]
    corruption: dict[int, str]
    held: Mapping[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)
    offset_paths: Mapping[int, str] = field(default_factory=dict, repr=False)
    place: Store | None = None
    verified: bool = True
    left_out: Mapping[str, int] = field(default_factory=dict)
    _cache: _Cache = field(default_factory=lambda: _Cache(), repr=False)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise DataError(f"source name {self.name!r} must be non-empty and without '/': ids are source/shard/key")
        if not self.counts.any():
            first = f"{self.names[0]}: {self.corruption.get(0)}" if self.names else "there is none"
            raise DataError(f"source {self.name!r}: no shard below {self.store.url} has a sample: {first}")

    def offsets(self, shard: int, on_fault: OnFault = None) -> NDArray[np.int64]:
        """The first byte of each sample of a shard, then the end of the last: int64 (counts[shard] + 1,).

        Args:
            on_fault: as `Store.read` has it.

        Raises:
            DataError: the shard is gone, or changed since it was indexed, or has not as many samples as its manifest
                says.
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
        if self.place is not None and shard in self.offset_paths:
            store, name = self.place, self.elsewhere[shard]
        written = store.info(name)
        offsets = None
        if written and self.verified:
            offsets = from_bytes(store.read(name, on_fault=on_fault), info.size)
        elif scan := read_offsets(self.store, info, store, written):
            offsets = scan.offsets
        if offsets is None or len(offsets) != self.counts[shard] + 1:
            offsets = scan_tar(self.store, info).offsets
        if len(offsets) != self.counts[shard] + 1:
            raise DataError(
                f"{self.store.url}/{info.name} has {len(offsets) - 1} samples, and its manifest says "
                f"{self.counts[shard]}: run launch/index.py"
            )
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
    options: StoreOptions = StoreOptions(),
    classes: bool = False,
) -> SourceIndex:
    """Open a source by its manifest or, where it has none and is small, by indexing it here.

    Args:
        store: what holds the shards, at any depth, or images and captions.
        name: the source's name, without "/".
        manifest: path or s3:// URL of a manifest; None takes index.json at the root of the source, if it is there.
        notice: is told before anything that takes long.
        options: how to reach the manifest where it is on S3.
        classes: it is a folder of classes (`data/store/virtual.py`).

    Raises:
        DataError: there is nothing in it, or too many shards to index now, or the manifest does not fit.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    if classes:
        if manifest is not None:
            raise DataError(f"source {name!r}: a folder of classes has no index: leave it out")
        return _class_folder(store, name, notice)
    if manifest is not None:
        return _listed(store, name, *open_place(manifest, options))
    if store.info(MANIFEST) is not None:
        return _listed(store, name, store, MANIFEST)
    left_out: Counter[str] = Counter()
    (infos, beside), remedy = list_shards(store, left_out), f"run python launch/index.py {shlex.quote(store.url)}"
    if not infos:
        left_out.clear()
        store, remedy = FolderStore(store), f"pack them with python launch/pack.py folder {shlex.quote(store.url)}"
        infos = store.list(SHARD_SUFFIX, left_out)
        if len(infos) > _MOST_VIRTUAL:
            raise DataError(
                f"source {name!r}: the images below {store.url} make {len(infos):,} shards of up to {SAMPLES_A_SHARD}, "
                f"and a folder may make {_MOST_VIRTUAL}: {remedy} first"
            )
    if not infos:
        raise DataError(f"source {name!r}: no {SHARD_SUFFIX} shard and no image below {store.url}{told(left_out)}")
    if len(infos) > _MOST_UNINDEXED:
        raise DataError(
            f"source {name!r}: {len(infos):,} shards below {store.url} and no {MANIFEST} there: {remedy} first"
        )
    notice(
        f"source {name!r}: no {MANIFEST} at {store.url}, reading {len(infos)} shards; to do it once, {remedy}"
        f"{told(left_out)}"
    )
    return _indexed(store, name, infos, beside)


def _class_folder(store: Store, name: str, notice: Callable[[str], None]) -> SourceIndex:
    notice(f"source {name!r}: listing the images in the folders of {store.url}")
    folders, left_out = ClassFolderStore(store), Counter[str]()
    infos = folders.list(left_out=left_out)
    if left_out:
        notice(f"source {name!r}{told(left_out)}")
    if len(infos) > _MOST_CLASS_SHARDS:
        raise DataError(
            f"source {name!r}: the images below {store.url} make {len(infos):,} shards of up to {SAMPLES_A_SHARD}, and "
            f"a folder of classes may make {_MOST_CLASS_SHARDS:,}: write them as WebDataset tars with a .cls member"
        )
    held = {number: folders.offsets(info.name) for number, info in enumerate(infos)}
    return SourceIndex(
        name,
        folders,
        tuple(info.name for info in infos),
        np.array([info.size for info in infos], np.int64),
        tuple(info.version for info in infos),
        np.array([len(held[number]) - 1 for number in range(len(infos))], np.int64),
        {},
        held=held,
    )


def _listed(store: Store, name: str, place: Store, manifest: str) -> SourceIndex:
    table = read_manifest(place, manifest, store.url)
    ours = all(table.versions)
    it = table if ours else complete(table, store)
    return SourceIndex(
        name,
        store,
        it.names,
        it.sizes,
        it.versions,
        it.counts,
        it.corruption,
        offset_paths=it.elsewhere,
        place=place,
        verified=ours,
        left_out=it.left_out,
    )


def check_listing(index: SourceIndex) -> str | None:
    """Compare a source as it is now, by one listing of its store, with what its table says: names, sizes, versions.

    Returns:
        A notice of shards that are there and not in the table; None where there are none.

    Raises:
        DataError: a shard is missing, or changed.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    listed = {info.name: info for info in index.store.list(SHARD_SUFFIX)}

    def is_stale(name: str, size: int, version: str) -> bool:
        now = listed.get(name)
        # Not every server tells versions.
        return now is None or now.size != size or (now.version or version) != (version or now.version)

    table = zip(index.names, index.sizes.tolist(), index.versions, strict=True)
    stale = [name for name, *said in table if is_stale(name, *said)]
    if stale:
        fault = "changed since" if stale[0] in listed else "is gone since"
        others = f", and {len(stale) - 1:,} more" if len(stale) > 1 else ""
        raise DataError(
            f"source {index.name!r}: {index.store.url}/{stale[0]} {fault} it was indexed{others}: "
            "run launch/index.py again"
        )
    if new := len(listed) - len(index.names):
        return (
            f"source {index.name!r}: {new:,} shards below {index.store.url} are not in its manifest and are left out; "
            "to have them, run launch/index.py again"
        )
    return None


def list_left_out(index: SourceIndex) -> Counter[str]:
    """What lies below a source's root, or in its shards, and is in no sample, by reason; lists its store once.

    Raises:
        DataError, StoreError: the store cannot be listed.
    """
    left_out = Counter(index.left_out)
    listed, _ = list_shards(index.store, left_out)
    if unknown := len({info.name for info in listed}.difference(index.names)):
        left_out["shards that are not in the manifest"] = unknown
    return left_out


def index_source(store: Store, name: str) -> SourceIndex:
    """Index every shard of a source here and now, however many there are.

    Raises:
        DataError: there is no shard in it, or no sample.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    left_out: Counter[str] = Counter()
    infos, beside = list_shards(store, left_out)
    if not infos:
        raise DataError(f"source {name!r}: no {SHARD_SUFFIX} shard below {store.url}{told(left_out)}")
    return _indexed(store, name, infos, beside)


def _indexed(store: Store, name: str, infos: Sequence[ObjectInfo], beside: Mapping[str, ObjectInfo]) -> SourceIndex:
    def index(info: ObjectInfo) -> TarScan:
        written = beside.get(info.name + OFFSETS_SUFFIX)
        return read_offsets(store, info, store, written) or scan_shard(store, info)

    scans = for_each_shard(infos, index, _THREADS)
    return SourceIndex(
        name,
        store,
        tuple(info.name for info in infos),
        np.array([info.size for info in infos], np.int64),
        tuple(info.version for info in infos),
        np.array([len(scan.offsets) - 1 for scan in scans], np.int64),
        {shard: scan.corruption for shard, scan in enumerate(scans) if scan.corruption},
        held={shard: scan.offsets for shard, scan in enumerate(scans)},
        left_out=sum((scan.left_out for scan in scans), Counter()),
    )
