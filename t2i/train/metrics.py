"""What a run writes about itself: metrics.jsonl, events.log, progress and Weights & Biases. On rank 0 alone.

Each line of metrics is of one step. Lines after the checkpoint that a run resumes from are removed, so a run that was
killed has the same lines as one that was not.

Only its checkpoints and its model are the run. If a disk does not take anything else (full, over a quota, read-only,
gone, broken), that is an event, and training goes on. Weights & Biases can neither end training nor hold it up: its
calls run in their own threads, and training waits for them only at its end, for a bounded time. A run that cannot begin
online begins offline; one that fails later is dropped. Curves have the training step as their axis, since W&B's own
count of lines goes on rising after a rollback.
"""

from __future__ import annotations

import errno
import json
import math
import os
import queue
import resource
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from data.files import atomic_write
from data.progress import progress_bar
from t2i.config.run import RunConfig
from t2i.plan.memory import find_gpu


class Terminal:
    """stderr that may close at any time: a launcher that exits must not end the run."""

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
            except OSError:  # events.log has it too
                self._gone = True


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, whole or not at all: the rest of a torn one would spoil the next line.

    Raises:
        OSError: the disk does not take it.
    """
    content = f"{line}\n".encode()
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) < len(content):  # a disk that is nearly full writes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


class EventLog:
    """events.log of the run in `directory`; where not `active`, `add` does nothing."""

    def __init__(self, directory: Path, stage: str, active: bool = True) -> None:
        self.terminal = Terminal()
        self._path, self._stage, self._active = directory / "events.log", stage, active
        self._refused: set[str] = set()

    def add(self, text: str) -> None:
        """Write a sentence to events.log and the terminal."""
        if not self._active:
            return
        self._print(text)
        with self.tolerate_disk_errors("events.log", self._print):
            append_line(self._path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._stage}: {text}")

    def _print(self, text: str) -> None:
        tqdm.write(f"{self._stage}: {text}", file=self.terminal)

    @contextmanager
    def tolerate_disk_errors(self, what: str, log: Callable[[str], None] | None = None) -> Iterator[None]:
        """Turn an error of the disk while writing `what` into an event, once; `log` takes it instead of this log."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            if what not in self._refused:
                self._refused.add(what)
                reason = getattr(error, "strerror", None) or str(error)
                (log or self.add)(f"{what} cannot be written ({reason}): training goes on without it")


T = TypeVar("T")

STEP = "train/step"
"""W&B's name of the step within the stage."""
BEGIN_S = 90.0
"""How long W&B's login may take, and after it the beginning of a run."""
FINISH_S = 30.0
"""How long W&B may take to end a run; what is not uploaded by then stays in the run's folder."""
CALL_S = 15.0
"""How long any other call of W&B may take."""
MOST_WAITING = 4096
"""How many lines may wait to be logged; more are dropped."""


def bounded(act: Callable[[], T], seconds: float) -> T:
    """What `act` returns, called in a thread that is left behind if it takes longer.

    Raises:
        TimeoutError: it takes longer.
        RuntimeError: it raised something, SystemExit included.
    """
    made: list[T] = []
    faults: list[BaseException] = []

    def call() -> None:
        try:
            made.append(act())
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=call, name="wandb call", daemon=True)
    thread.start()
    thread.join(seconds)
    if faults:
        message = " ".join(str(faults[0]).split())
        raise RuntimeError(f"{type(faults[0]).__name__}: {message}") from faults[0]
    if not made:
        raise TimeoutError(f"no answer for {seconds:g} s")
    return made[0]


def run_id(directory: Path, events: EventLog) -> str:
    """The run's id at W&B, kept in its folder, so that a resumed run is the same one there."""
    path, made = directory / "wandb_id", secrets.token_hex(8)
    with events.tolerate_disk_errors("wandb_id"):
        if path.exists() and (known := path.read_text(errors="ignore").strip()):
            return known
        atomic_write(path, made.encode())
    return made


class WandbLog:
    """Logs one stage to W&B; `logging.wandb` is offline or online."""

    def __init__(self, config: RunConfig, events: EventLog) -> None:
        self._config, self._events = config, events
        self._id = run_id(config.directory, events)
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_WAITING)
        self._dropped_lines = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log the metrics of a step; returns at once."""
        try:
            self._lines.put_nowait({STEP: step, **values})
        except queue.Full:
            if not self._dropped_lines:
                self._events.add("Weights & Biases does not keep up: some numbers are not logged there")
            self._dropped_lines = True

    def close(self) -> None:
        """Log what waits and finish the run, within a bounded time."""
        with suppress(queue.Full):  # its thread hangs, and is left behind
            self._lines.put(None, timeout=CALL_S)
        self._thread.join(FINISH_S + 3 * CALL_S)
        if self._thread.is_alive():
            self._events.add("Weights & Biases is not done, and is left behind; wandb sync uploads what it has written")

    # In the thread

    def _work(self) -> None:
        run = self._begin()
        while (line := self._lines.get()) is not None:
            if run is not None and self._try("log", partial(run.log, line), CALL_S) is None:
                run = None
        if run is not None:
            self._try("finish", run.finish, FINISH_S)

    def _begin(self) -> Any:
        """A W&B run, online if that is wanted and possible, or None."""
        if self._config.logging.wandb == "online":
            reason = "no login"
            try:
                if bounded(self._login, BEGIN_S):
                    return bounded(lambda: self._init("online"), BEGIN_S)
            except (TimeoutError, RuntimeError) as error:
                reason = str(error)
            self._events.add(f"Weights & Biases ({reason}): writing offline (wandb sync uploads it)")
        made = self._try("begin", lambda: self._init("offline"), BEGIN_S)
        return made[0] if made is not None else None

    def _login(self) -> bool:
        import wandb

        return bool(wandb.login(prompt=False))

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        run = wandb.init(
            project=self._config.logging.wandb_project,
            name=self._config.name,
            id=self._id,
            resume="allow",
            dir=self._config.directory,
            mode=mode,
            config=self._config.model_dump(mode="json"),
            # If W&B captured the console, nothing would reach the terminal once its service is gone.
            settings={"console": "off", "init_timeout": BEGIN_S},
        )
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        return run

    def _try(self, what: str, act: Callable[[], Any], seconds: float) -> tuple[Any] | None:
        """What a call returns, in a tuple, or None if it failed and the run is dropped."""
        try:
            return (bounded(act, seconds),)
        except (TimeoutError, RuntimeError) as error:
            self._events.add(f"Weights & Biases cannot {what} ({error}): it is dropped, and training goes on without")
        with suppress(TimeoutError, RuntimeError):  # or it may wait for its service when this process ends
            bounded(self._give_up, CALL_S)
        return None

    def _give_up(self) -> None:
        import wandb

        wandb.teardown()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that one device can reach: the data sheet's if it is known, or those of a matmul, measured."""
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
    """Peak memory in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class JsonLines:
    """A file of JSON lines, each with a stage and a step: metrics.jsonl, quarantine.jsonl, skipped.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """All lines so far, without a torn last one."""
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
        """Remove the stage's lines after `step`, atomically; at step 0 all of them, the first validation too."""
        self.keep(lambda line: line["stage"] != stage or 0 < step >= line["step"])

    def take_back(self, stage: str, step: int, kinds: Sequence[str]) -> None:
        """Remove the stage's lines of some kinds at `step`, atomically: they come again."""
        self.keep(lambda line: (line["stage"], line["step"]) != (stage, step) or line["kind"] not in kinds)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Remove all lines but those that are `wanted`, atomically. Raises OSError if the disk does not take it."""
        kept = [line for line in self.lines() if wanted(line)]
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; numbers that are not finite become null. Raises as `append_line`."""
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        append_line(self.path, json.dumps(line))


class Observer:
    """Metrics, events, progress and W&B of one stage; does nothing on ranks that are not `active`, all but 0."""

    def __init__(self, config: RunConfig, stage: str, step: int, active: bool) -> None:
        self.active = active
        self.stage = stage
        self.events = EventLog(config.directory, stage, active)
        self.event = self.events.add
        if not active:
            return
        self.metrics = JsonLines(config.directory / "metrics.jsonl")
        with self.events.tolerate_disk_errors("metrics.jsonl"):
            self.metrics.rewind(stage, step)
        self._bar = progress_bar(config.train.steps, "step", stage, initial=step, file=self.events.terminal)
        self._wandb = None if config.logging.wandb == "disabled" else WandbLog(config, self.events)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of metrics."""
        if not self.active:
            return
        with self.events.tolerate_disk_errors("metrics.jsonl"):
            self.metrics.write({"kind": kind, "stage": self.stage, "step": step, "time": time.time(), **values})
        if self._wandb is not None:
            self._wandb.log(step, {f"{self.stage}/{kind}/{name}": value for name, value in values.items()})

    def take_back(self, step: int, kinds: Sequence[str]) -> None:
        """Remove the stage's lines of these kinds at `step`: they come again."""
        if self.active:
            with self.events.tolerate_disk_errors("metrics.jsonl"):
                self.metrics.take_back(self.stage, step, kinds)

    def progress(self, values: dict[str, Any] | None = None) -> None:
        """Advance the progress bar by a step and show its loss and throughput."""
        if not self.active:
            return
        if values is not None:
            self._bar.set_postfix_str(
                f"loss {values['loss']:.4f}, {values['images_per_s']:.0f} images/s", refresh=False
            )
        self._bar.update()

    def close(self) -> None:
        """End the progress bar and the W&B run."""
        if self.active:
            self._bar.close()
            if self._wandb is not None:
                self._wandb.close()
