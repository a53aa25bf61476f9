"""Noise that belongs to a slot."""

from __future__ import annotations

import pytest
import torch

from t2i.diffusion.flow import slot_noise

CPU = torch.device("cpu")


def test_noise_is_the_slots_own_and_standard_normal() -> None:
    noise = slot_noise(3, [4, 9, 7], (3, 40, 40), CPU)
    assert torch.equal(noise[1:2], slot_noise(3, [9], (3, 40, 40), CPU))
    assert not torch.equal(noise[1:2], slot_noise(4, [9], (3, 40, 40), CPU))
    assert abs(noise.mean()) < 0.03 and noise.std() == pytest.approx(1.0, abs=0.03)


def test_scale_is_the_standard_deviation() -> None:
    plain, scaled = (slot_noise(3, [4, 9], (3, 8, 8), CPU, scale) for scale in (1.0, 2.0))
    assert torch.equal(scaled, 2 * plain)
