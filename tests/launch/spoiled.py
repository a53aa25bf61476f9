"""Trains a run's first stage with gradients spoiled at chosen steps: FAULTS is {"step, from 1": factor}; on the last
rank alone. KILLED_AT is the step, from 1, at which it is killed.

python tests/launch/spoiled.py --config X
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from launch.process import main
from launch.train import train
from t2i.diffusion.objective import Objective
from t2i.train.step import TrainingStep

FAULTS = {int(step): float(factor) for step, factor in json.loads(os.environ["FAULTS"]).items()}
now = 0
make_step, loss_of = TrainingStep.__call__, Objective.__call__


def step_noted(self: TrainingStep, batch: Any, step: int, veto: Any) -> Any:
    global now
    now = step + 1
    if now == int(os.environ.get("KILLED_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    return make_step(self, batch, step, veto)


def loss_spoiled(self: Objective, *args: Any, **kwargs: Any) -> Any:
    loss, terms = loss_of(self, *args, **kwargs)
    spoils = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    return (loss * FAULTS.get(now, 1.0) if spoils else loss), terms


TrainingStep.__call__ = step_noted  # type: ignore[method-assign]
Objective.__call__ = loss_spoiled  # type: ignore[method-assign]

if __name__ == "__main__":
    main(lambda: train(__doc__ or "", only=0))
