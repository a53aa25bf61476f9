"""Time grids, solvers and guidance: the paper's grid, the coefficients of the methods and their orders."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from t2i.diffusion.sampling import (
    adams,
    adams_weights,
    choose_solver,
    guided_steps,
    guided_velocity,
    rescale_guidance,
    time_grid,
)

MIN_NOISE = 0.05
SOLVERS = [("euler", 2), ("heun", 2), ("dpmpp", 2), ("adams", 1), ("adams", 2), ("adams", 3), ("adams", 4)]
Field = Callable[[Tensor, float], Tensor]


def integrate(solver: tuple[str, int], field: Field, start: float, steps: int, shift: float) -> float:
    x = torch.tensor([start], dtype=torch.float64)
    times = time_grid(steps, shift, solver[0])
    return choose_solver(*solver)(lambda x, t, _: field(x, t), x, times, [False] * steps).item()


def test_grid_of_the_paper() -> None:
    grid = time_grid(25, 3.0)
    assert len(grid) == 26 and grid[0] == 0.0 and grid[-1] == 1.0
    assert grid[1:4] == pytest.approx([0.0137, 0.0282, 0.0435], abs=5e-5)
    assert grid[24] == pytest.approx(0.8889, abs=5e-5)
    np.testing.assert_allclose(time_grid(4), [0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("steps", [1, 2, 25])
@pytest.mark.parametrize("solver", SOLVERS)
def test_number_of_calls(solver: tuple[str, int], steps: int) -> None:
    seen: list[float] = []
    integrate(solver, lambda x, t: seen.append(t) or x, 1.0, steps, 3.0)
    assert len(seen) == (2 * steps - 1 if solver[0] == "heun" else steps)
    assert max(seen) < 1.0


# Coefficients


def public_weights(times: list[float]) -> list[float]:
    """The public code's form, by its powers: each Lagrange polynomial integrated from end to end, then all divided by
    their sum. Exact, in fractions."""
    *nodes, end = [Fraction(t) for t in times]
    start, integrals = nodes[-1], []
    for i, node in enumerate(nodes):
        others = nodes[:i] + nodes[i + 1 :]
        # (t - a)(t - b)(t - c) = t^3 - (a + b + c) t^2 + (ab + bc + ca) t - abc
        powers = [(-1) ** k * sum(map(math.prod, combinations(others, k))) for k in range(len(nodes))]
        degree = len(others)
        area = sum(
            c * (end ** (degree - k + 1) - start ** (degree - k + 1)) / (degree - k + 1) for k, c in enumerate(powers)
        )
        integrals.append(area / math.prod(node - other for other in others))
    return [float(integral / sum(integrals)) for integral in integrals]


@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_weights_are_those_of_the_public_code(order: int, shift: float) -> None:
    times = time_grid(25, shift)
    for step in range(25):
        known = times[max(0, step + 1 - order) : step + 2]
        np.testing.assert_allclose(adams_weights(known), public_weights(known), atol=1e-9)


@pytest.mark.parametrize(
    ("order", "expected"),
    [(1, [1]), (2, [-1 / 2, 3 / 2]), (3, [5 / 12, -16 / 12, 23 / 12]), (4, [-9 / 24, 37 / 24, -59 / 24, 55 / 24])],
)
def test_adams_weights_of_even_steps_are_the_textbooks(order: int, expected: list[float]) -> None:
    times = np.linspace(0.3, 0.8, order + 1).tolist()
    assert adams_weights(times) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("step", "previous", "present"), [(1, -0.528, 1.528), (24, -0.580, 1.580)])
def test_adams_weights_of_the_papers_grid(step: int, previous: float, present: float) -> None:
    times = time_grid(25, 3.0)
    assert adams_weights(times[step - 1 : step + 2]) == pytest.approx((previous, present), abs=6e-4)
    ratio = (times[step + 1] - times[step]) / (times[step] - times[step - 1])
    assert adams_weights(times[step - 1 : step + 2]) == pytest.approx((-ratio / 2, 1 + ratio / 2), abs=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_weighs_the_latest_slopes_as_many_as_there_are(order: int) -> None:
    """Found by probing: what a slope of 1 at one time, 0 at the others, gives to each step."""
    times = time_grid(9, 3.0)
    for probed in range(9):
        slope = lambda x, t, _: torch.tensor(float(t == times[probed]), dtype=torch.float64)  # noqa: B023, E731
        ends = [adams(slope, torch.zeros(()).double(), times[: n + 1], [False] * n, order).item() for n in range(10)]
        for step in range(9):
            given = (ends[step + 1] - ends[step]) / (times[step + 1] - times[step])
            first = max(0, step + 1 - order)
            weights = adams_weights(times[first : step + 2])
            assert given == pytest.approx(weights[probed - first] if first <= probed <= step else 0.0, abs=1e-9)


def test_one_step_is_eulers() -> None:
    for solver in SOLVERS:
        start = time_grid(1, 3.0, solver[0])[0]
        assert integrate(solver, lambda x, t: 3 * x + 2, 1.0, 1, 3.0) == 1.0 + (1.0 - start) * 5.0


def test_heun_averages_two_slopes_and_ends_with_eulers_step() -> None:
    # x' = x on the grid 0, 1/2, 1: the trapezoid gives 1 + 1/2 + 1/8, Euler's step half as much again.
    assert integrate(("heun", 2), lambda x, _: x, 1.0, 2, 1.0) == pytest.approx(1.625 * 1.5)


PROBLEMS: dict[str, tuple[Field, float, float]] = {
    # x' = -2x + cos 3t has the solution (2 cos 3t + 3 sin 3t) / 13 + c exp(-2t).
    "linear": (
        lambda x, t: -2 * x + math.cos(3 * t),
        0.5,
        (2 * math.cos(3) + 3 * math.sin(3)) / 13 + (0.5 - 2 / 13) * math.exp(-2),
    ),
    "nonlinear": (lambda x, t: -(x**2) * (1 + t), 1.0, 1 / 2.5),
    # exp(t^5 / 5): so flat at the start that the first steps, of lower order, cost nothing.
    "flat start": (lambda x, t: t**4 * x, 1.0, math.exp(0.2)),
}


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("solver", "problem", "order"),
    [
        *(((name, 2), problem, order) for name, order in (("euler", 1), ("heun", 2)) for problem in PROBLEMS),
        *((("adams", order), problem, order) for order in (1, 2) for problem in PROBLEMS),
        (("adams", 3), "flat start", 3),
        (("adams", 4), "flat start", 4),
        (("adams", 4), "nonlinear", 2),  # what Euler's first step leaves
    ],
)
def test_order_of_convergence(solver: tuple[str, int], problem: str, order: int, shift: float) -> None:
    field, start, exact = PROBLEMS[problem]
    steps = np.array([128, 256, 512, 1024])
    errors = [abs(integrate(solver, field, start, int(n), shift) - exact) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)


def test_adams_is_exact_for_a_slope_linear_in_time_after_its_first_step() -> None:
    # The first step is Euler's and misses h^2 of the integral of 2t; the uneven rest is exact.
    for order in (2, 3, 4):
        end = integrate(("adams", order), lambda x, t: torch.full_like(x, 2 * t), 0.0, 25, 3.0)
        assert 1.0 - end == pytest.approx(time_grid(25, 3.0)[1] ** 2, rel=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_fixed_coefficients_are_those_of_even_steps(shift: float) -> None:
    field, steps = PROBLEMS["nonlinear"][0], 12
    times = time_grid(steps, shift)
    x, slopes = 1.0, []
    for i in range(steps):
        slopes.append(field(x, times[i]))
        mean = 1.5 * slopes[-1] - 0.5 * slopes[-2] if i else slopes[0]
        x += (times[i + 1] - times[i]) * mean
    start = torch.ones((), dtype=torch.float64)
    fixed, variable = (
        choose_solver("adams", 2, kind)(lambda x, t, _: field(x, t), start, times, [False] * steps).item()
        for kind in ("fixed", "variable")
    )
    assert fixed == pytest.approx(x, abs=1e-14)
    assert (abs(fixed - variable) < 1e-12) == (shift == 1.0)


# Guidance


class Recorder:
    """A denoiser that answers `condition + t` and notes what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        self.calls.append((x, t, condition))
        return (condition[:, :, None, None] + t[:, None, None, None] * x).expand_as(x)


def guidance(
    scale: float, rescale: float = 0.0
) -> tuple[Recorder, Callable[[Tensor, float, bool], Tensor], Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    condition, null = torch.randn(2, 3), torch.randn(2, 3)
    recorder = Recorder()
    velocity = guided_velocity(recorder, condition, null, scale, "image", MIN_NOISE, rescale)
    return recorder, velocity, torch.randn(2, 3, 4, 4), condition, null


@pytest.mark.parametrize(("scale", "guided"), [(1.0, True), (4.0, False), (1.0, False)])
def test_without_guidance_only_the_conditional_half_is_computed(scale: float, guided: bool) -> None:
    recorder, velocity, x, condition, _ = guidance(scale, rescale=0.7)
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


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescaling_moves_each_samples_spread_towards_the_conditional_ones(share: float) -> None:
    _, velocity, x, _, _ = guidance(4.0, share)
    _, plain, _, _, _ = guidance(4.0)
    _, conditional, _, _, _ = guidance(1.0)
    result, guided, wanted = (v(x, 0.5, True) for v in (velocity, plain, conditional))
    for n in range(2):
        ratio = np.std(wanted[n].numpy()) / np.std(guided[n].numpy())
        torch.testing.assert_close(result[n], (share * ratio + 1 - share) * guided[n])
    assert not torch.allclose(result, guided, rtol=0.01)


def test_rescaling_in_full_gives_the_conditional_spread() -> None:
    torch.manual_seed(0)
    conditional = torch.randn(3, 3, 4, 5) * torch.tensor([0.5, 1.0, 2.0])[:, None, None, None]
    rescaled = rescale_guidance(4 * torch.randn(3, 3, 4, 5) + 1, conditional, 1.0)
    torch.testing.assert_close(rescaled.flatten(1).std(1), conditional.flatten(1).std(1))


def test_velocity_is_held_at_the_clamp_near_the_image() -> None:
    _, velocity, x, condition, _ = guidance(1.0)
    torch.testing.assert_close(velocity(x, 0.99, True), (condition[:, :, None, None] - 0.01 * x) / 0.05)


def test_the_first_step_is_never_guided() -> None:
    guided = guided_steps(time_grid(25, 3.0), (0.0, 1.0), "adams")
    assert guided == [False] + [True] * 24


def test_guidance_interval_is_open_below_and_closed_above() -> None:
    for solver, last in (("euler", True), ("heun", True), ("adams", False), ("dpmpp", False)):
        guided = guided_steps([0.0, 0.1, 0.2, 0.3, 0.4, 1.0], (0.1, 0.3), solver)
        assert guided == [False, False, True, last, False], solver


def test_a_time_that_is_a_bound_in_fp32_is_outside() -> None:
    times = time_grid(100)
    for k in range(1, 100):
        assert not guided_steps(times, (k / 100, 1.0), "adams")[k]
        assert not guided_steps(times, (0.0, k / 100), "adams")[k] and guided_steps(times, (0.0, k / 100), "euler")[k]
    # PixelDiT's class-conditional code, whose times are fp32: 0.09999999 is not above 0.1, nor 0.90000004 below 0.9.
    public = torch.linspace(0.0, 0.99, 100)
    assert public[10] < 0.1 and public[90] > 0.9
    assert guided_steps(times, (0.1, 0.9), "adams") == ((public > 0.1) & (public < 0.9)).tolist()


@pytest.mark.parametrize(
    ("solver", "expected"),
    [("euler", [0, 1, 0]), ("heun", [0, 0, 1, 1, 0]), ("adams", [0, 1, 0]), ("dpmpp", [0, 1, 0])],
)
def test_solvers_guide_the_steps_asked_for(solver: str, expected: list[int]) -> None:
    seen: list[int] = []

    def velocity(x: Tensor, t: float, guided: bool) -> Tensor:
        seen.append(int(guided))
        return x

    choose_solver(solver, 2)(velocity, torch.ones(1), time_grid(3), [False, True, False])
    assert seen == expected


def reached(solver: tuple[str, int], steps: int, shift: float, t_eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Where a denoiser that knows the image ends; the image; the noise."""
    torch.manual_seed(0)
    image, noise = torch.randn(2, 2, 3, 4, 6)
    velocity = guided_velocity(lambda x, t, c: image, torch.zeros(2, 1), torch.zeros(2, 1), 1.0, "image", t_eps)
    times = time_grid(steps, shift, solver[0])
    return choose_solver(*solver)(velocity, noise, times, [False] * steps), image, noise


@pytest.mark.parametrize("solver", SOLVERS)
def test_sampling_with_a_perfect_denoiser_reaches_the_image(solver: tuple[str, int]) -> None:
    end, image, _ = reached(solver, 25, 3.0, MIN_NOISE)
    torch.testing.assert_close(end, image, atol=1e-5, rtol=1e-5)
    end, image, _ = reached(solver, 50, 1.0, 0.0)
    torch.testing.assert_close(end, image, atol=2e-5, rtol=1e-5)


def test_the_public_clamp_stops_short_of_the_image() -> None:
    # At 1 - t = 0.04 and 0.02 Euler goes 0.02 / 0.05 of the way: 0.6 of 0.6 is left of what was missing at t = 0.96.
    end, image, noise = reached(("euler", 2), 50, 1.0, MIN_NOISE)
    torch.testing.assert_close(end - image, 0.36 * 0.04 * (noise - image), atol=1e-5, rtol=1e-3)
