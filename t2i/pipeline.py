"""Pictures from prompts.

A picture is a function of the weights, the sampler, the seed, its prompt and its number under that prompt: never of
the prompts beside it, its place in a file or the number of processes. Batches have one fixed size (the last one is
filled up), since kernels may round differently for different sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.randomness import key
from t2i.build import build_denoiser, build_text, choose_dtype
from t2i.config import RunConfig, SamplingConfig
from t2i.config_base import ConfigError
from t2i.diffusion.flow import to_pixels
from t2i.diffusion.noise import slot_noise
from t2i.diffusion.sampling import SOLVERS, guided_steps, guided_velocity, time_grid
from t2i.model_folder import WhichWeights, read_model
from t2i.models.pixelgen import PixelGen
from t2i.models.text import TextEncoder


@dataclass(frozen=True)
class Picture:
    """What to draw: a prompt, and which of its pictures (from 0)."""

    prompt: str
    number: int = 0


def starting_noise(
    picture: Picture, seed: int, size: tuple[int, int], device: torch.device, scale: float = 1.0
) -> Tensor:
    """The noise (3, H, W) that a picture starts from, of standard deviation `scale`."""
    return slot_noise(key(seed, "sample", picture.prompt), [picture.number], (3, *size), device, scale)[0]


@dataclass
class Pipeline:
    """A denoiser with what it takes to draw. `config` is that of the stage it was trained in."""

    config: RunConfig
    denoiser: PixelGen
    text: TextEncoder
    null_caption: Tensor
    """States (L, E) of the empty caption."""
    device: torch.device

    @classmethod
    def load(cls, folder: Path, which: WhichWeights, device: torch.device) -> Pipeline:
        """A trained model from its folder.

        Raises:
            ConfigError: the folder is not a model's, or its weights do not fit its config.
        """
        saved = read_model(folder, which)
        config, null_caption = saved.config, saved.null_caption
        dtype = choose_dtype(config.engine.dtype, device)
        denoiser = build_denoiser(config.model, null_caption.shape[-1], config.text.length)
        try:
            denoiser.load_state_dict(saved.denoiser)
        except RuntimeError as error:
            raise ConfigError(f"{folder} does not fit its config: {str(error).splitlines()[1].strip()}") from error
        denoiser = denoiser.to(device, dtype).eval().requires_grad_(False)
        return cls(config, denoiser, build_text(config, device, dtype), null_caption, device)

    @torch.no_grad()
    def draw(self, pictures: Sequence[Picture], sampling: SamplingConfig) -> Tensor:
        """Pictures at the resolution the model was trained at, uint8 (len(pictures), 3, H, W), on the host."""
        side = self.config.data.resolution
        times = time_grid(sampling.steps, sampling.timeshift)
        guided = guided_steps(times, sampling.cfg_interval)
        drawn = [torch.empty(0, 3, side, side, dtype=torch.uint8)]
        for start in range(0, len(pictures), sampling.batch_size):
            chunk = list(pictures[start : start + sampling.batch_size])
            filled = chunk + [Picture("")] * (sampling.batch_size - len(chunk))
            states = self.text([picture.prompt for picture in filled])
            velocity = guided_velocity(
                lambda x, t, condition: self.denoiser(x, t, condition).image,
                states,
                self.null_caption.to(states).expand_as(states),
                sampling.guidance_scale,
                self.config.objective.min_noise,
            )
            size, scale = (side, side), self.config.objective.noise_scale
            noises = [starting_noise(picture, sampling.seed, size, self.device, scale) for picture in filled]
            images = SOLVERS[sampling.solver](velocity, torch.stack(noises), times, guided)
            drawn.append(to_pixels(images[: len(chunk)]).cpu())
        return torch.cat(drawn)
