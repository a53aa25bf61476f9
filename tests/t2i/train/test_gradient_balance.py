"""Gradient balancing in a training step: the weight is that of two full backward passes over the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from t2i.build import build_denoiser
from t2i.config.run import ModelConfig, RunConfig
from t2i.diffusion.flow import flow_matching_loss
from t2i.diffusion.objective import LossWeights, Objective
from t2i.diffusion.perceptual import cosine_distance
from t2i.models.layers import patchify, unpatchify
from t2i.train.step import GradientBalance, build_balance

BATCH, SIDE, PATCH = 8, 8, 4
TIMES = np.array([0.05, 0.31, 0.1, 0.9, 0.299, 0.2, 0.5, 0.97])
OPEN = [1, 3, 6, 7]


class Features:
    """In place of both frozen networks."""

    width, depth = 5, 1

    def tokens(self, image: Tensor, grid: tuple[int, int], layers: Sequence[int]) -> list[Tensor]:
        matrix = torch.randn(3 * PATCH**2, self.width, generator=torch.Generator().manual_seed(9))
        return [patchify(image, PATCH).tanh() @ matrix]

    def distance(self, predicted: Tensor, image: Tensor) -> Tensor:
        return (predicted.sigmoid() - image.sigmoid()).square().flatten(1).mean(1)


class Network(nn.Module):
    """Any denoiser that ends in a linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(3 * PATCH**2, 10)
        self.head = nn.Linear(10, 3 * PATCH**2)

    def forward(self, x: Tensor) -> Tensor:
        return unpatchify(self.head(self.trunk(patchify(x, PATCH)).tanh()), PATCH, SIDE, SIDE)


OBJECTIVE = Objective(LossWeights(0.5, 0.3, 0.0, 0.3, 0.05), Features(), Features())
CLEAN = torch.rand(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
NOISE = torch.zeros_like(CLEAN)


def config(**objective: Any) -> RunConfig:
    settings = {"balance_from_step": 0, "balance_every": 1} | objective
    return RunConfig.model_validate({"objective": settings, "model": {"patch_size": PATCH}})


def balance_of(network: Network, micro: int = BATCH, state: dict | None = None, **objective: Any) -> GradientBalance:
    run = config(**objective)
    run.train.batch_size, run.train.micro_batch_size = BATCH, micro
    balance = GradientBalance(run, network.head)
    if state is not None:
        balance.take_up(state)
    return balance


def step(network: Network, balance: GradientBalance, number: int, micro: int, t: np.ndarray = TIMES) -> bool:
    """One step's gradients, added up on the network as an engine does; whether it was measured."""
    gradient_hook = balance.begin(number)
    for part in np.split(np.arange(BATCH), BATCH // micro):
        loss, _ = OBJECTIVE(
            network(0.3 * CLEAN[part]), None, CLEAN[part], NOISE[part], t[part], grid=(2, 2), batch_size=BATCH,
            ungated=int((t >= 0.3).sum()), micro_batches=BATCH // micro, perceptual_weight=balance.weight,
            gradient_hook=gradient_hook,
        )  # fmt: skip
        (loss * micro / BATCH).backward()
    return gradient_hook is not None


def two_backwards(network: Network) -> tuple[Tensor, Tensor]:
    """Gradients of flow matching and of the perceptual terms at the head's weight, each by its own backward pass."""
    predicted = network(0.3 * CLEAN)
    flow = flow_matching_loss(predicted, CLEAN, NOISE, torch.from_numpy(TIMES), "image", 0.05).mean()
    pair = predicted[OPEN], CLEAN[OPEN]
    (a,), (b,) = (Features().tokens(image, (2, 2), [1]) for image in pair)
    perceptual = 0.5 * Features().distance(*pair).mean() + 0.3 * cosine_distance(a, b).mean()
    (of_flow,) = torch.autograd.grad(flow, network.head.weight, retain_graph=True)
    (of_perceptual,) = torch.autograd.grad(perceptual, network.head.weight)
    return of_flow, of_perceptual


def expected_ratio(network: Network) -> float:
    flow, perceptual = two_backwards(network)
    return float(flow.norm() / (perceptual.norm() + 1e-4))


@pytest.mark.parametrize("micro", [8, 4, 2, 1])
def test_the_ratio_is_that_of_two_full_backwards_however_the_batch_is_cut(micro: int) -> None:
    network = Network()
    balance = balance_of(network, micro, balance_smoothing=0.5)
    assert step(network, balance, 0, micro)
    assert balance.weight == 1.0  # the step itself has the old weight
    balance.finish(applied=True)
    ratio = expected_ratio(network)
    assert abs(ratio - 1) > 0.5
    assert balance.weight == pytest.approx(0.5 + 0.5 * ratio, rel=1e-5)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_gradients_of_a_measured_step_are_those_of_any_other(weight: float) -> None:
    gradients = []
    for start in (0, 5):
        network = Network()
        measured = step(network, balance_of(network, 4, {"weight": weight}, balance_from_step=start), 0, 4)
        assert measured == (start == 0)
        gradients.append([parameter.grad for parameter in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)
    flow, perceptual = two_backwards(Network())
    torch.testing.assert_close(gradients[0][2], flow + weight * perceptual, atol=1e-6, rtol=1e-4)


def test_measured_are_every_so_many_steps_from_the_configured_one() -> None:
    network = Network()
    balance = balance_of(network, balance_from_step=7, balance_every=5)
    measured, weights = [], []
    for number in range(22):
        if step(network, balance, number, BATCH):
            measured.append(number)
        balance.finish(applied=True)
        weights.append(balance.weight)
    assert measured == [10, 15, 20]
    assert weights[:10] == [1.0] * 10
    assert [n for n in range(1, 22) if weights[n] != weights[n - 1]] == measured


def test_repeated_measurements_approach_the_ratio_and_the_clamp_holds() -> None:
    network = Network()
    ratio = expected_ratio(network)
    for most, target in ((100.0, ratio), (0.9 * ratio, 0.9 * ratio)):
        balance = balance_of(network, balance_max=most)
        for number in range(60):
            step(network, balance, number, BATCH)
            balance.finish(applied=True)
        assert balance.weight == pytest.approx(target, rel=1e-4)


def test_a_vetoed_or_wholly_gated_step_leaves_the_weight_alone() -> None:
    network = Network()
    balance = balance_of(network)
    step(network, balance, 0, BATCH)
    balance.finish(applied=False)
    assert balance.weight == 1.0
    step(network, balance, 1, BATCH, np.full(BATCH, 0.1))
    balance.finish(applied=True)
    assert balance.weight == 1.0
    step(network, balance, 2, BATCH)
    balance.finish(applied=True)
    assert balance.weight == pytest.approx(0.8 + 0.2 * expected_ratio(network), rel=1e-5)


def test_it_goes_on_from_its_state() -> None:
    network = Network()
    whole = balance_of(network)
    for number in range(4):
        step(network, whole, number, BATCH)
        whole.finish(applied=True)
        if number == 1:
            state = whole.state
    resumed = balance_of(network, state=state)
    assert resumed.weight == state["weight"] != whole.weight
    for number in (2, 3):
        step(network, resumed, number, BATCH)
        resumed.finish(applied=True)
    assert resumed.state == whole.state


def test_it_is_off_unless_asked_for() -> None:
    network = build_denoiser(ModelConfig(width=8, depth=1, heads=1, text_depth=0, bottleneck=4, repa_layer=1), 4, 2)
    assert build_balance(RunConfig(), network) is None
    assert not network.head._forward_pre_hooks
    assert build_balance(config(), network) is not None
