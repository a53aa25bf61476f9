"""`objective.noise_scale` is in whatever the network is shown: in training, validation and sampling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.loader import Batch
from data.preview import ValidationSet
from t2i.config.run import RunConfig
from t2i.diffusion.objective import LossWeights, Objective
from t2i.distributed import World
from t2i.engine.engine import StepResult
from t2i.models.pixelgen import Prediction
from t2i.pipeline import Picture, Pipeline
from t2i.train.metrics import EventLog
from t2i.train.scoring import Evaluator
from t2i.train.step import TrainingStep

CPU = torch.device("cpu")
PIXELS = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def config(scale: float) -> RunConfig:
    return RunConfig.model_validate(
        {
            "objective": {"noise_scale": scale, "lpips_weight": 0, "pdino_weight": 0, "repa_weight": 0},
            "model": {"patch_size": 4},
            "data": {"resolution": 8},
            "train": {"batch_size": 4, "micro_batch_size": 2},
            "sampling": {"steps": 1, "batch_size": 2},
        }
    )


class Text:
    """In place of a text encoder."""

    dtype = torch.float32

    def __call__(self, captions: list[str]) -> list[Tensor]:
        return [torch.zeros(2, 3)] * len(captions)


class Shown:
    """In place of a network; keeps what it is shown."""

    patch_size = 4

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.times: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, _: Tensor) -> Prediction:
        self.images.append(x)
        self.times.append(t)
        return Prediction(torch.zeros_like(x, requires_grad=torch.is_grad_enabled()), x)


def trained(scale: float, shown: Shown) -> None:
    engine: Any = SimpleNamespace(
        network=lambda *inputs: (shown(*inputs).output, None),
        backward=lambda loss: None,
        step=lambda lr, skip_update: StepResult(0.0, None),
    )
    objective = Objective(LossWeights(0, 0, 0, 0.3, 0.05), None, None)
    batch = Batch([PIXELS], [""] * 4, [""] * 4, np.arange(4), {}, [], 0.0)
    step = TrainingStep(config(scale), "low", World(0, 1, CPU), Text(), torch.zeros(2, 3), objective, engine)
    step(batch, 0, lambda loss, norm: None)


def pipeline_of(scale: float, shown: Shown) -> Pipeline:
    return Pipeline(config(scale), shown, Text(), torch.zeros(2, 3), CPU)


def validated(scale: float, shown: Shown) -> None:
    heldout = ValidationSet(PIXELS, [""] * 4, [""] * 4)
    events = EventLog(Path(), "low")
    Evaluator(pipeline_of(scale, shown), World(0, 1, CPU), heldout, Path(), lambda _: None, events).loss()


def sampled(scale: float, shown: Shown) -> None:
    pipeline_of(scale, shown).draw([Picture("a"), Picture("b")], config(scale).sampling)


@pytest.mark.parametrize("job", [trained, validated, sampled])
def test_the_noise_in_what_a_network_is_shown_has_that_deviation(job: Callable[[float, Shown], None]) -> None:
    one, three = Shown(), Shown()
    job(1.0, one)
    job(3.0, three)
    t = torch.cat(one.times)
    assert torch.equal(t, torch.cat(three.times)) and len(t) > 0
    # x_t = t image + (1 - t) scale noise: two of them differ by twice the noise.
    noise = (torch.cat(three.images) - torch.cat(one.images)) / 2 / (1 - t)[:, None, None, None]
    assert noise.std() == pytest.approx(1.0, abs=0.1) and abs(noise.mean()) < 0.1
