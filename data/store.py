"""Where bytes come from: a local directory or `s3://bucket/prefix`, behind two calls, `list` and `read`.

- An object's name is its path below the root, with forward slashes, alike for both kinds.
- A store is plain configuration: it pickles and holds no open file, so threads and processes share it.
- Faults that may pass are retried a bounded number of times and end as `StoreError`; what only the user
  can mend (bucket, directory, credentials, permissions) is a `DataError` at once.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import boto3
import botocore
from botocore import exceptions as aws
from botocore.config import Config

from data.errors import DataError, StoreError

T = TypeVar("T")


@dataclass(frozen=True)
class ObjectInfo:
    """One object. `version` changes when the content does: the ETag on S3, the mtime in ns on disk."""

    name: str
    size: int
    version: str


class Store(Protocol):
    """A readable tree of objects. `readahead` is the number of bytes that cost about as much as one more read."""

    url: str
    readahead: int

    def list(self, suffix: str = "") -> list[ObjectInfo]:
        """List every object whose name ends in `suffix`, sorted by name.

        Raises:
            DataError: the directory or bucket cannot be listed.
            StoreError: the network failed for longer than the retries last.
        """

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read bytes [start, stop) of an object, `stop=None` for its end: all of them, or raise.

        Raises:
            DataError: the object is gone, shorter than `stop`, or may not be read.
            StoreError: the network or a disk failed for longer than the retries last.
        """


def open_store(
    url: str,
    *,
    endpoint: str | None = None,
    region: str | None = None,
    profile: str | None = None,
    anonymous: bool = False,
) -> Store:
    """Open the store at a local directory or at `s3://bucket/prefix`; the keywords concern S3 alone.

    Credentials are boto3's (its environment variables and files).

    Args:
        url: the directory, or s3://bucket/prefix.
        endpoint: URL of another S3 server than Amazon's.
        region: the bucket's region; None takes the profile's.
        profile: profile of the AWS credentials file; None takes boto3's choice.
        anonymous: send no credentials.

    Raises:
        DataError: a missing directory, an unknown scheme or an unknown profile.
    """
    if url.startswith("s3://"):
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket or "@" in bucket or ":" in bucket:
            # The URL is not repeated: what stands before an "@" may be a secret.
            raise DataError("an S3 source must be s3://bucket/prefix, with the credentials in boto3's usual places")
        return S3Store(bucket, prefix.strip("/"), endpoint, region, profile, anonymous)
    if "://" in url:
        raise DataError(f"source {url!r}: the scheme must be s3://, or give a local directory")
    return LocalStore(url)


def _retried(what: str, attempt: Callable[[], T], faults: tuple[type[Exception], ...], attempts: int = 4) -> T:
    for n in range(attempts):
        try:
            return attempt()
        except faults as fault:
            if n + 1 == attempts:
                raise StoreError(f"{what} failed {attempts} times, the last time with: {fault}") from fault
            time.sleep(random.uniform(0.5, 1.0) * 0.2 * 4**n)
    raise AssertionError("unreachable")


def _shrunk(url: str, name: str, end: int) -> DataError:
    return DataError(f"{url}/{name} ends before byte {end}: it changed since it was indexed; index the source anew")


class LocalStore:
    """A directory and everything below it."""

    readahead = 16 << 10

    def __init__(self, root: str) -> None:
        self.url = root.rstrip("/") or "/"
        if not Path(root).is_dir():
            raise DataError(f"source {root!r} is not a directory: give the folder that holds the .tar shards")

    def list(self, suffix: str = "") -> list[ObjectInfo]:
        def fail(error: OSError) -> None:
            raise error  # os.walk would leave the folder out in silence

        found = []
        try:
            for folder, _, files in os.walk(self.url, onerror=fail):
                for path in (Path(folder, file) for file in files if file.endswith(suffix)):
                    stat = path.stat()
                    name = path.relative_to(self.url).as_posix()
                    found.append(ObjectInfo(name, stat.st_size, str(stat.st_mtime_ns)))
        except OSError as error:
            raise DataError(f"source {self.url!r}: {error.filename!r} cannot be listed: {error.strerror}") from error
        return sorted(found, key=lambda info: info.name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        def attempt() -> bytes:
            try:
                with open(Path(self.url, name), "rb", buffering=0) as file:
                    end = os.fstat(file.fileno()).st_size if stop is None else stop
                    pieces, at = [], start
                    # The kernel may return less than was asked for; only b"" is the end.
                    while at < end and (piece := os.pread(file.fileno(), end - at, at)):
                        pieces.append(piece)
                        at += len(piece)
            except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
                raise DataError(f"{self.url}/{name} cannot be read: {error.strerror}") from error
            if at < end:
                raise _shrunk(self.url, name, end)
            return b"".join(pieces)

        return _retried(f"reading {self.url}/{name}", attempt, (OSError,))


class S3Store:
    """A bucket's objects below a prefix, through boto3; `endpoint` is the URL of any other S3 server."""

    readahead = 4 << 20

    def __init__(
        self,
        bucket: str,
        prefix: str,
        endpoint: str | None,
        region: str | None,
        profile: str | None,
        anonymous: bool,
    ) -> None:
        self._settings = (bucket, prefix, endpoint, region, profile, anonymous)
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._where = self.url + (f" at {endpoint}" if endpoint else "")
        config = Config(
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=64,
            retries={"mode": "standard", "max_attempts": 6},
            signature_version=botocore.UNSIGNED if anonymous else None,
            # Few servers besides Amazon's have a DNS name for every bucket.
            s3={"addressing_style": "path" if endpoint else "auto"},
        )
        try:
            session = boto3.Session(profile_name=profile)
            self._client: Any = session.client("s3", endpoint_url=endpoint, region_name=region, config=config)
        except (aws.ProfileNotFound, aws.InvalidRegionError, ValueError) as error:
            raise DataError(f"source {self._where}: {error}") from error

    def __reduce__(self) -> tuple[type[S3Store], tuple[Any, ...]]:
        return S3Store, self._settings

    def list(self, suffix: str = "") -> list[ObjectInfo]:
        def attempt() -> list[ObjectInfo]:
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
            return [
                ObjectInfo(item["Key"].removeprefix(self._prefix), item["Size"], item["ETag"].strip('"'))
                for page in pages
                for item in page.get("Contents", [])
                if item["Key"].endswith(suffix)
            ]

        return sorted(self._request("listing", self._where, attempt), key=lambda info: info.name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is not None and stop <= start:
            return b""
        byte_range = f"bytes={start}-{'' if stop is None else stop - 1}"

        def attempt() -> bytes:
            # Without a range an empty object is b"", with one it is an error.
            extra = {} if start == 0 and stop is None else {"Range": byte_range}
            with self._client.get_object(Bucket=self._bucket, Key=self._prefix + name, **extra)["Body"] as body:
                content: bytes = body.read()
            if stop is not None and len(content) != stop - start:
                raise _shrunk(self.url, name, stop)
            return content

        return self._request("reading", f"{self._where}/{name}", attempt)

    def _request(self, verb: str, what: str, attempt: Callable[[], T]) -> T:
        # botocore retries requests; a body that breaks under way is its caller's to ask for again.
        broken_bodies = (aws.ResponseStreamingError, aws.IncompleteReadError, aws.ReadTimeoutError)
        try:
            return _retried(f"{verb} {what}", attempt, broken_bodies)
        except aws.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", "unknown"))
            if remedy := _REMEDIES.get(code):
                raise DataError(f"{verb} {what} was refused ({code}): {remedy}") from error
            raise StoreError(f"{verb} {what} failed after retries: {error}") from error
        except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.TokenRetrievalError) as error:
            raise DataError(f"{verb} {what}: {error}; configure boto3's credentials or set anonymous") from error
        except aws.ParamValidationError as error:
            raise DataError(f"{verb} {what}: {error}") from error
        except aws.BotoCoreError as error:
            raise StoreError(f"{verb} {what} failed after retries: {error}") from error


_NO_BUCKET = "the bucket does not exist; check its name and the endpoint"
_CREDENTIALS = "the credentials are not valid for this server; check the access key, the secret and the profile"
_DENIED = "these credentials may not list or read it; grant s3:ListBucket and s3:GetObject, or set anonymous"
_MOVED = "the bucket lives in another region; set region to it"
_REMEDIES = {
    "NoSuchBucket": _NO_BUCKET,
    "InvalidBucketName": _NO_BUCKET,
    "NoSuchKey": "the object does not exist; it was removed since it was indexed",
    "404": "the object or bucket does not exist",
    "InvalidRange": "the object is shorter than when it was indexed; index the source anew",
    "416": "the object is shorter than when it was indexed; index the source anew",
    "AccessDenied": _DENIED,
    "403": _DENIED,
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "ExpiredToken": "the session token has expired; renew the credentials",
    "PermanentRedirect": _MOVED,
    "AuthorizationHeaderMalformed": _MOVED,
    "IllegalLocationConstraintException": _MOVED,
}
