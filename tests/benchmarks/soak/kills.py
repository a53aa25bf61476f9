"""One start of a run, and how it is killed."""

from __future__ import annotations

import random
import re
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

import psutil
from tiny import start

from soak.runs import HANG_S, Parallelism, Run, say

SCRIPT = "curriculum.py"
POLL_S = 0.002
BEGUN = re.compile("(going on|starting) from")  # events.log, as the first step comes


@dataclass(frozen=True)
class Aim:
    """When a kill is to come: `at` seconds after the `start`, or at a place among the steps (`step`, `save`)."""

    moment: str
    at: float


def draw_aims(rng: random.Random, count: int, start_s: float, total: int) -> Iterator[Aim]:
    """Kills of one run, the later ones further on in it. A save needs others after it, lest the run ends first."""
    places = sorted(rng.uniform(0, total + 1) for _ in range(count))
    for place in places:
        moment = rng.choice(["start", "step", "step", "save", "save"])
        at = rng.uniform(0, start_s) if moment == "start" else place
        yield Aim(moment, min(at, total - 2.0) if moment == "save" else at)


class Stuck(Exception):
    """The run does not continue and cannot be started again."""


class Start:
    """One start of a run."""

    def __init__(self, run: Run, parallelism: Parallelism) -> None:
        self.run = run
        self.name = f"{run.config.name}: {parallelism.name} x{parallelism.ranks}"
        self._leftovers = run.saves()
        self._offset = run.events.stat().st_size if run.events.exists() else 0
        self._began = time.monotonic()
        options = ["--config", str(run.config_path), *parallelism.options]
        self._process = start(parallelism.launcher, SCRIPT, *options, ranks=parallelism.ranks)
        self._output: deque[str] = deque(maxlen=40)
        threading.Thread(target=self._output.extend, args=(self._process.stdout,), daemon=True).start()

    def told(self) -> str:
        """The text of events.log since this start."""
        return self.run.events.read_bytes()[self._offset :].decode() if self.run.events.exists() else ""

    def begun(self) -> bool:
        """Whether its first step is done."""
        return BEGUN.search(self.told()) is not None

    def saving(self) -> bool:
        """Whether this start is writing a checkpoint that is not committed yet."""
        return bool(self.run.saves() - self._leftovers)

    def _until(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition; False if the run ends first."""
        while not condition():
            if self._process.poll() is not None:
                return False
            time.sleep(POLL_S)
        return True

    def _after(self, seconds: float) -> bool:
        then = time.monotonic() + seconds
        return self._until(lambda: time.monotonic() >= then)

    def _family(self) -> tuple[list[psutil.Process], list[psutil.Process]]:
        """The launchers, the topmost first, and the ranks. It takes longer to find them than to save."""
        launchers: list[psutil.Process] = []
        ranks: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):  # one that has ended has no children that matter
            top = psutil.Process(self._process.pid)
            for process in [top, *top.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    words = [word.endswith(SCRIPT) for word in process.cmdline()]
                    if any(words):  # a rank is a Python that runs the script, a launcher one that is told of it
                        (ranks if any(words[1:3]) else launchers).append(process)
        return launchers, ranks

    def kill(self, aim: Aim, step_s: float, rng: random.Random) -> tuple[str, str] | None:
        """Kill it as aimed; whom and at which moment that was. None: it ended before."""
        ready = self._after(aim.at) if aim.moment == "start" else self._until(self.begun)
        launchers, ranks = self._family()
        if not ready or not launchers:
            return None
        whom = rng.choice(["launcher", "rank", "all"] if ranks else ["launcher", "all"])
        victims = {"launcher": [rng.choice(launchers)], "rank": [rng.choice(ranks or launchers)]}
        if aim.moment != "start":
            ready = self._until(lambda: self.run.steps_trained() >= int(aim.at))
            ready = ready and (self._until(self.saving) if aim.moment == "save" else self._after(aim.at % 1 * step_s))
            if not ready:
                return None
        saving = self.saving()
        for victim in victims.get(whom, launchers + ranks):
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        trained = self.run.steps_trained()
        moment = "save" if saving else "start" if not self.begun() else "end" if trained == self.run.total else "step"
        say(f"{self.name}, {whom} killed ({moment}), {trained} steps done")
        return whom, moment

    def leave(self, killed: bool) -> float:
        """Wait until it has ended and left the run; the seconds since its start.

        Raises:
            Stuck: it failed without being killed, or it is still there.
        """
        try:
            code = self._process.wait(HANG_S if killed else 10 * HANG_S)
        except subprocess.TimeoutExpired:
            for left in chain(*self._family()):
                left.kill()
            raise Stuck(f"{self.name} does not end:\n{''.join(self._output)}") from None
        if code != 0 and not killed:
            raise Stuck(f"{self.name} ended with {code}:\n{''.join(self._output)}")
        if not self.run.wait_until_free():
            raise Stuck(f"{self.name} still holds the run:\n{''.join(self._output)}")
        return time.monotonic() - self._began
