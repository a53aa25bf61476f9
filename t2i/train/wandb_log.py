"""A run's numbers at Weights & Biases, which can neither end training nor hold it up.

- Threads of their own make the library's calls, and training waits for none of them but, for a bounded time, at its
  end. Whatever a call raises, and one that does not return, is an event: a run that cannot begin online begins offline,
  and one that fails later, or offline, is dropped.
- The id lies in the run's folder: it is of this run alone, whatever its name, and a run that goes on is the same there.
- Every line carries its training step, which is the axis of all curves. W&B's own count of lines goes on rising where
  a run goes back to an earlier step, and what comes after is kept and in its place.
"""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from data.files import atomic_write
from t2i.config import RunConfig
from t2i.train.events import EventLog

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
