"""Writing WebDataset shards: OUT/train/00000.tar ..., OUT/heldout/00000.tar ..., OUT/dataset.json.

- The bytes depend on the spec and its arguments alone, not on the clock, the user or the number of workers.
- Rows are assigned to shards by number before any is read. So processes share nothing but counters, memory does not
  grow with the data, and a row that is skipped leaves its shard one sample short.
- Beside a shard lie the rows that it lacks and why, `00000.left_out.json`, and its offsets, `00000.tar.idx` and
  `00000.tar.left_out.json` (data/shards/manifest.py). A shard appears whole, so the names that are there say what is
  left to do. Each split's `index.json` (which also completes a missing `.tar.idx`) and `dataset.json` come last.
- `dataset.json.partial`, the plan, is written first, so that the same command resumes and another one is refused.
- In a folder a lock keeps out other processes; lock and plan are removed at the end. S3 has no locks, but processes
  with the same plan write the same bytes; the plan stays, so that packing needs no permission to delete.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data.errors import DataError, UserError
from data.files import FileLock, sync
from data.packing.spec import DatasetSpec, Reader, Sample, Skipped, check, json_bytes
from data.progress import progress_bar
from data.shards.manifest import OFFSETS_SUFFIX, SHARD_SUFFIX, build_manifest, scan_shard, write_offsets
from data.store import StoreOptions, WritableStore, open_store

SUMMARY = "dataset.json"
PLAN = "dataset.json.partial"
LOCK = "dataset.json.lock"
LEFT_OUT_SUFFIX = ".left_out.json"
WITHOUT_CAPTION = "packed without a caption (no .txt)"
"""Key in a shard's `.left_out.json` of the samples that are packed although nothing says what they show."""

_ROWS_A_STEP = 50
"""Rows after which a process reports progress and checks whether to stop."""
_MOST_SHARDS_A_RANGE = 64
_RANGES_A_WORKER = 4
"""Enough for the last ones to end at about the same time."""
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_SUMMARY_TYPES = {"source": str, "arguments": dict, "versions": dict, "rows": dict}


@dataclass(frozen=True)
class ShardRange:
    """Neighbouring shards of a split, written by one process, so that the reader seeks once for all of them."""

    split: str
    first: int
    rows: list[int]
    items: Sequence[Any]


def shard_stem(split: str, shard: int) -> str:
    return f"{split}/{shard:05d}"


_Progress = Callable[[int, int], None]
"""Called with the rows read and the rows skipped since the last call; may raise to stop the writing."""


def write_all(output: Output, read: Reader, shard_ranges: list[ShardRange], rows: int, workers: int) -> None:
    workers = min(workers, len(shard_ranges))
    to_do = sum(sum(shard_range.rows) for shard_range in shard_ranges)
    with progress_bar(rows, "image", "packing", initial=rows - to_do) as bar:
        left_out = 0

        def progress(read_rows: int, skipped_rows: int) -> None:
            nonlocal left_out
            bar.update(read_rows)
            left_out += skipped_rows
            if skipped_rows:
                bar.set_postfix_str(f"{left_out} left out", refresh=False)

        if workers <= 1:
            for shard_range in shard_ranges:
                _write_shards(output, read, shard_range, progress)
        else:
            _write_in_processes(output, read, shard_ranges, workers, progress)


def _write_shards(output: Output, read: Reader, shard_range: ShardRange, progress: _Progress) -> None:
    rows = iter(read(shard_range.items))
    for shard, count in enumerate(shard_range.rows, shard_range.first):
        _write_shard(output, shard_stem(shard_range.split, shard), _counted(islice(rows, count), count, progress))


def _counted(rows: Iterable[Sample | Skipped], count: int, progress: _Progress) -> Iterator[Sample | Skipped]:
    number = skipped_rows = reported = 0
    for number, row in enumerate(rows, 1):
        skipped_rows += isinstance(row, Skipped)
        if number % _ROWS_A_STEP == 0 or number == count:
            progress(number - reported, skipped_rows)
            reported, skipped_rows = number, 0
        yield row
    assert number == count, "a reader gives one result for each item"


def _write_shard(output: Output, stem: str, rows: Iterable[Sample | Skipped]) -> None:
    # Imported here: it takes seconds, and evaluation imports the specs for captions alone.
    from webdataset import TarWriter

    left_out: dict[str, list[str]] = {}
    with output.scratch(stem + SHARD_SUFFIX) as path:
        with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for row in rows:
                if isinstance(row, Skipped):
                    left_out.setdefault(row.reason, []).append(row.row)
                    continue
                if not row.members.get("txt", b"").strip():
                    left_out.setdefault(WITHOUT_CAPTION, []).append(row.key)
                tar.write({"__key__": row.key, **row.members})
        folder = open_store(str(path.parent))
        info = folder.info(path.name)
        assert info is not None
        scan = scan_shard(folder, info)
        if left_out:
            output.store.write(stem + LEFT_OUT_SUFFIX, json_bytes(left_out))
        if len(scan.offsets) > 1:
            output.put(path, stem + SHARD_SUFFIX)
            # After the shard: offsets older than their shard are not trusted.
            write_offsets(output.store, stem + SHARD_SUFFIX + OFFSETS_SUFFIX, scan)


# --- processes ---


class _Stopped(Exception):
    """The parent asked this process to stop."""


def _write_in_processes(
    output: Output, read: Reader, shard_ranges: list[ShardRange], workers: int, progress: _Progress
) -> None:
    # Spawned, not forked: the caller may have threads (torch, OpenCV).
    context = multiprocessing.get_context("spawn")
    # Two counters a range, then whether to stop. Without locks, since a killed process would keep one.
    shared = context.RawArray("q", 2 * len(shard_ranges) + 1)
    seen = [0, 0]

    def report() -> None:
        now = [sum(shared[:-1:2]), sum(shared[1:-1:2])]
        progress(now[0] - seen[0], now[1] - seen[1])
        seen[:] = now

    with ProcessPoolExecutor(workers, mp_context=context, initializer=_enter, initargs=(output, read, shared)) as pool:
        pending = {pool.submit(_work, number, shard_range) for number, shard_range in enumerate(shard_ranges)}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                report()
        except BaseException:
            shared[-1] = 1
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_mine: tuple[Output, Reader, Any]
"""What a worker receives once rather than with each range: an index of many shards is large."""


def _enter(output: Output, read: Reader, shared: Any) -> None:
    global _mine
    _mine = (output, read, shared)
    # The parent handles Ctrl-C. If it is killed, its workers exit instead of waiting for work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(number: int, shard_range: ShardRange) -> None:
    output, read, shared = _mine

    def progress(rows: int, skipped_rows: int) -> None:
        if shared[-1]:
            raise _Stopped
        shared[2 * number] += rows
        shared[2 * number + 1] += skipped_rows

    _write_shards(output, read, shard_range, progress)


@dataclass(frozen=True)
class Packed:
    """The content of dataset.json, and whether it was there before."""

    summary: dict[str, Any]
    was_finished: bool


def pack(
    spec: DatasetSpec,
    out: str | Path,
    shard_size: int = 1000,
    workers: int = 1,
    options: StoreOptions = StoreOptions(),
) -> Packed:
    """Write shards into a folder or below an S3 prefix, resuming if interrupted; a finished pack is left as it is.

    Args:
        out: a folder or s3://bucket/prefix that is new, empty or holds this pack.
        shard_size: maximum samples in a shard; the numbers of rows of a split's shards differ by at most one.
        workers: processes.
        options: of the S3 server, if `out` is on one.

    Raises:
        UserError: a number is out of range; or `out` holds anything else, is in use, or cannot be written.
        DataError: no row is usable, or an object cannot be read or written.
        StoreError: faults outlasted the retries.
    """
    check(shard_size >= 1, "shard_size", shard_size, "at least 1")
    check(workers >= 1, "workers", workers, "at least 1")
    cuts = {split: _Cut(len(items), shard_size) for split, items in spec.splits.items()}
    plan = {
        "source": spec.name,
        **spec.about,
        "arguments": {**spec.arguments, "shard_size": shard_size},
        "versions": spec.versions,
        "rows": {split: len(items) for split, items in spec.splits.items()},
    }
    output = Output(str(out), options)
    if (there := output.finished(plan)) is not None:
        return Packed(there, was_finished=True)
    with output.lock(plan):
        shard_ranges = _shard_ranges(spec, cuts, _done(output, cuts), workers)
        rows = sum(cut.rows for cut in cuts.values())
        write_all(output, spec.read, shard_ranges, rows, workers)
        summary = _finish(output, plan, cuts, spec)
    return Packed(summary, was_finished=False)


# --- which shards there are ---


@dataclass(frozen=True)
class _Cut:
    """range(rows), cut into the fewest shards of at most `shard_size`, whose lengths differ by at most one."""

    rows: int
    shard_size: int

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_size)

    def start(self, shard: int) -> int:
        """The first row of a shard."""
        return self.rows * shard // self.shards


def _done(output: Output, cuts: Mapping[str, _Cut]) -> set[str]:
    """The stems of shards that need no more work: they are there, or have no usable row."""
    names = output.names()
    done = set()
    for split, cut in cuts.items():
        for shard in range(cut.shards):
            stem = shard_stem(split, shard)
            if stem + SHARD_SUFFIX in names:
                done.add(stem)
            elif stem + LEFT_OUT_SUFFIX in names:
                rows = cut.start(shard + 1) - cut.start(shard)
                if _left_out(output, stem)[0].total() == rows:
                    done.add(stem)
    return done


def _left_out(output: Output, stem: str) -> tuple[Counter[str], int]:
    """The number of rows that a shard lacks, by reason, and the number of its samples without a caption."""
    content = json.loads(bytes(output.store.read(stem + LEFT_OUT_SUFFIX)))
    without_caption = len(content.pop(WITHOUT_CAPTION, ()))
    return Counter({reason: len(rows) for reason, rows in content.items()}), without_caption


def _shard_ranges(spec: DatasetSpec, cuts: Mapping[str, _Cut], done: set[str], workers: int) -> list[ShardRange]:
    missing = [(s, n) for s, cut in cuts.items() for n in range(cut.shards) if shard_stem(s, n) not in done]
    longest = min(_MOST_SHARDS_A_RANGE, max(1, len(missing) // (workers * _RANGES_A_WORKER)))
    found: list[tuple[str, int, int]] = []
    for split, shard in missing:
        if found and found[-1][::2] == (split, shard) and shard - found[-1][1] < longest:
            found[-1] = (split, found[-1][1], shard + 1)
        else:
            found.append((split, shard, shard + 1))
    shard_ranges = []
    for split, first, end in found:
        starts = [cuts[split].start(shard) for shard in range(first, end + 1)]
        rows = [stop - start for start, stop in pairwise(starts)]
        shard_ranges.append(ShardRange(split, first, rows, spec.splits[split][starts[0] : starts[-1]]))
    return shard_ranges


def _finish(output: Output, plan: dict[str, Any], cuts: Mapping[str, _Cut], spec: DatasetSpec) -> dict[str, Any]:
    """Write each split's index.json, and dataset.json."""
    names = output.names()
    left_out, samples, shards, without_caption = Counter(spec.left_out), {}, {}, 0
    for split, cut in cuts.items():
        stems = [shard_stem(split, shard) for shard in range(cut.shards)]
        shards[split] = sum(stem + SHARD_SUFFIX in names for stem in stems)
        lacking: Counter[str] = Counter()
        for stem in stems:
            if stem + LEFT_OUT_SUFFIX in names:
                lacks, uncaptioned = _left_out(output, stem)
                lacking, without_caption = lacking + lacks, without_caption + uncaptioned
        samples[split] = cut.rows - lacking.total()
        left_out += lacking
    if not any(samples.values()):
        reasons = ", ".join(f"{n} ({why})" for why, n in left_out.items())
        raise DataError(f"no row of {spec.name} can be packed, all are left out: {reasons or 'there are none'}")
    for split in cuts:
        if shards[split]:
            store = output.split_store(split)
            build_manifest([store], store)
    counts = {"samples": samples, "shards": shards, "left_out": dict(left_out), "without_caption": without_caption}
    summary = plan | counts
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    output.store.write(SUMMARY, text.encode("utf-8", "backslashreplace") + b"\n")
    return summary


# --- where it goes ---


class Output:
    """Where a pack goes: a folder, which `lock` creates if need be, or an S3 prefix. Pickles."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        if "://" in url and not url.startswith("s3://"):
            raise UserError(f"out is {url}: it should be a folder or s3://bucket/prefix")
        self.url, self._options = url, options
        self._folder = None if "://" in url else Path(url)

    @cached_property
    def store(self) -> WritableStore:
        """The store; a folder must exist by now."""
        return open_store(self.url, self._options)

    def split_store(self, split: str) -> WritableStore:
        return open_store(f"{self.url.rstrip('/')}/{split}", self._options)

    def names(self) -> set[str]:
        return {info.name for info in self.store.list()}

    def finished(self, plan: dict[str, Any]) -> dict[str, Any] | None:
        """The summary of a finished pack; None if there is none. Raises UserError if it is another pack's."""
        if self._folder is not None and not self._folder.is_dir():
            return None
        return self._same(SUMMARY, plan)

    @contextmanager
    def lock(self, plan: dict[str, Any]) -> Iterator[None]:
        """Start or resume this pack, locking the folder.

        Raises:
            UserError: the place holds anything else, is in use, or cannot be written.
        """
        if self._folder is None:
            self._begin(plan)
            yield
            return
        try:
            lock = FileLock(self._folder / LOCK, f"another process is packing: out {self.url}")
        except OSError as error:
            raise UserError(f"out is {self.url}: it should be a folder to write into: {error.strerror}") from error
        with lock:
            self._begin(plan)
            for left_behind in self._folder.glob("*/*.partial"):
                left_behind.unlink()
            yield
            (self._folder / PLAN).unlink()

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Yield a local path for an object that `put` will move to its place; what is left there is removed.

        Raises:
            UserError: the disk is full, or writing is not permitted.
        """
        with ExitStack() as stack:
            # In a folder it lies beside its place, as a rename is free and a copy writes everything twice.
            place = self._folder or Path(stack.enter_context(TemporaryDirectory(prefix="pack-")))
            # The process id keeps a worker that outlived its parent from writing into the same file.
            path = place / f"{name}.{os.getpid()}.partial"
            stack.callback(path.unlink, missing_ok=True)
            try:
                path.parent.mkdir(exist_ok=True)
                yield path
            except OSError as error:
                if error.errno not in _NOT_WRITABLE:
                    raise
                raise UserError(f"{path} cannot be written: {error.strerror}") from error

    def put(self, path: Path, name: str) -> None:
        """Move the file written to `scratch(name)` to its name, whole and durably."""
        if self._folder is None:
            self.store.upload(name, path)
            return
        sync(path)  # else the rename may outlive the content when the machine goes down
        os.replace(path, self._folder / name)
        sync((self._folder / name).parent)

    def _begin(self, plan: dict[str, Any]) -> None:
        if self._same(PLAN, plan) is not None:
            return
        if self.names() - {LOCK}:
            raise UserError(f"out is {self.url}: it should be new or empty, and it holds other files")
        self.store.write(PLAN, json.dumps(plan).encode())

    def _same(self, name: str, plan: dict[str, Any]) -> dict[str, Any] | None:
        """The content of a plan or summary, if it is there; UserError if it is not that of this pack."""
        if self.store.info(name) is None:
            return None
        try:
            there = json.loads(bytes(self.store.read(name)))
            is_ours = all(isinstance(there[key], kind) for key, kind in _SUMMARY_TYPES.items())
        except (ValueError, TypeError, LookupError):
            is_ours = False
        if not is_ours:
            raise UserError(
                f"out is {self.url}: it should be new or empty, and it holds a {name} that this command did not write"
            )
        was, now = ({"source": tree["source"], **tree["arguments"], **tree["versions"]} for tree in (there, plan))
        for field in [*now, *(was.keys() - now.keys())]:
            if was.get(field) != now.get(field):
                raise UserError(
                    f"out is {self.url}: it should be another place, for this one holds a pack whose {field} "
                    f"is {was.get(field)}, not {now.get(field)}"
                )
        return dict(there)
