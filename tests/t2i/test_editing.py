"""Edits with a model: both families, both predictions; what comes back unchanged, and what everything depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from random_model import config, random_weights
from torch import Tensor

from data.errors import UserError
from data.randomness import key
from t2i.build import build_conditioner
from t2i.config.base import ConfigError
from t2i.config.loading import validate_config, validate_section
from t2i.diffusion.flow import slot_noise, to_pixels, to_unit_range
from t2i.model_folder import write_model
from t2i.models.text import stack_conditions
from t2i.pipeline import EditSettings, Pipeline, edit_image, patch_window

CPU = torch.device("cpu")
IMAGE = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
SETTINGS = EditSettings(steps=6, n_max=4, shift=2.0, source_guidance=1.5, target_guidance=2.0, seed=5)
RED, BLUE = "a red circle", "a blue circle"
SMALL = {"patch_size": 4, "width": 32, "depth": 2, "heads": 2, "repa_layer": 1}
MODELS: dict[str, dict[str, Any]] = {
    f"{family}, {prediction}": {**SMALL, "prediction": prediction, **of_family}
    for family, of_family in {
        "pixelgen": {"text_depth": 1, "bottleneck": 8},
        "pixeldit": {"family": "pixeldit", "pixel": {"depth": 1, "width": 4}},
    }.items()
    for prediction in ("image", "velocity")
}


@pytest.fixture(scope="module", params=MODELS)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A tiny model with random weights, so large that its pictures follow the words."""
    run = validate_config(config().model_dump() | {"model": MODELS[request.param]}, "test")
    louder = 3 if run.model.family == "pixeldit" else 1
    weights = {name: louder * weight for name, weight in random_weights(run, 0).items()}
    folder: Path = tmp_path_factory.mktemp("model") / "model"
    write_model(folder, run, weights, weights, build_conditioner(run, CPU, torch.float32).null_caption())
    return Pipeline.load(folder, "ema", CPU)


def edited(pipeline: Pipeline, source: str, target: str, **changes: Any) -> Tensor:
    return edit_image(pipeline, IMAGE, source, target, SETTINGS.model_copy(update=changes))


def noise(pipeline: Pipeline, source: str, target: str, step: int, average: int = 0) -> Tensor:
    of_step = key(5, "edit", source, target, step)
    return slot_noise(of_step, [average], IMAGE.shape, CPU, pipeline.config.objective.noise_scale)


def velocity(pipeline: Pipeline, x: Tensor, t: float, words: str, scale: float) -> Tensor:
    """Guided, caption by caption."""
    found = []
    for states in (stack_conditions(pipeline.conditioner([words])), pipeline.null_caption[None]):
        output = pipeline.denoiser(x, torch.tensor([t]), states).output
        is_image = pipeline.config.model.prediction == "image"
        found.append((output - x) / max(1 - t, 0.05) if is_image else output)
    return found[1] + scale * (found[0] - found[1])


@pytest.mark.parametrize("n_avg", [1, 2])
def test_an_edit_to_the_same_words_is_the_image_itself(pipeline: Pipeline, n_avg: int) -> None:
    for words in (RED, ""):
        assert torch.equal(edited(pipeline, words, words, target_guidance=1.5, n_avg=n_avg), IMAGE)
    away = (edited(pipeline, RED, BLUE, target_guidance=1.5).int() - IMAGE.int()).abs()
    assert away.float().mean() > 1
    # The same words, pulled harder, are an edit.
    assert not torch.equal(edited(pipeline, RED, RED), IMAGE)


@torch.no_grad()
def test_an_edit_of_two_steps_written_out(pipeline: Pipeline) -> None:
    """The last two of the grid 0, 1/5, 1/2, 1 (shift 2 of 0, 1/3, 2/3, 1)."""
    image, moved = to_unit_range(IMAGE)[None], torch.zeros(1, *IMAGE.shape)
    for step, (t, t_next) in enumerate([(0.2, 0.5), (0.5, 1.0)], start=1):
        x = t * image + (1 - t) * noise(pipeline, RED, BLUE, step)
        v = velocity(pipeline, x + moved, t, BLUE, 2.0) - velocity(pipeline, x, t, RED, 1.5)
        moved = moved + (t_next - t) * v
    result = edited(pipeline, RED, BLUE, steps=3, n_max=2)
    assert result.dtype == torch.uint8 and result.shape == IMAGE.shape
    assert (result.int() - to_pixels(image + moved)[0].int()).abs().max() <= 1


@torch.no_grad()
def test_with_steps_of_its_own_the_end_is_drawn(pipeline: Pipeline) -> None:
    """Of the same words: the middle step moves nothing, the last is one of Euler's from the noised image."""
    image = to_unit_range(IMAGE)[None]
    x = 0.5 * image + 0.5 * noise(pipeline, RED, RED, 2)
    x = x + 0.5 * velocity(pipeline, x, 0.5, RED, 1.5)
    result = edited(pipeline, RED, RED, steps=3, n_max=2, n_min=1, target_guidance=1.5)
    assert (result.int() - to_pixels(x)[0].int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [2] * 8),
        ({"n_avg": 3}, [2] * 24),
        ({"n_min": 1}, [2] * 7),
        ({"source_guidance": 1.0}, [2, 1] * 4),
        ({"source_guidance": 1.0, "target_guidance": 1.0}, [1] * 8),
    ],
)
def test_what_an_edit_costs(pipeline: Pipeline, changes: dict[str, Any], expected: list[int]) -> None:
    """Images in each call of the network: four a step and average where both are guided."""
    batches: list[int] = []
    hook = pipeline.denoiser.register_forward_pre_hook(lambda module, given: batches.append(len(given[0])))
    edited(pipeline, RED, BLUE, **changes)
    hook.remove()
    assert batches == expected


@pytest.mark.parametrize(
    "change",
    [{"steps": 7}, {"n_max": 5}, {"n_min": 1}, {"n_avg": 2}, {"source_guidance": 2.5}, {"target_guidance": 3.0}]
    + [{"shift": 3.0}, {"seed": 6}],
)
def test_every_setting_counts(pipeline: Pipeline, change: dict[str, Any]) -> None:
    assert not torch.equal(edited(pipeline, RED, BLUE, **change), edited(pipeline, RED, BLUE))


def test_an_edit_repeats(pipeline: Pipeline) -> None:
    first = edited(pipeline, RED, BLUE)
    edited(pipeline, BLUE, RED)
    assert torch.equal(edited(pipeline, RED, BLUE), first)


def test_what_the_network_makes_of_the_image_is_shown(pipeline: Pipeline) -> None:
    shown: list[tuple[torch.Size, float]] = []
    settings = SETTINGS.model_copy(update={"n_min": 1, "n_avg": 2})
    result = edit_image(pipeline, IMAGE, RED, BLUE, settings, lambda images, t: shown.append((images.shape, t)))
    assert torch.equal(result, edited(pipeline, RED, BLUE, n_min=1, n_avg=2))
    assert {shape for shape, _ in shown} == {(1, *IMAGE.shape)}
    assert [t for _, t in shown] == pytest.approx([1 / 5, 1 / 5, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 5 / 7])


# Windows and settings


@pytest.mark.parametrize(
    ("height", "width", "patch", "window"),
    [
        (16, 32, 16, (slice(0, 16), slice(0, 32))),
        (31, 33, 16, (slice(7, 23), slice(0, 32))),
        (45, 63, 16, (slice(6, 38), slice(7, 55))),
    ],
)
def test_the_middle_that_is_whole_patches(height: int, width: int, patch: int, window: tuple[slice, slice]) -> None:
    assert patch_window(height, width, patch) == window


@pytest.mark.parametrize(("height", "width"), [(15, 99), (99, 15)])
def test_an_image_smaller_than_a_patch(height: int, width: int) -> None:
    with pytest.raises(UserError, match=f"the image has {height} x {width} pixels: each side must be at least 16"):
        patch_window(height, width, 16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_max": 7}, r"n_max 7 must be at most steps \(6\)"),
        ({"n_min": 5}, r"n_min 5 must be at most n_max \(4\)"),
        ({"n_avg": 0}, "n_avg: input should be greater than 0"),
        ({"target_guidance": -1}, "target_guidance: input should be greater than or equal to 0"),
        ({"shift": 0}, "shift: input should be greater than 0"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate_section(EditSettings, {**SETTINGS.model_dump(), **change}, "test")
