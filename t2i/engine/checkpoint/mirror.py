"""A copy of a stage's checkpoints in another place, a directory or `s3://`, made in the background.

- Rank 0's thread uploads regular checkpoints: parts first, the manifest last, and only then is one there. One that
  comes while another is under way waits; if a third comes, the second is left out.
- Retention is the stage's own. An object that goes does so after its manifest. What a killed upload left is removed by
  the next one; unfinished multipart uploads are for a lifecycle rule of the bucket (AbortIncompleteMultipartUpload).
- No fault of the mirror stops training: it is an event, and the next checkpoint tries again.
- A run goes on from the mirror where that has a newer good checkpoint than its own folder, which may be empty.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data.errors import DataError, StoreError
from data.files import commit, sync
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
    """Open the part of a mirror that is one stage's.

    Args:
        url: a directory, which is there, or s3://bucket/prefix.
        below: the stage's place in it: run/stage.

    Raises:
        DataError: as `open_store`.
    """
    place = f"{url.rstrip('/')}/{below}"
    if isinstance(open_store(url, options), LocalStore):  # a disk that is not mounted must not become a folder
        try:
            Path(place).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"checkpoint.mirror {url}: {place} cannot be made: {error.strerror}") from error
    return open_store(place, options)


def _folders(store: WritableStore) -> dict[str, list[str]]:
    """The files of every checkpoint there, whole or not; in a directory, what a killed upload left as well."""
    if isinstance(store, LocalStore):
        return {path.name: os.listdir(path) for path in Path(store.url).iterdir() if is_step(path.name)}
    found: dict[str, list[str]] = {}
    for info in store.list():
        folder, _, file = info.name.partition("/")
        if file and is_step(folder):
            found.setdefault(folder, []).append(file)
    return found


class Mirror:
    """Rank 0's copier.

    Args:
        store: the stage's part of the mirror (`open_mirror`).
        keep: newest checkpoints to keep there.
        keep_every: those at multiples of so many steps are kept for ever; 0: none.
    """

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

    def offer(self, path: Path) -> None:
        """Copy a checkpoint when there is time; `holding` says how long its files are needed."""
        with self._changed:
            if self._pending is not None:
                self._events.append(f"mirror: {self._pending.name} left out, a newer one is there")
            self._pending = path
            self._wake()

    def discard_after(self, step: int) -> None:
        """Take later checkpoints away when there is time, before any other is copied."""
        with self._changed:
            self._discard = step if self._discard is None else min(step, self._discard)
            self._pending = None
            self._wake()

    def holding(self) -> set[Path]:
        """Checkpoints that are being copied or wait for it."""
        with self._changed:
            return {path for path in (self._pending, self._current) if path is not None}

    def take_events(self) -> list[str]:
        """What has happened since the last call, in sentences."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def close(self, patience_s: float) -> None:
        """Wait for what is to be copied, for so many seconds at most."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._thread is None, patience_s):
                left = (self._current or self._pending or Path("a deletion")).name
                self._events.append(f"mirror: left before {left} was done")

    # The thread

    def _wake(self) -> None:
        """Under the lock: begin work, if nobody is at it."""
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
                    self._discard_now(discard)
                if current is not None:
                    self._upload(current)
                    self._prune(current)
            except Exception as error:  # an event: the mirror never stops training
                what = current.name if current is not None else f"checkpoints after step {discard}"
                self._events.append(f"mirror: {what}: {error}")

    def _upload(self, path: Path) -> None:
        text = (path / MANIFEST).read_bytes()
        parts = parse_manifest(text, str(path))["parts"]
        if MANIFEST in _folders(self._store).get(
            path.name, []
        ):  # of a damaged or superseded one: void before its parts are replaced
            self._store.delete(f"{path.name}/{MANIFEST}")
        for part in parts:
            self._store.upload(f"{path.name}/{part['file']}", path / part["file"])
        self._store.write(f"{path.name}/{MANIFEST}", text)

    def _discard_now(self, after: int) -> None:
        self._remove(lambda steps: [step for step in steps if step > after])

    def _prune(self, latest: Path) -> None:
        self._remove(lambda steps: self._retention.outdated(dict.fromkeys(steps, False), step_of(latest)), latest)

    def _remove(self, chosen: Callable[[list[int]], list[int]], spared: Path | None = None) -> None:
        """Remove the steps chosen of those that are whole, and what is left of uploads that were never finished."""
        folders = _folders(self._store)
        whole = [name for name, files in folders.items() if MANIFEST in files]
        going = {folder_name(step) for step in chosen([step_of(Path(name)) for name in whole])}
        for folder, files in folders.items():
            # A server may not list yet what was just written.
            if (folder in going or folder not in whole) and (spared is None or folder != spared.name):
                for file in sorted(files, key=lambda name: name != MANIFEST):
                    self._store.delete(f"{folder}/{file}")


# The way back


def latest_checkpoint(
    folder: Path, store: WritableStore | None, before: int | None = None
) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint of a stage, fetched from its mirror if that has a newer one than `folder`.

    Call it on one rank; the files are then in `folder`, for all.

    Args:
        store: the stage's part of the mirror; None: there is none.
        before: only checkpoints from before this step count; None: all.

    Returns:
        The checkpoint, or None if there is none, and what was wrong with newer ones.

    Raises:
        CheckpointError: there is nothing in `folder` and the mirror cannot be read, or the disk is full.
        StoreError: there is nothing in `folder`, and the mirror does not answer.
    """
    path, faults = newest(folder, before)
    if store is None:
        return path, faults
    try:
        whole = [step_of(Path(name)) for name, files in _folders(store).items() if MANIFEST in files]
        least = -1 if path is None else step_of(path)
        for step in sorted((s for s in whole if s > least and (before is None or s < before)), reverse=True):
            try:
                return _download(store, step, folder), [*faults, f"{folder_name(step)} taken from {store.url}"]
            except (CheckpointError, DataError) as error:
                faults.append(f"mirror: {error}")
    except _FAULTS as error:
        if path is None and isinstance(error, StoreError):  # it may pass
            raise
        if path is None:
            raise CheckpointError(
                f"{folder} holds no good checkpoint and checkpoint.mirror cannot be used: {error}; set it to null "
                "to start without it"
            ) from error
        faults.append(f"mirror: {error}")
    return path, faults


def _download(store: WritableStore, step: int, folder: Path) -> Path:
    """Fetch a checkpoint and check it.

    Raises:
        CheckpointError: it is not as written.
        DataError: it is not there any more.
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
            piece = store.read(source, start, min(start + _RANGE, part["bytes"]))
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != part["sha256"]:
        raise CheckpointError(f"{store.url}/{source}: its checksum is not the manifest's")
