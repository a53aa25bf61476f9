"""The part of the config that says how pictures are drawn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from t2i.config_base import Section

Unit = Annotated[float, Field(ge=0, le=1)]


class SamplingConfig(Section):
    """How pictures are drawn."""

    solver: Literal["euler", "heun", "adams", "dpmpp"] = "adams"
    """Integrator of the sampling equation; dpmpp is DPM-Solver++ 2M, with its own time grid: the FlowDPM-Solver of Sana
    and PixelDiT's text to image. For N steps the network is called N times, 2 N - 1 times by heun."""
    order: int = Field(2, ge=1, le=4)
    """Of adams: slopes that a step combines, the present one and those of the steps before (PixelGen Table 7: 2)."""
    coefficients: Literal["variable", "fixed"] = "variable"
    """Of adams at order 2: variable follow the lengths of the steps, fixed are those of even steps on any grid, as in
    PixelDiT's class-conditional code."""
    steps: int = Field(25, gt=0)
    """Steps of the integrator."""
    guidance_scale: float = Field(4.0, ge=0)
    """Classifier-free guidance; 1 is none."""
    cfg_interval: tuple[Unit, Unit] = (0.0, 1.0)
    """Guidance applies to steps that start at low < t <= high (under adams and dpmpp t < high, as in the public codes);
    elsewhere the unguided half is not computed. Both are within [0, 1]."""
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    """Share of the guided velocity that is scaled to the standard deviation of the prompt's own (Lin et al. 2023,
    section 3.4, who take 0.7): against the glare of high scales; 0 is none."""
    clamp: bool = True
    """Hold 1 - t at objective.min_noise or above where it divides, as in training and in the public code; false divides
    by 1 - t itself, so that the last step ends at the image predicted there."""
    timeshift: float = Field(3.0, gt=0)
    """Shift of the time grid; above 1 spends more steps at high noise."""
    batch_size: int = Field(16, gt=0)
    """Pictures drawn at once; every batch is filled up to it."""
    seed: int = 0
    """Seed of the starting noise; a picture depends on it, its prompts and its number alone."""

    @model_validator(mode="after")
    def _used(self) -> SamplingConfig:
        default = type(self).model_fields["order"].default
        if self.solver != "adams" and self.order != default:
            raise ValueError(f"order {self.order} does nothing under solver {self.solver}: leave it at {default}")
        if self.coefficients == "fixed" and (self.solver, self.order) != ("adams", 2):
            raise ValueError(
                f"coefficients fixed goes with solver adams at order 2, not with {self.solver} at order {self.order}"
            )
        low, high = self.cfg_interval
        if low > high:
            raise ValueError(f"cfg_interval [{low}, {high}] must be [low, high]")
        return self
