"""Flow matching on the straight path between noise and image, as pure functions in fp32; and the noise of a slot.

Convention everywhere: t = 0 is noise, t = 1 the image, `x_t = t x + (1 - t) noise`, velocity `v = dx_t/dt = x - noise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from data.randomness import hash_u64


def slot_noise(key: int, slots: ArrayLike, shape: Sequence[int], device: torch.device, scale: float = 1.0) -> Tensor:
    """Normal fp32 noise (len(slots), *shape) of standard deviation `scale`, a function of key and slot on one kind of
    device."""
    generator = torch.Generator(device)
    seeds = hash_u64(key, slots).tolist()
    drawn = [torch.randn(*shape, generator=generator.manual_seed(seed), device=device) for seed in seeds]
    return scale * torch.stack(drawn)


Array = NDArray[np.float64]

PredictionKind = Literal["image", "velocity"]
"""What a network predicts from a noisy image."""


def logit_normal(uniform: Array, mean: float, std: float) -> Array:
    """Times whose logit is normal, from uniforms in (0, 1), by the inverse CDF."""
    logit = mean + std * torch.special.ndtri(torch.from_numpy(uniform))
    return torch.sigmoid(logit).numpy()


def shift_time(t: Array, shift: float) -> Array:
    """`t / (t + (1 - t) shift)`: a shift above 1 moves times towards noise; 0 and 1 stay."""
    return t / (t + (1.0 - t) * shift)


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    return t.float().view(-1, *[1] * (like.ndim - 1))


def interpolate(image: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t (PixelGen eq. 2). image and noise (B, ...), t (B,)."""
    t = _per_sample(t, image)
    return t * image + (1.0 - t) * noise


def velocity_from_image(image: Tensor, x_t: Tensor, t: Tensor, t_eps: float) -> Tensor:
    """The velocity that a predicted image implies (PixelGen eq. 3), with 1 - t clamped to `t_eps` or above."""
    return (image - x_t) / (1.0 - _per_sample(t, x_t)).clamp(min=t_eps)


def image_from_velocity(velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The image that a velocity implies: x_t + (1 - t) v."""
    return x_t + velocity * (1.0 - _per_sample(t, x_t))


def predicted_velocity(output: Tensor, x_t: Tensor, t: Tensor, prediction: PredictionKind, t_eps: float) -> Tensor:
    """The velocity of a network's output; `t_eps` applies to predicted images."""
    return velocity_from_image(output, x_t, t, t_eps) if prediction == "image" else output


def flow_matching_loss(
    output: Tensor, image: Tensor, noise: Tensor, t: Tensor, prediction: PredictionKind, t_eps: float
) -> Tensor:
    """Squared error of the velocity (PixelGen eq. 5, PixelDiT eq. 8), the mean over each sample's pixels: (B,).

    For predicted images, both velocities share x_t and the clamp, so their difference is that of the images over max(1
    - t, t_eps).
    """
    if prediction == "velocity":
        return (output.float() - (image.float() - noise.float())).square().flatten(1).mean(1)
    error = (output.float() - image.float()).square().flatten(1).mean(1)
    return error / (1.0 - t.float()).clamp(min=t_eps).square()


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 pixels to fp32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def to_pixels(image: Tensor) -> Tensor:
    """fp32 in [-1, 1], clamped, to the nearest uint8."""
    return ((image.float().clamp(-1, 1) + 1.0) * 127.5 + 0.5).to(torch.uint8)
