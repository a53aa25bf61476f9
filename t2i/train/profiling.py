"""Profiles chosen steps: a trace (torch.profiler) and a memory snapshot (torch.cuda.memory).

Each rank writes its own files, without communication. If writing fails, that is an event, and training goes on. A step
that is not profiled costs two comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function

from t2i.config.train import ProfilingConfig

_NO_PROFILE = nullcontext()
_MOST_ALLOCATIONS = 1_000_000


class Profiler:
    """Profiles steps of one stage on this rank. Use as a context manager, or call `close`.

    Writes `trace_FIRST-LAST_rank_N.json.gz` (for chrome://tracing or ui.perfetto.dev) and `memory_STEP_rank_N.pickle`
    (for pytorch.org/memory_viz) into `folder`. If it can, the trace begins one step early to warm the profiler up; that
    step is not in the file. `log` takes one sentence for each file, written or not.
    """

    def __init__(
        self, config: ProfilingConfig, folder: Path, rank: int, device: torch.device, log: Callable[[str], None]
    ) -> None:
        self._folder, self._rank, self._device, self._log = folder, rank, device, log
        self._first, self._last = config.trace_step, config.trace_step + config.trace_steps - 1
        self._warm_up = max(1, self._first - 1) if self._first else self._last + 1
        self._memory_step = config.memory_step
        self._profile: profile | None = None
        self._begun = self._done = 0  # the steps of the trace so far
        if self._memory_step and device.type != "cuda":
            log(f"profiling.memory_step {self._memory_step}: no memory snapshot, {device.type} is no CUDA device")
            self._memory_step = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, step: int) -> AbstractContextManager[None]:
        """Context of step `step`, counted from 1."""
        if self._warm_up <= step <= self._last or step == self._memory_step:
            return self._profiled(step)
        return _NO_PROFILE

    @contextmanager
    def _profiled(self, step: int) -> Iterator[None]:
        if step == self._memory_step:
            torch.cuda.memory._record_memory_history(max_entries=_MOST_ALLOCATIONS)
        if self._warm_up <= step <= self._last:
            self._begin(step)
        try:
            with record_function(f"step {step}"):
                yield
        finally:
            if step == self._memory_step:
                self._write(f"memory_{step:08d}_rank_{self._rank:05d}.pickle", torch.cuda.memory._dump_snapshot)
                torch.cuda.memory._record_memory_history(enabled=None)
        if self._profile is not None:
            self._done = step
            self._profile.step()
            if step == self._last:
                self.close()

    def _begin(self, step: int) -> None:
        """Start the trace, unless it is under way since the step before."""
        if self._profile is not None and self._done == step - 1:
            return
        self.close()
        self._begun, self._done = max(step, self._first), step - 1
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        warm_up = self._begun - step
        self._profile = profile(
            activities=activities,
            schedule=lambda n: ProfilerAction.WARMUP if n < warm_up else ProfilerAction.RECORD,  # until `stop`
            record_shapes=True,
        )
        self._profile.start()

    def close(self) -> None:
        """End the trace, and write what it holds of the chosen steps."""
        if self._profile is None:
            return
        ended, self._profile = self._profile, None
        ended.stop()
        if self._done >= self._begun:
            name = f"trace_{self._begun:08d}-{self._done:08d}_rank_{self._rank:05d}.json.gz"
            self._write(name, ended.export_chrome_trace)

    def _write(self, name: str, write: Callable[[str], object]) -> None:
        partial = self._folder / f".{name}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write(str(partial))
            partial.rename(self._folder / name)
        except (OSError, RuntimeError) as error:
            self._log(f"rank {self._rank} could not write {self._folder / name}: {error}")
        else:
            self._log(f"wrote {self._folder / name}")
