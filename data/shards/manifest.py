"""Manifests of shards, and the offsets of the samples in each shard.

- A manifest, `index.json`, is a shard list of wids (WebDataset):
  `{"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [{"url", "nsamples", "filesize", ...}]}`.
  Ours adds `version` (ETag or mtime), `corruption` (where and why the shard ends early), `left_out` ({reason: number}
  of what is in no sample) and `offsets` (the path of its `.tar.idx` where that is not beside the shard). Where another
  tool wrote the manifest, a listing of the source supplies `version` and `filesize`.
- A url is relative to the manifest's folder for a shard below it, else absolute, as wids resolves them. Shards and
  manifest can be moved together if the versions stay: modification times (`mv`, `cp -a`, `rsync -a`) or ETags (those of
  multipart uploads depend on the part size). Otherwise they have to be indexed anew.
- One manifest may list several prefixes; a source takes the shards below its own.
- Offsets are Megatron-Energon's `.tar.idx`: little-endian uint64, the first header byte of each sample, then the end
  of the last member, where the closing zeros begin (in a shard that ends early: the end of its last whole sample).
  `00000.tar.left_out.json` holds what else the scan found. Both lie beside the shard, or in `<manifest>.offsets/`
  beside the manifest if the shards are read-only. Offsets of other tools do for training; indexing scans those shards.
- The manifest is written last and at once. A build that was interrupted resumes from the `.tar.idx` files.
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
from data.listing import format_left_out, kind_of, why_not_a_shard
from data.progress import followed
from data.shards.tar import BLOCK, TarScan, scan_tar
from data.store import ObjectInfo, ReadOnly, Store, StoreOptions, WritableStore, open_store

T = TypeVar("T")

MANIFEST = "index.json"
"""Name of a source's own manifest, at its root."""
SHARD_SUFFIX = ".tar"
OFFSETS_SUFFIX = ".idx"
"""Appended to the shard's name."""
_LEFT_OUT_SUFFIX = ".left_out.json"
"""Appended to the shard's name."""
UNCOUNTED = "uncounted shards (another tool wrote their .tar.idx: run launch/index.py to count what they lose)"
_KIND = "wids-shard-index-v1"


@dataclass(frozen=True, eq=False)
class ShardTable:
    """The shards of one source, sorted by name; arrays are int64 (shards,).

    Attributes:
        names: paths below the source's root.
        sizes: bytes; -1 where the manifest does not say.
        versions: as the store gives them; "" where the manifest does not say.
        counts: samples.
        corruption: where and why a shard ends early, by its number in the table.
        offset_paths: path of a shard's offsets in the manifest's folder, where they are not beside it; by its number.
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


# --- offsets of one shard ---


def list_shards(store: Store, left_out: Counter[str]) -> tuple[list[ObjectInfo], dict[str, ObjectInfo]]:
    """List a source's shards, sorted by name, and the files of offsets beside them, by name.

    Whatever else the source holds that a user may expect to be used (compressed shards, images) is added to `left_out`,
    by reason.
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
    """Write a `.tar.idx` file and, before it, the scan's `left_out`."""
    store.write(name.removesuffix(OFFSETS_SUFFIX) + _LEFT_OUT_SUFFIX, json.dumps(scan.left_out).encode())
    store.write(name, offsets_to_bytes(scan.offsets))


def offsets_to_bytes(offsets: NDArray[np.int64]) -> bytes:
    """The content of a `.tar.idx` file."""
    return offsets.astype("<u8").tobytes()


def offsets_from_bytes(content: bytes | bytearray, size: int) -> NDArray[np.int64] | None:
    """Parse a `.tar.idx` file, int64 (samples + 1,); None if it cannot be that of a shard of `size` bytes."""
    if len(content) < 16 or len(content) % 8:
        return None
    raw = np.frombuffer(content, "<u8")
    if raw[-1] > size or (raw[1:] <= raw[:-1]).any() or (raw[:-1] % BLOCK).any():
        return None
    return raw.astype(np.int64)


def read_offsets(
    store: Store, info: ObjectInfo, offsets_store: Store, written: ObjectInfo | None, *, counted: bool = False
) -> TarScan | None:
    """Read a shard's offsets from the file `written` of `offsets_store`; None if there is none that fits the shard.

    The file must not be older than the shard, and samples must begin where it says. The samples checked are the first
    two, two pairs within, and the last two, after which the archive must end or be corrupt; a pair shorter than the
    store's readahead takes one request. Offsets of other content are thus detected even where its size is the same.
    Where nobody counted what the shard leaves out, the result is None if `counted` is required, and has `UNCOUNTED` in
    its `left_out` otherwise.
    """
    if written is None or written.modified < info.modified:
        return None
    offsets = offsets_from_bytes(offsets_store.read(written.name), info.size)
    left_out = _read_left_out(offsets_store, written.name, info)
    if offsets is None or (left_out is None and counted):
        return None
    last = max(0, len(offsets) - 3)  # of the pairs of samples
    for n in sorted({0, last // 3, 2 * last // 3} - {last}):
        two = scan_tar(store, replace(info, size=int(offsets[n + 2])), int(offsets[n]) if n else 0)
        if two.corruption or not np.array_equal(two.offsets[:-1], offsets[n : n + 2]):
            return None
    rest = _check_end(scan_tar(store, info, int(offsets[last]) if last else 0), info)
    if not np.array_equal(rest.offsets, offsets[last:]):
        return None
    return TarScan(offsets, rest.corruption, Counter({UNCOUNTED: 1}) if left_out is None else left_out)


def _read_left_out(store: Store, offsets_name: str, shard: ObjectInfo) -> Counter[str] | None:
    """The `left_out` that `write_offsets` wrote; None if it did not, or if the file is stale or malformed."""
    info = store.info(offsets_name.removesuffix(OFFSETS_SUFFIX) + _LEFT_OUT_SUFFIX)
    if info is None or info.modified < shard.modified:
        return None
    try:
        found = json.loads(store.read(info.name))
    except ValueError:
        return None
    return Counter(found) if _is_left_out(found) else None


def _is_left_out(value: object) -> bool:
    return isinstance(value, dict) and all(type(n) is int for n in value.values())


def _check_end(scan: TarScan, info: ObjectInfo) -> TarScan:
    """The scan of a shard, marked as corrupt if no zeros close the archive."""
    if scan.corruption is None and scan.offsets[-1] == info.size > 0:
        words = f"it ends at byte {info.size} without the zeros that close a tar: it may be cut off"
        return replace(scan, corruption=words)
    return scan


def scan_shard(store: Store, info: ObjectInfo) -> TarScan:
    """Scan a shard; where it has no sample, its `corruption` says why."""
    scan = _check_end(scan_tar(store, info), info)
    if len(scan.offsets) > 1:
        return scan
    words = scan.corruption or "no member that belongs to a sample"
    if words.endswith("header at byte 0"):
        begin = bytes(store.read(info.name, 0, min(BLOCK, info.size), version=info.version))
        words = f"not a tar but {kind}" if (kind := kind_of(begin)) else f"{words}: not a tar"
    elif scan.left_out:
        words += format_left_out(scan.left_out)
    return replace(scan, corruption=words)


# --- building a manifest ---


def build_manifest(
    sources: Sequence[WritableStore], place: WritableStore, name: str = MANIFEST, workers: int = 16
) -> Built:
    """Index every shard of some sources, and list them in one manifest, the file `name` of the store `place`.

    Args:
        sources: directories or prefixes with .tar shards, at any depth.
        workers: shards that are read at a time.

    Raises:
        DataError: a source has no shard or no sample; neither it nor `place` can be written; or the file `name` is
            there and is no manifest of shards.
        StoreError: faults of the network or a disk outlasted the retries.
    """
    entries: dict[str, dict[str, Any]] = {}
    corrupt = []
    left_out: Counter[str] = Counter()
    _refuse_foreign_file(place, name)
    for source in sources:
        infos, offsets_files = list_shards(source, left_out)
        if not infos:
            raise DataError(f"no {SHARD_SUFFIX} shard below {source.url}{format_left_out(left_out)}")
        found = for_each_shard(infos, _Indexer(source, offsets_files, place, name), workers)
        if not any(len(scan.offsets) > 1 for scan, _ in found):
            raise DataError(f"no shard below {source.url} has a sample: {infos[0].name}: {found[0][0].corruption}")
        for info, (scan, offsets_path) in zip(infos, found, strict=True):
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
            entries[url] = {**entry, "offsets": offsets_path} if offsets_path else entry
    head = json.dumps({"__kind__": _KIND, "wids_version": 1})
    lines = ",\n".join(json.dumps(entry) for entry in entries.values())
    place.write(name, f'{head[:-1]}, "shardlist": [\n{lines}\n]}}\n'.encode())
    samples, size = (sum(entry[key] for entry in entries.values()) for key in ("nsamples", "filesize"))
    return Built(len(entries), samples, size, corrupt, left_out)


def _refuse_foreign_file(place: Store, name: str) -> None:
    if place.info(name) is None:
        return
    content = place.read(name)
    if (format_ := _other_index(content)) or b'"shardlist"' not in content:
        raise DataError(
            f"{place.url}/{name} is {format_ or 'no index of tar shards'}, and is not overwritten: give the index "
            "another name (--out), or remove it"
        )


def _other_index(content: bytes | bytearray) -> str | None:
    """Name the format of another library's index; None if it is none that is known."""
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
    """Ensures that a shard's offsets are written; returns its scan, and their path if they are not beside the shard."""

    def __init__(
        self, source: WritableStore, offsets_files: dict[str, ObjectInfo], place: WritableStore, manifest: str
    ) -> None:
        self._source, self._offsets_files, self._place, self._manifest = source, offsets_files, place, manifest
        self._read_only = False

    def __call__(self, info: ObjectInfo) -> tuple[TarScan, str | None]:
        beside_shard = info.name + OFFSETS_SUFFIX
        written = self._offsets_files.get(beside_shard)
        if scan := read_offsets(self._source, info, self._source, written, counted=True):
            return scan, None
        in_folder = offsets_name(self._manifest, self._source.url, info.name)
        if scan := read_offsets(self._source, info, self._place, self._place.info(in_folder), counted=True):
            return scan, in_folder
        scan = scan_shard(self._source, info)
        if len(scan.offsets) == 1:
            return scan, None
        if not self._read_only:
            try:
                write_offsets(self._source, beside_shard, scan)
                return scan, None
            except ReadOnly:
                self._read_only = True
        write_offsets(self._place, in_folder, scan)
        return scan, in_folder


def for_each_shard(infos: Sequence[ObjectInfo], task: Callable[[ObjectInfo], T], workers: int) -> list[T]:
    """Run a task for every shard, `workers` at a time, with a progress bar; returns the results in order."""
    pool = ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(task, info) for info in infos]
        for future in followed(as_completed(futures), len(infos), "shard", "indexing"):
            future.result()  # the first failure ends it
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# --- reading a manifest ---


def open_place(manifest: str, options: StoreOptions = StoreOptions()) -> tuple[WritableStore, str]:
    """Open the folder of a manifest, given by its path or s3:// URL; returns it and the manifest's file name.

    Raises:
        DataError: the folder does not exist, or `manifest` names no file.
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
    if format_ := _other_index(content):
        raise DataError(
            f"{where} is {format_}, whose shards are not read: convert them to tars; index tars that are there with "
            "launch/index.py --out FILE, and name FILE as the source's index"
        )
    try:
        rows = [_row(place.url, entry) for entry in json.loads(content)["shardlist"]]
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
    names, counts, sizes, versions, corruption, offset_paths, left_out = zip(*shards, strict=True)
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
    """Fill in sizes and versions that the manifest lacks, from one listing of the source.

    Raises:
        DataError: a shard is not there, or is of another size than the manifest says.
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
    if not _is_left_out(left_out):
        raise ValueError(f"left_out of {url!r}")
    return _resolved(base, url), count, size, version, corruption, offsets, left_out


# --- addresses ---


def offsets_name(manifest: str, source_url: str, shard: str) -> str:
    """Path of a shard's offsets in the manifest's folder: `index.offsets/s3/bucket/prefix/00000.tar.idx`."""
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
