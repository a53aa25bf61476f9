"""What every store has: its calls, its options, its retries and its errors."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

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
