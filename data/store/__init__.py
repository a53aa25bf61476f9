"""Where bytes come from and go to: a local directory or `s3://bucket/prefix`, behind five calls.

- `Store` lists and reads; `WritableStore` writes as well. `open_store` gives the latter; a folder of images seen as
  shards (`folder.py`) is the former alone.
- An object's name is its path below the root, with forward slashes, alike for both kinds.
- A listing holds what counts by the rule of `data/listing.py`; the rest can be read and written all the same.
- A store is plain configuration: it pickles and holds no open file, so threads and processes share it.
- An object is written whole or not at all, and is read as the one version it was when the read began (or when it was
  indexed): bytes of two versions never meet.
- Faults that may pass are retried until none of the call's requests has got on for `retry_minutes`, then they end as
  `StoreError`; what only the user can mend (bucket, directory, credentials, permissions) is a `DataError` at once.
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
