"""Pictures from a model folder: a prompt's picture is its own, and what is no model is refused."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from random_model import config, random_weights, write_random_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import UserError
from t2i.build import build_conditioner, build_denoiser
from t2i.config.base import ConfigError
from t2i.config.loading import dump_config, validate_config
from t2i.config.run import RunConfig
from t2i.config.train import SamplingConfig
from t2i.diffusion.flow import to_pixels
from t2i.model_folder import DENOISER, FILES, NULL_CAPTION, check_model, read_model, write_model
from t2i.models.text import TextEncoder, resolve_model, stack_conditions
from t2i.pipeline import Picture, Pipeline, pictures_of, starting_noise, states_of_batches

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square", "green apple", "", "two yellow stars", "a red circle"]
SAMPLING = SamplingConfig(steps=3, batch_size=4, guidance_scale=3.0, shift=2.0, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "model")


def test_a_folder_holds_what_was_written_and_replaces_an_attempt_that_was_cut_short(tmp_path: Path) -> None:
    (tmp_path / ".model").mkdir()
    (tmp_path / ".model" / "left.over").touch()
    raw, ema, null = {"denoiser.a": torch.ones(2)}, {"denoiser.a": torch.zeros(2)}, torch.full((3, 4), 7.0)
    write_model(tmp_path / "model", RunConfig(name="x"), raw, ema, null)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "left.over").exists()
    for which in FILES:
        check_model(tmp_path / "model", which)
    for which, expected in (("raw", raw), ("ema", ema)):
        saved = read_model(tmp_path / "model", which)
        assert saved.config == RunConfig(name="x")
        assert saved.denoiser.keys() == {"a"}
        assert torch.equal(saved.denoiser["a"], expected["denoiser.a"])
        assert torch.equal(saved.null_caption, null)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return Pipeline.load(folder, "ema", CPU)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_picture_is_its_own_whatever_is_drawn_beside_it(copy: Path, dtype: str) -> None:
    (copy / "config.yaml").write_text(dump_config(config(dtype)))
    pipeline = Pipeline.load(copy, "ema", CPU)
    pictures = [Picture(prompt) for prompt in PROMPTS]
    together = pipeline.draw(pictures, SAMPLING)
    assert together.shape == (6, 3, 16, 16) and together.dtype == torch.uint8
    assert len(torch.unique(together[:5].flatten(1), dim=0)) == 5
    for n, picture in enumerate(pictures):
        assert torch.equal(pipeline.draw([picture], SAMPLING)[0], together[n])
    assert torch.equal(pipeline.draw(pictures[::-1], SAMPLING), together.flip(0))
    assert torch.equal(pipeline.draw(pictures[1:4] + pictures[:2], SAMPLING), together[[1, 2, 3, 0, 1]])


def test_pictures_of_a_prompt_differ_by_number_and_seed_alone(pipeline: Pipeline) -> None:
    first, second = Picture("a dog", 0), Picture("a dog", 1)
    pictures = pipeline.draw([first, second, first], SAMPLING)
    assert torch.equal(pictures[0], pictures[2]) and not torch.equal(pictures[0], pictures[1])
    reseeded = pipeline.draw([first], SAMPLING.model_copy(update={"seed": 6}))
    assert not torch.equal(reseeded[0], pictures[0])
    noise = starting_noise(first, 5, (16, 16), CPU)
    assert torch.equal(noise, starting_noise(first, 5, (16, 16), CPU))
    for other in (starting_noise(second, 5, (16, 16), CPU), starting_noise(Picture("a cat"), 5, (16, 16), CPU)):
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.15


@torch.no_grad()
def test_a_picture_is_the_solution_of_the_guided_equation(pipeline: Pipeline) -> None:
    """Adams' second-order steps on the grid 0, 1/5, 1/2, 1 (shift 2 of 0, 1/3, 2/3, 1), written out."""
    picture = Picture("green apple", 3)
    states, null = stack_conditions(pipeline.conditioner([picture.prompt])), pipeline.null_caption[None]

    def velocity(x: Tensor, t: float, scale: float) -> Tensor:
        v, v_null = ((pipeline.denoiser(x, torch.tensor([t]), s).output - x) / (1 - t) for s in (states, null))
        return v_null + scale * (v - v_null)

    x = starting_noise(picture, 5, (16, 16), CPU)[None]
    v0 = velocity(x, 0.0, 1.0)
    x = x + 0.2 * v0
    v1 = velocity(x, 0.2, 3.0)
    x = x + 0.3 * (1.75 * v1 - 0.75 * v0)
    v2 = velocity(x, 0.5, 3.0)
    x = x + 0.5 * ((1 + 5 / 6) * v2 - 5 / 6 * v1)
    drawn = pipeline.draw([picture], SAMPLING)[0].int()
    assert (drawn - to_pixels(x)[0].int()).abs().max() <= 1
    assert drawn.float().std() > 20


@torch.no_grad()
def test_a_picture_by_dpm_solver(pipeline: Pipeline) -> None:
    """DPM-Solver++ 2M at noise levels 0.999, 0.666 and 0.333 before the shift, written out; every step is guided."""
    picture = Picture("green apple", 3)
    states, null = stack_conditions(pipeline.conditioner([picture.prompt])), pipeline.null_caption[None]

    def image(x: Tensor, level: float) -> Tensor:
        of, of_null = (pipeline.denoiser(x, torch.tensor([1 - level]), s).output for s in (states, null))
        return of_null + 3.0 * (of - of_null)

    first, second, third = (2 * level / (1 + level) for level in (0.999, 0.666, 0.333))
    x = starting_noise(picture, 5, (16, 16), CPU)[None]
    d0 = image(x, first)
    x = second / first * x + (1 - second / first) * d0
    d1 = image(x, second)
    r = torch.logit(torch.tensor([1 - first, 1 - second, 1 - third], dtype=torch.float64)).diff()
    x = third / second * x + (1 - third / second) * (d1 + (d1 - d0) * (r[1] / r[0] / 2).item())
    drawn = pipeline.draw([picture], SAMPLING.model_copy(update={"solver": "dpmpp"}))[0].int()
    assert (drawn - to_pixels(image(x, third))[0].int()).abs().max() <= 1
    assert drawn.float().std() > 20


def test_raw_and_averaged_weights_come_from_their_own_files(folder: Path, pipeline: Pipeline) -> None:
    raw = Pipeline.load(folder, "raw", CPU)
    for weights, loaded in (("model", raw), ("ema", pipeline)):
        saved = load_file(folder / f"{weights}.safetensors")
        for name, value in loaded.denoiser.state_dict().items():
            assert torch.equal(value, saved[DENOISER + name])
    assert not any(p.requires_grad for p in raw.denoiser.parameters()) and not raw.denoiser.training


def test_the_null_caption_is_the_one_stored_with_the_weights(copy: Path) -> None:
    tensors = load_file(copy / "ema.safetensors")
    save_file({**tensors, NULL_CAPTION: tensors[NULL_CAPTION] + 1}, copy / "ema.safetensors")
    changed = Pipeline.load(copy, "ema", CPU)
    assert torch.equal(changed.null_caption, tensors[NULL_CAPTION] + 1)
    guided = changed.draw([Picture("a")], SAMPLING)
    unguided = changed.draw([Picture("a")], SAMPLING.model_copy(update={"guidance_scale": 1.0}))
    original = Pipeline.load(copy, "raw", CPU)
    original.denoiser = changed.denoiser
    assert not torch.equal(original.draw([Picture("a")], SAMPLING), guided)
    assert torch.equal(original.draw([Picture("a")], SAMPLING.model_copy(update={"guidance_scale": 1.0})), unguided)


@pytest.mark.parametrize(
    "change", [{"solver": name} for name in ("euler", "heun", "dpmpp")] + [{"order": 1}, {"order": 3}]
    + [{"cfg_interval": (0.3, 1.0)}, {"guidance_rescale": 0.7}, {"steps": 4}, {"shift": 3.0}]
    + [{"coefficients": "fixed"}],
)  # fmt: skip
def test_every_setting_of_the_sampler_counts(pipeline: Pipeline, change: dict[str, Any]) -> None:
    drawn = pipeline.draw([Picture("a dog")], SAMPLING)
    assert not torch.equal(pipeline.draw([Picture("a dog")], SAMPLING.model_copy(update=change)), drawn)


# Negative prompts, sizes, clamp


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A tiny network with random weights that draws 3 classes."""
    model = {"condition": "class", "classes": 3, "patch_size": 4, "width": 32, "depth": 2, "heads": 2, "repa_layer": 1}
    model |= {"bottleneck": 8, "context_tokens": 2, "context_start": 1}
    run = validate_config({"model": model, "data": {"resolution": 16}, "engine": {"dtype": "fp32"}}, "test")
    torch.manual_seed(0)
    denoiser = build_denoiser(run.model, 0, 0)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    weights = {DENOISER + name: value for name, value in denoiser.state_dict().items()}
    place = tmp_path_factory.mktemp("classes") / "model"
    write_model(place, run, weights, weights, build_conditioner(run, CPU, torch.float32).null_caption())
    return Pipeline.load(place, "ema", CPU)


@pytest.mark.parametrize(
    ("of", "prompt", "negative"),
    [("pipeline", "green apple", "a red circle"), ("of_classes", "1", "2")],
)
@torch.no_grad()
def test_a_negative_prompt_takes_the_null_captions_place(
    request: pytest.FixtureRequest, of: str, prompt: str, negative: str
) -> None:
    """One guided step from t = 1/4 on, after an unguided one, written out."""
    pipeline: Pipeline = request.getfixturevalue(of)
    sampling = SamplingConfig(solver="euler", steps=2, shift=3.0, guidance_scale=3.0, batch_size=2, seed=5)
    picture = Picture(prompt, 1, negative=negative)
    states, away = (stack_conditions(pipeline.conditioner([text])) for text in (prompt, negative))
    x = starting_noise(picture, 5, (16, 16), CPU)[None]
    x = x + 0.25 * (pipeline.denoiser(x, torch.tensor([0.0]), states).output - x)
    v, v_away = ((pipeline.denoiser(x, torch.tensor([0.25]), s).output - x) / 0.75 for s in (states, away))
    expected = to_pixels(x + 0.75 * (v_away + 3 * (v - v_away)))[0].int()
    other = Picture(prompt, 1)
    drawn = pipeline.draw([picture, other], sampling)
    assert (drawn[0].int() - expected).abs().max() <= 1
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(pipeline.draw([other, picture], sampling), drawn.flip(0))
    unguided = sampling.model_copy(update={"guidance_scale": 1.0})
    assert torch.equal(*pipeline.draw([picture, other], unguided))


def test_the_empty_prompt_is_the_class_that_stands_for_none(of_classes: Pipeline) -> None:
    """Guidance from it to itself changes nothing; it is number 3, after the classes."""
    drawn = of_classes.draw([Picture("")], SAMPLING.model_copy(update={"guidance_scale": 5.0}))
    assert (drawn.int() - of_classes.draw([Picture("")], SAMPLING).int()).abs().max() <= 1
    with torch.no_grad():
        of_classes.denoiser.label.weight[3] += 1.0
        moved = of_classes.draw([Picture("")], SAMPLING)
        of_classes.denoiser.label.weight[3] -= 1.0
    assert (drawn.int() - moved.int()).abs().max() > 1


@pytest.mark.parametrize(("height", "width"), [(8, 24), (24, 8), (32, 32)])
def test_pictures_of_another_size(pipeline: Pipeline, height: int, width: int) -> None:
    pictures = [Picture("a red circle"), Picture("a dog", 2)]
    drawn = pipeline.draw(pictures, SAMPLING, (height, width))
    assert drawn.shape == (2, 3, height, width)
    assert torch.equal(pipeline.draw(pictures[1:], SAMPLING, (height, width))[0], drawn[1])
    assert drawn.float().std() > 20


def test_pictures_have_the_size_that_the_model_was_trained_at(copy: Path) -> None:
    tree = config().model_dump()
    tree["data"]["resolution"] = [8, 20]
    (copy / "config.yaml").write_text(dump_config(validate_config(tree, "test")))
    assert Pipeline.load(copy, "ema", CPU).draw([Picture("a")], SAMPLING).shape == (1, 3, 8, 20)


def test_without_the_clamp_the_last_step_ends_at_the_image_predicted_there(pipeline: Pipeline) -> None:
    seen: list[Tensor] = []
    hook = pipeline.denoiser.register_forward_hook(lambda module, given, made: seen.append(made.output))
    sampling = SamplingConfig(solver="euler", steps=30, shift=1.0, guidance_scale=1.0, batch_size=1)
    ends = [
        (pipeline.draw([Picture("a dog")], sampling.model_copy(update={"clamp": clamp}))[0].int(), to_pixels(seen[-1]))
        for clamp in (False, True)
    ]
    hook.remove()
    (end, predicted), (short, aimed_at) = ends
    assert (end - predicted[0].int()).abs().max() <= 1
    assert (short - aimed_at[0].int()).abs().max() > 1


@pytest.mark.parametrize("change", [{"reload_every_step": True}, {"cache": 2}])
def test_how_the_text_encoder_keeps_memory_free_changes_no_picture(copy: Path, change: dict[str, Any]) -> None:
    pictures = [Picture(prompt, negative=PROMPTS[0]) for prompt in PROMPTS[1:]]
    expected = Pipeline.load(copy, "ema", CPU).draw(pictures, SAMPLING)
    tree = config().model_dump()
    tree["text"] |= change
    (copy / "config.yaml").write_text(dump_config(validate_config(tree, "test")))
    assert torch.equal(Pipeline.load(copy, "ema", CPU).draw(pictures, SAMPLING), expected)


def test_negative_prompts_and_the_null_caption_are_read_without_the_instruction(copy: Path) -> None:
    tree = config().model_dump()
    tree["text"]["instruction"] = "a photo of "
    (copy / "config.yaml").write_text(dump_config(validate_config(tree, "test")))
    pipeline = Pipeline.load(copy, "ema", CPU)
    seen: list[Tensor] = []
    pipeline.denoiser.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    sampling = SamplingConfig(solver="euler", steps=2, guidance_scale=3.0, batch_size=2)
    pipeline.draw([Picture("a dog", negative="a cat"), Picture("a cat")], sampling)
    dog, cat = pipeline.conditioner(["a dog", "a cat"])
    (plain_cat,) = pipeline.conditioner(["a cat"], plain=True)
    assert torch.equal(seen[-1], torch.stack([plain_cat, pipeline.null_caption, dog, cat]))
    assert not torch.equal(cat, plain_cat)


# Masked pads: prompts and what guidance leads away from differ in length


@pytest.fixture(scope="module")
def masking(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    tree = config().model_dump()
    tree["text"]["length"] = 40
    tree["model"]["text_padding"] = "mask"
    run = validate_config(tree, "test")
    weights = random_weights(run, 0)
    place = tmp_path_factory.mktemp("masking") / "model"
    write_model(place, run, weights, weights, build_conditioner(run, CPU, torch.float32).null_caption())
    return Pipeline.load(place, "ema", CPU)


LONG = "two blue squares left of three yellow stars " * 5


@torch.no_grad()
@pytest.mark.parametrize(("prompt", "negative"), [("a dog", ""), (LONG, ""), ("a dog", LONG), (LONG, "a dog")])
def test_guidance_between_captions_of_different_lengths(masking: Pipeline, prompt: str, negative: str) -> None:
    """One guided step from t = 1/4 on, after an unguided one, written out; each caption is given at its own length."""
    sampling = SamplingConfig(solver="euler", steps=2, shift=3.0, guidance_scale=3.0, batch_size=3, seed=5)
    picture = Picture(prompt, 1, negative=negative)
    states, away = (masking.conditioner([text])[0][None] for text in (prompt, negative))
    assert (states.shape[1], away.shape[1]) == tuple(40 if text == LONG else 32 for text in (prompt, negative))
    x = starting_noise(picture, 5, (16, 16), CPU)[None]
    x = x + 0.25 * (masking.denoiser(x, torch.tensor([0.0]), states).output - x)
    v, v_away = ((masking.denoiser(x, torch.tensor([0.25]), s).output - x) / 0.75 for s in (states, away))
    expected = to_pixels(x + 0.75 * (v_away + 3 * (v - v_away)))[0].int()
    drawn = masking.draw([picture], sampling)
    assert (drawn[0].int() - expected).abs().max() <= 1 and drawn.float().std() > 20
    # Other pictures beside it; its place in the batch, where a kernel may round otherwise, is the same.
    beside = [Picture("a", negative=other) for other in ("", LONG, "b")]
    assert torch.equal(masking.draw([*beside, picture], sampling)[-1], drawn[0])


# What is computed


def calls_of(pipeline: Pipeline, sampling: SamplingConfig, pictures: list[Picture]) -> list[tuple[float, int]]:
    """Time and batch of each call of the network."""
    calls: list[tuple[float, int]] = []

    def note(module: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        calls.append((round(given[1][0].item(), 6), len(given[0])))

    hook = pipeline.denoiser.register_forward_pre_hook(note)
    pipeline.draw(pictures, sampling)
    hook.remove()
    return calls


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [(0.0, 2), (0.25, 4), (0.5, 4), (0.75, 4)]),
        ({"cfg_interval": (0.25, 0.5)}, [(0.0, 2), (0.25, 2), (0.5, 2), (0.75, 2)]),
        ({"cfg_interval": (0.2, 0.6)}, [(0.0, 2), (0.25, 4), (0.5, 4), (0.75, 2)]),
        ({"guidance_scale": 1.0}, [(0.0, 2), (0.25, 2), (0.5, 2), (0.75, 2)]),
        ({"solver": "euler"}, [(0.0, 2), (0.25, 4), (0.5, 4), (0.75, 4)]),
        ({"order": 4, "guidance_rescale": 0.7}, [(0.0, 2), (0.25, 4), (0.5, 4), (0.75, 4)]),
        ({"coefficients": "fixed"}, [(0.0, 2), (0.25, 4), (0.5, 4), (0.75, 4)]),
        ({"solver": "dpmpp"}, [(0.001, 4), (0.25075, 4), (0.5005, 4), (0.75025, 4)]),
        (
            {"solver": "dpmpp", "cfg_interval": (0.001, 0.6)},
            [(0.001, 2), (0.25075, 4), (0.5005, 4), (0.75025, 2)],
        ),
        (
            {"solver": "heun", "cfg_interval": (0.25, 0.5)},
            [(0.0, 2), (0.25, 2), (0.25, 2), (0.5, 2), (0.5, 4), (0.75, 4), (0.75, 2)],
        ),
    ],
)
def test_the_unguided_half_is_computed_where_guidance_applies_alone(
    pipeline: Pipeline, change: dict[str, Any], expected: list[tuple[float, int]]
) -> None:
    sampling = SamplingConfig(steps=4, shift=1.0, guidance_scale=3.0, batch_size=2).model_copy(update=change)
    assert calls_of(pipeline, sampling, [Picture("a dog", negative="a cat")]) == expected


class CountingText:
    """States that tell their caption, and how often each was asked for."""

    width, dtype = 3, torch.float32

    def __init__(self) -> None:
        self.encoded: Counter[str] = Counter()

    def __call__(self, captions: list[str]) -> list[Tensor]:
        self.encoded.update(captions)
        return [torch.full((2, 3), float(ord(caption[0]))) for caption in captions]


def test_a_caption_is_encoded_once_and_held_as_long_as_it_is_needed() -> None:
    text = CountingText()
    batches = [["a", "", "b", ""], ["b", "", "b", ""], ["c", "n", "a", "n"], ["d", "", "d", "n"]]
    held = []
    for batch, states in zip(batches, states_of_batches(text, torch.zeros(2, 3), batches), strict=True):
        held.append(set(states))
        for caption in batch:
            assert torch.equal(states[caption], torch.full((2, 3), float(ord(caption)) if caption else 0.0))
    assert held == [{"", "a", "b"}, {"", "a", "b"}, {"", "a", "c", "n"}, {"", "n", "d"}]
    assert text.encoded == Counter("abcdn")


def test_text_states_are_computed_once_a_prompt_however_many_pictures_share_it(pipeline: Pipeline) -> None:
    encoded: list[str] = []
    assert isinstance(pipeline.conditioner, TextEncoder)
    hook = pipeline.conditioner.register_forward_pre_hook(lambda module, given: encoded.extend(given[0]))
    pictures = [Picture(prompt, n, "a cat") for prompt in ("a dog", "a fish") for n in range(5)]
    pipeline.draw(pictures, SAMPLING)
    hook.remove()
    assert sorted(encoded) == ["a cat", "a dog", "a fish"]


def test_no_pictures(pipeline: Pipeline) -> None:
    assert pipeline.draw([], SAMPLING).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("missing", [["model.safetensors", "ema.safetensors"], ["config.yaml"], None])
def test_a_folder_that_is_no_model(copy: Path, tmp_path: Path, missing: list[str] | None) -> None:
    for name in missing or ():
        (copy / name).unlink()
    if missing is None:
        copy = tmp_path / "absent"
    with pytest.raises(ConfigError, match=f"{copy.name} is not a model folder: it has no .*"):
        Pipeline.load(copy, "ema", CPU)


def test_one_of_the_two_weights_is_enough(copy: Path, pipeline: Pipeline) -> None:
    (copy / "model.safetensors").unlink()
    pictures = [Picture("a cat")]
    assert torch.equal(Pipeline.load(copy, "ema", CPU).draw(pictures, SAMPLING), pipeline.draw(pictures, SAMPLING))
    with pytest.raises(ConfigError, match=r"copy has no model.safetensors, the raw weights: take its ema weights"):
        Pipeline.load(copy, "raw", CPU)


def test_a_pointer_of_git_lfs_is_called_one(copy: Path) -> None:
    (copy / "ema.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(UserError, match=r"copy/ema.safetensors: is a Git LFS pointer, .*`git lfs pull`"):
        Pipeline.load(copy, "ema", CPU)


def test_a_text_encoder_may_have_moved(copy: Path, tmp_path: Path, pipeline: Pipeline) -> None:
    there = Path(resolve_model(config().text.model))
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace(config().text.model, "/gone"))
    with pytest.raises(ConfigError, match=r"text.model '/gone' cannot be loaded: .*--text_model says where .*copy's"):
        Pipeline.load(copy, "ema", CPU)
    moved = Path(shutil.copytree(there, tmp_path / "moved"))
    pictures = [Picture("a cat")]
    found = Pipeline.load(copy, "ema", CPU, str(moved))
    assert torch.equal(found.draw(pictures, SAMPLING), pipeline.draw(pictures, SAMPLING))
    weights = load_file(moved / "model.safetensors")
    save_file({n: v.flip(0).contiguous() for n, v in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"--text_model .*moved is not the text encoder of .*copy: its states"):
        Pipeline.load(copy, "ema", CPU, str(moved))
    (moved / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(UserError, match=r"moved/model.safetensors: is a Git LFS pointer"):
        Pipeline.load(copy, "ema", CPU, str(moved))


def test_weights_of_another_model(copy: Path) -> None:
    (copy / "config.yaml").write_text(dump_config(config(width=64)))
    with pytest.raises(ConfigError, match=r"copy does not fit its config: .*size mismatch") as caught:
        Pipeline.load(copy, "ema", CPU)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors[DENOISER + "head.bias"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ConfigError, match=r"copy does not fit its config: .*head.bias"):
        Pipeline.load(copy, "raw", CPU)


def test_a_file_without_the_null_caption(copy: Path) -> None:
    tensors = load_file(copy / "ema.safetensors")
    del tensors[NULL_CAPTION]
    save_file(tensors, copy / "ema.safetensors")
    with pytest.raises(ConfigError):
        Pipeline.load(copy, "ema", CPU)


def test_a_file_cut_short(copy: Path) -> None:
    (copy / "ema.safetensors").write_bytes((copy / "ema.safetensors").read_bytes()[:1000])
    with pytest.raises(ConfigError):
        Pipeline.load(copy, "ema", CPU)


def test_numbers_of_equal_prompts_go_on() -> None:
    assert pictures_of(["a", "b", "a"], 2, "c") == [
        *(Picture("a", n, "c") for n in (0, 1)), *(Picture("b", n, "c") for n in (0, 1)),
        *(Picture("a", n, "c") for n in (2, 3)),
    ]  # fmt: skip
