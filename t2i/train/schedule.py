"""What depends on the step or the slot alone: learning rates and times. Pure functions."""

from __future__ import annotations

import math

from t2i.config_objective import ObjectiveConfig
from t2i.config_optimizer import OptimizerConfig
from t2i.diffusion.flow import Array, logit_normal, shift_time


def learning_rate(config: OptimizerConfig, step: int, steps: int, peak: float) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, plateau, and what the schedule lowers it by."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "step":
        return peak * warm * config.step_down_factor ** sum(step >= round(at * steps) for at in config.step_down_at)
    decay_steps = round(config.decay_fraction * steps)
    progress = (step - (steps - decay_steps)) / decay_steps if decay_steps else 0.0
    progress = min(max(progress, 0.0), 1.0)
    if config.schedule == "cosine":
        progress = (1.0 - math.cos(math.pi * progress)) / 2.0
    return peak * warm * (1.0 - (1.0 - config.final_lr_fraction) * progress)


def training_times(config: ObjectiveConfig, quantile: Array) -> Array:
    """Times t of the training density at quantiles in (0, 1)."""
    return shift_time(logit_normal(quantile, config.time_mean, config.time_std), config.timeshift)
