"""From noise to an image: time grids, classifier-free guidance, solvers; and editing by FlowEdit.

A solver integrates `dx/dt = velocity(x, t)` from t = 0 (noise) to t = 1 (image) over a given grid. The state and the
network's t are fp32, grids and coefficients float64. Calls of the network for N steps: Euler N, Heun 2N - 1, Adams N,
DPM-Solver++ N.

FlowEdit (Kulikov et al., "FlowEdit: Inversion-Free Text-Based Editing Using Pre-Trained Flow Models", 2025, algorithm
1) noises an image and moves it by the difference of its velocities under two captions. For equal captions the
difference is 0 to the last bit, and the image does not change. In the paper t = 1 is noise; here t = 0 is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from t2i.diffusion.flow import PredictionKind, interpolate, predicted_velocity, shift_time

Velocity = Callable[[Tensor, float, bool], Tensor]  # (x_t, t, guided) -> dx/dt
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t, t (B,), condition) -> its output
Solver = Callable[[Velocity, Tensor, list[float], list[bool]], Tensor]  # (velocity, noise, times, guided) -> image
Coefficients = Literal["variable", "fixed"]

_DPMPP_START = 0.001
"""Where DPM-Solver++ starts, before the shift: at t = 0 its ln(t / (1 - t)) is infinite."""


def time_grid(steps: int, shift: float = 1.0, solver: str = "euler") -> list[float]:
    """The steps + 1 times of a solver up to 1, linear before `shift_time`.

    They begin at 0, for dpmpp at 0.001 before the shift, as in Sana's public code, which also starts from pure noise.
    """
    return shift_time(np.linspace(_DPMPP_START if solver == "dpmpp" else 0.0, 1.0, steps + 1), shift).tolist()


def rescale_guidance(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Move `share` of a guided prediction to the standard deviation of the conditional one, sample by sample.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", equations 15 and 16, on velocities
    as there: guidance raises their standard deviation, and with it the contrast of the image.
    """
    spread, wanted = (x.flatten(1).std(1).view(-1, *[1] * (x.ndim - 1)) for x in (guided, conditional))
    spread = spread.clamp(min=torch.finfo(spread.dtype).tiny)  # an untrained network returns zeros
    return guided * (share * wanted / spread + (1.0 - share))


def guided_velocity(
    denoiser: Denoiser,
    condition: Tensor,
    null_condition: Tensor,
    guidance_scale: float,
    prediction: PredictionKind,
    t_eps: float,
    rescale: float = 0.0,
) -> Velocity:
    """Classifier-free guidance on velocities, `v_null + scale (v - v_null)`, then `rescale_guidance`.

    Both halves go through the network as one batch, the unconditional one first, which is skipped where guidance is off
    or 1. Predictions are not clamped, as in the public code.

    Args:
        condition: text states (B, L, E) of the prompts, or classes.
        null_condition: those of the empty caption or of negative prompts.
        t_eps: lower bound of 1 - t where a predicted image becomes a velocity; 0 is none. The public code has 0.05 for
            every call of the network, before guidance: a step that starts at t above 0.95 is then too short, so that
            Euler's 50 even steps leave 36 % of what is missing at t = 0.96.
        rescale: share of the guided velocity that is rescaled.
    """

    def velocity(x_t: Tensor, t: float, guided: bool) -> Tensor:
        def of(x: Tensor, states: Tensor) -> Tensor:
            times = torch.full((len(x),), t, device=x.device)
            return predicted_velocity(denoiser(x, times, states), x, times, prediction, t_eps)

        if not guided or guidance_scale == 1.0:
            return of(x_t, condition)
        null, conditional = of(torch.cat([x_t, x_t]), torch.cat([null_condition, condition])).chunk(2)
        combined = null + guidance_scale * (conditional - null)
        return rescale_guidance(combined, conditional, rescale) if rescale > 0 else combined

    return velocity


class FiniteTracker:
    """Records which images of a batch are finite after each call of a velocity, without waiting for the device."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._finite: list[Tensor] = []

    def _record(self, t: float, images: Tensor) -> None:
        self._times.append(t)
        self._finite.append(images.flatten(1).sum(1).isfinite())  # a sum is finite only if all its terms are

    def wrap(self, velocity: Velocity) -> Velocity:
        """The same velocity, recorded."""

        def recorded(x_t: Tensor, t: float, guided: bool) -> Tensor:
            slope = velocity(x_t, t, guided)
            self._record(t, slope)
            return slope

        return recorded

    def first_nonfinite(self, images: Tensor) -> tuple[int, float] | None:
        """Index of the image that was the first not to be finite, and the t; None if all resulting images are."""
        self._record(1.0, images)
        finite = torch.stack([flags[: len(images)] for flags in self._finite]).cpu()
        if finite.all():
            return None
        call, image = (~finite).nonzero()[0].tolist()
        return image, self._times[call]


def euler(velocity: Velocity, x: Tensor, times: list[float], guided: list[bool]) -> Tensor:
    """First order."""
    for i, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * velocity(x, t, guided[i])
    return x


def heun(velocity: Velocity, x: Tensor, times: list[float], guided: list[bool]) -> Tensor:
    """Second order, two calls a step; the last step is Euler's, since its corrector would be at t = 1."""
    for i, (t, t_next) in enumerate(pairwise(times)):
        slope = velocity(x, t, guided[i])
        if t_next < times[-1]:
            slope = (slope + velocity(x + (t_next - t) * slope, t_next, guided[i])) / 2
        x = x + (t_next - t) * slope
    return x


def adams_weights(times: Sequence[float]) -> list[float]:
    """Weights of the slopes at times[:-1] in the step from times[-2] to times[-1]; they sum to 1.

    Adams-Bashforth for uneven steps: each weight is the mean over the step of the slope's Lagrange polynomial. For two
    slopes, with r the ratio of the step to the one before: -r / 2 and 1 + r / 2.
    """
    start, end = times[-2:]
    nodes = (np.array(times[:-1]) - start) / (end - start)  # the step is from 0 to 1
    weights = []
    for i, node in enumerate(nodes):
        others = np.delete(nodes, i)
        basis = np.atleast_1d(np.poly(others)) / np.prod(node - others)
        weights.append(float(np.polyval(np.polyint(basis), 1.0)))
    return weights


def adams(
    velocity: Velocity,
    x: Tensor,
    times: list[float],
    guided: list[bool],
    order: int,
    coefficients: Coefficients = "variable",
) -> Tensor:
    """Adams-Bashforth of `order` slopes for uneven steps; "Adams-2nd" of the PixelGen paper (Table 7) has two.

    The first steps combine the slopes there are, so the very first is Euler's, with its second-order local error.
    `coefficients` fixed uses those of even steps on any grid, 3/2 and -1/2 for two slopes, as PixelDiT's
    class-conditional code does; with 25 steps and shift 3 they differ from the variable ones by up to 0.08.
    """
    slopes: deque[Tensor] = deque(maxlen=order)
    for i, (t, t_next) in enumerate(pairwise(times)):
        slopes.append(velocity(x, t, guided[i]))
        even = coefficients == "fixed"
        weights = adams_weights(range(len(slopes) + 1) if even else times[i + 1 - len(slopes) : i + 2])
        x = x + (t_next - t) * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
    return x


def dpmpp(velocity: Velocity, x: Tensor, times: list[float], guided: list[bool]) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2) on the straight path: the "FlowDPM-Solver" of Sana and PixelDiT.

    With alpha = t and sigma = 1 - t, a step goes the fraction (t_next - t) / (1 - t) of the way to an image. The first
    and the last step use the image predicted at t, so they are Euler's, and the last one ends at that image. The others
    extrapolate it by half a step in lambda = ln(t / (1 - t)), from the image predicted before.
    """
    with np.errstate(divide="ignore"):  # infinite at t = 1, which no step reads
        lambdas = (np.log(times) - np.log1p(np.negative(times))).tolist()
    last, previous = len(times) - 2, x
    for i, (t, t_next) in enumerate(pairwise(times)):
        image = predicted = x + (1.0 - t) * velocity(x, t, guided[i])
        if 0 < i < last:
            ratio = (lambdas[i + 1] - lambdas[i]) / (lambdas[i] - lambdas[i - 1]) / 2
            image = predicted + ratio * (predicted - previous)
        x = torch.lerp(x, image, (t_next - t) / (1.0 - t))
        previous = predicted
    return x


def choose_solver(name: str, order: int, coefficients: Coefficients = "variable") -> Solver:
    """The solver by name; `order` and `coefficients` apply to adams."""
    of_adams = partial(adams, order=order, coefficients=coefficients)
    solvers: dict[str, Solver] = {"euler": euler, "heun": heun, "adams": of_adams, "dpmpp": dpmpp}
    return solvers[name]


def guided_steps(times: list[float], interval: tuple[float, float], solver: str) -> list[bool]:
    """Which steps are guided: those that start at low < t <= high, for adams and dpmpp at low < t < high.

    As in the public codes, where those of dpmpp give the bounds in 1 - t. From t = 0 the first step is never guided.
    Comparison in fp32 makes a time of our grids equal to a bound such as 0.1 or 0.9 of 100 even steps; in PixelDiT's
    class-conditional code rounding decides, and leaves these two out as well.
    """
    starts, (low, high) = np.array(times[:-1], np.float32), np.array(interval, np.float32)
    below = starts < high if solver in ("adams", "dpmpp") else starts <= high
    return ((low < starts) & below).tolist()


Noise = Callable[[int, int], Tensor]  # (step, average), both from 0 -> noise of the image's shape


def flow_edit(
    source: Velocity,
    target: Velocity,
    image: Tensor,
    noise: Noise,
    times: list[float],
    n_max: int,
    n_min: int = 0,
    n_avg: int = 1,
) -> Tensor:
    """The edited image, fp32 (B, 3, H, W), not clamped.

    Every call is guided. Calls of `source`: (n_max - n_min) n_avg; of `target`: n_min more.

    Args:
        source: the velocity under the caption of the image.
        target: the velocity under the caption of the edit.
        image: fp32 (B, 3, H, W) in [-1, 1].
        noise: new for each step and average; steps are numbered as in `times`.
        times: a sampler's whole grid, from noise to image.
        n_max: the number of last steps that are taken: with fewer, the edit stays closer to the image.
        n_min: the number of last steps that sample freely, without the source.
        n_avg: noises over which a step's difference of velocities is averaged.
    """
    steps = len(times) - 1
    assert 0 <= n_min <= n_max <= steps and n_avg > 0
    first, free = steps - n_max, steps - n_min
    moved = torch.zeros_like(image)
    for step, (t, t_next) in enumerate(pairwise(times[first : free + 1]), start=first):
        difference = torch.zeros_like(image)
        for average in range(n_avg):
            x_t = _noised(image, noise(step, average), t)
            # The edit is stored as its offset from the image: where that is 0, x_t is not rounded.
            difference = difference + target(x_t + moved, t, True) - source(x_t, t, True)
        moved = moved + (t_next - t) / n_avg * difference
    if n_min == 0:
        return image + moved
    x_t = _noised(image, noise(free, 0), times[free]) + moved
    return euler(target, x_t, times[free:], [True] * n_min)


def _noised(image: Tensor, noise: Tensor, t: float) -> Tensor:
    return interpolate(image, noise, torch.full((len(image),), t, device=image.device))
