"""A trained model that generates images from prompts and edits images.

- An image depends on the weights, the sampler, the seed, its size, its prompts and its number under them, never on the
  images beside it. Batches have one fixed size (the last one is filled up), since kernels may round differently for
  different sizes. Some also do for another position in a batch or number of threads: jobs that promise the same files
  process whole batches of the same images for any number of processes.
- An edit depends on the weights, the settings, the image and the two captions. Both captions are computed at the same
  positions of equal batches, so that an edit between equal captions with equal guidance returns the image to the last
  bit (unless n_min is above 0).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from data.errors import UserError, shortened
from data.randomness import key
from t2i.build import Denoiser, build_conditioner, build_denoiser, choose_dtype
from t2i.config.base import ConfigError, Section
from t2i.config.loading import validate_section
from t2i.config.run import RunConfig
from t2i.config.train import SamplingConfig
from t2i.diffusion.flow import image_from_velocity, slot_noise, to_pixels, to_unit_range
from t2i.diffusion.sampling import (
    FiniteTracker,
    Velocity,
    choose_solver,
    flow_edit,
    guided_steps,
    guided_velocity,
    time_grid,
)
from t2i.model_folder import WhichWeights, read_model
from t2i.models.text import Conditioner, check_same_text, stack_conditions

T = TypeVar("T")


class NotFiniteError(UserError):
    """An image whose numbers are not finite."""


@dataclass(frozen=True)
class Picture:
    """What to generate: a prompt (a caption, or a class in digits), and which of its images (from 0)."""

    prompt: str
    number: int = 0
    negative: str = ""
    """What guidance leads away from; unused where guidance is off."""


def pictures_of(prompts: Sequence[str], each: int, negative: str = "") -> list[Picture]:
    """`each` images of each prompt; the numbers of equal prompts go on, so that no two images are the same."""
    before: Counter[str] = Counter()
    pictures = []
    for prompt in prompts:
        pictures += [Picture(prompt, before[prompt] + number, negative) for number in range(each)]
        before[prompt] += each
    return pictures


def starting_noise(
    picture: Picture, seed: int, size: tuple[int, int], device: torch.device, scale: float = 1.0
) -> Tensor:
    """The noise (3, H, W) that an image starts from, of standard deviation `scale`."""
    return slot_noise(key(seed, "sample", picture.prompt), [picture.number], (3, *size), device, scale)[0]


def batches_of(pictures: Sequence[T], batch_size: int) -> list[Sequence[T]]:
    """The batches that images are generated in. Processes share whole batches."""
    return [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]


def states_of_batches(
    conditioner: Callable[[list[str]], list[Tensor]], null_caption: Tensor, batches: Sequence[Sequence[str]]
) -> Iterator[dict[str, Tensor]]:
    """For each batch of captions, their states (L, E) or classes () by caption; `null_caption` for the empty one.

    Every caption is encoded once, when its first batch is due, and kept until the last batch that needs it.
    """
    last = {caption: n for n, captions in enumerate(batches) for caption in captions}
    held = {"": null_caption}
    for n, captions in enumerate(batches):
        missing = [caption for caption in dict.fromkeys(captions) if caption not in held]
        if missing:
            held.update(zip(missing, conditioner(missing), strict=True))
        yield held
        held = {caption: states for caption, states in held.items() if not caption or last[caption] > n}


States = tuple[dict[str, Tensor], dict[str, Tensor]]
"""States (L, E) or classes () of a batch's prompts, and of its negative prompts, by their words."""
Preview = Callable[[Tensor, float], None]
"""Gets the images (b, 3, H, W) that a call of the network predicts, about in [-1, 1], and its t."""


def previewed(velocity: Velocity, preview: Preview, count: int) -> Velocity:
    """The same velocity; `preview` gets what each call of the network predicts for the first `count` images."""

    def shown(x_t: Tensor, t: float, guided: bool) -> Tensor:
        slope = velocity(x_t, t, guided)
        preview(image_from_velocity(slope, x_t, torch.full((len(x_t),), t, device=x_t.device))[:count], t)
        return slope

    return shown


@dataclass
class Pipeline:
    """A denoiser with everything it takes to generate. `config` is that of the stage it was trained in."""

    config: RunConfig
    denoiser: Denoiser
    conditioner: Conditioner
    null_caption: Tensor
    """States (L, E) of the empty caption, or the null class ()."""
    device: torch.device
    on_fault: Callable[[str], None] | None = None
    """Called with a sentence about an image that is not finite, which is then black; None: an error is raised."""

    @classmethod
    def load(cls, folder: Path, which: WhichWeights, device: torch.device, text_model: str | None = None) -> Pipeline:
        """A trained model from its folder.

        `text_model`: where its text encoder is now, in place of its config's text.model.
        """
        saved = read_model(folder, which)
        config, null_caption = saved.config, saved.null_caption
        if text_model is not None:
            if config.model.condition == "class":
                raise ConfigError(f"--text_model {text_model}: {folder} draws classes and has no text encoder")
            config = config.model_copy(update={"text": config.text.model_copy(update={"model": text_model})})
        dtype = choose_dtype(config.engine.dtype, device)
        try:
            conditioner = build_conditioner(config, device, dtype)
        except UserError as error:
            raise ConfigError(f"{error}; --text_model says where {folder}'s text encoder is now") from error
        # An imported null caption need not be the text encoder's own (--null_attention zero).
        if text_model is not None and not (folder / "import.json").exists():
            check_same_text(null_caption, conditioner.null_caption(), f"--text_model {text_model}", str(folder))
        denoiser = build_denoiser(config.model, conditioner.width, config.text.length)
        try:
            denoiser.load_state_dict(saved.denoiser)
        except RuntimeError as error:
            raise ConfigError(f"{folder} does not fit its config: {str(error).splitlines()[1].strip()}") from error
        denoiser = denoiser.to(device, dtype).eval().requires_grad_(False)
        return cls(config, denoiser, conditioner, null_caption, device)

    def states(self, batches: Sequence[Sequence[Picture]]) -> Iterator[States]:
        """The conditions of each batch's prompts and negative prompts."""
        null_caption = self.null_caption.to(self.device, self.conditioner.dtype)
        prompts = [[picture.prompt for picture in batch] for batch in batches]
        negatives = [[picture.negative for picture in batch] for batch in batches]
        return zip(
            states_of_batches(self.conditioner, null_caption, prompts),
            states_of_batches(partial(self.conditioner, plain=True), null_caption, negatives),
            strict=True,
        )

    def velocity(self, pictures: Sequence[Picture], states: States, sampling: SamplingConfig) -> Velocity:
        """The guided velocity of images that are generated together: (x_t (b, 3, H, W), t, guided) to dx/dt."""
        prompts, negatives = states
        return guided_velocity(
            lambda x, t, condition: self.denoiser(x, t, condition).output,
            # At full length: an image's shape of computation must not depend on the images beside it.
            stack_conditions([prompts[picture.prompt] for picture in pictures], self.config.text.length),
            stack_conditions([negatives[picture.negative] for picture in pictures], self.config.text.length),
            sampling.guidance_scale,
            self.config.model.prediction,
            self.config.objective.t_eps if sampling.clamp else 0.0,
            sampling.guidance_rescale,
        )

    @torch.no_grad()
    def draw_batches(
        self,
        pictures: Sequence[Picture],
        sampling: SamplingConfig,
        size: tuple[int, int] | None = None,
        preview: Preview | None = None,
    ) -> Iterator[Tensor]:
        """Images in order, uint8 (b, 3, H, W) on the host, with at most `sampling.batch_size` in a batch.

        Images that share a prompt should be neighbours: its states are then computed once. `size`: height and width in
        pixels, multiples of the patch; None is the trained size. `preview` gets each batch as it forms.

        Raises:
            NotFiniteError: an image is not finite.
        """
        height, width = size or self.config.data.size
        assert height % self.denoiser.patch_size == 0 and width % self.denoiser.patch_size == 0
        times = time_grid(sampling.steps, sampling.shift, sampling.solver)
        guided = guided_steps(times, sampling.cfg_interval, sampling.solver)
        solve = choose_solver(sampling.solver, sampling.order, sampling.coefficients)
        batches = batches_of(pictures, sampling.batch_size)
        for batch, states in zip(batches, self.states(batches), strict=True):
            filled = [*batch, *[batch[-1]] * (sampling.batch_size - len(batch))]
            tracker = FiniteTracker()
            velocity = tracker.wrap(self.velocity(filled, states, sampling))
            if preview is not None:
                velocity = previewed(velocity, preview, len(batch))
            scale = self.config.objective.noise_scale
            noise = [starting_noise(picture, sampling.seed, (height, width), self.device, scale) for picture in filled]
            images = solve(velocity, torch.stack(noise), times, guided)[: len(batch)]
            names = [f"prompt {shortened(one.prompt)!r}, picture {one.number}" for one in batch]
            self.check_finite(tracker, images, names, times)
            yield to_pixels(images).cpu()

    def check_finite(
        self, tracker: FiniteTracker, images: Tensor, names: Sequence[str], times: Sequence[float]
    ) -> None:
        """Raise NotFiniteError for images that are not finite, or call `on_fault`. `names`: of each image, in words;
        `times`: the solver's grid."""
        if (fault := tracker.first_nonfinite(images)) is None:
            return
        image, t = fault
        steps = len(times) - 1
        step = min(bisect_right(times, t), steps)
        message = (
            f"{names[image]}: is not finite from step {step} of {steps} (t = {t:.4g}) on: use other weights, "
            "engine.dtype fp32 in the model's config.yaml, or less guidance"
        )
        if self.on_fault is None:
            raise NotFiniteError(message)
        self.on_fault(message)

    def draw(
        self, pictures: Sequence[Picture], sampling: SamplingConfig, size: tuple[int, int] | None = None
    ) -> Tensor:
        """All images in one tensor, uint8 (len(pictures), 3, H, W)."""
        none = torch.empty(0, 3, *(size or self.config.data.size), dtype=torch.uint8)
        return torch.cat([none, *self.draw_batches(pictures, sampling, size)])


class EditSettings(Section):
    """How images are edited; the defaults are FlowEdit's for Stable Diffusion 3."""

    steps: int = Field(50, gt=0)
    """Steps of the time grid from noise to image."""
    n_max: int = Field(33, gt=0)
    """Number of last steps that are taken: with more, an edit may go farther from its image."""
    n_min: int = Field(0, ge=0)
    """Number of last steps that sample freely, without the source image."""
    n_avg: int = Field(1, gt=0)
    """Noises that each step is averaged over."""
    source_guidance: float = Field(3.5, ge=0)
    """Classifier-free guidance of the source caption; 1 is none."""
    target_guidance: float = Field(13.5, ge=0)
    """Classifier-free guidance of the target caption."""
    shift: float = Field(gt=0)
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
    """A model's edit settings: the defaults on its own time grid, with `given`; `where`, in messages, names their
    source."""
    return validate_section(EditSettings, {"shift": config.sampling.shift, **given}, where)


def patch_window(height: int, width: int, patch: int, name: str = "the image") -> tuple[slice, slice]:
    """The rows and columns of the centre of an image that are whole patches; `name`, in messages, is the image's."""
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

    Clamp and guidance_rescale come from the model's sampling section; guidance applies to every step, whatever
    cfg_interval.

    Args:
        pipeline: of a model that reads captions.
        image: uint8 (3, H, W), H and W multiples of the patch.
        source: caption of the image.
        target: caption of the edit.
        preview: gets the target's prediction at each call of the network, n_avg calls a step.

    Raises:
        NotFiniteError: the edit is not finite.
    """
    config, patch = pipeline.config, pipeline.denoiser.patch_size
    assert config.model.condition == "text"
    assert image.shape[-2] % patch == 0 and image.shape[-1] % patch == 0
    words = [Picture(source), Picture(target)]
    (states,) = pipeline.states([words])
    of_source, of_target = (
        pipeline.velocity([caption], states, config.sampling.model_copy(update={"guidance_scale": scale}))
        for caption, scale in zip(words, (settings.source_guidance, settings.target_guidance), strict=True)
    )
    tracker = FiniteTracker()
    of_source, of_target = tracker.wrap(of_source), tracker.wrap(of_target)
    if preview is not None:
        of_target = previewed(of_target, preview, 1)

    def noise(step: int, average: int) -> Tensor:
        of_step = key(settings.seed, "edit", source, target, step)
        return slot_noise(of_step, [average], image.shape, pipeline.device, config.objective.noise_scale)

    times = time_grid(settings.steps, settings.shift)
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
    name = f"edit from {shortened(source)!r} to {shortened(target)!r}"
    pipeline.check_finite(tracker, edited, [name], times)
    return to_pixels(edited)[0].cpu()
