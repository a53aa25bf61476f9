"""A progress bar on a terminal; a line now and then in a file, where a bar would be one endless line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, Self, TypeVar

from tqdm import tqdm

T = TypeVar("T")

LINE_S = 60.0
"""Seconds between two lines."""
SHORT_S = 5.0
"""A job that ends sooner writes no line."""


class Stream(Protocol):
    """What progress is written to."""

    def write(self, text: str, /) -> object: ...
    def flush(self) -> object: ...
    def isatty(self) -> bool: ...


class Lines:
    """What is used of tqdm's bar, in lines: every LINE_S seconds, and at the end of what takes SHORT_S."""

    def __init__(self, total: int, unit: str, what: str, initial: int, stream: Stream) -> None:
        self._total, self._unit, self._what, self._stream = total, unit, what, stream
        self._initial = self._done = self._shown = initial
        self._began = self._last = time.monotonic()
        self._postfix = ""

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        """What stands at the end of the next line."""
        self._postfix = text

    def update(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        if time.monotonic() - self._last >= LINE_S:
            self._show()

    def close(self) -> None:
        """Show the end."""
        if self._done > self._shown and time.monotonic() - self._began >= SHORT_S:
            self._show()

    def _show(self) -> None:
        self._last, self._shown = time.monotonic(), self._done
        bar = "{desc}{n_fmt}/{total_fmt} {unit} ({percentage:.0f} %) [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        text = tqdm.format_meter(
            self._done,
            self._total,
            self._last - self._began,
            prefix=f"{self._what}: " if self._what else "",
            unit=self._unit,
            initial=self._initial,
            postfix=self._postfix,
            bar_format=bar,
        )
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress_bar(
    total: int, unit: str, what: str = "", *, initial: int = 0, shown: bool = True, file: Stream | None = None
) -> tqdm[Any] | Lines:
    """A job's progress: `update` it, and close it or use it as a context manager.

    Args:
        total: items to do, each a `unit`.
        what: the job's name.
        initial: items done already.
        shown: whether anything is shown, as on rank 0 alone.
        file: where; None is stderr.
    """
    stream: Any = sys.stderr if file is None else file
    if shown and not stream.isatty():
        return Lines(total, unit, what, initial, stream)
    return tqdm(
        total=total, initial=initial, desc=what or None, unit=unit, dynamic_ncols=True, disable=not shown, file=stream
    )


def followed(items: Iterable[T], total: int, unit: str, what: str = "", *, shown: bool = True) -> Iterator[T]:
    """Yield the items, while `progress_bar` shows how many are done."""
    with progress_bar(total, unit, what, shown=shown) as bar:
        for item in items:
            yield item
            bar.update()
