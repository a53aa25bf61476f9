"""From noise to an image: time grids, classifier-free guidance and solvers.

A solver integrates `dx/dt = velocity(x, t)` from t = 0 (noise) to t = 1 (image) over a given grid. The state
is fp32. Calls of the network for N steps: Euler N, Heun 2N - 1, Adams N.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from t2i.diffusion.flow import shift_time, velocity_from_image

Velocity = Callable[[Tensor, float, bool], Tensor]  # (x_t, t, guided) -> dx/dt
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t, t (B,), condition) -> predicted image


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 0 to 1, linear before `shift_time`."""
    return shift_time(np.linspace(0.0, 1.0, steps + 1), shift).tolist()


def guided_velocity(
    denoiser: Denoiser,
    condition: Tensor,
    null_condition: Tensor,
    guidance_scale: float,
    min_noise: float,
) -> Velocity:
    """Classifier-free guidance on velocities, `v_null + scale (v - v_null)`.

    Both halves go through the network as one batch, the unconditional one first; where guidance is off, the
    unconditional half is not computed.
    """

    def velocity(x_t: Tensor, t: float, guided: bool) -> Tensor:
        def of(x: Tensor, states: Tensor) -> Tensor:
            times = torch.full((len(x),), t, device=x.device)
            return velocity_from_image(denoiser(x, times, states), x, times, min_noise)

        if not guided or guidance_scale == 1.0:
            return of(x_t, condition)
        null, conditional = of(torch.cat([x_t, x_t]), torch.cat([null_condition, condition])).chunk(2)
        return null + guidance_scale * (conditional - null)

    return velocity


def euler(velocity: Velocity, x: Tensor, times: list[float], guided: list[bool]) -> Tensor:
    """First order."""
    for i, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * velocity(x, t, guided[i])
    return x


def heun(velocity: Velocity, x: Tensor, times: list[float], guided: list[bool]) -> Tensor:
    """Second order, two calls a step; the last step is Euler's, whose corrector would sit at t = 1."""
    for i, (t, t_next) in enumerate(pairwise(times)):
        slope = velocity(x, t, guided[i])
        if t_next < times[-1]:
            slope = (slope + velocity(x + (t_next - t) * slope, t_next, guided[i])) / 2
        x = x + (t_next - t) * slope
    return x


def adams2(velocity: Velocity, x: Tensor, times: list[float], guided: list[bool]) -> Tensor:
    """Two-step Adams-Bashforth for uneven steps: (1 + r/2) v_n - (r/2) v_(n-1), r = h_n / h_(n-1).

    "Adams-2nd" of the PixelGen paper (Table 7); the first step is Euler's.
    """
    previous: tuple[float, Tensor] | None = None
    for i, (t, t_next) in enumerate(pairwise(times)):
        step, slope = t_next - t, velocity(x, t, guided[i])
        combined = slope
        if previous is not None:
            ratio = step / previous[0]
            combined = (1 + ratio / 2) * slope - ratio / 2 * previous[1]
        x = x + step * combined
        previous = (step, slope)
    return x


SOLVERS = {"euler": euler, "heun": heun, "adams2": adams2}


def guided_steps(times: list[float], interval: tuple[float, float]) -> list[bool]:
    """Which steps are guided: those whose start t has low < t <= high.

    The lower end is open, as in the public code: from pure noise (t = 0) the first step is never guided.
    """
    low, high = interval
    return [low < t <= high for t in times[:-1]]
