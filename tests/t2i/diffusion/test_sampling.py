"""Time grids, solvers and guidance: the paper's grid, the coefficients of the methods and their orders."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from t2i.diffusion.sampling import SOLVERS, adams2, euler, guided_steps, guided_velocity, heun, time_grid

MIN_NOISE = 0.05
Field = Callable[[Tensor, float], Tensor]


def integrate(name: str, field: Field, start: float, steps: int, shift: float) -> float:
    x = torch.tensor([start], dtype=torch.float64)
    times = time_grid(steps, shift)
    return SOLVERS[name](lambda x, t, _: field(x, t), x, times, [False] * steps).item()


def test_grid_of_the_paper() -> None:
    grid = time_grid(25, 3.0)
    assert len(grid) == 26 and grid[0] == 0.0 and grid[-1] == 1.0
    assert grid[1:4] == pytest.approx([0.0137, 0.0282, 0.0435], abs=5e-5)
    assert grid[24] == pytest.approx(0.8889, abs=5e-5)
    np.testing.assert_allclose(time_grid(4), [0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("steps", [1, 2, 25])
@pytest.mark.parametrize(("name", "calls"), [("euler", [1, 0]), ("heun", [2, -1]), ("adams2", [1, 0])])
def test_number_of_calls(name: str, calls: list[int], steps: int) -> None:
    seen: list[float] = []
    integrate(name, lambda x, t: seen.append(t) or x, 1.0, steps, 3.0)
    assert len(seen) == calls[0] * steps + calls[1]
    assert max(seen) < 1.0


def adams_coefficients(step: int) -> tuple[float, float]:
    """Weights of the last and the present slope in a step, found by probing with unit slopes."""
    times = time_grid(25, 3.0)

    def probe(probed: int, steps: int) -> float:
        slope = lambda x, t, _: torch.tensor(float(t == times[probed]), dtype=torch.float64)  # noqa: E731
        return adams2(slope, torch.zeros((), dtype=torch.float64), times[: steps + 1], [False] * steps).item()

    size = times[step + 1] - times[step]
    # What the probed slope gave to the steps before is taken away.
    previous, present = ((probe(n, step + 1) - probe(n, step)) / size for n in (step - 1, step))
    return previous, present


@pytest.mark.parametrize(("step", "previous", "present"), [(1, -0.528, 1.528), (24, -0.580, 1.580)])
def test_adams_coefficients_of_the_papers_grid(step: int, previous: float, present: float) -> None:
    assert adams_coefficients(step) == pytest.approx((previous, present), abs=6e-4)


@pytest.mark.parametrize("step", [2, 7, 20])
def test_adams_coefficients_are_those_of_uneven_steps(step: int) -> None:
    times = time_grid(25, 3.0)
    ratio = (times[step + 1] - times[step]) / (times[step] - times[step - 1])
    assert adams_coefficients(step) == pytest.approx((-ratio / 2, 1 + ratio / 2), abs=1e-4)


def test_one_step_is_eulers() -> None:
    for name in SOLVERS:
        assert integrate(name, lambda x, t: 3 * x + 2, 1.0, 1, 3.0) == 6.0


def test_heun_averages_two_slopes_and_ends_with_eulers_step() -> None:
    # x' = x on the grid 0, 1/2, 1: the trapezoid gives 1 + 1/2 + 1/8, Euler's step half as much again.
    assert integrate("heun", lambda x, _: x, 1.0, 2, 1.0) == pytest.approx(1.625 * 1.5)


PROBLEMS: dict[str, tuple[Field, float, float]] = {
    "linear": (lambda x, t: -2 * x + math.cos(3 * t), 0.5, math.nan),
    "nonlinear": (lambda x, t: -(x**2) * (1 + t), 1.0, 1 / 2.5),
}
# x' = -2x + cos 3t has the solution (2 cos 3t + 3 sin 3t) / 13 + c exp(-2t).
_LINEAR = (2 * math.cos(3) + 3 * math.sin(3)) / 13 + (0.5 - 2 / 13) * math.exp(-2)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("adams2", 2)])
def test_order_of_convergence(name: str, order: int, problem: str, shift: float) -> None:
    field, start, exact = PROBLEMS[problem]
    exact = _LINEAR if problem == "linear" else exact
    steps = np.array([64, 128, 256, 512])
    errors = [abs(integrate(name, field, start, int(n), shift) - exact) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.12)


def test_adams_is_exact_for_a_slope_linear_in_time_after_its_first_step() -> None:
    # The first step is Euler's and misses h^2 of the integral of 2t; the uneven rest is exact.
    assert 1.0 - integrate("adams2", lambda x, t: torch.full_like(x, 2 * t), 0.0, 25, 3.0) == pytest.approx(
        time_grid(25, 3.0)[1] ** 2, rel=1e-6
    )


# Guidance


class Recorder:
    """A denoiser that answers `condition + t` and notes what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.calls.append((x, t, condition))
        return (condition[:, :, None, None] + t[:, None, None, None] * x).expand_as(x)


def guidance(scale: float) -> tuple[Recorder, Callable[[Tensor, float, bool], Tensor], Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    condition, null = torch.randn(2, 3), torch.randn(2, 3)
    recorder = Recorder()
    velocity = guided_velocity(recorder, condition, null, scale, MIN_NOISE)
    return recorder, velocity, torch.randn(2, 3, 4, 4), condition, null


@pytest.mark.parametrize(("scale", "guided"), [(1.0, True), (4.0, False), (1.0, False)])
def test_without_guidance_only_the_conditional_half_is_computed(scale: float, guided: bool) -> None:
    recorder, velocity, x, condition, _ = guidance(scale)
    result = velocity(x, 0.5, guided)
    ((seen_x, seen_t, seen_condition),) = recorder.calls
    assert torch.equal(seen_x, x) and torch.equal(seen_condition, condition)
    assert torch.equal(seen_t, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(result, (condition[:, :, None, None] + 0.5 * x - x) / 0.5)


@pytest.mark.parametrize("scale", [0.0, 2.25, 4.0])
def test_guidance_extrapolates_velocities_from_one_batch_with_the_null_half_first(scale: float) -> None:
    recorder, velocity, x, condition, null = guidance(scale)
    result = velocity(x, 0.5, True)
    ((seen_x, seen_t, seen_condition),) = recorder.calls
    assert torch.equal(seen_condition, torch.cat([null, condition]))
    assert torch.equal(seen_x, torch.cat([x, x])) and seen_t.shape == (4,)
    v, v_null = (((c[:, :, None, None] + 0.5 * x) - x) / 0.5 for c in (condition, null))
    torch.testing.assert_close(result, v_null + scale * (v - v_null))


def test_velocity_is_held_at_the_clamp_near_the_image() -> None:
    _, velocity, x, condition, _ = guidance(1.0)
    torch.testing.assert_close(velocity(x, 0.99, True), (condition[:, :, None, None] - 0.01 * x) / 0.05)


def test_the_first_step_is_never_guided() -> None:
    guided = guided_steps(time_grid(25, 3.0), (0.0, 1.0))
    assert guided == [False] + [True] * 24


def test_guidance_interval_is_open_below_and_closed_above() -> None:
    assert guided_steps([0.0, 0.1, 0.2, 0.3, 0.4, 1.0], (0.1, 0.3)) == [False, False, True, True, False]


@pytest.mark.parametrize(("solver", "expected"), [(euler, [0, 1, 0]), (heun, [0, 0, 1, 1, 0]), (adams2, [0, 1, 0])])
def test_solvers_guide_the_steps_asked_for(solver: Callable[..., Tensor], expected: list[int]) -> None:
    seen: list[int] = []

    def velocity(x: Tensor, t: float, guided: bool) -> Tensor:
        seen.append(int(guided))
        return x

    solver(velocity, torch.ones(1), time_grid(3), [False, True, False])
    assert seen == expected


def test_sampling_with_a_perfect_denoiser_reaches_the_image() -> None:
    torch.manual_seed(0)
    image, noise = torch.randn(2, 2, 3, 4, 4)
    times = time_grid(25, 3.0)
    for solver in SOLVERS.values():
        velocity = guided_velocity(lambda x, t, c: image, torch.zeros(2, 1), torch.zeros(2, 1), 1.0, MIN_NOISE)
        torch.testing.assert_close(solver(velocity, noise, times, [False] * 25), image, atol=1e-5, rtol=1e-5)
