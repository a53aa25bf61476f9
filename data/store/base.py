"""What all stores share: their calls, options, retries and errors."""

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
    """The store can be read but not written."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object.

    Attributes:
        name: path below the store's root.
        size: bytes.
        version: changes with the content: the ETag without quotes on S3, the mtime in ns on disk; "" if the server
            gives none.
        modified: when it was last written, in seconds since 1970; 0 if the server does not say.
    """

    name: str
    size: int
    version: str
    modified: float


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """How to reach a store; only `retry_minutes` applies to a directory. Credentials come from boto3's usual places.

    Attributes:
        endpoint: URL of an S3 server other than Amazon's.
        region: the bucket's region; None takes the profile's.
        profile: profile of the AWS credentials file; None takes boto3's choice.
        anonymous: send no credentials.
        requester_pays: accept that the requester is charged.
        connect_timeout_s: seconds to wait for a connection.
        read_timeout_s: seconds to wait for the next bytes of an answer, and for the next 64 KiB of an object.
        retry_minutes: minutes without progress after which a call fails; 0 retries nothing.
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
    """A tree of objects to read. Reading `readahead` bytes costs about as much as one more request.

    Every call raises DataError for what only the user can correct, and StoreError where faults outlasted the retries.
    """

    url: str
    readahead: int

    def list(self, suffix: str = "", left_out: Counter[str] | None = None) -> list[ObjectInfo]:
        """List the objects that count (`data/listing.py`) and whose names end in `suffix`, sorted by name.

        What does not count is added to `left_out` by reason, whatever its name ends in.
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
        """Read all bytes [start, stop) of an object; `stop=None` is its end.

        Args:
            version: the version that the object must still have.
            on_fault: called with the kind of every fault that is retried or ends the read: "throttled" (too many
                requests), "server" (its error), "timeout" (or too slow a body), "broken" (a connection reset, refused
                or cut short), "credentials" (none at the moment).

        Raises:
            DataError: the object is gone, shorter than `stop`, of another version, or reading it is not permitted.
        """

    def info(self, name: str) -> ObjectInfo | None:
        """Look one object up; None if there is no such object."""


class WritableStore(Store, Protocol):
    """A tree of objects to read and write; whether writing is allowed shows at the first attempt."""

    def write(self, name: str, content: bytes) -> None:
        """Write or replace an object, whole or not at all, and create the folders above it.

        Raises:
            ReadOnly: writing is not permitted.
        """

    def upload(self, name: str, path: Path) -> None:
        """Write the content of a local file of any size as `write` does."""

    def delete(self, name: str) -> None:
        """Remove an object, if it is there, and its folder if that is then empty."""


def changed(url: str, name: str) -> DataError:
    """The error where an object has another version than the index says."""
    return DataError(f"{url}/{name} changed since it was indexed; index the source anew")


def shrunk(url: str, name: str, end: int) -> DataError:
    """The error where an object ends before the bytes asked for."""
    return DataError(f"{url}/{name} ends before byte {end}: it changed since it was indexed; index the source anew")


def unreadable(path: Path, error: OSError) -> DataError:
    """The error where a local file to upload cannot be read."""
    return DataError(f"{path} cannot be read: {error.strerror}")


@dataclass(frozen=True)
class Fault:
    """A transient fault.

    Attributes:
        kind: what `on_fault` is called with.
        words: its description in messages.
        minutes: how long this kind alone is retried, where that is shorter than `retry_minutes`.
        error: what is raised after that, where it is not StoreError.
    """

    kind: str
    words: str
    minutes: float = math.inf
    error: DataError | None = None


class Retries:
    """The retries of one call: exponential backoff with full jitter, for `minutes` without progress.

    A call whose faults persist for some seconds logs one warning; a process logs at most one a minute. `what` names the
    call in messages: "reading s3://bucket/a.tar".
    """

    _FIRST_S, _CAP_S = 0.2, 20.0

    def __init__(self, what: str, minutes: float, on_fault: OnFault = None) -> None:
        self._what, self._minutes, self._on_fault = what, minutes, on_fault
        self._warned = False
        self.progress()

    def progress(self) -> None:
        """Reset the deadline and the backoff: bytes arrived."""
        self._since, self._faults = time.monotonic(), 0
        self._kind, self._kind_since = "", 0.0

    def run(
        self,
        attempt: Callable[[], T],
        faults: tuple[type[Exception], ...],
        judge: Callable[[Exception], Fault | DataError],
    ) -> T:
        """Call `attempt` until it succeeds.

        Exceptions of the types `faults` go to `judge`, which returns a transient fault or the error to raise at once.
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
            raise fault.error or StoreError(
                f"{self._what}: {self._faults} requests in a row failed over {minutes:g} minutes, "
                f"the last one with: {fault.words}"
            ) from error
        if not self._warned and now - self._faulty_since >= _SILENT_S:
            words = f"{self._what}: {fault.words}; trying again, for up to {minutes:g} minutes without progress"
            self._warned = _warned(words)
        # The exponent is capped only to keep the power small.
        delay = random.uniform(0, min(self._CAP_S, self._FIRST_S * 2 ** min(self._faults, 10)))
        time.sleep(min(delay, left))


_SILENT_S = 3.0  # shorter faults are counted but not logged
_WARNING_S = 60.0
_warning_lock = threading.Lock()
_last_warning = -math.inf


def _warned(words: str) -> bool:
    """Log a warning unless this process logged one within a minute, as an outage hits many calls; whether it did."""
    global _last_warning
    with _warning_lock:
        now = time.monotonic()
        if now - _last_warning < _WARNING_S:
            return False
        _last_warning = now
    _log.warning(words)
    return True
