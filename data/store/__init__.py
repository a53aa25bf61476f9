"""Stores of objects: a local directory, or `s3://bucket/prefix`, behind the same few calls.

- `Store` lists and reads; `WritableStore`, which `open_store` returns, writes as well. The virtual tars of a folder of
  images (`virtual.py`) are a `Store`.
- An object's name is its path below the root, with forward slashes. A listing holds what `data/listing.py` counts;
  other objects can still be read and written by name.
- A store is plain configuration: it pickles and holds no open file, so threads and processes share it.
- An object is written whole or not at all. A read returns bytes of one version, never of two.
- Transient faults are retried until none of a call's requests has made progress for `retry_minutes`, then raise
  `StoreError`. What only the user can correct (bucket, directory, credentials, permissions) is a `DataError` at once.
"""

from __future__ import annotations

from data.errors import DataError
from data.store.base import ObjectInfo, OnFault, ReadOnly, Store, StoreOptions, WritableStore, changed
from data.store.local import LocalStore
from data.store.s3 import S3Store

__all__ = [
    "LocalStore",
    "ObjectInfo",
    "OnFault",
    "ReadOnly",
    "S3Store",
    "Store",
    "StoreOptions",
    "WritableStore",
    "changed",
    "open_store",
]


def open_store(url: str, options: StoreOptions = StoreOptions()) -> WritableStore:
    """Open the store at a local directory or at `s3://bucket/prefix`.

    Raises:
        DataError: a missing directory, an unknown scheme, an unknown profile, or credentials in a URL.
    """
    if url.startswith("s3://"):
        return S3Store(url, options)
    if "://" in url:
        raise DataError(f"source {url!r}: the scheme must be s3://, or give a local directory")
    return LocalStore(url, options)
