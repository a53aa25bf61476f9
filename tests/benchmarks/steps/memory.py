"""Peaks of a process's resident memory, by what it was doing: anonymous memory, and files mapped into it.

The system counts (`/proc/self/status`): RssAnon is what a process can be killed for, RssFile are pages of files, which
can be written out and dropped, RssShmem is shared memory and files of a tmpfs.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

PERIOD_S = 0.05
KINDS = {"RssAnon": "anonymous", "RssFile": "files", "RssShmem": "shared"}


class MemoryPeaks:
    """Samples from a thread, for the time of a `with`.

    Args:
        part: what the process is doing now.
    """

    def __init__(self, part: Callable[[], str]) -> None:
        self._part = part
        self._peaks: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(KINDS.values(), 0))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryPeaks:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.is_set():
            part, peaks = self._part(), _resident()
            known = self._peaks[part]
            for name, kib in peaks.items():
                known[name] = max(known[name], kib)
            self._ended.wait(PERIOD_S)

    def gib(self) -> dict[str, dict[str, float]]:
        """Peaks in GiB by part, and "whole", the largest of each kind."""
        whole = {kind: max(peaks[kind] for peaks in self._peaks.values()) for kind in KINDS.values()}
        return {
            part: {kind: round(kib / 2**20, 2) for kind, kib in peaks.items()}
            for part, peaks in {**self._peaks, "whole": whole}.items()
        }


def _resident() -> dict[str, int]:
    """KiB by kind, now."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {KINDS[words[0][:-1]]: int(words[1]) for words in lines if words[0][:-1] in KINDS}
