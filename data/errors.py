"""Errors (a user's mistake, the world's fault, a skipped sample) and the exit codes of jobs. Standard library alone."""

from __future__ import annotations

from collections.abc import Iterable

DONE = 0
FAILED = 1
"""Something that nobody foresaw; a traceback says what."""
BAD_INPUT = 2
"""A user's mistake, said in one sentence."""
EXIT_RESUMABLE = 75
"""Saved, or nothing to save: the same command, started again, goes on (EX_TEMPFAIL of sysexits.h)."""


class UserError(ValueError):
    """A user's mistake, in one sentence that names the field or object and says what would be right.

    The base of every such error in the project; jobs print the sentence and exit with code 2.
    """


class DataError(UserError):
    """A mistake about data: a source that is missing, empty, malformed, or holds nothing usable."""


class StoreError(RuntimeError):
    """A fault of the network or a disk that outlasted its retries: the run stops, resumable; no sample is to blame."""


class _Skipped(Exception):
    """A sample that a lane passes over. `reason` is the counter it is counted under."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class BadSample(_Skipped):
    """Content that cannot be used (undecodable, malformed, lying): skipped, counted and listed as quarantined."""


class Filtered(_Skipped):
    """A good sample that the filters leave out: skipped and counted."""


def first_of(names: Iterable[object], most: int = 4) -> str:
    """The first few names, joined for a sentence: "a, b", "a, b and 3 more"."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def shortened(value: object, most: int = 80) -> str:
    """A value as text of at most `most` characters; where it is cut, it ends in "..."."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
