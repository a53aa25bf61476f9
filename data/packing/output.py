"""Where a pack goes: a folder or an S3 prefix, held for one pack from its first shard to its last.

- `dataset.json.partial`, the plan, is written before anything else, so that the same command takes up where it was
  stopped and another command is refused.
- In a folder a lock keeps a second process from writing beside the first; lock and plan go at the end. S3 has no locks,
  and two processes with the same plan write the same bytes; the plan stays, so that packing needs no right to delete.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data.errors import UserError
from data.files import FileLock
from data.store import StoreOptions, WritableStore, open_store

SUMMARY = "dataset.json"
PLAN = "dataset.json.partial"
LOCK = "dataset.json.lock"

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_WRITTEN_HERE = {"source": str, "arguments": dict, "versions": dict, "rows": dict}


class Output:
    """A folder, which need not exist before it is held, or an S3 prefix. Pickles.

    Raises:
        UserError: `url` is neither.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        if "://" in url and not url.startswith("s3://"):
            raise UserError(f"out is {url}: it should be a folder or s3://bucket/prefix")
        self.url, self._options = url, options
        self._folder = None if "://" in url else Path(url)

    @cached_property
    def store(self) -> WritableStore:
        """Its store; a folder must exist by now."""
        return open_store(self.url, self._options)

    def below(self, split: str) -> WritableStore:
        """Open the store of a split that is there."""
        return open_store(f"{self.url.rstrip('/')}/{split}", self._options)

    def names(self) -> set[str]:
        """List what there is."""
        return {info.name for info in self.store.list()}

    def finished(self, plan: dict[str, Any]) -> dict[str, Any] | None:
        """Return what the summary of a finished pack says; None where there is no summary.

        Raises:
            UserError: it is the summary of another pack, or of something else.
        """
        if self._folder is not None and not self._folder.is_dir():
            return None
        return self._same(SUMMARY, plan)

    @contextmanager
    def hold(self, plan: dict[str, Any]) -> Iterator[None]:
        """Begin or take up this pack.

        Raises:
            UserError: anything else is there, or another process packs into the folder, or it cannot be written.
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
        """Give a local path where a large object may grow before it is `put`, and remove what is left there.

        Raises:
            UserError: there is no room, or no right to write.
        """
        with ExitStack() as stack:
            # In a folder it grows beside its place: a rename costs nothing, where a copy writes all of it twice.
            place = self._folder or Path(stack.enter_context(TemporaryDirectory(prefix="pack-")))
            # The process's number keeps a worker that outlived its parent from writing into the same file.
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
        """Make the file that was written to `scratch(name)` appear under its name, whole."""
        if self._folder is None:
            self.store.upload(name, path)
            return
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # else the rename may outlive the content when the machine goes down
        os.replace(path, self._folder / name)

    def _begin(self, plan: dict[str, Any]) -> None:
        if self._same(PLAN, plan) is not None:
            return
        if self.names() - {LOCK}:
            raise UserError(f"out is {self.url}: it should be new or empty, and it holds other files")
        self.store.write(PLAN, json.dumps(plan).encode())

    def _same(self, name: str, plan: dict[str, Any]) -> dict[str, Any] | None:
        """What an object says of the pack that is here, which must be that of the plan."""
        if self.store.info(name) is None:
            return None
        there = self._parse(name, bytes(self.store.read(name)))
        was, now = ({"source": it["source"], **it["arguments"], **it["versions"]} for it in (there, plan))
        for field in [*now, *(was.keys() - now.keys())]:
            if was.get(field) != now.get(field):
                raise UserError(
                    f"out is {self.url}: it should be another place, for this one holds a pack whose {field} "
                    f"is {was.get(field)}, not {now.get(field)}"
                )
        return there

    def _parse(self, name: str, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(content)
            if all(isinstance(found[key], kind) for key, kind in _WRITTEN_HERE.items()):
                return dict(found)
        except (ValueError, TypeError, LookupError):
            pass
        raise UserError(
            f"out is {self.url}: it should be new or empty, and it holds a {name} that this command did not write"
        )
