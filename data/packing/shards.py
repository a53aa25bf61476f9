"""Writing the shards of a pack, in processes that share nothing but counters."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

from data.packing.contents import LeftOut, Reader, Sample, json_bytes
from data.packing.output import Output
from data.progress import progress_bar
from data.shards.offsets import OFFSETS_SUFFIX, SHARD_SUFFIX, scan_shard, write_offsets
from data.store import open_store

LEFT_OUT_SUFFIX = ".left_out.json"
WITHOUT_CAPTION = "packed without a caption (no .txt)"
"""Where a shard's left-out rows lie are listed under it, too, the samples that are packed although nothing says what
they show."""

_ROWS_A_STEP = 50
"""How often a process says how far it is, and asks whether to stop."""


@dataclass(frozen=True)
class Stretch:
    """Neighbouring shards of a split, written by one process: their reader finds its place once for all of them."""

    split: str
    first: int
    rows: list[int]
    items: Sequence[Any]


def shard_stem(split: str, shard: int) -> str:
    return f"{split}/{shard:05d}"


_Progress = Callable[[int, int], None]
"""Takes the rows read and the rows left out since it was called last; may raise to stop the writing."""


def write_all(output: Output, read: Reader, stretches: list[Stretch], rows: int, workers: int) -> None:
    workers = min(workers, len(stretches))
    to_do = sum(sum(stretch.rows) for stretch in stretches)
    with progress_bar(rows, "image", "packing", initial=rows - to_do) as bar:
        left_out = 0

        def progress(read_rows: int, lacking: int) -> None:
            nonlocal left_out
            bar.update(read_rows)
            left_out += lacking
            if lacking:
                bar.set_postfix_str(f"{left_out} left out", refresh=False)

        if workers <= 1:
            for stretch in stretches:
                _write_stretch(output, read, stretch, progress)
        else:
            _write_in_processes(output, read, stretches, workers, progress)


def _write_stretch(output: Output, read: Reader, stretch: Stretch, progress: _Progress) -> None:
    rows = iter(read(stretch.items))
    for shard, count in enumerate(stretch.rows, stretch.first):
        _write_shard(output, shard_stem(stretch.split, shard), _counted(islice(rows, count), count, progress))


def _counted(rows: Iterable[Sample | LeftOut], count: int, progress: _Progress) -> Iterator[Sample | LeftOut]:
    number = lacking = reported = 0
    for number, row in enumerate(rows, 1):
        lacking += isinstance(row, LeftOut)
        if number % _ROWS_A_STEP == 0 or number == count:
            progress(number - reported, lacking)
            reported, lacking = number, 0
        yield row
    assert number == count, "a reader gives one result for each item"


def _write_shard(output: Output, stem: str, rows: Iterable[Sample | LeftOut]) -> None:
    # Imported here: it takes seconds, and who imports the contents may only want captions.
    from webdataset import TarWriter

    left_out: dict[str, list[str]] = {}
    with output.scratch(stem + SHARD_SUFFIX) as path:
        with open(path, "wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for row in rows:
                if isinstance(row, LeftOut):
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
    output: Output, read: Reader, stretches: list[Stretch], workers: int, progress: _Progress
) -> None:
    # Spawned, not forked: the caller may have threads (torch, OpenCV).
    context = multiprocessing.get_context("spawn")
    # Two counters a stretch, and at the end whether to stop. Without locks: a process that is killed holds none.
    shared = context.RawArray("q", 2 * len(stretches) + 1)
    seen = [0, 0]

    def report() -> None:
        now = [sum(shared[:-1:2]), sum(shared[1:-1:2])]
        progress(now[0] - seen[0], now[1] - seen[1])
        seen[:] = now

    with ProcessPoolExecutor(workers, mp_context=context, initializer=_enter, initargs=(output, read, shared)) as pool:
        pending = {pool.submit(_work, number, stretch) for number, stretch in enumerate(stretches)}
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
"""What a worker is given once, rather than with each stretch: an index of many shards is large."""


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


def _work(number: int, stretch: Stretch) -> None:
    output, read, shared = _mine

    def progress(rows: int, lacking: int) -> None:
        if shared[-1]:
            raise _Stopped
        shared[2 * number] += rows
        shared[2 * number + 1] += lacking

    _write_stretch(output, read, stretch, progress)
