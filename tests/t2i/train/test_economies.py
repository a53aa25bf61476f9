"""The economies of a step change its cost, not its loss: each is taken back, and the numbers stay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from steps.economies import CaptionsByMicroBatch, SpendthriftObjective
from torch import Tensor

from data.loader import Batch
from t2i.config.loading import validate_config
from t2i.config.run import RunConfig
from t2i.diffusion.objective import LossWeights, Objective
from t2i.distributed import World
from t2i.engine.engine import StepResult
from t2i.models.text import ClassLabels
from t2i.train.step import TrainingStep

CPU, GRID, WIDTH, CLASSES = torch.device("cpu"), (2, 3), 5, 10
TIMES = np.array([0.05, 0.9, 0.31, 0.29, 0.6, 0.1])


class Eyes:
    """Both frozen networks; counts the images that it is shown."""

    width, depth = WIDTH, 1

    def __init__(self) -> None:
        self.distances, self.described = 0, 0

    def distance(self, predicted: Tensor, image: Tensor) -> Tensor:
        self.distances += len(predicted)
        return (predicted.sin() - image.sin()).square().flatten(1).mean(1)

    def tokens(self, image: Tensor, grid: tuple[int, int], layers: Sequence[int]) -> list[Tensor]:
        self.described += len(image)
        matrix = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(3))
        patches = image.unflatten(2, (grid[0], -1)).unflatten(4, (grid[1], -1)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return [(patches.flatten(1, 2) @ matrix).tanh()]


def of(objective: Objective, t: np.ndarray) -> list[Tensor]:
    """Loss, gradients at prediction and features, sums of the terms."""
    torch.manual_seed(0)
    predicted, image = torch.randn(len(t), 3, 8, 12, requires_grad=True), torch.randn(len(t), 3, 8, 12)
    projected = torch.randn(len(t), 6, WIDTH, requires_grad=True)
    ungated = int((t >= 0.3).sum())
    loss, terms = objective(
        predicted,
        projected,
        image,
        torch.zeros_like(image),
        t,
        grid=GRID,
        batch_size=2 * len(t),
        ungated=2 * ungated,
        micro_batches=2,
    )
    return [
        loss,
        *torch.autograd.grad(loss, (predicted, projected)),
        *(terms.sums[name] for name in sorted(terms.sums)),
    ]


@pytest.mark.parametrize("pdino_gated", [True, False])
@pytest.mark.parametrize("t", [TIMES, np.full(4, 0.1), np.full(4, 0.7)], ids=["some", "none", "all"])
@pytest.mark.parametrize("all_samples", [True, False])
@pytest.mark.parametrize("features_twice", [True, False])
def test_gating_and_shared_features(all_samples: bool, features_twice: bool, t: np.ndarray, pdino_gated: bool) -> None:
    eyes, wide_eyes = Eyes(), Eyes()
    weights = LossWeights(0.1, 0.3, 0.5, 0.3, 0.05, pdino_gated=pdino_gated)
    economical = Objective(weights, eyes, eyes)
    spendthrift = SpendthriftObjective(
        Objective(weights, wide_eyes, wide_eyes), all_samples=all_samples, features_twice=features_twice
    )
    found, expected = of(spendthrift, t), of(economical, t)
    if (t < 0.3).all():  # a term of no samples is 0 there, and left out here
        found, expected = found[:3], expected[:3]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    ungated, n = int((t >= 0.3).sum()), len(t)
    compared = ungated if pdino_gated else n
    assert (eyes.distances, eyes.described) == (ungated, n + compared)
    more = n if all_samples else compared
    assert wide_eyes.distances == (n if all_samples else ungated)
    assert wide_eyes.described == n + more * (2 if features_twice else 1)


class Recorder:
    """In the engine's place: keeps the conditions that its network was given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def network(self, x_t: Tensor, t: Tensor, condition: Tensor) -> tuple[Tensor, None]:
        self.given.append(condition)
        return torch.zeros_like(x_t), None

    def backward(self, loss: Tensor) -> None:
        pass

    def step(self, *_: object) -> StepResult:
        return StepResult(1.0, None)


def conditions(make: type[TrainingStep], config: RunConfig) -> list[Tensor]:
    engine, labels = Recorder(), ClassLabels(CLASSES, CPU)
    objective = Objective(LossWeights(0, 0, 0, 0.3, 0.05), None, None)
    step = make(config, "s", World(0, 1, CPU), labels, labels.null_caption(), objective, engine)
    slots = np.arange(config.train.batch_size)
    captions = [str(slot % CLASSES) for slot in slots]
    pixels = torch.zeros(len(slots), 3, 8, 8, dtype=torch.uint8)
    step(Batch([pixels], captions, captions, slots, {}, [], 0.0), 0, lambda loss, norm: None)
    return engine.given


def test_captions_first() -> None:
    model = {"condition": "class", "classes": CLASSES, "width": 16, "heads": 2, "depth": 4, "repa_layer": 1}
    tree = {
        "model": {**model, "patch_size": 4, "context_start": 1},
        "data": {"resolution": 8},
        "objective": {"caption_dropout": 0.5},
        "train": {"batch_size": 16, "micro_batch_size": 4},
    }
    config = validate_config(tree, "here")
    economical, spendthrift = (conditions(make, config) for make in (TrainingStep, CaptionsByMicroBatch))
    assert len(economical) == 4
    torch.testing.assert_close(spendthrift, economical, atol=0, rtol=0)
    assert 0 < sum(int((it == CLASSES).sum()) for it in economical) < 16
