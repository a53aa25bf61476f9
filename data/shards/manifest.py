"""The manifest of indexed shards, `index.json`: the wids shard list of the WebDataset ecosystem, and some keys more.

- `{"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [{"url", "nsamples", "filesize", ...}]}`. Ours
  besides: `version` (the shard's ETag or mtime), `corruption` (where and why it ends early), `left_out` (what it holds that
  is in no sample: {reason: number}), and `offsets`, the path of its `.tar.idx` where that is not beside the shard. What
  others wrote has no `version`, and perhaps no `filesize`: a listing tells them then.
- A url is relative to the manifest's own folder for a shard below it, else absolute, as wids resolves them. So shards
  and manifest can be moved together if the versions stay: a directory with its modification times (`mv`, `cp -a`,
  `rsync -a`), objects with their ETags (those of multipart uploads change with the parts' size). Else they are indexed
  anew.
- One manifest may list several prefixes; a source takes those below its own.
- Offsets lie beside each shard; for shards that may only be read, in `<manifest>.offsets/` beside the manifest.
- It is written last and at once. What was indexed before is read from the `.tar.idx` files, so building goes on where
  it was stopped.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.listing import told
from data.progress import followed
from data.shards.offsets import (
    OFFSETS_SUFFIX,
    SHARD_SUFFIX,
    is_left_out,
    list_shards,
    read_offsets,
    scan_shard,
    write_offsets,
)
from data.shards.tar import TarScan
from data.store import ObjectInfo, ReadOnly, Store, StoreOptions, WritableStore, open_store

T = TypeVar("T")

MANIFEST = "index.json"
"""Where a source's own manifest lies, at its root."""

_KIND = "wids-shard-index-v1"


@dataclass(frozen=True, eq=False)
class ShardTable:
    """The shards of one source, sorted by name; arrays are int64 (shards,).

    Attributes:
        names: paths below the source's root.
        sizes: bytes; -1 where the manifest does not say.
        versions: as the store tells them; "" where the manifest does not say.
        counts: samples.
        corruption: where and why a shard ends early, by its number in the table.
        offset_paths: where in the manifest's folder a shard's offsets lie, if not beside it; by its number.
        left_out: what the shards hold that is in no sample, by reason.
    """

    names: tuple[str, ...]
    sizes: NDArray[np.int64]
    versions: tuple[str, ...]
    counts: NDArray[np.int64]
    corruption: dict[int, str]
    offset_paths: dict[int, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Built:
    """What a manifest lists; `corrupt` has a line for each shard that ends early, `left_out` what is in no sample."""

    shards: int
    samples: int
    bytes: int
    corrupt: list[str]
    left_out: Counter[str]


# --- building ---


def build_manifest(
    sources: Sequence[WritableStore], place: WritableStore, name: str = MANIFEST, workers: int = 16
) -> Built:
    """Index every shard of some sources, and list them in one manifest.

    Args:
        sources: directories or prefixes with .tar shards, at any depth.
        place: the manifest's folder.
        name: the manifest's file name there.
        workers: shards that are read at a time.

    Raises:
        DataError: a source has no shard, or no sample; or neither it nor the manifest's folder can be written; or what
            is there under the manifest's name is something else.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    entries: dict[str, dict[str, Any]] = {}
    corrupt = []
    left_out: Counter[str] = Counter()
    _check_replaceable(place, name)
    for source in sources:
        infos, beside = list_shards(source, left_out)
        if not infos:
            raise DataError(f"no {SHARD_SUFFIX} shard below {source.url}{told(left_out)}")
        indexer = _Indexer(source, beside, place, name)
        found = for_each_shard(infos, indexer, workers)
        if not any(len(scan.offsets) > 1 for scan, _ in found):
            raise DataError(f"no shard below {source.url} has a sample: {infos[0].name}: {found[0][0].corruption}")
        for info, (scan, offset_paths) in zip(infos, found, strict=True):
            url = _relative(place.url, source.url, info.name)
            if url in entries:
                raise DataError(f"{source.url} lies inside another prefix of this manifest: name each shard once")
            count = len(scan.offsets) - 1
            entry = {"url": url, "nsamples": count, "filesize": info.size, "version": info.version}
            if scan.corruption:
                entry["corruption"] = scan.corruption
                corrupt.append(f"{info.name}: {scan.corruption}; {count} samples kept")
            if scan.left_out:
                entry["left_out"] = scan.left_out
                left_out += scan.left_out
            entries[url] = {**entry, "offsets": elsewhere} if offset_paths else entry
    head = json.dumps({"__kind__": _KIND, "wids_version": 1})
    lines = ",\n".join(json.dumps(entry) for entry in entries.values())
    place.write(name, f'{head[:-1]}, "shardlist": [\n{lines}\n]}}\n'.encode())
    return Built(
        len(entries),
        sum(entry["nsamples"] for entry in entries.values()),
        sum(entry["filesize"] for entry in entries.values()),
        corrupt,
        left_out,
    )


def _check_replaceable(place: Store, name: str) -> None:
    """Refuse to write a manifest over what is none."""
    if place.info(name) is None:
        return
    content = place.read(name)
    if (format_ := _foreign(content)) or b'"shardlist"' not in content:
        raise DataError(
            f"{place.url}/{name} is {format_ or 'no index of tar shards'}, and is not overwritten: give the index "
            "another name (--out), or remove it"
        )


def _foreign(content: bytes | bytearray) -> str | None:
    """What an index of another tool is called; None for what is not known as one."""
    try:
        top = json.loads(content)
    except ValueError:
        return None
    if not isinstance(top, dict) or "shardlist" in top:
        return None
    if isinstance(top.get("shards"), list):
        return "an index of MosaicML Streaming (MDS)"
    return "an index of LitData" if isinstance(top.get("chunks"), list) else None


class _Indexer:
    """Sees to it that a shard's offsets are written; gives its scan, and where they lie if not beside it."""

    def __init__(
        self, source: WritableStore, beside: dict[str, ObjectInfo], place: WritableStore, manifest: str
    ) -> None:
        self._source, self._beside, self._place, self._manifest = source, beside, place, manifest
        self._read_only = False

    def __call__(self, info: ObjectInfo) -> tuple[TarScan, str | None]:
        beside = info.name + OFFSETS_SUFFIX
        if scan := read_offsets(self._source, info, self._source, self._beside.get(beside), counted=True):
            return scan, None
        offset_paths = offsets_name(self._manifest, self._source.url, info.name)
        if scan := read_offsets(self._source, info, self._place, self._place.info(offset_paths), counted=True):
            return scan, offset_paths
        scan = scan_shard(self._source, info)
        if len(scan.offsets) == 1:
            return scan, None
        if not self._read_only:
            try:
                write_offsets(self._source, beside, scan)
                return scan, None
            except ReadOnly:
                self._read_only = True
        write_offsets(self._place, elsewhere, scan)
        return scan, offset_paths


def for_each_shard(infos: Sequence[ObjectInfo], task: Callable[[ObjectInfo], T], workers: int) -> list[T]:
    """Do a task for every shard, `workers` at a time, and show how far it is; returns what it gave, in their order."""
    pool = ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(task, info) for info in infos]
        for future in followed(as_completed(futures), len(infos), "shard", "indexing"):
            future.result()  # the first failure ends it
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# --- reading ---


def open_place(manifest: str, options: StoreOptions = StoreOptions()) -> tuple[WritableStore, str]:
    """Open the folder of a manifest, given by its path or s3:// URL; returns it and the manifest's name in it.

    Raises:
        DataError: the folder does not exist.
    """
    folder, _, name = manifest.rpartition("/")
    if not name or (manifest.startswith("s3://") and folder == "s3:/"):
        raise DataError(f"manifest {manifest!r} should be a file, such as {manifest.rstrip('/')}/{MANIFEST}")
    folder = folder or ("/" if manifest.startswith("/") else ".")
    if "://" not in folder and not Path(folder).is_dir():
        raise DataError(f"manifest {manifest!r}: {folder!r} is not a directory")
    return open_store(folder, options), name


def read_manifest(place: Store, name: str, source_url: str) -> ShardTable:
    """Read the shards of a manifest that lie below a source's root.

    Raises:
        DataError: there is no such manifest, or it is malformed, or lists no shard of this source.
    """
    where = f"manifest {place.url}/{name}"
    content = place.read(name)
    if format_ := _foreign(content):
        raise DataError(
            f"{where} is {format_}, whose shards are not read: convert them to tars; index tars that are there with "
            "launch/index.py --out FILE, and name FILE as the source's index"
        )
    try:
        listed = json.loads(content)["shardlist"]
        rows = [_row(place.url, entry) for entry in listed]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where} is no wids index ({error!r}): remove it and write it anew with launch/index.py"
        ) from error
    root = _absolute(source_url).rstrip("/") + "/"
    below = ((url.removeprefix(root), *rest) for url, *rest in rows if url.startswith(root))
    shards = sorted(below, key=lambda row: str(row[0]))
    if not shards:
        example = f", but such as {rows[0][0]}" if rows else ""
        raise DataError(f"{where} lists no shard below {source_url}{example}")
    names, counts, sizes, versions, corruption, elsewhere, left_out = zip(*shards, strict=True)
    if len(set(names)) < len(names):
        raise DataError(f"{where} lists a shard below {source_url} twice: write it anew")
    return ShardTable(
        names,
        np.array(sizes, np.int64),
        versions,
        np.array(counts, np.int64),
        {shard: words for shard, words in enumerate(corruption) if words},
        {shard: path for shard, path in enumerate(offset_paths) if path},
        sum(map(Counter, left_out), Counter()),
    )


def complete(table: ShardTable, store: Store) -> ShardTable:
    """Fill in what the manifest does not say, from one listing of the source.

    Raises:
        DataError: a shard is not there, or of another size than the manifest says.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    listed = {info.name: info for info in store.list(SHARD_SUFFIX)}
    infos = []
    for name, size in zip(table.names, table.sizes.tolist(), strict=True):
        info = listed.get(name)
        if info is None or size not in (-1, info.size):
            fault = "is not there" if info is None else f"has {info.size:,} bytes, not {size:,}"
            raise DataError(f"{store.url}/{name} {fault}, other than its manifest says: run launch/index.py")
        infos.append(info)
    return replace(
        table,
        sizes=np.array([info.size for info in infos], np.int64),
        versions=tuple(old or info.version for old, info in zip(table.versions, infos, strict=True)),
    )


def _row(base: str, entry: dict[str, Any]) -> tuple[str, int, int, str, str, str, dict[str, int]]:
    url, count, size, version = entry["url"], entry["nsamples"], entry.get("filesize", -1), entry.get("version", "")
    corruption, offsets, left_out = entry.get("corruption", ""), entry.get("offsets", ""), entry.get("left_out", {})
    if not (type(count) is type(size) is int and count >= 0 and size >= -1):
        raise ValueError(f"nsamples {count!r} and filesize {size!r} of {url!r}")
    if not type(version) is type(corruption) is type(offsets) is str:
        raise ValueError(f"version, corruption or offsets of {url!r}")
    if not is_left_out(left_out):
        raise ValueError(f"left_out of {url!r}")
    return _resolved(base, url), count, size, version, corruption, offsets, left_out


# --- addresses ---


def offsets_name(manifest: str, source_url: str, shard: str) -> str:
    """Where offsets lie in a manifest's folder: `index.offsets/s3/bucket/prefix/00000.tar.idx`."""
    address = _absolute(f"{source_url}/{shard}").replace("://", "/").lstrip("/")
    # An object's name may hold anything; here it must not lead out of the folder.
    parts = [quote(part) if set(part) - {"."} else part.replace(".", "%2E") or "%2F" for part in address.split("/")]
    return "/".join([manifest.removesuffix(".json") + ".offsets", *parts]) + OFFSETS_SUFFIX


def _relative(base: str, source_url: str, shard: str) -> str:
    if not {".", ".."}.isdisjoint(shard.split("/")):
        raise DataError(f"shard {shard!r} below {source_url}: its name must be a plain path, for a manifest to list it")
    url = _absolute(f"{source_url}/{shard}")
    folder = _absolute(base).rstrip("/") + "/"
    if url.startswith(folder) and "//" not in f"/{shard}":  # which a relative path would lose
        url = url.removeprefix(folder)
        return f"./{url}" if ":" in url.partition("/")[0] else url  # what ends in ":" would be a scheme
    return url if "://" in url or "://" not in base else f"file://{url}"


def _resolved(base: str, url: str) -> str:
    """A shard's absolute address: a path, or a URL with its scheme."""
    if url.startswith("file:"):
        return url.removeprefix("file:").replace("//", "", 1)
    if "://" in url or url.startswith("/"):
        return url
    scheme, mark, folder = _absolute(base).rpartition("://")
    path = f"{folder.rstrip('/')}/{url}"
    return scheme + mark + (posixpath.normpath(path) if "/." in path else path)


def _absolute(url: str) -> str:
    return url if "://" in url else os.path.abspath(url)
