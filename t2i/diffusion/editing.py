"""FlowEdit: from an image of one caption to an image of another, by the flow alone, without inverting it.

The image is noised, the flow asked where it leads from there for either caption, and the edit moves by the difference:
what the captions have in common cancels, and with it most of the picture. Where both velocities are one function the
difference is 0 to the last bit, and nothing moves.

Source: Kulikov et al., "FlowEdit: Inversion-Free Text-Based Editing Using Pre-Trained Flow Models" (2025), algorithm 1.
There t = 1 is noise and steps are counted down to the image; here t = 0 is noise, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from t2i.diffusion.flow import interpolate
from t2i.diffusion.sampling import Velocity, euler

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
        source: the velocity for the caption of the image.
        target: for the caption of the edit.
        image: fp32 (B, 3, H, W) in [-1, 1].
        noise: fresh for each step and average; steps are numbered as in `times`.
        times: a sampler's whole grid, from noise to image.
        n_max: how many of its steps are taken, the last ones: the fewer, the closer the edit stays to the image.
        n_min: in how many of these, again the last ones, the edit is drawn as any noisy image is, and not held to the
            source any more.
        n_avg: over how many noises a step's difference of velocities is averaged.
    """
    steps = len(times) - 1
    assert 0 <= n_min <= n_max <= steps and n_avg > 0
    first, free = steps - n_max, steps - n_min
    moved = torch.zeros_like(image)
    for step, (t, t_next) in enumerate(pairwise(times[first : free + 1]), start=first):
        difference = torch.zeros_like(image)
        for average in range(n_avg):
            x_t = _noised(image, noise(step, average), t)
            # The edit is kept as how far it has moved, so that what has not moved is x_t itself, unrounded.
            difference = difference + target(x_t + moved, t, True) - source(x_t, t, True)
        moved = moved + (t_next - t) / n_avg * difference
    if n_min == 0:
        return image + moved
    x_t = _noised(image, noise(free, 0), times[free]) + moved
    return euler(target, x_t, times[free:], [True] * n_min)


def _noised(image: Tensor, noise: Tensor, t: float) -> Tensor:
    return interpolate(image, noise, torch.full((len(image),), t, device=image.device))
