"""Copies of a stage's checkpoints in another place, a directory or `s3://`, made in the background.

- Rank 0's thread uploads regular checkpoints, the manifest last: an upload without a manifest is no checkpoint. One
  checkpoint may wait while another is uploaded; a newer one replaces it.
- Retention is the stage's own. A manifest is deleted before its parts. The next upload removes what a killed one left,
  except unfinished multipart uploads: the bucket needs a lifecycle rule for them (AbortIncompleteMultipartUpload).
- No fault of the mirror stops training: it is reported as an event, and the next checkpoint tries again.
- A run resumes from the mirror if that has a newer intact checkpoint than the run's own folder, which may be empty.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from data.errors import DataError, StoreError
from data.files import commit, name_in_errors, sync
from data.store import LocalStore, StoreOptions, WritableStore, open_store
from t2i.engine.checkpoint.format import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    Retention,
    folder_name,
    is_step,
    newest,
    parse_manifest,
    step_of,
)

_FAULTS = (DataError, StoreError, OSError)
_RANGE = 16 << 20
_DOWNLOADS = 4


def open_mirror(url: str, below: str, options: StoreOptions) -> WritableStore:
    """Open the part of a mirror that belongs to one stage.

    Args:
        url: an existing directory, or s3://bucket/prefix.
        below: the stage's path in it: run/stage.

    Raises:
        DataError: as `open_store`.
        UserError: the directory cannot be written to.
    """
    place = f"{url.rstrip('/')}/{below}"
    if isinstance(open_store(url, options), LocalStore):  # fails if the disk is not mounted, instead of making a folder
        with name_in_errors(f"checkpoint.mirror {url}: {place}", "made"):
            Path(place).mkdir(parents=True, exist_ok=True)
    return open_store(place, options)


def _folders(store: WritableStore) -> dict[str, list[str]]:
    """The files of every checkpoint there, complete or not, with those that a killed upload left in a directory."""
    if isinstance(store, LocalStore):
        return {path.name: os.listdir(path) for path in Path(store.url).iterdir() if is_step(path.name)}
    found: dict[str, list[str]] = {}
    for info in store.list():
        folder, _, file = info.name.partition("/")
        if file and is_step(folder):
            found.setdefault(folder, []).append(file)
    return found


def _steps_after(step: int, steps: list[int]) -> list[int]:
    return [later for later in steps if later > step]


class Mirror:
    """Uploads checkpoints, on rank 0; `store` is the stage's part of the mirror (`open_mirror`)."""

    def __init__(self, store: WritableStore, *, keep: int, keep_every: int = 0) -> None:
        self._store = store
        self._retention = Retention(keep, keep_every)
        self._events: deque[str] = deque()
        self._changed = threading.Condition()
        # Under the condition's lock:
        self._pending: Path | None = None
        self._current: Path | None = None
        self._discard: int | None = None
        self._thread: threading.Thread | None = None

    def enqueue(self, path: Path) -> None:
        """Upload a checkpoint in the background; its files are needed as long as `in_use` has it."""
        with self._changed:
            if self._pending is not None:
                self._events.append(f"mirror: {self._pending.name} left out, a newer one is there")
            self._pending = path
            self._start()

    def discard_after(self, step: int) -> None:
        """Remove later checkpoints in the background, before any other is uploaded."""
        with self._changed:
            self._discard = step if self._discard is None else min(step, self._discard)
            self._pending = None
            self._start()

    def in_use(self) -> set[Path]:
        """Checkpoints that are being uploaded or wait for it."""
        with self._changed:
            return {path for path in (self._pending, self._current) if path is not None}

    def take_events(self) -> list[str]:
        """Messages since the last call."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def close(self, timeout_s: float) -> None:
        """Wait until everything is uploaded, or the time is over."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._thread is None, timeout_s):
                left = (self._current or self._pending or Path("a deletion")).name
                self._events.append(f"mirror: left before {left} was done")

    # The background thread

    def _start(self) -> None:
        """Start the thread if it is not running; the caller holds the lock."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current, self._pending = self._pending, None
                discard, self._discard = self._discard, None
                if self._current is None and discard is None:
                    self._thread = None
                    self._changed.notify_all()
                    return
                current = self._current
            try:
                if discard is not None:
                    self._remove(partial(_steps_after, discard))
                if current is not None:
                    self._upload(current)
                    self._prune(current)
            except Exception as error:  # an event: the mirror never stops training
                what = current.name if current is not None else f"checkpoints after step {discard}"
                self._events.append(f"mirror: {what}: {error}")

    def _upload(self, path: Path) -> None:
        text = (path / MANIFEST).read_bytes()
        parts = parse_manifest(text, str(path))["parts"]
        # Of a damaged or superseded checkpoint, which must be void before its parts are replaced.
        if MANIFEST in _folders(self._store).get(path.name, []):
            self._store.delete(f"{path.name}/{MANIFEST}")
        for part in parts:
            self._store.upload(f"{path.name}/{part['file']}", path / part["file"])
        self._store.write(f"{path.name}/{MANIFEST}", text)

    def _prune(self, latest: Path) -> None:
        self._remove(lambda steps: self._retention.expired(dict.fromkeys(steps, False), step_of(latest)), latest)

    def _remove(self, choose: Callable[[list[int]], list[int]], kept: Path | None = None) -> None:
        """Remove the steps that `choose` takes of the complete ones, and what is left of unfinished uploads."""
        folders = _folders(self._store)
        complete = [name for name, files in folders.items() if MANIFEST in files]
        removed = {folder_name(step) for step in choose([step_of(Path(name)) for name in complete])}
        for folder, files in folders.items():
            # `kept` was just written: a server may not list its manifest yet.
            if (folder in removed or folder not in complete) and (kept is None or folder != kept.name):
                for file in sorted(files, key=lambda name: name != MANIFEST):
                    self._store.delete(f"{folder}/{file}")


# Resuming


def latest_checkpoint(
    folder: Path, store: WritableStore | None, before: int | None = None
) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint of a stage, downloaded into `folder` if its mirror has a newer one than that.

    Call it on one rank; the files are then in `folder`, for all.

    Args:
        store: the stage's part of the mirror, if there is one.
        before: only checkpoints from before this step count.

    Returns:
        The checkpoint, if there is one, and messages: what is wrong with newer ones, and a download.

    Raises:
        CheckpointError: `folder` has none, and the mirror cannot be read or the disk is full.
        StoreError: `folder` has none, and the mirror does not answer.
    """
    path, faults = newest(folder, before)
    if store is None:
        return path, faults
    try:
        complete = [step_of(Path(name)) for name, files in _folders(store).items() if MANIFEST in files]
        least = -1 if path is None else step_of(path)
        for step in sorted((s for s in complete if s > least and (before is None or s < before)), reverse=True):
            try:
                return _download(store, step, folder), [*faults, f"{folder_name(step)} taken from {store.url}"]
            except (CheckpointError, DataError) as error:
                faults.append(f"mirror: {error}")
    except _FAULTS as error:
        if path is None and isinstance(error, StoreError):  # transient
            raise
        if path is None:
            raise CheckpointError(
                f"{folder} holds no good checkpoint and checkpoint.mirror cannot be used: {error}; set it to null "
                "to start without it"
            ) from error
        faults.append(f"mirror: {error}")
    return path, faults


def _download(store: WritableStore, step: int, folder: Path) -> Path:
    """Download a checkpoint and check it.

    Raises:
        CheckpointError: it was changed.
        DataError: it is no longer there.
        StoreError: the network failed for longer than the retries last.
        OSError: it cannot be written here.
    """
    name = folder_name(step)
    text = store.read(f"{name}/{MANIFEST}")
    parts = parse_manifest(text, f"{store.url}/{name}")["parts"]
    aside = folder / f".{name}.mirror"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            list(pool.map(lambda part: _download_part(store, name, part, aside), parts))
        (aside / MANIFEST).write_bytes(text)
        sync(aside / MANIFEST)
        sync(aside)
        Checkpoint(aside)
        commit(aside, folder / name)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder / name


def _download_part(store: WritableStore, name: str, part: dict[str, Any], aside: Path) -> None:
    source, digest = f"{name}/{part['file']}", hashlib.sha256()
    with (aside / part["file"]).open("wb") as file:
        for start in range(0, part["bytes"], _RANGE):
            chunk = store.read(source, start, min(start + _RANGE, part["bytes"]))
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != part["sha256"]:
        raise CheckpointError(f"{store.url}/{source}: its checksum is not the manifest's")
