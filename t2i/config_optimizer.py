"""The part of the config that says how weights follow gradients, and how fast."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from t2i.config_base import Fraction, Section


class OptimizerConfig(Section):
    """The optimizer, its gradient clipping and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of attention and MLP, AdamW for everything else."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of AdamW's two moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of AdamW's second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, for both optimizers, of linear layers' matrices: not of biases, norms, embeddings and
    learned positions."""
    muon_lr: float = Field(0.02, gt=0)
    """Peak learning rate of Muon, whose updates have a root mean square of about 0.2."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Momentum of Muon (Nesterov's form)."""
    clip_grad_norm: float = Field(1.0, ge=0)
    """Largest global gradient norm; a larger gradient is scaled down to it. 0 turns clipping off."""
    schedule: Literal["constant", "linear", "cosine", "step"] = "constant"
    """How the rate falls after warm-up: never; on a line or a cosine at the end of the stage; or in steps down."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from 0."""
    decay_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the stage, at its end, over which a linear or cosine schedule decays."""
    final_lr_fraction: float = Field(0.0, ge=0, le=1)
    """Where a linear or cosine schedule ends, as a share of the peak."""
    step_down_at: list[Fraction] = Field([])
    """Where a step schedule lowers the rate: shares of the stage, in rising order."""
    step_down_factor: float = Field(0.1, gt=0, lt=1)
    """What it multiplies the rate by, each time."""

    @model_validator(mode="after")
    def _decay(self) -> OptimizerConfig:
        if (self.schedule in ("linear", "cosine")) != (self.decay_fraction > 0):
            raise ValueError(
                f"decay_fraction {self.decay_fraction} does not go with schedule {self.schedule}: "
                "linear and cosine need one above 0, the others have 0"
            )
        if (self.schedule == "step") != bool(self.step_down_at):
            raise ValueError(
                f"step_down_at {self.step_down_at} does not go with schedule {self.schedule}: "
                "step needs shares of the stage, such as [0.6, 0.9], the others have none"
            )
        if any(later <= earlier for earlier, later in pairwise(self.step_down_at)):
            raise ValueError(f"step_down_at {self.step_down_at} must rise")
        return self
