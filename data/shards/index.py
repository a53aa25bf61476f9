"""The index of a source: its shards, and where in each the samples lie.

- Only the table of shards is in memory. A shard's offsets are loaded when its first sample is read, and a sample's
  members are found in its bytes: 36 million samples in 40,000 shards open in a second and pickle in a few MB.
- The table comes from a manifest (written by `launch/index.py` or another wids tool). A source of up to 1,000 shards
  without a manifest is indexed at the start of the run, with a notice.
- A source of up to 100,000 images and no .tar is read as virtual shards (`data/store/virtual.py`).
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
from data.listing import format_left_out
from data.shards.manifest import (
    MANIFEST,
    OFFSETS_SUFFIX,
    SHARD_SUFFIX,
    complete,
    for_each_shard,
    list_shards,
    offsets_from_bytes,
    open_place,
    read_manifest,
    read_offsets,
    scan_shard,
)
from data.shards.tar import TarScan, scan_tar
from data.store import ObjectInfo, OnFault, Store, StoreOptions
from data.store.virtual import SAMPLES_A_SHARD, ClassFolderStore, FolderStore

_MOST_UNINDEXED = 1000
_MOST_VIRTUAL = 100
"""Virtual shards of a folder of images; every process holds the names of all files and reads them one by one."""
_MOST_CLASS_SHARDS = 2000
"""Virtual shards of a folder of classes; ImageNet makes 1,282."""
_THREADS = 8
_CACHE_BYTES = 32 << 20
"""Bytes of offsets cached in a process; each of a rank's lanes reads one or two shards at a time."""


@dataclass(frozen=True, eq=False)
class SourceIndex:
    """A source as the loader reads it. Thread-safe; pickles without its cache.

    Attributes:
        name: the source's name, the first part of its samples' ids.
        names: the shards, sorted, relative to store.url.
        sizes: int64 (shards,), bytes.
        versions: the version of each shard that reads insist on.
        counts: int64 (shards,), samples.
        corruption: where and why a shard ends early, by its number.
        in_memory: offsets that need no reading, by shard.
        offset_paths: path of a shard's offsets in `place`, where they are not beside the shard.
        place: the manifest's folder.
        verified: whether the files of offsets were compared with the shards when the manifest was written; if not, they
            are compared when they are read.
        left_out: what the shards hold that is in no sample, by reason, as far as the manifest says.
    """

    name: str
    store: Store
    names: tuple[str, ...]
    sizes: NDArray[np.int64]
    versions: tuple[str, ...]
    counts: NDArray[np.int64]
    corruption: dict[int, str]
    in_memory: Mapping[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)
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

        Raises:
            DataError: the shard is gone, changed since it was indexed, or has another number of samples than its
                manifest says.
            StoreError: faults outlasted the retries.
        """
        if (offsets := self.in_memory.get(shard)) is not None:
            return offsets
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
            store, name = self.place, self.offset_paths[shard]
        written = store.info(name)
        offsets = None
        if written and self.verified:
            offsets = offsets_from_bytes(store.read(name, on_fault=on_fault), info.size)
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
        """Hash of shard names and sample counts, 16 hex digits; it changes whenever the order of samples would."""
        lines = (f"{name}\t{count}" for name, count in zip(self.names, self.counts.tolist(), strict=True))
        return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()

    @property
    def mean_bytes(self) -> float:
        """Mean bytes of a sample in its tar."""
        return float(self.sizes.sum() / self.counts.sum())


class _Cache:
    """The most recently used offsets, up to `_CACHE_BYTES`; pickles empty."""

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
    """Open a source by its manifest or, if it has none and is small, by indexing it now.

    Args:
        store: what holds the shards, at any depth, or images and captions.
        name: the source's name, without "/".
        manifest: path or s3:// URL of a manifest; None takes index.json at the source's root if there is one.
        notice: called with a sentence before anything slow.
        options: how to reach a manifest on S3.
        classes: the source is a folder of classes (`data/store/virtual.py`).

    Raises:
        DataError: the source is empty, has too many shards to index now, or does not fit its manifest.
        StoreError: faults outlasted the retries.
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
    infos, offsets_files = list_shards(store, left_out)
    remedy = f"run python launch/index.py {shlex.quote(store.url)}"
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
        raise DataError(
            f"source {name!r}: no {SHARD_SUFFIX} shard and no image below {store.url}{format_left_out(left_out)}"
        )
    if len(infos) > _MOST_UNINDEXED:
        raise DataError(
            f"source {name!r}: {len(infos):,} shards below {store.url} and no {MANIFEST} there: {remedy} first"
        )
    notice(
        f"source {name!r}: no {MANIFEST} at {store.url}, reading {len(infos)} shards; to do it once, {remedy}"
        f"{format_left_out(left_out)}"
    )
    return _indexed(store, name, infos, offsets_files)


def _class_folder(store: Store, name: str, notice: Callable[[str], None]) -> SourceIndex:
    notice(f"source {name!r}: listing the images in the folders of {store.url}")
    folders, left_out = ClassFolderStore(store), Counter[str]()
    infos = folders.list(left_out=left_out)
    if left_out:
        notice(f"source {name!r}{format_left_out(left_out)}")
    if len(infos) > _MOST_CLASS_SHARDS:
        raise DataError(
            f"source {name!r}: the images below {store.url} make {len(infos):,} shards of up to {SAMPLES_A_SHARD}, and "
            f"a folder of classes may make {_MOST_CLASS_SHARDS:,}: write them as WebDataset tars with a .cls member"
        )
    offsets = [folders.offsets(info.name) for info in infos]
    return SourceIndex(
        name,
        folders,
        tuple(info.name for info in infos),
        np.array([info.size for info in infos], np.int64),
        tuple(info.version for info in infos),
        np.array([len(of_shard) - 1 for of_shard in offsets], np.int64),
        {},
        in_memory=dict(enumerate(offsets)),
    )


def _listed(store: Store, name: str, place: Store, manifest: str) -> SourceIndex:
    table = read_manifest(place, manifest, store.url)
    ours = all(table.versions)
    table = table if ours else complete(table, store)
    return SourceIndex(
        name,
        store,
        table.names,
        table.sizes,
        table.versions,
        table.counts,
        table.corruption,
        offset_paths=table.offset_paths,
        place=place,
        verified=ours,
        left_out=table.left_out,
    )


def check_listing(index: SourceIndex) -> str | None:
    """Compare names, sizes and versions of a source's table with one listing of its store.

    Returns a notice if there are shards that the table lacks, else None.

    Raises:
        DataError: a shard is missing or changed.
        StoreError: faults outlasted the retries.
    """
    listed = {info.name: info for info in index.store.list(SHARD_SUFFIX)}
    stale = []
    for name, size, version in zip(index.names, index.sizes.tolist(), index.versions, strict=True):
        now = listed.get(name)
        # Not every server gives versions.
        if now is None or now.size != size or (now.version or version) != (version or now.version):
            stale.append(name)
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
    """What lies below a source's root, or in its shards, and is in no sample, by reason; lists the store once."""
    left_out = Counter(index.left_out)
    listed, _ = list_shards(index.store, left_out)
    if unknown := len({info.name for info in listed}.difference(index.names)):
        left_out["shards that are not in the manifest"] = unknown
    return left_out


def index_source(store: Store, name: str) -> SourceIndex:
    """Index every shard of a source now, however many there are.

    Raises:
        DataError: it has no shard, or no sample.
    """
    left_out: Counter[str] = Counter()
    infos, offsets_files = list_shards(store, left_out)
    if not infos:
        raise DataError(f"source {name!r}: no {SHARD_SUFFIX} shard below {store.url}{format_left_out(left_out)}")
    return _indexed(store, name, infos, offsets_files)


def _indexed(
    store: Store, name: str, infos: Sequence[ObjectInfo], offsets_files: Mapping[str, ObjectInfo]
) -> SourceIndex:
    def index(info: ObjectInfo) -> TarScan:
        written = offsets_files.get(info.name + OFFSETS_SUFFIX)
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
        in_memory={shard: scan.offsets for shard, scan in enumerate(scans)},
        left_out=sum((scan.left_out for scan in scans), Counter()),
    )
