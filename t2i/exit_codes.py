"""What a job's exit code says. Standard library alone."""

from __future__ import annotations

DONE = 0
FAILED = 1
"""Something that nobody foresaw; a traceback says what."""
BAD_INPUT = 2
"""A user's mistake, said in one sentence."""
START_AGAIN = 75
"""Saved, or nothing to save: the same command, started again, goes on (EX_TEMPFAIL of sysexits.h)."""
