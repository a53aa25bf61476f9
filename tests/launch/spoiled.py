"""Trains a run's first stage with gradients spoiled at chosen steps: FAULTS is {"step, from 1": factor}; on the last
rank alone. KILLED_AT, RAISES_AT and HANGS_AT are steps, from 1, at which the last rank does that; LATE_AT is the one in
which its clock goes a day on. NOTES is a folder in which every rank notes what it trains on, a line a step.

python tests/launch/spoiled.py --config X
"""

from __future__ import annotations

import json
import os
import signal
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from launch.process import main
from launch.train import train
from t2i.diffusion.objective import Objective
from t2i.train.step import TrainingStep

FAULTS = {int(step): float(factor) for step, factor in json.loads(os.environ.get("FAULTS", "{}")).items()}
SPOILS = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
now = 0
make_step, loss_of = TrainingStep.__call__, Objective.__call__


def at(fault: str) -> int:
    return int(os.environ.get(f"{fault}_AT", 0))


def note(batch: Any) -> None:
    if "NOTES" in os.environ and not batch.ids[0].startswith("made up/"):  # the dry run's
        rows = {int(slot): id_ for slot, id_ in zip(batch.slots, batch.ids, strict=True)}
        sizes = [list(pixels.shape) for pixels in batch.pixels]
        with Path(os.environ["NOTES"], f"rank_{os.environ.get('RANK', 0)}").open("a") as file:
            file.write(json.dumps({"step": now, "ids": rows, "sizes": sizes}) + "\n")


def step_noted(self: TrainingStep, batch: Any, step: int, skip_update: Any) -> Any:
    global now
    now = step + 1
    note(batch)
    if SPOILS and now == at("KILLED"):
        os.kill(os.getpid(), signal.SIGKILL)
    if SPOILS and now == at("RAISES"):
        raise ArithmeticError("the last rank's own words")
    if SPOILS and now == at("HANGS"):
        time.sleep(3600)
    if SPOILS and now == at("LATE"):
        clock = import_module("launch.preemption")  # the package has its `preemption` under this name
        clock.time = SimpleNamespace(monotonic=lambda: time.monotonic() + 86_400)
    return make_step(self, batch, step, skip_update)


def loss_spoiled(self: Objective, *args: Any, **kwargs: Any) -> Any:
    loss, terms = loss_of(self, *args, **kwargs)
    return (loss * FAULTS.get(now, 1.0) if SPOILS else loss), terms


TrainingStep.__call__ = step_noted
Objective.__call__ = loss_spoiled

if __name__ == "__main__":
    main(lambda: train(__doc__ or "", only=0))
