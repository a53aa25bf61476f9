"""Where a pack goes: a folder or an S3 prefix, held for one pack from its first shard to its last.

- `dataset.json.partial`, the plan, is written before anything else, so that the same command takes up where it was
  stopped and another command is refused.
- In a folder the plan is locked, so that no second process writes beside the first, and goes at the end. On S3 there
  are no locks, and two processes with the same plan write the same bytes; the plan stays, so that packing needs no
  right to delete.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data.errors import UserError
from data.store import Store, StoreOptions, open_store

PLAN = "dataset.json.partial"


class Output:
    """A folder, which need not exist before it is held, or an S3 prefix. Pickles."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.url, self._options = url, options
        self.folder = None if url.startswith("s3://") else Path(url)
        if self.folder is not None and "://" in url:
            raise UserError(f"out is {url}: it should be a folder or s3://bucket/prefix")

    @cached_property
    def store(self) -> Store:
        """Its store; a folder must exist by now."""
        return open_store(self.url, self._options)

    def below(self, split: str) -> Store:
        """Open the store of a split that is there."""
        return open_store(f"{self.url.rstrip('/')}/{split}", self._options)

    def names(self) -> set[str]:
        """List what there is."""
        return {info.name for info in self.store.list()}

    def finished(self, summary: str, plan: dict[str, Any]) -> dict[str, Any] | None:
        """Return what the summary of a finished pack says; None where there is no summary.

        Raises:
            UserError: it is the summary of another pack, or of something else.
        """
        if self.folder is not None and not (self.folder / summary).exists():
            return None
        if self.store.info(summary) is None:
            return None
        there = self._parse(summary, bytes(self.store.read(summary)))
        self._check_same(there, plan)
        return there

    @contextmanager
    def hold(self, plan: dict[str, Any]) -> Iterator[None]:
        """Begin or take up this pack.

        Raises:
            UserError: anything else is there, or another process packs into the folder.
            OSError: the folder cannot be written.
        """
        if self.folder is None:
            self._plan_on_s3(plan)
            yield
        else:
            with self._plan_in_folder(self.folder, plan):
                yield

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Give a local path to write an object to before it is `put`, and remove what is left there."""
        if self.folder is None:
            with TemporaryDirectory(prefix="pack-") as folder:
                yield Path(folder, Path(name).name)
            return
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        # The process's number keeps a worker that outlived its parent from writing into the same file.
        aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            yield aside
        finally:
            aside.unlink(missing_ok=True)

    def put(self, path: Path, name: str) -> None:
        """Make the file that was written to `scratch(name)` appear under its name, whole."""
        if self.folder is None:
            self.store.upload(name, path)
        else:
            os.replace(path, self.folder / name)

    def _plan_on_s3(self, plan: dict[str, Any]) -> None:
        there = self.names()
        if self.store.info(PLAN) is not None:
            self._check_same(self._parse(PLAN, bytes(self.store.read(PLAN))), plan)
        elif there:
            raise UserError(f"out is {self.url}: it should be a new or an empty prefix, and it holds other objects")
        else:
            self.store.write(PLAN, json.dumps(plan).encode())

    @contextmanager
    def _plan_in_folder(self, out: Path, plan: dict[str, Any]) -> Iterator[None]:
        if out.exists() and not out.is_dir():
            raise UserError(f"out is {out}: it should be a folder, and it is a file")
        others = {path.name for path in out.iterdir()} - {PLAN} if out.is_dir() else set()
        if others and not (out / PLAN).exists():
            raise UserError(f"out is {out}: it should be a new or an empty folder, and it holds other files")
        out.mkdir(parents=True, exist_ok=True)
        with open(out / PLAN, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"out is {out}: another process is packing into it") from None
            file.seek(0)
            begun = file.read()
            if others or begun.endswith("}"):
                self._check_same(self._parse(PLAN, begun.encode()), plan)
            else:  # new, or cut short before any shard was begun
                file.truncate(0)
                file.write(json.dumps(plan))
                file.flush()
            for left_behind in out.glob("*/*.partial"):
                left_behind.unlink()
            yield
            (out / PLAN).unlink()

    def _parse(self, name: str, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(content)
            if all(isinstance(found[key], kind) for key, kind in _WRITTEN_HERE.items()):
                return dict(found)
        except (ValueError, TypeError, KeyError, LookupError):
            pass
        raise UserError(
            f"out is {self.url}: it should be new or empty, and it holds a {name} that this command did not write"
        )

    def _check_same(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        was, now = ({"source": it["source"], **it["arguments"], **it["versions"]} for it in (there, here))
        for name in [*now, *(was.keys() - now.keys())]:
            if was.get(name) != now.get(name):
                raise UserError(
                    f"out is {self.url}: it should be another place, for this one holds a pack whose {name} "
                    f"is {was.get(name)}, not {now.get(name)}"
                )


_WRITTEN_HERE = {"source": str, "arguments": dict, "versions": dict, "rows": dict}
