"""FlowEdit: against the paper's own convention, where it is known where it ends, and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from t2i.diffusion.flow import interpolate
from t2i.diffusion.sampling import Velocity, euler, flow_edit, time_grid

SHAPE = (2, 3, 4, 5)
IMAGE = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
CASES = [(6, 6, 0, 1), (6, 4, 0, 1), (6, 4, 0, 3), (6, 5, 2, 1), (6, 5, 2, 2), (6, 3, 3, 1), (1, 1, 0, 1), (7, 7, 7, 1)]


def noise(step: int, average: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 * step + average))


def toy(weight: float) -> Velocity:
    """Something of x and t that is neither linear nor even."""
    return lambda x, t, guided: weight * torch.tanh(x + weight * t) + (1 - t) * x.flip(-1) ** 2


def as_in_the_paper(steps: int, shift: float, n_max: int, n_min: int, n_avg: int) -> Tensor:
    """Algorithm 1 with t = 1 for noise, a velocity of noise - image, and steps counted down, in fp64."""

    def velocity(weight: float, x: Tensor, t: float) -> Tensor:
        return -toy(weight)(x, 1 - t, True)

    image = IMAGE.double()
    sigma = [shift * (i / steps) / (1 + (shift - 1) * (i / steps)) for i in range(steps + 1)]
    z = image.clone()
    for i in range(n_max, n_min, -1):
        total = torch.zeros_like(z)
        for average in range(n_avg):
            z_source = (1 - sigma[i]) * image + sigma[i] * noise(steps - i, average).double()
            z_target = z + z_source - image
            total += velocity(1.3, z_target, sigma[i]) - velocity(0.7, z_source, sigma[i])
        z = z + (sigma[i - 1] - sigma[i]) * total / n_avg
    if n_min:
        z = z + (1 - sigma[n_min]) * image + sigma[n_min] * noise(steps - n_min, 0).double() - image
    for i in range(n_min, 0, -1):
        z = z + (sigma[i - 1] - sigma[i]) * velocity(1.3, z, sigma[i])
    return z


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("steps", "n_max", "n_min", "n_avg"), CASES)
def test_it_is_the_papers_algorithm(steps: int, shift: float, n_max: int, n_min: int, n_avg: int) -> None:
    edited = flow_edit(toy(0.7), toy(1.3), IMAGE, noise, time_grid(steps, shift), n_max, n_min, n_avg)
    assert edited.dtype == torch.float32
    torch.testing.assert_close(edited.double(), as_in_the_paper(steps, shift, n_max, n_min, n_avg), atol=2e-5, rtol=0)
    assert (edited - IMAGE).abs().max() > 1e-2


@pytest.mark.parametrize("n_avg", [1, 3])
def test_one_velocity_for_both_moves_nothing(n_avg: int) -> None:
    edited = flow_edit(toy(1.3), toy(1.3), IMAGE, noise, time_grid(6, 3.0), 5, 0, n_avg)
    assert torch.equal(edited, IMAGE)


def test_one_velocity_for_both_and_steps_of_its_own_is_drawing_from_the_noised_image() -> None:
    times = time_grid(6, 3.0)
    edited = flow_edit(toy(1.3), toy(1.3), IMAGE, noise, times, 5, n_min=2)
    noised = interpolate(IMAGE, noise(4, 0), torch.full((2,), times[4]))
    assert torch.equal(edited, euler(toy(1.3), noised, times[4:], [True, True]))


@pytest.mark.parametrize(("n_max", "n_min", "n_avg"), [(6, 0, 1), (1, 0, 1), (4, 0, 2), (4, 1, 1)])
def test_where_captions_have_one_image_each_the_edit_adds_what_tells_them_apart(
    n_max: int, n_min: int, n_avg: int
) -> None:
    """Velocities (a - x) / (1 - t) and (b - x) / (1 - t) lead to a and b from anywhere."""
    a, b = (torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))

    def to(image: Tensor) -> Velocity:
        return lambda x, t, guided: (image - x) / (1 - t)

    edited = flow_edit(to(a), to(b), IMAGE, noise, time_grid(6, 3.0), n_max, n_min, n_avg)
    torch.testing.assert_close(edited, b if n_min else IMAGE + b - a, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("n_max", "n_min", "n_avg"), [(4, 0, 1), (4, 0, 3), (4, 1, 2), (2, 2, 1)])
def test_calls_and_noises(n_max: int, n_min: int, n_avg: int) -> None:
    calls: dict[str, list[float]] = {"source": [], "target": []}
    asked: list[tuple[int, int]] = []

    def counted(name: str) -> Velocity:
        def velocity(x: Tensor, t: float, guided: bool) -> Tensor:
            assert guided
            calls[name].append(t)
            return x

        return velocity

    def noted(step: int, average: int) -> Tensor:
        asked.append((step, average))
        return noise(step, average)

    times = time_grid(6, 3.0)
    flow_edit(counted("source"), counted("target"), IMAGE, noted, times, n_max, n_min, n_avg)
    held = [(step, average) for step in range(6 - n_max, 6 - n_min) for average in range(n_avg)]
    assert calls["source"] == [times[step] for step, _ in held]
    assert calls["target"] == calls["source"] + times[6 - n_min : 6]
    assert asked == held + [(6 - n_min, 0)] * (n_min > 0)
