"""From noise to an image: time grids, classifier-free guidance and solvers.

A solver integrates `dx/dt = velocity(x, t)` from t = 0 (noise) to t = 1 (image) over a given grid. The state
is fp32, coefficients are computed in float64. Calls of the network for N steps: Euler N, Heun 2N - 1, Adams N.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from t2i.diffusion.flow import PredictionKind, predicted_velocity, shift_time

Velocity = Callable[[Tensor, float, bool], Tensor]  # (x_t, t, guided) -> dx/dt
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t, t (B,), condition) -> its output
Solver = Callable[[Velocity, Tensor, list[float], list[bool]], Tensor]  # (velocity, noise, times, guided) -> image


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 0 to 1, linear before `shift_time`."""
    return shift_time(np.linspace(0.0, 1.0, steps + 1), shift).tolist()


def rescale_guidance(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Move `share` of a guided prediction to the standard deviation of the conditional one, sample by sample.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", equations 15 and 16. As there, the
    prediction is a velocity: guidance raises its spread, and with it the contrast of the image.
    """
    spread, wanted = (x.flatten(1).std(1).view(-1, *[1] * (x.ndim - 1)) for x in (guided, conditional))
    return guided * (share * wanted / spread + (1.0 - share))


def guided_velocity(
    denoiser: Denoiser,
    condition: Tensor,
    null_condition: Tensor,
    guidance_scale: float,
    prediction: PredictionKind,
    min_noise: float,
    rescale: float = 0.0,
) -> Velocity:
    """Classifier-free guidance on velocities, `v_null + scale (v - v_null)`, then `rescale_guidance`.

    Both halves go through the network as one batch, the unconditional one first; where guidance is off, the
    unconditional half is not computed.

    Args:
        denoiser: its predictions are not clamped, here or in the public code.
        condition: text states (B, L, E) of the prompts.
        null_condition: those of what guidance leads away from, the empty caption or negative prompts.
        guidance_scale: 1 is none.
        prediction: what the denoiser returns.
        min_noise: lower bound of 1 - t where a predicted image becomes a velocity. The public code has 0.05 for every
            call of the network, before guidance: a step that starts at t above 0.95 goes too short a way, so that
            Euler's 50 even steps leave 36 % of what is missing at t = 0.96. 0 is none.
        rescale: share of the guided velocity that is rescaled.
    """

    def velocity(x_t: Tensor, t: float, guided: bool) -> Tensor:
        def of(x: Tensor, states: Tensor) -> Tensor:
            times = torch.full((len(x),), t, device=x.device)
            return predicted_velocity(denoiser(x, times, states), x, times, prediction, min_noise)

        if not guided or guidance_scale == 1.0:
            return of(x_t, condition)
        null, conditional = of(torch.cat([x_t, x_t]), torch.cat([null_condition, condition])).chunk(2)
        combined = null + guidance_scale * (conditional - null)
        return rescale_guidance(combined, conditional, rescale) if rescale > 0 else combined

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


def adams_weights(times: Sequence[float]) -> list[float]:
    """Weights of the slopes at times[:-1] in the step from times[-2] to times[-1]; they sum to 1.

    Adams-Bashforth for uneven steps: the mean over the step of the polynomial through the slopes, that is of each
    one's Lagrange polynomial. For two slopes, r being the step over the one before: -r / 2 and 1 + r / 2.
    """
    start, end = times[-2:]
    nodes = (np.array(times[:-1]) - start) / (end - start)  # the step is from 0 to 1
    weights = []
    for i, node in enumerate(nodes):
        others = np.delete(nodes, i)
        basis = np.atleast_1d(np.poly(others)) / np.prod(node - others)
        weights.append(float(np.polyval(np.polyint(basis), 1.0)))
    return weights


def adams(velocity: Velocity, x: Tensor, times: list[float], guided: list[bool], order: int) -> Tensor:
    """Adams-Bashforth of `order` slopes for uneven steps; "Adams-2nd" of the PixelGen paper (Table 7) has two.

    The first steps combine the slopes there are, so the very first is Euler's; its error, of the second order in its
    length, stays.
    """
    slopes: deque[Tensor] = deque(maxlen=order)
    for i, (t, t_next) in enumerate(pairwise(times)):
        slopes.append(velocity(x, t, guided[i]))
        weights = adams_weights(times[i + 1 - len(slopes) : i + 2])
        x = x + (t_next - t) * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
    return x


def choose_solver(name: str, order: int) -> Solver:
    """The solver of a name; `order` is that of adams."""
    solvers: dict[str, Solver] = {"euler": euler, "heun": heun, "adams": partial(adams, order=order)}
    return solvers[name]


def guided_steps(times: list[float], interval: tuple[float, float], solver: str) -> list[bool]:
    """Which steps are guided: those whose start t has low < t <= high, and under Adams low < t < high.

    As in the public code. From pure noise (t = 0) the first step is never guided.
    """
    low, high = interval
    return [low < t and (t < high or (t == high and solver != "adams")) for t in times[:-1]]
