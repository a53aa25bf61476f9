"""Objects of an S3 server, Amazon's or another, through botocore.

- botocore's own retries are off, except its redirects to a bucket's region: `Retries` alone decides when a request is
  sent again, so its deadline holds and every fault is counted.
- A body is read into a buffer of its length. When it breaks, the next request asks for the missing bytes. A body below
  64 KiB in `read_timeout_s` counts as stalled: its bytes are kept, but they are no progress.
- An object is the same while the ETag of its answers is, weak or not. If-Match is not sent, since not every server
  compares ETags as it returns them. Where listings have other ETags than answers, each is compared with its own kind.
- Other servers omit fields: lengths, ETags, dates, the continuation token of a listing. A missing field is asked for in
  another way, or the error names the server as the cause.
- Checksum headers are sent only where S3 demands them, as not every server knows them. Requests are signed with the
  SHA-256 of their content, which servers verify.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data.errors import DataError
from data.listing import drop_excluded
from data.store.base import ObjectInfo, OnFault, Retries, StoreOptions, changed, shrunk, unreadable
from data.store.s3_client import ERRORS, OUTSIDE, Connection, CutShort, Refused, Stalled, judge_for, open_session

_PIECE = 64 << 10  # bytes of a body that count as progress if they arrive within `read_timeout_s`
_PART = 16 << 20  # bytes of a part of a multipart upload; S3 allows at most 10,000 parts
_UPLOADS = 4  # parts in flight
_BUCKET = re.compile(r"(arn:[^/]+(?:[:/]outpost[:/][^/:]+)?[:/]accesspoint[:/][^/:]+|[^/]*)/?(.*)", re.DOTALL)
"""A bucket's name, or the ARN of an access point, and the prefix."""
_RANGE = re.compile(r"(?:bytes[ =])?(\d+)-\d+/(\d+|\*)")
_LISTING = ("IsTruncated", "KeyCount", "Name", "Contents")
"""A complete answer to a listing has at least one of these fields; an empty answer parses as well."""


@dataclass
class _Part:
    """The bytes that a read asks for, and its progress."""

    start: int
    stop: int | None
    version: str | None
    content: bytearray | None = None  # allocated when its length is known
    got: int = 0
    counted: int = 0  # bytes of `got` that were counted as progress or as stalled
    seen: tuple[int, object] | None = None  # size and ETag (or date) that every answer must have


class S3Store:
    """A bucket's objects below a prefix."""

    readahead = 4 << 20

    def __init__(self, url: str, options: StoreOptions) -> None:
        match = _BUCKET.fullmatch(url.removeprefix("s3://"))
        bucket, prefix = match.groups() if match else ("", "")
        if not bucket or "@" in bucket or (":" in bucket and "accesspoint" not in bucket):
            # The URL is not repeated: the text before an "@" may be a secret.
            raise DataError(
                "an S3 source must be s3://bucket/prefix, where an access point's ARN is a bucket as well, with the "
                "credentials in boto3's usual places"
            )
        if "@" in urlsplit(options.endpoint or "").netloc:
            raise DataError("endpoint must be http(s)://host:port, with the credentials in boto3's usual places")
        self._settings = (url, options)
        # A leading slash belongs to the prefix: keys may have empty segments.
        self._options, self._prefix = options, f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
        self.url = f"s3://{bucket}/{self._prefix}".rstrip("/")
        self._answer_tags: dict[tuple[str, str], str] = {}  # ETag of answers, by name and version in a listing
        self._shared = {"Bucket": bucket, **({"RequestPayer": "requester"} if options.requester_pays else {})}
        open_session(self._where(), options)  # so that a missing profile is reported now
        self._connection = Connection(self._where(), options)

    def __reduce__(self) -> tuple[type[S3Store], tuple[Any, ...]]:
        return S3Store, self._settings

    @property
    def _client(self) -> Any:
        # A forked process must not share its parent's connections, nor a lock that a thread of the parent may hold.
        if self._connection.pid != os.getpid():
            self._connection = Connection(self._where(), self._options)
        return self._connection.client()

    def list(self, suffix: str = "", left_out: Counter[str] | None = None) -> list[ObjectInfo]:
        infos = drop_excluded(self._all(), lambda info: info.name, Counter() if left_out is None else left_out)
        return sorted((info for info in infos if info.name.endswith(suffix)), key=lambda info: info.name)

    def _all(self) -> Iterator[ObjectInfo]:
        # Each page is retried by itself: a listing may have tens of thousands.
        after: dict[str, str] = {}
        while True:
            page = self._call("listing", "", "list_objects_v2", *_LISTING, Prefix=self._prefix, **after)
            items = page.get("Contents", [])
            if not items and not after and not page.get("IsTruncated"):
                self._check_prefix()
            for item in items:
                name = item["Key"].removeprefix(self._prefix)
                if name and not name.endswith("/"):  # consoles create an empty object of such a name for a "folder"
                    info = _described(name, item["Size"], item) if "Size" in item else self.info(name)
                    if info is not None:
                        yield info
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated", token is not None):
                return
            before = after
            after = {"ContinuationToken": token} if token else {"StartAfter": items[-1]["Key"]} if items else {}
            if after in ({}, before):
                raise DataError(f"listing {self._where()}: the server cuts the listing short and gives no way to go on")

    def _check_prefix(self) -> None:
        """Raise DataError if the prefix is the name of an object."""
        entry = self._entry(self._prefix.rstrip("/")) if self._prefix else None
        if entry and entry.get("Size"):
            raise DataError(f"{self.url} is an object: give the prefix that holds it, {self.url.rpartition('/')[0]}")

    def _entry(self, key: str) -> dict[str, Any] | None:
        """A key's entry in a listing; None if there is no such object, or listing is not permitted."""
        try:
            page = self._call("listing", "", "list_objects_v2", *_LISTING, Prefix=key, MaxKeys=1)
        except Refused:  # the credentials may only permit reading, or listing below a prefix
            return None
        return next((item for item in page.get("Contents", []) if item["Key"] == key), None)

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        version: str | None = None,
        on_fault: OnFault = None,
    ) -> bytes | bytearray:
        if stop is not None and stop <= start:
            return b""
        retries = self._retries("reading", name, on_fault)
        part = _Part(start, stop, version)
        try:
            retries.run(lambda: self._fetch(name, part, retries), ERRORS, judge_for(f"reading {self._where(name)}"))
        except Refused as refusal:
            if refusal.code not in OUTSIDE:
                raise
            if part.content is not None or stop is not None:
                raise shrunk(self.url, name, stop or start) from refusal
            # There is no byte at `start`, which is correct at the end of the object (an empty object has no ranges).
            if (info := self.info(name)) is None or info.size != start:
                raise shrunk(self.url, name, start) from refusal
            return b""
        assert part.content is not None
        return part.content

    def _fetch(self, name: str, part: _Part, retries: Retries) -> None:
        if part.got and part.content is not None and part.got == len(part.content):
            return  # only the end of the answer was lost
        with closing(self._get(name, part)) as body:
            assert part.content is not None
            view = memoryview(part.content)
            due = time.monotonic() + self._options.read_timeout_s
            while part.got < len(view):
                if time.monotonic() > due:
                    few, part.counted = part.got - part.counted, part.got
                    raise Stalled(f"only {few} bytes in {self._options.read_timeout_s:g} s")
                # read1 returns what has arrived; read would wait for all bytes asked for, however slow they are.
                piece = body.read1(min(len(view) - part.got, _PIECE))
                if not piece:
                    raise CutShort("the body ended early")
                view[part.got : part.got + len(piece)] = piece
                part.got += len(piece)
                if part.got - part.counted >= _PIECE:
                    part.counted, due = part.got, time.monotonic() + self._options.read_timeout_s
                    retries.progress()
            is_end = part.seen is not None and part.start + len(view) == part.seen[0]
            if is_end and body.length_remaining is None and body.read1(1):  # chunked, as the length was unknown
                raise DataError(
                    f"the server of {self._where(name)} sends more bytes than the object has: a proxy may be "
                    "decompressing it"
                )

    def _get(self, name: str, part: _Part) -> Any:
        """Request the missing bytes of `part`, and allocate its buffer once their number is known."""
        at = part.start + part.got
        end = part.start + len(part.content) if part.content is not None else part.stop
        # An empty object can only be requested without a range.
        wanted = {"Range": f"bytes={at}-{'' if end is None else end - 1}"} if at or end is not None else {}
        answer = self._send("get_object", Key=self._prefix + name, **wanted)
        body = answer["Body"]._raw_stream  # botocore's wrapper has no `read1`
        try:
            first, size = self._covered(name, answer, at)
            if first != at:
                raise DataError(f"the server of {self._where(name)} does not answer ranged requests as S3 does")
            tag = _tag(answer)
            seen = size, tag or answer.get("LastModified")
            is_same = part.seen == seen if part.seen else self._is_version(name, part.version, tag, size)
            if not is_same:
                raise changed(self.url, name)
            if end is not None and size < end:
                raise shrunk(self.url, name, end)
            part.seen = seen
            if part.content is None:
                part.content = bytearray((size if end is None else end) - part.start)
        except BaseException:
            body.close()
            raise
        return body

    def _covered(self, name: str, answer: dict[str, Any], at: int) -> tuple[int, int]:
        """First byte in an answer to GET, and the object's size; a server may ignore the range and send everything."""
        if match := _RANGE.match(answer.get("ContentRange", "")):
            first, size = int(match[1]), None if match[2] == "*" else int(match[2])
        elif answer["ResponseMetadata"]["HTTPStatusCode"] == 206:
            first, size = at, None
        else:
            first, size = 0, answer.get("ContentLength")
        if size is None and (info := self.info(name)):
            size = info.size
        if size is None:
            raise changed(self.url, name)  # it is gone
        return first, size

    def _is_version(self, name: str, version: str | None, tag: str, size: int) -> bool:
        """Whether an answer with ETag `tag` is of a version, as far as the server says."""
        if not version or not tag or tag in (version, self._answer_tags.get((name, version))):
            return True
        # A listing's ETag may be of another kind, so compare with what a listing and HEAD say now.
        entry, info = self._entry(self._prefix + name), self.info(name)
        now = [(entry.get("Size", size), _tag(entry))] if entry else []
        now += [(info.size, info.version)] if info else []
        if (size, version) not in now:
            return False
        self._answer_tags[name, version] = tag
        return True

    def info(self, name: str) -> ObjectInfo | None:
        key = self._prefix + name
        try:
            head = self._call("looking up", name, "head_object", Key=key)
        except Refused:
            # Only the answer to GET has a body that says why.
            try:
                self._call("looking up", name, "get_object", Key=key, Range="bytes=0-0")["Body"].close()
            except Refused as reason:
                if reason.code in ("NoSuchKey", "404"):
                    return None
                raise
            raise
        size = head.get("ContentLength")
        if size is None and (size := (self._entry(key) or {}).get("Size")) is None:
            raise DataError(f"looking up {self._where(name)}: the server does not say how long it is")
        return _described(name, size, head)

    def write(self, name: str, content: bytes) -> None:
        self._call("writing", name, "put_object", Key=self._prefix + name, Body=content)

    def delete(self, name: str) -> None:
        self._call("deleting", name, "delete_object", Key=self._prefix + name)

    def upload(self, name: str, path: Path) -> None:
        try:
            size = path.stat().st_size
            if size <= _PART:
                return self.write(name, path.read_bytes())
            with self._multipart(name) as parts:
                self._upload_parts(name, path, size, parts)
        except OSError as error:
            raise unreadable(path, error) from error

    @contextmanager
    def _multipart(self, name: str) -> Iterator[dict[str, str]]:
        key = self._prefix + name
        upload_id = self._call("writing", name, "create_multipart_upload", "UploadId", Key=key)["UploadId"]
        parts = {"Key": key, "UploadId": upload_id}
        try:
            yield parts
        except BaseException as error:
            # Parts left behind are charged for. One attempt only: `error` may mean that the server is unreachable.
            try:
                self._client.abort_multipart_upload(**self._shared, **parts)
            except ERRORS:
                error.add_note(f"uploaded parts of {self._where(name)} are still there: abort its multipart upload")
            raise

    def _upload_parts(self, name: str, path: Path, size: int, parts: dict[str, str]) -> None:
        length = max(_PART, -(-size // 10_000))

        def send(number: int) -> dict[str, Any]:
            with open(path, "rb") as file:
                file.seek((number - 1) * length)
                body = file.read(length)
            sent = self._call("writing", name, "upload_part", PartNumber=number, Body=body, **parts)
            if "ETag" not in sent:
                raise DataError(f"writing {self._where(name)}: the server gives parts no ETag, so none can be joined")
            return {"PartNumber": number, "ETag": sent["ETag"]}

        with ThreadPoolExecutor(_UPLOADS) as pool:
            done = list(pool.map(send, range(1, -(-size // length) + 1)))
        try:
            self._call("writing", name, "complete_multipart_upload", MultipartUpload={"Parts": done}, **parts)
        except Refused as refusal:
            # The request may have succeeded and only its answer been lost.
            info = self.info(name) if refusal.code == "NoSuchUpload" else None
            if info is None or info.size != size or not info.version.endswith(f"-{len(done)}"):
                raise

    def _where(self, name: str = "") -> str:
        return f"{self.url}/{name}".rstrip("/") + (f" at {self._options.endpoint}" if self._options.endpoint else "")

    def _retries(self, verb: str, name: str, on_fault: OnFault = None) -> Retries:
        return Retries(f"{verb} {self._where(name)}", self._options.retry_minutes, on_fault)

    def _call(self, verb: str, name: str, operation: str, *fields: str, **arguments: Any) -> dict[str, Any]:
        """Send a request until it is answered; a complete answer has at least one of `fields`."""

        def attempt() -> dict[str, Any]:
            answer = self._send(operation, **arguments)
            if fields and not any(field in answer for field in fields):
                raise CutShort("the answer ended early")
            return answer

        judge = judge_for(f"{verb} {self._where(name)}", writing=verb == "writing")
        return self._retries(verb, name).run(attempt, ERRORS, judge)

    def _send(self, operation: str, **arguments: Any) -> dict[str, Any]:
        request = getattr(self._client, operation)
        try:
            answer: dict[str, Any] = request(**self._shared, **arguments)
        except ValueError as error:  # not one of botocore's own errors
            raise DataError(f"the server of {self._where()} answers with what no S3 server does: {error}") from error
        return answer


def _tag(answer: dict[str, Any]) -> str:
    """The ETag of an answer or a listing's entry, without quotes and weakness; "" if it has none."""
    return str(answer.get("ETag", "")).removeprefix("W/").strip('"')


def _described(name: str, size: int, answer: dict[str, Any]) -> ObjectInfo:
    modified = answer.get("LastModified")
    return ObjectInfo(name, size, _tag(answer), modified.timestamp() if modified else 0.0)
