"""Pictures from prompts.

A picture is a function of the weights, the sampler, the seed, its size, its prompts and its number under them: never
of the pictures beside it. Batches have one fixed size (the last one is filled up), since kernels may round differently
for different sizes. Some do so, too, for another place in a batch or another number of threads: jobs that promise the
same files draw whole batches, made of the same pictures for any number of processes.

Edits of images: from what an image shows to what it is to show, both in words, with any model that draws captions.

An edit is a function of the weights, the settings, the image and the two captions. Each is computed by itself, so that
nothing depends on what is edited beside it; and both captions are computed at the same places of equal batches, so that
where they are the same, and their guidance too, the image comes back as it was, to the last bit (unless n_min lets go
of it).
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

from data.errors import UserError
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
    """A picture whose numbers are not finite."""


@dataclass(frozen=True)
class Picture:
    """What to draw: a prompt (a caption, or a class in digits), and which of its pictures (from 0)."""

    prompt: str
    number: int = 0
    negative: str = ""
    """What guidance leads away from; where it is off, nothing reads this."""


def pictures_of(prompts: Sequence[str], each: int, negative: str = "") -> list[Picture]:
    """So many pictures of each prompt; where prompts are equal the numbers go on, so that no two pictures are one."""
    before: Counter[str] = Counter()
    pictures = []
    for prompt in prompts:
        pictures += [Picture(prompt, before[prompt] + number, negative) for number in range(each)]
        before[prompt] += each
    return pictures


def starting_noise(
    picture: Picture, seed: int, size: tuple[int, int], device: torch.device, scale: float = 1.0
) -> Tensor:
    """The noise (3, H, W) that a picture starts from, of standard deviation `scale`."""
    return slot_noise(key(seed, "sample", picture.prompt), [picture.number], (3, *size), device, scale)[0]


def batches_of(pictures: Sequence[T], batch_size: int) -> list[Sequence[T]]:
    """In which batches pictures are drawn. Processes that share them out take whole ones."""
    return [pictures[start : start + batch_size] for start in range(0, len(pictures), batch_size)]


def states_of_batches(
    conditioner: Callable[[list[str]], list[Tensor]], null_caption: Tensor, batches: Sequence[Sequence[str]]
) -> Iterator[dict[str, Tensor]]:
    """For each batch of captions, their states (L, E) or classes () by caption; the empty one's are `null_caption`.

    Every caption is encoded once, when its first batch is due, and held no longer than a later one needs it.
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
"""Is given the images (b, 3, H, W) that a call of the network predicts, in [-1, 1] or about, and its t."""


def previewed(velocity: Velocity, preview: Preview, count: int) -> Velocity:
    """The same velocity; `preview` is shown what each call of the network makes of the first `count` pictures."""

    def shown(x_t: Tensor, t: float, guided: bool) -> Tensor:
        slope = velocity(x_t, t, guided)
        preview(image_from_velocity(slope, x_t, torch.full((len(x_t),), t, device=x_t.device))[:count], t)
        return slope

    return shown


@dataclass
class Pipeline:
    """A denoiser with what it takes to draw. `config` is that of the stage it was trained in."""

    config: RunConfig
    denoiser: Denoiser
    conditioner: Conditioner
    null_caption: Tensor
    """States (L, E) of the empty caption, or the class () that stands for none."""
    device: torch.device
    on_fault: Callable[[str], None] | None = None
    """Is told of a picture that is not finite, which is then drawn black; None: it is an error."""

    @classmethod
    def load(cls, folder: Path, which: WhichWeights, device: torch.device, text_model: str | None = None) -> Pipeline:
        """A trained model from its folder.

        Args:
            text_model: where its text encoder lies now, in place of its config's text.model.

        Raises:
            ConfigError: the folder is not a model's, its weights do not fit its config, or the text encoder cannot be
                loaded or is another one.
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
        # An imported null caption was not computed by its text encoder alone.
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
        """What the denoiser is told of each batch's prompts and negative prompts."""
        null_caption = self.null_caption.to(self.device, self.conditioner.dtype)
        prompts = [[it.prompt for it in batch] for batch in batches]
        negatives = [[it.negative for it in batch] for batch in batches]
        return zip(
            states_of_batches(self.conditioner, null_caption, prompts),
            states_of_batches(partial(self.conditioner, plain=True), null_caption, negatives),
            strict=True,
        )

    def velocity(self, pictures: Sequence[Picture], states: States, sampling: SamplingConfig) -> Velocity:
        """The guided velocity of pictures that are drawn together: (x_t (b, 3, H, W), t, guided) to dx/dt."""
        prompts, negatives = states
        return guided_velocity(
            lambda x, t, condition: self.denoiser(x, t, condition).output,
            # At full length: what is drawn beside a picture must not decide in what shape it is computed.
            stack_conditions([prompts[it.prompt] for it in pictures], self.config.text.length),
            stack_conditions([negatives[it.negative] for it in pictures], self.config.text.length),
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
        """Pictures in their order, uint8 (b, 3, H, W) on the host, with at most `sampling.batch_size` in a batch.

        Args:
            pictures: what to draw; those that share a prompt are best neighbours, and its states are computed once.
            sampling: how.
            size: height and width in pixels, multiples of the patch; none takes those the model was trained at.
            preview: is shown each batch as it forms.

        Raises:
            NotFiniteError: a picture is not finite.
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
            noise = [starting_noise(it, sampling.seed, (height, width), self.device, scale) for it in filled]
            images = solve(velocity, torch.stack(noise), times, guided)[: len(batch)]
            self.check_finite(
                tracker, images, [f"prompt {it.prompt[:80]!r}, picture {it.number}" for it in batch], times
            )
            yield to_pixels(images).cpu()

    def check_finite(
        self, tracker: FiniteTracker, images: Tensor, names: Sequence[str], times: Sequence[float]
    ) -> None:
        """See that images that were drawn under a watch are finite.

        Args:
            names: of each, in words.
            times: the solver's grid.

        Raises:
            NotFiniteError: one is not, unless `on_fault` hears of it.
        """
        if (fault := tracker.first_nonfinite(images)) is None:
            return
        image, t = fault
        steps = len(times) - 1
        step = min(bisect_right(times, t), steps)
        said = f"{names[image]}: is not finite from step {step} of {steps} (t = {t:.4g}) on: draw with other weights, "
        said += "with engine.dtype fp32 in the model's config.yaml, or with less guidance"
        if self.on_fault is None:
            raise NotFiniteError(said)
        self.on_fault(said)

    def draw(
        self, pictures: Sequence[Picture], sampling: SamplingConfig, size: tuple[int, int] | None = None
    ) -> Tensor:
        """The same in one tensor, uint8 (len(pictures), 3, H, W)."""
        none = torch.empty(0, 3, *(size or self.config.data.size), dtype=torch.uint8)
        return torch.cat([none, *self.draw_batches(pictures, sampling, size)])


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
    """How a model edits: the defaults on its own time grid, with what is given entered.

    Raises:
        ConfigError: a setting that is wrong, said to be `where`.
    """
    return validate_section(EditSettings, {"shift": config.sampling.shift, **given}, where)


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
    pipeline.check_finite(tracker, edited, [f"edit from {source[:80]!r} to {target[:80]!r}"], times)
    return to_pixels(edited)[0].cpu()
