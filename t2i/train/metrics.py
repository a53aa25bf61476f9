"""What a run writes about itself: metrics.jsonl, progress, Weights & Biases, throughput.

Rank 0 alone observes. A line of metrics is of one step, so a run that was killed and went on has the same
lines as one that was not; lines past the checkpoint that a run resumes from are taken back.

events.log of a run, and the one rule for what is written beside its checkpoints.

The rule: a disk that does not take it (full, over a quota, read-only, gone, broken) is an event, and training goes on.
Grids, metrics, the best model, reports and records tell of a run; only its checkpoints and its model are the run.

A run's numbers at Weights & Biases, which can neither end training nor hold it up.

- Threads of their own make the library's calls, and training waits for none of them but, for a bounded time, at its
  end. Whatever a call raises, and one that does not return, is an event: a run that cannot begin online begins offline,
  and one that fails later, or offline, is dropped.
- The id lies in the run's folder: it is of this run alone, whatever its name, and a run that goes on is the same there.
- Every line carries its training step, which is the axis of all curves. W&B's own count of lines goes on rising where
  a run goes back to an earlier step, and what comes after is kept and in its place.
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


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, whole or not at all: a part of one would spoil the line that comes after it.

    Raises:
        OSError: the disk does not take it.
    """
    content = f"{line}\n".encode()
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) < len(content):  # a disk that is about full takes what it can
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise


class EventLog:
    """What happens in a stage, in sentences, on rank 0; on other ranks `add` does nothing.

    Args:
        directory: the run's folder.
        stage: the stage's name.
        active: whether this is rank 0.
    """

    def __init__(self, directory: Path, stage: str, active: bool = True) -> None:
        self.terminal = Terminal()
        self._path, self._stage, self._active = directory / "events.log", stage, active
        self._refused: set[str] = set()

    def add(self, text: str) -> None:
        """One sentence for events.log and the terminal."""
        if not self._active:
            return
        self._say(text)
        with self.beside("events.log", self._say):
            append_line(self._path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._stage}: {text}")

    def _say(self, text: str) -> None:
        tqdm.write(f"{self._stage}: {text}", file=self.terminal)

    @contextmanager
    def beside(self, what: str, said: Callable[[str], None] | None = None) -> Iterator[None]:
        """Around everything that is written beside checkpoints: a fault of the disk is an event, the first of its kind.

        Args:
            what: names what is written, in the event.
            said: is told instead of this log.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            if what not in self._refused:
                self._refused.add(what)
                reason = getattr(error, "strerror", None) or str(error)
                (said or self.add)(f"{what} cannot be written ({reason}): training goes on without it")


T = TypeVar("T")

STEP = "train/step"
"""The step of a line, in its stage."""
BEGIN_S = 90.0
"""How long a login, and after it the beginning of a run, may take."""
FINISH_S = 30.0
"""And its end: what is not uploaded then stays in the run's folder."""
CALL_S = 15.0
"""And any other call."""
MOST_WAITING = 4096
"""Lines that wait to be logged; more are left out."""


def bounded(act: Callable[[], T], seconds: float) -> T:
    """What `act` returns, called in a thread that is left behind should it take longer.

    Raises:
        TimeoutError: it does.
        RuntimeError: it has raised something, be it an exit.
    """
    made: list[T] = []
    faults: list[BaseException] = []

    def call() -> None:
        try:
            made.append(act())
        except BaseException as error:  # SystemExit too
            faults.append(error)

    thread = threading.Thread(target=call, name="wandb call", daemon=True)
    thread.start()
    thread.join(seconds)
    if faults:
        told = " ".join(str(faults[0]).split())
        raise RuntimeError(f"{type(faults[0]).__name__}: {told}") from faults[0]
    if not made:
        raise TimeoutError(f"no answer for {seconds:g} s")
    return made[0]


def run_id(directory: Path, events: EventLog) -> str:
    """The run's id at W&B, kept in its folder."""
    path, made = directory / "wandb_id", secrets.token_hex(8)
    with events.beside("wandb_id"):
        if path.exists() and (known := path.read_text(errors="ignore").strip()):
            return known
        atomic_write(path, made.encode())
    return made


class WandbLog:
    """Logs to W&B while one stage trains.

    Args:
        config: the stage's settings; `logging.wandb` is offline or online.
        events: told of what goes wrong.
    """

    def __init__(self, config: RunConfig, events: EventLog) -> None:
        self._config, self._events = config, events
        self._id = run_id(config.directory, events)
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_WAITING)
        self._left_out = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Numbers of a step; returns at once."""
        try:
            self._lines.put_nowait({STEP: step, **values})
        except queue.Full:
            if not self._left_out:
                self._events.add("Weights & Biases does not keep up: some numbers are not logged there")
            self._left_out = True

    def close(self) -> None:
        """Log what waits and finish the run, within bounds."""
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
        """A run, online if that is wanted and possible; None: there is none."""
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
            # What passes through its hands does not reach the terminal once its service is gone.
            settings={"console": "off", "init_timeout": BEGIN_S},
        )
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        return run

    def _try(self, what: str, act: Callable[[], Any], seconds: float) -> tuple[Any] | None:
        """What a call returns, in a tuple; None: it has failed, and the run is dropped."""
        try:
            return (bounded(act, seconds),)
        except (TimeoutError, RuntimeError) as error:
            self._events.add(f"Weights & Biases cannot {what} ({error}): it is dropped, and training goes on without")
        with suppress(TimeoutError, RuntimeError):  # else it may wait for its service at this process's end
            bounded(self._give_up, CALL_S)
        return None

    def _give_up(self) -> None:
        import wandb

        wandb.teardown()


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
