"""Writing WebDataset shards: DIR/train/00000.tar ..., DIR/heldout/00000.tar ..., DIR/dataset.json.

- The bytes depend on the contents and their arguments alone, not on the clock, the user or the number of workers.
- A shard appears under its name when it is whole; `dataset.json` appears last and says the pack is finished.
- Until then `dataset.json.partial` says what is being packed, so that the same command takes up where it was
  stopped, another command is refused, and a second process does not write beside the first.

A sample's members: `<key>.jpg` (quality 95, no chroma subsampling), `<key>.txt` (the caption), `<key>.json`.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from tqdm import tqdm

from data.errors import UserError

JPEG_QUALITY = 95
SUMMARY = "dataset.json"
PLAN = "dataset.json.partial"


@dataclass(frozen=True)
class Sample:
    """One picture and its words: image (H, W, 3) uint8 RGB; `meta` is what goes into the .json member."""

    key: str
    image: NDArray[np.uint8]
    caption: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class Contents:
    """What to pack. `render` turns an item of a split into a sample; it is pure and can be pickled."""

    name: str
    licence: str
    credit: str
    arguments: dict[str, Any]
    splits: dict[str, Sequence[Any]]
    render: Callable[[Any], Sample]
    left_out: dict[str, int] = field(default_factory=dict)
    """What there is besides and the pack has not: reason and number."""
    versions: dict[str, str] = field(default_factory=dict)
    """Packages that the pictures or captions come from."""


@dataclass(frozen=True)
class Packed:
    """What dataset.json says, and whether it was there before."""

    summary: dict[str, Any]
    was_finished: bool


def check(good: bool, field: str, value: object, should_be: str) -> None:
    """Refuse a user's value.

    Raises:
        UserError: it is not good.
    """
    if not good:
        raise UserError(f"{field} is {value}: it should be {should_be}")


def check_common(size: int, heldout: float) -> None:
    """Refuse a wrong side in pixels or a wrong share to hold out.

    Raises:
        UserError: naming the argument and what would be right.
    """
    check(8 <= size <= 4096, "size", size, "a number of pixels between 8 and 4096")
    check(0 <= heldout < 1, "heldout", heldout, "a share of at least 0 and below 1")


def pack(contents: Contents, out: Path, shard_size: int = 1000, workers: int = 1) -> Packed:
    """Write shards into a folder; do nothing where this pack is finished, go on where it was interrupted.

    Args:
        contents: what to pack.
        out: the folder, new, empty or with this pack.
        shard_size: most samples in a shard; the shards of a split differ by at most one.
        workers: processes.

    Raises:
        UserError: a wrong number, or `out` holds anything else, or another process packs into it.
        OSError: `out` cannot be written.
    """
    check(shard_size >= 1, "shard_size", shard_size, "at least 1")
    check(workers >= 1, "workers", workers, "at least 1")
    shards = {split: _cut(len(items), shard_size) for split, items in contents.splits.items()}
    summary = {
        "source": contents.name,
        "licence": contents.licence,
        "credit": contents.credit,
        "arguments": {**contents.arguments, "shard_size": shard_size},
        "versions": contents.versions,
        "samples": {split: len(items) for split, items in contents.splits.items()},
        "shards": {split: len(ranges) for split, ranges in shards.items()},
        "left_out": contents.left_out,
    }
    if (out / SUMMARY).exists():
        _check_same(out, json.loads((out / SUMMARY).read_text()), summary)
        return Packed(summary, was_finished=True)

    with _plan(out, summary):
        jobs: list[tuple[Path, Sequence[Any]]] = []
        for split, ranges in shards.items():
            if ranges:
                (out / split).mkdir(exist_ok=True)
            for left_behind in (out / split).glob("*.partial"):
                left_behind.unlink()
            for number, part in enumerate(ranges):
                items = contents.splits[split][part.start : part.stop]
                jobs.append((out / split / f"{number:05d}.tar", items))
        _write_all(contents.render, [job for job in jobs if not job[0].exists()], workers)
        _replace(out / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False).encode() + b"\n")
        (out / PLAN).unlink(missing_ok=True)
    return Packed(summary, was_finished=False)


def _cut(n: int, shard_size: int) -> list[range]:
    """Cut range(n) into the fewest parts of at most `shard_size`, which differ by at most one in length."""
    parts = -(-n // shard_size)
    return [range(n * i // parts, n * (i + 1) // parts) for i in range(parts)]


# --- the directory ---


@contextmanager
def _plan(out: Path, summary: dict[str, Any]) -> Iterator[None]:
    """Hold the directory for this pack, by a lock on its plan that goes when the process goes."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out is {out}: it should be a folder, and it is a file")
    if out.is_dir() and any(out.iterdir()) and not (out / PLAN).exists():
        raise UserError(f"out is {out}: it should be a new or an empty folder, and it holds other files")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / PLAN, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"out is {out}: another process is packing into it") from None
        file.seek(0)
        try:
            _check_same(out, json.loads(file.read()), summary)
        except json.JSONDecodeError:  # new, or cut short before any shard was begun
            file.truncate(0)
            file.write(json.dumps(summary))
            file.flush()
        yield


def _check_same(out: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    was, now = ({"source": it["source"], **it["arguments"], **it["versions"]} for it in (there, here))
    for name, value in now.items():
        if was.get(name) != value:
            raise UserError(
                f"out is {out}: it should be another folder, for this one holds a pack whose {name} "
                f"is {was.get(name)}, not {value}"
            )


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    aside.write_bytes(content)
    os.replace(aside, path)


# --- the shards ---


def _write_all(render: Callable[[Any], Sample], jobs: list[tuple[Path, Sequence[Any]]], workers: int) -> None:
    workers = min(workers, len(jobs))
    with tqdm(total=sum(len(items) for _, items in jobs), unit="image", disable=None) as bar:
        if workers <= 1:
            for path, items in jobs:
                bar.update(_write_shard(render, path, items))
            return
        # Spawned, not forked: the caller may have threads (torch, OpenCV).
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_with_parent) as pool:
            futures = [pool.submit(_write_shard, render, path, items) for path, items in jobs]
            try:
                for future in futures:
                    bar.update(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _leave_with_parent() -> None:
    """Exit when the parent is killed, rather than wait for work for ever; leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_shard(render: Callable[[Any], Sample], path: Path, items: Sequence[Any]) -> int:
    """Write one tar and return the number of its samples."""
    # Imported here: it takes seconds, and who imports the contents may only want captions.
    from webdataset import TarWriter

    # The process's number keeps a worker that outlived its parent from writing into the same file.
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(aside, "wb") as file:
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for item in items:
                sample = render(item)
                jpeg = simplejpeg.encode_jpeg(sample.image, JPEG_QUALITY, "RGB", "444")
                meta = json.dumps(sample.meta, ensure_ascii=False)
                text = {"txt": sample.caption.encode(), "json": meta.encode()}
                tar.write({"__key__": sample.key, "jpg": jpeg, **text})
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    return len(items)
