"""Edits of images: from what an image shows to what it is to show, both in words, with any model that draws captions.

An edit is a function of the weights, the settings, the image and the two captions. Each is computed by itself, so that
nothing depends on what is edited beside it; and both captions are computed at the same places of equal batches, so that
where they are the same, and their guidance too, the image comes back as it was, to the last bit (unless n_min lets go
of it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from data.errors import UserError
from data.randomness import key
from t2i.config import RunConfig
from t2i.config_base import Section
from t2i.config_loading import validate_section
from t2i.diffusion.editing import flow_edit
from t2i.diffusion.flow import to_pixels, to_unit_range
from t2i.diffusion.noise import slot_noise
from t2i.diffusion.sampling import FiniteWatch, time_grid
from t2i.pipeline import Picture, Pipeline, Preview, previewed


class EditSettings(Section):
    """How images are edited; the defaults are FlowEdit's for Stable Diffusion 3."""

    steps: int = Field(50, gt=0)
    """Steps of the time grid from noise to image."""
    n_max: int = Field(33, gt=0)
    """How many of them are taken, the last ones: the more, the farther an edit may go from its image."""
    n_min: int = Field(0, ge=0)
    """In how many of these, the last ones, the edit is drawn freely and no longer held to its image."""
    n_avg: int = Field(1, gt=0)
    """Noises that each step is averaged over."""
    source_guidance: float = Field(3.5, ge=0)
    """Classifier-free guidance of what the image shows; 1 is none."""
    target_guidance: float = Field(13.5, ge=0)
    """The same of what it is to show."""
    timeshift: float = Field(gt=0)
    """Shift of the time grid; above 1 spends more steps at high noise."""
    seed: int = 0
    """Seed of the noise."""

    @model_validator(mode="after")
    def _in_order(self) -> EditSettings:
        if self.n_max > self.steps:
            raise ValueError(f"n_max {self.n_max} must be at most steps ({self.steps})")
        if self.n_min > self.n_max:
            raise ValueError(f"n_min {self.n_min} must be at most n_max ({self.n_max})")
        return self


def edit_settings(config: RunConfig, given: Mapping[str, Any], where: str) -> EditSettings:
    """How a model edits: the defaults on its own time grid, with what is given entered.

    Raises:
        ConfigError: a setting that is wrong, said to be `where`.
    """
    return validate_section(EditSettings, {"timeshift": config.sampling.timeshift, **given}, where)


def patch_window(height: int, width: int, patch: int, name: str = "the image") -> tuple[slice, slice]:
    """The rows and columns of an image's middle that are whole patches.

    Raises:
        UserError: it is smaller than a patch; `name` says which it is.
    """
    if min(height, width) < patch:
        raise UserError(f"{name} has {height} x {width} pixels: each side must be at least {patch}, a patch's")
    top, left = height % patch // 2, width % patch // 2
    return slice(top, top + height // patch * patch), slice(left, left + width // patch * patch)


@torch.no_grad()
def edit_image(
    pipeline: Pipeline,
    image: Tensor,
    source: str,
    target: str,
    settings: EditSettings,
    preview: Preview | None = None,
) -> Tensor:
    """An edited image, uint8 (3, H, W) on the host.

    The network's clamp and the rescaling of guidance are those of the model's sampling section; guidance applies to
    every step, whatever cfg_interval is there.

    Args:
        pipeline: draws captions, not classes.
        image: uint8 (3, H, W), H and W multiples of the patch.
        source: what it shows.
        target: what it is to show.
        settings: how.
        preview: is shown what each call of the network for the target makes of the image, n_avg calls a step.

    Raises:
        NotFiniteError: the edit is not finite.
    """
    config, patch = pipeline.config, pipeline.denoiser.patch_size
    assert config.model.condition == "text"
    assert image.shape[-2] % patch == 0 and image.shape[-1] % patch == 0
    words = [Picture(source), Picture(target)]
    (states,) = pipeline.states([words])
    of_source, of_target = (
        pipeline.velocity([it], states, config.sampling.model_copy(update={"guidance_scale": scale}))
        for it, scale in zip(words, (settings.source_guidance, settings.target_guidance), strict=True)
    )
    watch = FiniteWatch()
    of_source, of_target = watch.over(of_source), watch.over(of_target)
    if preview is not None:
        of_target = previewed(of_target, preview, 1)

    def noise(step: int, average: int) -> Tensor:
        of_step = key(settings.seed, "edit", source, target, step)
        return slot_noise(of_step, [average], image.shape, pipeline.device, config.objective.noise_scale)

    times = time_grid(settings.steps, settings.timeshift)
    edited = flow_edit(
        of_source,
        of_target,
        image=to_unit_range(image.to(pipeline.device))[None],
        noise=noise,
        times=times,
        n_max=settings.n_max,
        n_min=settings.n_min,
        n_avg=settings.n_avg,
    )
    pipeline.check_finite(watch, edited, [f"edit from {source[:80]!r} to {target[:80]!r}"], times)
    return to_pixels(edited)[0].cpu()
