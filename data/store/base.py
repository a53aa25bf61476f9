"""What every store has: its calls, its options, its retries and its errors."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from data.errors import DataError, StoreError

T = TypeVar("T")
OnFault = Callable[[str], None] | None

_log = logging.getLogger(__name__)


class ReadOnly(DataError):
    """The store may be read but not written."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object.

    Attributes:
        name: its path below the store's root.
        size: bytes.
        version: changes when the content does: the ETag without quotes on S3, the mtime in ns on disk; "" where the
            server tells none.
        modified: when it was last written, in seconds since 1970; 0 where the server does not tell.
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
        read_timeout_s: seconds to wait for the next bytes of an answer, and for the next 64 KiB of an object.
        retry_minutes: minutes without progress after which faults end a call; 0 retries nothing.
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
    """A tree of objects to read. `readahead` is the number of bytes that cost about as much as one more request.

    Every call raises DataError for what only the user can mend, and StoreError where faults outlasted their retries.
    """

    url: str
    readahead: int

    def list(self, suffix: str = "", left_out: Counter[str] | None = None) -> list[ObjectInfo]:
        """List every object that counts (`data/listing.py`) and whose name ends in `suffix`, sorted by name.

        Args:
            left_out: what does not count is added to it, by reason and whatever its name ends in.
        """

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
                for less), "server" (its error), "timeout" (dripping, too), "broken" (a connection reset, refused, or
                cut short), "credentials" (none for now).

        Raises:
            DataError: the object is gone, shorter than `stop`, another version, or may not be read.
        """

    def info(self, name: str) -> ObjectInfo | None:
        """Look one object up; None where there is no such object."""


class WritableStore(Store, Protocol):
    """A tree of objects to read and to write; whether it may be written shows at the first attempt."""

    def write(self, name: str, content: bytes) -> None:
        """Write an object in place of any before, whole or not at all, and the folders above it.

        Raises:
            ReadOnly: the place may not be written.
        """

    def upload(self, name: str, path: Path) -> None:
        """Write a local file's content as `write` does, however large it is."""

    def delete(self, name: str) -> None:
        """Remove an object, and the folder that held nothing else; one that is not there is removed already."""


def changed(url: str, name: str) -> DataError:
    """The error of an object that is not what the index says."""
    return DataError(f"{url}/{name} changed since it was indexed; index the source anew")


def shrunk(url: str, name: str, end: int) -> DataError:
    """The error of an object that ends before the bytes asked for."""
    return DataError(f"{url}/{name} ends before byte {end}: it changed since it was indexed; index the source anew")


def unreadable(path: Path, error: OSError) -> DataError:
    """The error of a local file that is to be uploaded."""
    return DataError(f"{path} cannot be read: {error.strerror}")


@dataclass(frozen=True)
class Fault:
    """A fault that may pass.

    Attributes:
        kind: as `on_fault` is told.
        words: as a message says it.
        minutes: how long it may go on by itself, where that is less than for others.
        lasting: what to raise then, where that is not StoreError.
    """

    kind: str
    words: str
    minutes: float = math.inf
    lasting: DataError | None = None


class Retries:
    """The patience of one call: full-jitter exponential backoff while any request of it gets on now and then.

    A call whose faults go on for some seconds says so once, through `logging`; a process does at most once a minute.

    Args:
        what: the call and its object, as a message names them ("reading s3://bucket/a.tar").
        minutes: how long faults may go on without progress.
    """

    _FIRST_S, _CAP_S = 0.2, 20.0

    def __init__(self, what: str, minutes: float, on_fault: OnFault = None) -> None:
        self._what, self._minutes, self._on_fault = what, minutes, on_fault
        self._warned = False
        self.progress()

    def progress(self) -> None:
        """Note that bytes arrived: the clocks and the backoff start anew."""
        self._since, self._faults = time.monotonic(), 0
        self._kind, self._kind_since = "", 0.0

    def run(
        self,
        attempt: Callable[[], T],
        faults: tuple[type[Exception], ...],
        judge: Callable[[Exception], Fault | DataError],
    ) -> T:
        """Attempt until it succeeds.

        Args:
            faults: exceptions of `attempt` to judge; others pass through.
            judge: from an exception to a fault that may pass, or to the error to raise at once.
        """
        while True:
            try:
                return attempt()
            except faults as error:
                verdict = judge(error)
                if isinstance(verdict, DataError):
                    raise verdict from error
                if self._on_fault:
                    self._on_fault(verdict.kind)
                self._wait(verdict, error)

    def _wait(self, fault: Fault, error: Exception) -> None:
        now = time.monotonic()
        self._faults += 1
        if self._faults == 1:
            self._faulty_since = now
        if self._kind != fault.kind:
            self._kind, self._kind_since = fault.kind, now
        minutes, since = self._minutes, self._since
        if fault.minutes < minutes:
            minutes, since = fault.minutes, self._kind_since
        left = since + 60 * minutes - now
        if left <= 0:
            raise fault.lasting or StoreError(
                f"{self._what}: {self._faults} requests in a row failed over {minutes:g} minutes, "
                f"the last one with: {fault.words}"
            ) from error
        if not self._warned and now - self._faulty_since >= _SILENT_S:
            words = f"{self._what}: {fault.words}; trying again, for up to {minutes:g} minutes without progress"
            self._warned = _warned(words)
        # The cap on the exponent only keeps the power small.
        delay = random.uniform(0, min(self._CAP_S, self._FIRST_S * 2 ** min(self._faults, 10)))
        time.sleep(min(delay, left))


_SILENT_S = 3.0  # faults that pass sooner are counted, not told
_WARNING_S = 60.0
_warning_lock = threading.Lock()
_last_warning = -math.inf


def _warned(words: str) -> bool:
    """Warn, but once a minute in this process: what ails one call ails the others as well. Whether it did."""
    global _last_warning
    with _warning_lock:
        now = time.monotonic()
        if now - _last_warning < _WARNING_S:
            return False
        _last_warning = now
    _log.warning(words)
    return True
