"""A directory and everything below it, as a store."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from data.errors import DataError
from data.files import atomic_path
from data.listing import excluded
from data.store.base import Fault, ObjectInfo, OnFault, ReadOnly, Retries, StoreOptions, changed, shrunk, unreadable

T = TypeVar("T")

_PARTIAL = ".partial"  # the ending of files that are still being written
_UNFINISHED = f"unfinished ({_PARTIAL})"
_BROKEN = "broken links"
_AGAIN = "links to folders that are listed already"
_SPECIAL = "neither files nor folders"
_TRANSIENT = {
    errno.EIO: "broken",
    errno.ESTALE: "broken",
    errno.ENOTCONN: "broken",
    errno.ECONNRESET: "broken",
    errno.EREMOTEIO: "broken",
    errno.EAGAIN: "throttled",
    errno.EBUSY: "throttled",
    errno.ETIMEDOUT: "timeout",
}


class LocalStore:
    """A directory and everything below it."""

    readahead = 16 << 10

    def __init__(self, root: str, options: StoreOptions) -> None:
        self.url, self._minutes = root.rstrip("/") or "/", options.retry_minutes
        if not Path(root).is_dir():
            raise DataError(f"source {root!r} is not a directory: give the folder that holds the .tar shards")

    def list(self, suffix: str = "", left_out: Counter[str] | None = None) -> list[ObjectInfo]:
        def attempt() -> tuple[list[ObjectInfo], Counter[str]]:
            skipped: Counter[str] = Counter()
            files = [(name, path) for name, path in _files(self.url, skipped) if name.endswith(suffix)]
            return [_described(name, os.stat(path)) for name, path in files], skipped

        infos, skipped = self._retried("listing", "", attempt)
        if left_out is not None:
            left_out.update(skipped)
        return sorted(infos, key=lambda info: info.name)

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        version: str | None = None,
        on_fault: OnFault = None,
    ) -> bytes | bytearray:
        def attempt() -> bytes | bytearray:
            nonlocal version
            with open(f"{self.url}/{name}", "rb", buffering=0) as file:
                info = _described(name, os.fstat(file.fileno()))
                if info.version != (version or info.version):
                    raise changed(self.url, name)
                version = info.version  # for the attempts that follow
                end = info.size if stop is None else stop
                if max(start, end) > info.size:
                    raise shrunk(self.url, name, max(start, end))
                content = bytearray(max(end - start, 0))
                view, at = memoryview(content), 0
                # The kernel may return less than asked for; only 0 means the end.
                while at < len(view):
                    if not (got := os.preadv(file.fileno(), [view[at:]], start + at)):
                        raise shrunk(self.url, name, end)
                    at += got
                return content

        return self._retried("reading", name, attempt, on_fault)

    def info(self, name: str) -> ObjectInfo | None:
        def attempt() -> ObjectInfo | None:
            path = Path(self.url, name)
            try:
                return _described(name, path.stat()) if not path.is_dir() else None
            except (FileNotFoundError, NotADirectoryError):
                return None

        return self._retried("looking up", name, attempt)

    def write(self, name: str, content: bytes) -> None:
        self._replace(name, lambda file: file.write(content))

    def upload(self, name: str, path: Path) -> None:
        def copy(file: BinaryIO) -> None:
            source.seek(0)
            shutil.copyfileobj(source, file, 1 << 20)

        try:
            source = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise unreadable(path, error) from error
        with source:
            self._replace(name, copy)

    def _replace(self, name: str, fill: Callable[[BinaryIO], object]) -> None:
        def attempt() -> None:
            path = Path(self.url, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as partial, open(partial, "xb") as file:
                fill(file)

        self._retried("writing", name, attempt)

    def delete(self, name: str) -> None:
        def attempt() -> None:
            path = Path(self.url, name)
            path.unlink(missing_ok=True)
            if path.parent != Path(self.url) and path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()

        self._retried("deleting", name, attempt)

    def _retried(self, verb: str, name: str, attempt: Callable[[], T], on_fault: OnFault = None) -> T:
        what = f"{verb} {self.url}/{name}".rstrip("/")

        def judge(error: Exception) -> Fault | DataError:
            assert isinstance(error, OSError)
            if kind := _TRANSIENT.get(error.errno or 0):
                return Fault(kind, str(error))
            mistake = DataError
            if verb == "writing" and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                mistake = ReadOnly
            where = f" ({error.filename})" if error.filename else ""
            return mistake(f"{what} is not possible: {error.strerror or error}{where}")

        return Retries(what, self._minutes, on_fault).run(attempt, (OSError,), judge)


def _described(name: str, stat: os.stat_result) -> ObjectInfo:
    return ObjectInfo(name, stat.st_size, str(stat.st_mtime_ns), stat.st_mtime)


def _files(root: str, left_out: Counter[str]) -> Iterator[tuple[str, str]]:
    """Name and path of every file below a folder that counts; the others are added to `left_out` by reason.

    Each real folder is listed once, under its own name rather than a link's. A link to a folder that contains the root
    is not followed, so links may form cycles.
    """
    top = os.path.realpath(root)
    walked: set[str] = set()
    folders, links = deque([("", root, top)]), deque[tuple[str, str]]()
    while folders or links:
        if not folders:
            name, path = links.popleft()
            try:
                target = os.path.realpath(path, strict=True)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                left_out[_BROKEN] += 1
                continue
            if not os.path.isdir(target):
                if os.path.isfile(target):
                    yield name, path
                else:
                    left_out[_SPECIAL] += 1
            elif f"{top}/".startswith(f"{target.rstrip('/')}/"):
                left_out[_AGAIN] += 1
            else:
                folders.append((f"{name}/", path, target))
            continue
        prefix, folder, real = folders.popleft()
        if real in walked:
            left_out[_AGAIN] += 1
            continue
        walked.add(real)
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if (reason := excluded(entry.name)) is not None:
                    left_out[reason] += 1
                elif entry.is_symlink():
                    links.append((prefix + entry.name, entry.path))
                elif entry.is_dir():
                    folders.append((f"{prefix}{entry.name}/", entry.path, f"{real.rstrip('/')}/{entry.name}"))
                elif not entry.is_file():
                    left_out[_SPECIAL] += 1
                elif entry.name.endswith(_PARTIAL):
                    left_out[_UNFINISHED] += 1
                else:
                    yield prefix + entry.name, entry.path
