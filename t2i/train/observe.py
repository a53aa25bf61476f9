"""What a run writes about itself: metrics.jsonl, progress, Weights & Biases, throughput.

Rank 0 alone observes. A line of metrics is of one step, so a run that was killed and went on has the same
lines as one that was not; lines past the checkpoint that a run resumes from are taken back.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from data.files import atomic_write
from data.progress import progress_bar
from t2i.config import RunConfig
from t2i.gpus import find_gpu
from t2i.train.events import EventLog, append_line
from t2i.train.wandb_log import WandbLog


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that one device can reach: the data sheet's where it is known, else a bare matmul's, measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        gpu = find_gpu(torch.cuda.get_device_name(device))
        if gpu is not None:
            return gpu.peak_bf16
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)

    def timed() -> float:
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    timed()
    return 2 * size**3 / min(timed() for _ in range(10))


def memory_gib(device: torch.device) -> float:
    """Peak memory: of the device where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class JsonLines:
    """A file of JSON lines, each of a stage and a step: metrics.jsonl, quarantine.jsonl and skipped.jsonl of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """Everything written so far; a torn last line is left out."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def rewind(self, stage: str, step: int) -> None:
        """Take back the stage's lines after `step`, atomically; at step 0 all of them, its first validation too."""
        self.keep(lambda line: line["stage"] != stage or 0 < step >= line["step"])

    def take_back(self, stage: str, step: int, kinds: Sequence[str]) -> None:
        """Take back the stage's lines of some kinds at `step`, atomically: they come again."""
        self.keep(lambda line: (line["stage"], line["step"]) != (stage, step) or line["kind"] not in kinds)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Take back all lines but those wanted, atomically.

        Raises:
            OSError: the disk does not take the rest.
        """
        kept = [line for line in self.lines() if wanted(line)]
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; numbers that are not finite become null.

        Raises:
            OSError: the disk does not take it.
        """
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        append_line(self.path, json.dumps(line))


class Observer:
    """Metrics, events, progress and W&B of one stage, on rank 0; on other ranks every method does nothing."""

    def __init__(self, config: RunConfig, stage: str, step: int, active: bool) -> None:
        self.active = active
        self.stage = stage
        self.events = EventLog(config.directory, stage, active)
        self.event = self.events.add
        if not active:
            return
        self.metrics = JsonLines(config.directory / "metrics.jsonl")
        with self.events.beside("metrics.jsonl"):
            self.metrics.rewind(stage, step)
        self._bar = progress_bar(config.train.steps, "step", stage, initial=step, file=self.events.terminal)
        self._wandb = None if config.logging.wandb == "disabled" else WandbLog(config, self.events)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of metrics."""
        if not self.active:
            return
        with self.events.beside("metrics.jsonl"):
            self.metrics.write({"kind": kind, "stage": self.stage, "step": step, "time": time.time(), **values})
        if self._wandb is not None:
            self._wandb.log(step, {f"{self.stage}/{kind}/{name}": value for name, value in values.items()})

    def take_back(self, step: int, kinds: Sequence[str]) -> None:
        """Lines of these kinds at a step come again."""
        if self.active:
            with self.events.beside("metrics.jsonl"):
                self.metrics.take_back(self.stage, step, kinds)

    def progress(self, values: dict[str, Any] | None = None) -> None:
        """One step further; `values` are shown behind it."""
        if not self.active:
            return
        if values is not None:
            self._bar.set_postfix_str(
                f"loss {values['loss']:.4f}, {values['images_per_s']:.0f} images/s", refresh=False
            )
        self._bar.update()

    def close(self) -> None:
        """End the bar and the W&B run."""
        if self.active:
            self._bar.close()
            if self._wandb is not None:
                self._wandb.close()
