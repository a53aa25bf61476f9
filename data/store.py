"""Where bytes come from and go to: a local directory or `s3://bucket/prefix`, behind five calls.

- An object's name is its path below the root, with forward slashes, alike for both kinds.
- A store is plain configuration: it pickles and holds no open file, so threads and processes share it.
- An object is written whole or not at all, and is read as the one version it was when the read began (or when it was
  indexed): bytes of two versions never meet.
- Faults that may pass are retried until none of the call's requests has got on for `retry_minutes`, then they end as
  `StoreError`; what only the user can mend (bucket, directory, credentials, permissions) is a `DataError` at once.
"""

from __future__ import annotations

import errno
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from data.errors import DataError, StoreError

T = TypeVar("T")
OnFault = Callable[[str], None] | None


class ReadOnly(DataError):
    """The store may be read but not written."""


@dataclass(frozen=True)
class ObjectInfo:
    """One object.

    Attributes:
        name: its path below the store's root.
        size: bytes.
        version: changes when the content does: the ETag without quotes on S3, the mtime in ns on disk.
        modified: when it was last written, in seconds since 1970.
    """

    name: str
    size: int
    version: str
    modified: float


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """How to reach a store; a directory looks at `retry_minutes` alone. Credentials are boto3's own affair.

    Attributes:
        endpoint: URL of another S3 server than Amazon's.
        region: the bucket's region; None takes the profile's.
        profile: profile of the AWS credentials file; None takes boto3's choice.
        anonymous: send no credentials.
        requester_pays: agree with every request that the requester is charged.
        connect_timeout_s: seconds to wait for a connection.
        read_timeout_s: seconds to wait for the next bytes of an answer.
        retry_minutes: minutes without a byte of progress after which faults end a call; 0 retries nothing.
    """

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    anonymous: bool = False
    requester_pays: bool = False
    connect_timeout_s: float = 10
    read_timeout_s: float = 60
    retry_minutes: float = 10


class Store(Protocol):
    """A tree of objects. `readahead` is the number of bytes that cost about as much as one more request.

    Every call raises DataError for what only the user can mend, and StoreError where faults outlasted their retries.
    """

    url: str
    readahead: int

    def list(self, suffix: str = "") -> list[ObjectInfo]:
        """List every object whose name ends in `suffix`, sorted by name."""

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        version: str | None = None,
        on_fault: OnFault = None,
    ) -> bytes | bytearray:
        """Read bytes [start, stop) of an object, `stop=None` for its end: all of them, or raise.

        Args:
            version: the version the object must still be.
            on_fault: called with the kind of every fault that is retried or ends the read: "throttled" (the server asks
                for less), "server" (its error), "timeout", "broken" (a connection reset, refused, or cut short).

        Raises:
            DataError: the object is gone, shorter than `stop`, another version, or may not be read.
        """

    def info(self, name: str) -> ObjectInfo | None:
        """Look one object up; None where there is no such object."""

    def write(self, name: str, content: bytes) -> None:
        """Write an object in place of any before, whole or not at all, and the folders above it.

        Raises:
            ReadOnly: the place may not be written.
        """

    def upload(self, name: str, path: Path) -> None:
        """Write a local file's content as `write` does, however large it is."""


def open_store(url: str, options: StoreOptions = StoreOptions()) -> Store:
    """Open the store at a local directory or at `s3://bucket/prefix`.

    Raises:
        DataError: a missing directory, an unknown scheme, an unknown profile, or credentials in a URL.
    """
    if url.startswith("s3://"):
        from data.s3 import S3Store  # here, as it builds on this file

        return S3Store(url, options)
    if "://" in url:
        raise DataError(f"source {url!r}: the scheme must be s3://, or give a local directory")
    return LocalStore(url, options)


def changed(url: str, name: str) -> DataError:
    """The error of an object that is not what the index says."""
    return DataError(f"{url}/{name} changed since it was indexed; index the source anew")


def shrunk(url: str, name: str, end: int) -> DataError:
    """The error of an object that ends before the bytes asked for."""
    return DataError(f"{url}/{name} ends before byte {end}: it changed since it was indexed; index the source anew")


def unreadable(path: Path, error: OSError) -> DataError:
    """The error of a local file that is to be uploaded."""
    return DataError(f"{path} cannot be read: {error.strerror}")


class Retries:
    """The patience of one call: full-jitter exponential backoff while any request of it gets on now and then.

    Args:
        what: the call and its object, as a message names them ("reading s3://bucket/a.tar").
        minutes: how long faults may go on without progress.
    """

    _FIRST_S, _CAP_S = 0.2, 20.0

    def __init__(self, what: str, minutes: float, on_fault: OnFault = None) -> None:
        self._what, self._minutes, self._on_fault = what, minutes, on_fault
        self.progress()

    def progress(self) -> None:
        """Note that bytes arrived: the clock and the backoff start anew."""
        self._since, self._faults = time.monotonic(), 0

    def run(
        self,
        attempt: Callable[[], T],
        faults: tuple[type[Exception], ...],
        judge: Callable[[Exception], tuple[str, str] | DataError],
    ) -> T:
        """Attempt until it succeeds.

        Args:
            faults: exceptions of `attempt` to judge; others pass through.
            judge: from an exception to (kind, words) of a fault that may pass, or to the error to raise at once.
        """
        while True:
            try:
                return attempt()
            except faults as fault:
                verdict = judge(fault)
                if isinstance(verdict, DataError):
                    raise verdict from fault
                kind, words = verdict
                if self._on_fault:
                    self._on_fault(kind)
                self._wait(words, fault)

    def _wait(self, words: str, fault: Exception) -> None:
        left = self._since + 60 * self._minutes - time.monotonic()
        self._faults += 1
        if left <= 0:
            raise StoreError(
                f"{self._what}: {self._faults} requests in a row failed over {self._minutes:g} minutes, "
                f"the last one with: {words}"
            ) from fault
        # The cap on the exponent only keeps the power small.
        delay = random.uniform(0, min(self._CAP_S, self._FIRST_S * 2 ** min(self._faults, 10)))
        time.sleep(min(delay, left))


_PARTIAL = ".partial"  # what is not whole yet is named so, and not listed
_PASSING = {
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

    def list(self, suffix: str = "") -> list[ObjectInfo]:
        def fail(error: OSError) -> None:
            raise error  # os.walk would leave the folder out in silence

        def attempt() -> list[ObjectInfo]:
            return [
                self._described(Path(folder, file).relative_to(self.url).as_posix(), os.stat(Path(folder, file)))
                for folder, _, files in os.walk(self.url, onerror=fail)
                for file in files
                if file.endswith(suffix) and not file.endswith(_PARTIAL)
            ]

        return sorted(self._retried("listing", "", attempt), key=lambda info: info.name)

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
            with open(Path(self.url, name), "rb", buffering=0) as file:
                info = self._described(name, os.fstat(file.fileno()))
                if info.version != (version or info.version):
                    raise changed(self.url, name)
                version = info.version  # of every attempt that follows
                end = info.size if stop is None else stop
                if max(start, end) > info.size:
                    raise shrunk(self.url, name, max(start, end))
                content = bytearray(max(end - start, 0))
                view, at = memoryview(content), 0
                # The kernel may return less than was asked for; only 0 is the end.
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
                return self._described(name, path.stat()) if not path.is_dir() else None
            except (FileNotFoundError, NotADirectoryError):
                return None

        return self._retried("looking up", name, attempt)

    def write(self, name: str, content: bytes) -> None:
        def attempt() -> None:
            with self._replacing(name) as file:
                file.write(content)

        self._retried("writing", name, attempt)

    def upload(self, name: str, path: Path) -> None:
        def attempt() -> None:
            source.seek(0)
            with self._replacing(name) as file:
                shutil.copyfileobj(source, file, 1 << 20)

        try:
            source = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise unreadable(path, error) from error
        with source:
            self._retried("writing", name, attempt)

    @contextmanager
    def _replacing(self, name: str) -> Iterator[BinaryIO]:
        path = Path(self.url, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
        try:
            with open(partial, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # else the rename may outlive the content when the machine goes down
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _described(self, name: str, stat: os.stat_result) -> ObjectInfo:
        return ObjectInfo(name, stat.st_size, str(stat.st_mtime_ns), stat.st_mtime)

    def _retried(self, verb: str, name: str, attempt: Callable[[], T], on_fault: OnFault = None) -> T:
        what = f"{verb} {self.url}/{name}".rstrip("/")

        def judge(error: Exception) -> tuple[str, str] | DataError:
            assert isinstance(error, OSError)
            if kind := _PASSING.get(error.errno or 0):
                return kind, str(error)
            mistake = DataError
            if verb == "writing" and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                mistake = ReadOnly
            where = f" ({error.filename})" if error.filename else ""
            return mistake(f"{what} is not possible: {error.strerror or error}{where}")

        return Retries(what, self._minutes, on_fault).run(attempt, (OSError,), judge)
