"""Writing WebDataset shards: OUT/train/00000.tar ..., OUT/heldout/00000.tar ..., OUT/dataset.json.

- The bytes depend on the contents and their arguments alone, not on the clock, the user or the number of workers.
- Rows are cut into shards by their numbers, before any is read: so processes share nothing, memory does not grow
  with the data, and a row that cannot be used leaves its shard one sample short.
- Beside a shard lie the rows that it lacks and why, `00000.left_out.json`, if there are any, and what its index is made
  of, `00000.tar.idx` and `00000.tar.left_out.json` (data/shards/offsets.py). A shard appears whole: so the names that
  are there say what is left to do. A split's `index.json` (which makes good a `.tar.idx` that a kill prevented), then
  `dataset.json`, come last.
- Until then `dataset.json.partial` says what is being packed (data/packing/output.py).

Writing the shards of a pack, in processes that share nothing but counters.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.packing.spec import DatasetSpec, Skipped, Reader, Sample, check, json_bytes
from data.packing.tars import SUMMARY, Output
from data.progress import progress_bar
from data.shards.manifest import build_manifest
from data.shards.manifest import OFFSETS_SUFFIX, SHARD_SUFFIX, scan_shard, write_offsets
from data.store import StoreOptions, open_store

LEFT_OUT_SUFFIX = ".left_out.json"
WITHOUT_CAPTION = "packed without a caption (no .txt)"
"""Where a shard's left-out rows lie are listed under it, too, the samples that are packed although nothing says what
they show."""

_ROWS_A_STEP = 50
"""How often a process says how far it is, and asks whether to stop."""


@dataclass(frozen=True)
class ShardRange:
    """Neighbouring shards of a split, written by one process: their reader finds its place once for all of them."""

    split: str
    first: int
    rows: list[int]
    items: Sequence[Any]


def shard_stem(split: str, shard: int) -> str:
    return f"{split}/{shard:05d}"


_Progress = Callable[[int, int], None]
"""Takes the rows read and the rows left out since it was called last; may raise to stop the writing."""


def write_all(output: Output, read: Reader, shard_ranges: list[ShardRange], rows: int, workers: int) -> None:
    workers = min(workers, len(shard_ranges))
    to_do = sum(sum(shard_range.rows) for shard_range in shard_ranges)
    with progress_bar(rows, "image", "packing", initial=rows - to_do) as bar:
        left_out = 0

        def progress(read_rows: int, lacking: int) -> None:
            nonlocal left_out
            bar.update(read_rows)
            left_out += lacking
            if lacking:
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
    number = lacking = reported = 0
    for number, row in enumerate(rows, 1):
        lacking += isinstance(row, Skipped)
        if number % _ROWS_A_STEP == 0 or number == count:
            progress(number - reported, lacking)
            reported, lacking = number, 0
        yield row
    assert number == count, "a reader gives one result for each item"


def _write_shard(output: Output, stem: str, rows: Iterable[Sample | Skipped]) -> None:
    # Imported here: it takes seconds, and who imports the contents may only want captions.
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
            # After the shard: offsets that are older than their shard are not trusted.
            write_offsets(output.store, stem + SHARD_SUFFIX + OFFSETS_SUFFIX, scan)


# --- processes ---


class _Stopped(Exception):
    """The parent gave up."""


def _write_in_processes(
    output: Output, read: Reader, shard_ranges: list[ShardRange], workers: int, progress: _Progress
) -> None:
    # Spawned, not forked: the caller may have threads (torch, OpenCV).
    context = multiprocessing.get_context("spawn")
    # Two counters a shard_range, and at the end whether to stop. Without locks: a process that is killed holds none.
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
"""What a worker is given once, rather than with each shard_range: an index of many shards is large."""


def _enter(output: Output, read: Reader, shared: Any) -> None:
    global _mine
    _mine = (output, read, shared)
    # Leave Ctrl-C to the parent, and with it, rather than wait for work for ever, when it is killed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(number: int, shard_range: ShardRange) -> None:
    output, read, shared = _mine

    def progress(rows: int, lacking: int) -> None:
        if shared[-1]:
            raise _Stopped
        shared[2 * number] += rows
        shared[2 * number + 1] += lacking

    _write_shards(output, read, shard_range, progress)


_MOST_SHARDS_A_RANGE = 64
_RANGES_A_WORKER = 4
"""So many that the last ones end at about the same time."""


@dataclass(frozen=True)
class Packed:
    """What dataset.json says, and whether it was there before."""

    summary: dict[str, Any]
    was_finished: bool


def pack(
    contents: DatasetSpec,
    out: str | Path,
    shard_size: int = 1000,
    workers: int = 1,
    options: StoreOptions = StoreOptions(),
) -> Packed:
    """Write shards into a folder or below an S3 prefix; nothing where finished, the rest where interrupted.

    Args:
        contents: what to pack.
        out: a folder or s3://bucket/prefix, new, empty or with this pack.
        shard_size: most samples in a shard; the rows of a split's shards differ by at most one.
        workers: processes.
        options: of the S3 server, if `out` is on one.

    Raises:
        UserError: a wrong number, or `out` holds anything else, or another process packs into it, or is no place to
            write to.
        DataError: no row is usable, or an object cannot be read or written.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    check(shard_size >= 1, "shard_size", shard_size, "at least 1")
    check(workers >= 1, "workers", workers, "at least 1")
    cuts = {split: _Cut(len(items), shard_size) for split, items in contents.splits.items()}
    plan = {
        "source": contents.name,
        **contents.about,
        "arguments": {**contents.arguments, "shard_size": shard_size},
        "versions": contents.versions,
        "rows": {split: len(items) for split, items in contents.splits.items()},
    }
    output = Output(str(out), options)
    if (there := output.finished(plan)) is not None:
        return Packed(there, was_finished=True)
    with output.hold(plan):
        shard_ranges = _shard_ranges(contents, cuts, _done(output, cuts), workers)
        rows = sum(cut.rows for cut in cuts.values())
        write_all(output, contents.read, shard_ranges, rows, workers)
        summary = _finish(output, plan, cuts, contents)
    return Packed(summary, was_finished=False)


# --- what is where ---


@dataclass(frozen=True)
class _Cut:
    """range(rows), cut into the fewest shards of at most `shard_size`, which differ by at most one in length."""

    rows: int
    shard_size: int

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_size)

    def start(self, shard: int) -> int:
        """Where a shard's rows begin, and those of the one before it end."""
        return self.rows * shard // self.shards


def _done(output: Output, cuts: Mapping[str, _Cut]) -> set[str]:
    """The stems of shards that need no more work: there, or without any usable row."""
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
    """The rows that a shard lacks, by reason, and the number of its samples without a caption."""
    content = json.loads(bytes(output.store.read(stem + LEFT_OUT_SUFFIX)))
    without_caption = len(content.pop(WITHOUT_CAPTION, ()))
    return Counter({reason: len(rows) for reason, rows in content.items()}), without_caption


def _shard_ranges(contents: DatasetSpec, cuts: Mapping[str, _Cut], done: set[str], workers: int) -> list[ShardRange]:
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
        shard_ranges.append(ShardRange(split, first, rows, contents.splits[split][starts[0] : starts[-1]]))
    return shard_ranges


def _finish(output: Output, plan: dict[str, Any], cuts: Mapping[str, _Cut], contents: DatasetSpec) -> dict[str, Any]:
    """Write what describes the whole: each split's index.json, and dataset.json."""
    names = output.names()
    left_out, samples, shards, without_caption = Counter(contents.left_out), {}, {}, 0
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
        listed = ", ".join(f"{n} ({why})" for why, n in left_out.items())
        raise DataError(f"no row of {contents.name} can be packed, all are left out: {listed or 'there are none'}")
    for split in cuts:
        if shards[split]:
            place = output.below(split)
            build_manifest([place], place)
    summary = {
        **plan,
        "samples": samples,
        "shards": shards,
        "left_out": dict(left_out),
        "without_caption": without_caption,
    }
    output.store.write(
        SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    )
    return summary
