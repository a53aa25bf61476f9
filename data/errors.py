"""What can go wrong with data: the user's mistake, the world's fault, a bad sample."""

from __future__ import annotations


class DataError(ValueError):
    """A user's mistake or an unusable source, in one sentence: the object, and what would be right."""


class StoreError(RuntimeError):
    """A network or disk fault that outlasted its retries: the run stops, resumable; no sample is to blame."""


class BadSample(Exception):
    """One sample cannot or shall not be used: its lane passes it over and counts it under `reason`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
