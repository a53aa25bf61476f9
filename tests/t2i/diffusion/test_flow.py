"""The path between noise and image: identities, and numbers of the paper's distribution of t."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from data.randomness import key, uniform
from t2i.diffusion import flow

MIN_NOISE = 0.05


def sample(times: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    image, noise = torch.randn(2, len(times), 3, 4, 6, dtype=torch.float64)
    return image, noise, torch.tensor(times, dtype=torch.float64)


def test_path_starts_at_noise_and_ends_at_the_image() -> None:
    image, noise, t = sample([0.0, 1.0, 0.25])
    x_t = flow.interpolate(image, noise, t)
    assert torch.equal(x_t[0], noise[0]) and torch.equal(x_t[1], image[1])
    torch.testing.assert_close(x_t[2], 0.25 * image[2] + 0.75 * noise[2])


def test_velocity_is_the_derivative_of_the_path() -> None:
    image, noise, t = sample([0.1, 0.5, 0.9])
    h = 2.0**-8
    slope = (flow.interpolate(image, noise, t + h) - flow.interpolate(image, noise, t - h)) / (2 * h)
    velocity = flow.velocity_from_image(image, flow.interpolate(image, noise, t), t, MIN_NOISE)
    torch.testing.assert_close(velocity, slope, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(velocity, image - noise, atol=1e-5, rtol=1e-5)


def test_conversions_are_each_others_inverses() -> None:
    image, noise, t = sample([0.0, 0.3, 0.94])
    x_t = flow.interpolate(image, noise, t)
    velocity = flow.velocity_from_image(image, x_t, t, MIN_NOISE)
    torch.testing.assert_close(flow.image_from_velocity(velocity, x_t, t), image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x_t - t[:, None, None, None] * velocity, noise, atol=1e-5, rtol=1e-5)


def test_division_by_one_minus_t_is_held_at_the_clamp() -> None:
    image, _, t = sample([0.94, 0.96, 0.99, 1.0])
    x_t = torch.zeros_like(image)
    velocity = flow.velocity_from_image(image, x_t, t, MIN_NOISE)
    torch.testing.assert_close(velocity[0], image[0] / 0.06, atol=1e-4, rtol=1e-4)
    for n in (1, 2, 3):
        torch.testing.assert_close(velocity[n], image[n] * 20, atol=1e-4, rtol=1e-4)


def test_loss_is_the_mean_squared_error_of_the_velocities() -> None:
    image, noise, t = sample([0.0, 0.2, 0.5, 0.9, 0.97, 1.0])
    torch.manual_seed(1)
    predicted = image + 0.1 * torch.randn_like(image)
    x_t = flow.interpolate(image, noise, t)
    error = [flow.velocity_from_image(x, x_t, t, MIN_NOISE) for x in (predicted, image)]
    expected = (error[0] - error[1]).square().mean(dim=(1, 2, 3)).float()
    loss = flow.flow_matching_loss(predicted, image, torch.zeros_like(image), t, "image", MIN_NOISE)
    assert loss.shape == (6,) and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-4)


def test_a_samples_loss_is_the_mean_over_its_pixels_whatever_its_shape() -> None:
    error = torch.randn(2, 3, 8, 8)
    for height, width in ((4, 16), (16, 4)):
        reshaped = error.reshape(2, 3, height, width)
        loss = flow.flow_matching_loss(
            reshaped, none := torch.zeros_like(reshaped), none, torch.zeros(2), "image", MIN_NOISE
        )
        torch.testing.assert_close(loss, error.square().mean(dim=(1, 2, 3)))


def test_weights_of_an_error_in_the_image() -> None:
    t = torch.tensor([0.0, 0.5, 0.9, 0.95, 1.0])
    loss = flow.flow_matching_loss(torch.ones(5, 3, 2, 2), *torch.zeros(2, 5, 3, 2, 2), t, "image", MIN_NOISE)
    torch.testing.assert_close(loss, torch.tensor([1.0, 4.0, 100.0, 400.0, 400.0]), atol=1e-2, rtol=1e-4)


def test_loss_arithmetic_is_fp32_for_bf16_networks() -> None:
    torch.manual_seed(0)
    predicted, image = torch.randn(2, 2, 3, 8, 8).bfloat16()
    t = torch.tensor([0.3, 0.9])
    loss = flow.flow_matching_loss(predicted, image, torch.zeros_like(image), t, "image", MIN_NOISE)
    assert torch.equal(
        loss, flow.flow_matching_loss(predicted.float(), image.float(), torch.zeros(2, 3, 8, 8), t, "image", MIN_NOISE)
    )


def test_quantiles_of_the_papers_distribution_of_t() -> None:
    grid = (np.arange(100_000) + 0.5) / 100_000
    t = flow.logit_normal(grid, -0.8, 0.8)
    assert np.median(t) == pytest.approx(1 / (1 + np.exp(0.8)), abs=1e-4)
    assert (np.diff(t) > 0).all() and t[0] > 0 and t[-1] < 1
    for below, share in ((0.1, 0.040), (0.3, 0.476), (0.6, 0.934)):
        assert np.mean(t < below) == pytest.approx(share, abs=5e-4)
    weights = 1 / np.maximum(1 - t, MIN_NOISE) ** 2
    assert weights.mean() == pytest.approx(2.96, abs=0.01)


def test_draws_of_slots_have_the_distribution() -> None:
    logits = flow.logit_normal(uniform(key(0, "time"), np.arange(40_000)), -0.8, 0.8)
    logits = np.log(logits / (1 - logits))
    assert logits.mean() == pytest.approx(-0.8, abs=0.02) and logits.std() == pytest.approx(0.8, abs=0.02)


def test_extreme_uniforms_give_times_inside_the_interval() -> None:
    t = flow.logit_normal(np.array([2.0**-53, 1 - 2.0**-53]), -0.8, 0.8)
    assert np.isfinite(t).all() and 0 < t[0] < 0.01 and 0.9 < t[1] < 1


def test_shift_keeps_the_ends_and_moves_the_rest_towards_noise() -> None:
    t = np.linspace(0, 1, 11)
    shifted = flow.shift_time(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] < t[1:-1]).all()
    assert flow.shift_time(np.array([0.5]), 3.0)[0] == pytest.approx(0.25)
    np.testing.assert_array_equal(flow.shift_time(t, 1.0), t)
    np.testing.assert_allclose(flow.shift_time(shifted, 1 / 3), t, atol=1e-12)


def test_pixels_survive_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    image = flow.to_unit_range(pixels)
    assert image.dtype == torch.float32 and image[0] == -1 and image[-1] == 1
    assert torch.equal(flow.to_pixels(image), pixels)


def test_pixels_are_clamped_and_rounded_to_the_nearest() -> None:
    assert flow.to_pixels(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    image = flow.to_unit_range(torch.tensor([10, 10, 10], dtype=torch.uint8))
    nudged = image + torch.tensor([0.49, -0.49, 0.51]) / 127.5
    assert flow.to_pixels(nudged).tolist() == [10, 10, 11]
