"""Pictures from prompts: a denoiser, a text encoder and the sampling settings.

A picture is a function of the weights, the sampler, the seed, its prompt and its number under that prompt:
never of the prompts beside it, its place in a file or the number of processes. Batches have one fixed size (the
last one is filled up), since kernels may round differently for different sizes.

A model folder holds `model.safetensors` (raw), `ema.safetensors` and `config.yaml`; the null caption's states are
stored with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.randomness import key
from t2i.config import ConfigError, RunConfig, SamplingConfig, load
from t2i.diffusion.flow import to_pixels
from t2i.diffusion.noise import slot_noise
from t2i.diffusion.sampling import SOLVERS, guided_steps, guided_velocity, time_grid
from t2i.models.pixelgen import PixelGen
from t2i.models.text import TextEncoder
from t2i.train.build import build_denoiser, build_text, choose_dtype

NULL_CAPTION = "null_caption"
DENOISER = "denoiser."


@dataclass(frozen=True)
class Picture:
    """What to draw: a prompt, and which of its pictures (from 0)."""

    prompt: str
    number: int = 0


def starting_noise(picture: Picture, seed: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """The noise (3, H, W) that a picture starts from."""
    return slot_noise(key(seed, "sample", picture.prompt), [picture.number], (3, *size), device)[0]


@torch.no_grad()
def draw(
    denoiser: PixelGen,
    text: Callable[[list[str]], Tensor],
    null_caption: Tensor,
    pictures: Sequence[Picture],
    sampling: SamplingConfig,
    *,
    size: tuple[int, int],
    min_noise: float,
    device: torch.device,
) -> Tensor:
    """uint8 (len(pictures), 3, H, W) on the host.

    Args:
        text: captions to states.
        null_caption: states (L, E) of the empty caption.
        size: height and width, multiples of the model's patch.
        min_noise: the clamp of 1 - t that the model was trained with.
    """
    times = time_grid(sampling.steps, sampling.timeshift)
    guided = guided_steps(times, sampling.cfg_interval)
    null = null_caption.to(device).expand(sampling.batch_size, -1, -1)
    drawn = []
    for start in range(0, len(pictures), sampling.batch_size):
        chunk = list(pictures[start : start + sampling.batch_size])
        filled = chunk + [Picture("")] * (sampling.batch_size - len(chunk))
        states = text([picture.prompt for picture in filled])
        noise = torch.stack([starting_noise(picture, sampling.seed, size, device) for picture in filled])
        velocity = guided_velocity(
            lambda x, t, condition: denoiser(x, t, condition).image,
            states,
            null.to(states.dtype),
            sampling.guidance_scale,
            min_noise,
        )
        images = SOLVERS[sampling.solver](velocity, noise, times, guided)
        drawn.append(to_pixels(images[: len(chunk)]).cpu())
    return torch.cat(drawn) if drawn else torch.empty(0, 3, *size, dtype=torch.uint8)


def model_file(folder: Path, weights: Literal["ema", "raw"]) -> Path:
    """The file with a model folder's weights.

    Raises:
        ConfigError: the folder is not a model.
    """
    file = folder / ("ema.safetensors" if weights == "ema" else "model.safetensors")
    if not file.exists() or not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} is not a model folder: {file.name} and config.yaml are expected in it")
    return file


class Pipeline:
    """A trained model, loaded from its folder.

    Args:
        folder: a `model/` folder of a run.
        weights: `ema` or `raw`.
        device: where to draw.

    Raises:
        ConfigError: the folder is not a model, or its weights do not fit its config.
    """

    def __init__(self, folder: Path, weights: Literal["ema", "raw"], device: torch.device) -> None:
        file = model_file(folder, weights)
        self.config: RunConfig = load(folder / "config.yaml")
        self.device = device
        dtype = choose_dtype(self.config.engine.dtype, device)
        try:
            tensors = load_file(file)
            self.null_caption = tensors.pop(NULL_CAPTION)
        except (SafetensorError, KeyError) as error:
            raise ConfigError(f"{file} is damaged or not a model of this kind: {error}") from error
        denoiser = build_denoiser(self.config.model, self.null_caption.shape[-1], self.config.text.length)
        try:
            denoiser.load_state_dict(
                {n.removeprefix(DENOISER): t for n, t in tensors.items() if n.startswith(DENOISER)}
            )
        except RuntimeError as error:
            raise ConfigError(f"{file} does not fit its config: {str(error).splitlines()[1].strip()}") from error
        self.denoiser = denoiser.to(device, dtype).eval().requires_grad_(False)
        self.text: TextEncoder = build_text(self.config, device, dtype)

    def draw(self, pictures: Sequence[Picture], sampling: SamplingConfig) -> Tensor:
        """uint8 (len(pictures), 3, H, W) at the resolution the model was trained at."""
        side = self.config.data.resolution
        return draw(
            self.denoiser,
            self.text,
            self.null_caption,
            pictures,
            sampling,
            size=(side, side),
            min_noise=self.config.objective.min_noise,
            device=self.device,
        )
