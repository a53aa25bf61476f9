"""The learning rate over a stage."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from t2i.config.train import OptimizerConfig
from t2i.train.step import learning_rate

STEPS, PEAK = 100, 3e-4


def rates(**settings: object) -> list[float]:
    """Rates of steps 0 to 100 relative to the peak; the last would be the first step after the stage."""
    config = OptimizerConfig.model_validate(settings)
    return [learning_rate(config, step, STEPS, PEAK) / PEAK for step in range(STEPS + 1)]


def test_constant() -> None:
    assert rates() == [1.0] * 101


def test_warm_up_is_linear_from_the_first_step_and_reaches_the_peak() -> None:
    found = rates(warmup_steps=10)
    assert found[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert found[10:] == [1.0] * 91
    assert rates(warmup_steps=1) == [1.0] * 101


def test_linear_decay_over_the_last_share_of_the_stage() -> None:
    found = rates(schedule="linear", decay_fraction=0.2, final_lr_fraction=0.1)
    assert found[:81] == [1.0] * 81
    assert found[90] == pytest.approx(0.55)
    assert found[99] == pytest.approx(0.145) and found[100] == pytest.approx(0.1)
    drops = [a - b for a, b in pairwise(found[80:])]
    assert drops == pytest.approx([0.045] * 20)


def test_cosine_decay_over_the_whole_stage() -> None:
    found = rates(schedule="cosine", decay_fraction=1.0, final_lr_fraction=0.2)
    assert found == pytest.approx([0.2 + 0.8 * (1 + math.cos(math.pi * n / 100)) / 2 for n in range(101)])
    assert found[0] == 1.0 and found[50] == pytest.approx(0.6) and found[100] == pytest.approx(0.2)


def test_decay_ends_at_zero_and_never_goes_below() -> None:
    for schedule in ("linear", "cosine"):
        config = OptimizerConfig.model_validate({"schedule": schedule, "decay_fraction": 0.5})
        assert learning_rate(config, 99, STEPS, PEAK) > 0
        assert learning_rate(config, 100, STEPS, PEAK) == learning_rate(config, 150, STEPS, PEAK) == 0.0


def test_steps_down_at_shares_of_the_stage() -> None:
    found = rates(schedule="step", step_down_at=[0.6, 0.9], step_down_factor=0.5)
    assert found == [1.0] * 60 + [0.5] * 30 + [0.25] * 11
    assert rates(schedule="step", step_down_at=[0.6])[60] == pytest.approx(0.1)
    warm = rates(schedule="step", step_down_at=[0.05], step_down_factor=0.5, warmup_steps=10)
    assert warm[4:6] == pytest.approx([0.5, 0.3]) and warm[10] == 0.5


def test_warm_up_and_decay_multiply() -> None:
    found = rates(schedule="linear", decay_fraction=1.0, warmup_steps=50)
    assert found[24] == pytest.approx(25 / 50 * 0.76) and found[75] == pytest.approx(0.25)


def test_the_peak_is_the_callers() -> None:
    config = OptimizerConfig.model_validate({"lr": 1.0, "muon_lr": 2.0})
    assert learning_rate(config, 5, STEPS, 0.02) == 0.02
