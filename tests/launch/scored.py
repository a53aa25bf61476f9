"""Trains a run's stages, scored by how bright their pictures are. FAULT is "leaving": the process is asked to at its
ninth picture; or "saving", "writing": it is killed on its way to the checkpoint of step 4, or to a model.

python tests/launch/scored.py --config X
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from launch import train as job
from launch.preemption import preemption
from launch.process import main
from t2i.train import checkpointing
from t2i.train.checkpointing import Saver

FAULT = os.environ.get("FAULT")
save_if_due, write_model = Saver.save_if_due, checkpointing.write_model


class Brightness:
    """Two tasks, of bright and of dark things, of three prompts each."""

    prompts = tuple(
        f"a photo of a {color} {shape}" for color in ("pink", "black") for shape in ("star", "ring", "heart")
    )
    tasks = ("bright",) * 3 + ("dark",) * 3
    judged = 0

    def judge(self, index: int, image: Tensor) -> dict[str, Any]:
        self.judged += 1
        if FAULT == "leaving" and self.judged == 9:
            preemption.request("the test asks to")
        return {"task": self.tasks[index], "mean": image.float().mean().item()}

    def summary(self, results: Sequence[dict[str, Any]]) -> dict[str, float]:
        means = {task: [it["mean"] / 255 for it in results if it["task"] == task] for task in ("bright", "dark")}
        bright, dark = (sum(values) / len(values) for values in means.values())
        return {"overall": (bright + 1 - dark) / 2, "bright": bright, "dark": 1 - dark}


def kill_saving(self: Saver, step: int, *args: Any, **kwargs: Any) -> None:
    if FAULT == "saving" and step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    save_if_due(self, step, *args, **kwargs)


def kill_writing(folder: Path, *args: Any) -> None:
    if FAULT == "writing" and folder.name == "model":
        os.kill(os.getpid(), signal.SIGKILL)
    write_model(folder, *args)


Saver.save_if_due = kill_saving
checkpointing.write_model = kill_writing
job.build_scorer = lambda config, device: Brightness()

if __name__ == "__main__":
    main(lambda: job.train(__doc__ or "", only=None))
