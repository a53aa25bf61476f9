"""DPM-Solver++ 2M against its formulas in their own terms, and against diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from t2i.diffusion.sampling import choose_solver, dpmpp, time_grid

Field = Callable[[Tensor, float], Tensor]
SETTINGS = [(steps, shift) for steps in (25, 50) for shift in (1.0, 3.0, 4.0)]


def toy_field(dtype: torch.dtype) -> tuple[Field, Tensor]:
    """A velocity, nonlinear in the state and in time, and noise to start from."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(48, 48, generator=generator, dtype=dtype) / 48**0.5
    noise = torch.randn(8, 48, generator=generator, dtype=dtype)
    return lambda x, t: 1.5 * torch.tanh((1 + 2 * t) * x @ mix) - (0.4 + t * t) * x + math.cos(5 * t), noise


def ours(field: Field, noise: Tensor, steps: int, shift: float) -> Tensor:
    solve = choose_solver("dpmpp", 2)
    return solve(lambda x, t, _: field(x, t), noise, time_grid(steps, shift, "dpmpp"), [False] * steps)


def in_noise_levels(field: Field, noise: Tensor, steps: int, shift: float) -> Tensor:
    """The method as published: levels sigma from noise to image, alpha = 1 - sigma, the network's v = noise - image,
    lambda = ln(alpha / sigma), x' = sigma' / sigma x + alpha' (1 - exp(-h)) D with h = lambda' - lambda."""
    base = [0.999 * (1 - i / steps) for i in range(steps + 1)]
    sigmas = [shift * b / (1 + (shift - 1) * b) for b in base]
    lambdas = [math.log((1 - sigma) / sigma) for sigma in sigmas[:-1]] + [math.inf]
    x, images = noise, []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        images.append(x + sigma * field(x, 1 - sigma))
        image, h = images[-1], lambdas[i + 1] - lambdas[i]
        if 0 < i < steps - 1:
            image = image + (images[-1] - images[-2]) * h / (lambdas[i] - lambdas[i - 1]) / 2
        x = sigma_next / sigma * x + (1 - sigma_next) * (1 - math.exp(-h)) * image
    return x


def test_its_grid_begins_next_to_noise() -> None:
    """Levels sigma of 0.999 (1 - i / N), shifted; the last is 0."""
    for steps, shift in SETTINGS:
        grid = time_grid(steps, shift, "dpmpp")
        base = 0.999 * (1 - np.arange(steps + 1) / steps)
        np.testing.assert_allclose(1 - np.array(grid), shift * base / (1 + (shift - 1) * base), rtol=1e-12, atol=0)
        assert grid[-1] == 1.0 and len(grid) == steps + 1
    assert 1 - time_grid(25, 3.0, "dpmpp")[0] == pytest.approx(2.997 / 2.998)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (2, 3.0), (3, 3.0), *SETTINGS])
def test_it_is_the_published_method(steps: int, shift: float) -> None:
    field, noise = toy_field(torch.float64)
    torch.testing.assert_close(
        ours(field, noise, steps, shift), in_noise_levels(field, noise, steps, shift), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize(("steps", "shift"), SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_diffusers_scheduler(dtype: torch.dtype, steps: int, shift: float) -> None:
    """Whose tables are fp32, and its state between steps. The network is told sigma itself, not the whole timestep."""
    schedulers = pytest.importorskip("diffusers.schedulers", reason="diffusers is not installed (extra 'dev')")
    scheduler = schedulers.DPMSolverMultistepScheduler(
        solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint", prediction_type="flow_prediction",
        use_flow_sigmas=True, flow_shift=shift, lower_order_final=True, final_sigmas_type="zero",
        num_train_timesteps=1000,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    np.testing.assert_allclose(1 - np.array(time_grid(steps, shift, "dpmpp")), scheduler.sigmas, rtol=1e-6)
    field, noise = toy_field(dtype)
    x = noise
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):  # one sigma more, 0
        told = 1000 * sigma.item()
        x = scheduler.step(-field(x, 1 - told / 1000), timestep, x).prev_sample
    assert x.dtype == dtype
    assert (ours(field, noise, steps, shift) - x).abs().max() < 2e-6 * x.abs().max()


@pytest.mark.parametrize("ends", [(0.2, 0.8), (0.0, 1.0)])
def test_its_order_of_convergence(ends: tuple[float, float]) -> None:
    """Two; of a grid over all times, but for the logarithm in which lambda grows at its ends."""
    # x' = -x^2 (1 + t) has the solution 1 / (c + t + t^2 / 2).
    steps, (start, end) = np.array([128, 256, 512, 1024]), ends
    exact = 1 / (1 + end + end**2 / 2 - start - start**2 / 2)
    errors = []
    for n in steps:
        times = np.linspace(start, end, n + 1).tolist()
        x = dpmpp(lambda x, t, _: -(x**2) * (1 + t), torch.ones((), dtype=torch.float64), times, [False] * n)
        errors.append(abs(x.item() - exact))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(2, abs=0.1 if start else 0.3)


def test_it_ends_at_the_image_predicted_last() -> None:
    """Exactly, in fp32."""
    field, noise = toy_field(torch.float32)
    images: list[Tensor] = []

    def velocity(x: Tensor, t: float, _: bool) -> Tensor:
        slope = field(x, t)
        images.append(x + (1 - t) * slope)
        return slope

    end = dpmpp(velocity, noise, time_grid(25, 3.0, "dpmpp"), [False] * 25)
    assert torch.equal(end, images[-1])
