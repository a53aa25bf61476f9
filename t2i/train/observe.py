"""What a run writes about itself: metrics.jsonl, the progress bar, Weights & Biases, throughput.

Rank 0 alone observes. A line of metrics is of one step, so a run that was killed and went on has the same
lines as one that was not; lines past the checkpoint that a run resumes from are taken back.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from t2i.config import RunConfig
from t2i.gpus import find_gpu


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
        self._refused = False

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
        self._keep(lambda line: line["stage"] != stage or 0 < step >= line["step"])

    def take_back(self, stage: str, step: int, kinds: Sequence[str]) -> None:
        """Take back the stage's lines of some kinds at `step`, atomically: they come again."""
        self._keep(lambda line: (line["stage"], line["step"]) != (stage, step) or line["kind"] not in kinds)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        kept = [line for line in self.lines() if wanted(line)]
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.rename(self.path)

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; numbers that are not finite become null."""
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk does not end a run
            if not self._refused:
                tqdm.write(f"{self.path} cannot be written: {error.strerror}", file=sys.stderr)
            self._refused = True


class Terminal:
    """stderr, for as long as somebody is there to read it: a launcher that goes must not end what it started."""

    def __init__(self) -> None:
        self._gone = False

    def write(self, text: str) -> None:
        self._try(lambda: sys.stderr.write(text))

    def flush(self) -> None:
        self._try(sys.stderr.flush)

    def isatty(self) -> bool:
        return not self._gone and sys.stderr.isatty()

    def _try(self, act: Callable[[], object]) -> None:
        if not self._gone:
            try:
                act()
            except OSError:  # events.log has what matters
                self._gone = True


class Observer:
    """Metrics, progress bar and W&B of one stage, on rank 0; on other ranks every method does nothing."""

    def __init__(self, config: RunConfig, stage: str, step: int, active: bool) -> None:
        self.active = active
        self.stage = stage
        if not active:
            return
        self.metrics = JsonLines(config.directory / "metrics.jsonl")
        self.metrics.rewind(stage, step)
        self.events = config.directory / "events.log"
        total = config.train.steps
        self._terminal = Terminal()
        self._bar = tqdm(total=total, initial=step, desc=stage, unit="step", dynamic_ncols=True, file=self._terminal)
        self._wandb = None if config.logging.wandb == "disabled" else self._start_wandb(config)

    def _start_wandb(self, config: RunConfig) -> Any:
        import wandb

        mode = config.logging.wandb
        if mode == "online" and not wandb.login(prompt=False):
            self.event("no Weights & Biases login: writing offline (wandb sync uploads it)")
            mode = "offline"
        return wandb.init(
            project=config.logging.wandb_project,
            name=config.name,
            id=config.name,
            resume="allow",
            dir=config.directory,
            mode=mode,
            config=config.model_dump(mode="json"),
        )

    def event(self, text: str) -> None:
        """One sentence for events.log and the terminal."""
        if not self.active:
            return
        with suppress(OSError), self.events.open("a") as file:  # the terminal has it
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.stage}: {text}\n")
        tqdm.write(f"{self.stage}: {text}", file=self._terminal)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of metrics."""
        if not self.active:
            return
        line = {"kind": kind, "stage": self.stage, "step": step, "time": time.time(), **values}
        self.metrics.write(line)
        if self._wandb is not None:
            self._wandb.log({f"{self.stage}/{kind}/{name}": value for name, value in values.items()})

    def take_back(self, step: int, kinds: Sequence[str]) -> None:
        """Lines of these kinds at a step come again."""
        if self.active:
            self.metrics.take_back(self.stage, step, kinds)

    def progress(self, values: dict[str, Any] | None = None) -> None:
        """One step further; `values` are shown behind the bar."""
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
                self._wandb.finish()
