"""Released weights in our network: every key and shape of XXL, the same numbers, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from released_pixelgen import (
    Sizes,
    denoiser_shapes,
    forward,
    lightning,
    position_table,
    project,
    projector_shapes,
    random_weights,
)
from torch import Tensor

from t2i.build import build_denoiser
from t2i.config import RunConfig
from t2i.config_base import ConfigError
from t2i.config_loading import load_config, stage_config, validate_config
from t2i.models.layers import Projector
from t2i.released.checkpoint import Checkpoint
from t2i.released.convert import Imported, export_weights, import_weights, trained_resolution
from t2i.released.names import TEXT_TO_IMAGE, released_names

ROOT = Path(__file__).parents[3]
XXL = Sizes(1536, 16, 24, 2048, 128, 4, 256, 16, 32, 768)
TINY = Sizes(hidden=48, blocks=3, heads=3, text_width=20, text_length=7, text_blocks=2, bottleneck=10, patch=4, grid=5,
             features=11)  # fmt: skip


def config(**model: int) -> RunConfig:
    sizes = {"patch_size": 4, "width": 48, "depth": 3, "heads": 3, "text_depth": 2, "bottleneck": 10, "repa_layer": 2}
    return validate_config(
        {"model": {**sizes, **model}, "text": {"length": 7}, "data": {"resolution": 20}}, where="the test"
    )


def stored(path: Path, weights: dict[str, Tensor], **more: Any) -> Checkpoint:
    torch.save(lightning(weights, **more), path)
    return Checkpoint(path)


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(TINY)


@pytest.fixture(scope="module")
def imported(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return import_weights(stored(tmp_path_factory.mktemp("x") / "x.ckpt", weights), config(), TINY.text_width)


@pytest.mark.parametrize(("grid", "parameters"), [(16, 1_122_132_736), (32, 1_123_312_384)])
def test_every_key_and_shape_of_xxl_has_its_place(tmp_path: Path, grid: int, parameters: int) -> None:
    """A whole checkpoint in a small file: each tensor is one number, repeated."""
    sizes = Sizes(**{**XXL.__dict__, "grid": grid})
    shapes = denoiser_shapes(sizes)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters
    every = {f"{prefix}{name}": shape for prefix in ("denoiser.", "ema_denoiser.") for name, shape in shapes.items()}
    every |= {f"diffusion_trainer.proj.0.{name}": shape for name, shape in projector_shapes(sizes).items()}
    numbers = {name: torch.tensor([float(n)]).expand(shape) for n, (name, shape) in enumerate(every.items())}
    whole = dict(numbers)
    whole["denoiser.pos_embed"] = whole["ema_denoiser.pos_embed"] = position_table(grid, sizes.hidden)[None]
    checkpoint = stored(tmp_path / "xxl.ckpt", whole)
    run = stage_config(load_config(ROOT / "configs/pixelgen_xxl.yaml"), 0 if grid == 16 else 2)
    assert trained_resolution(checkpoint, run.model.patch_size) == run.data.resolution == 16 * grid
    result = import_weights(checkpoint, run, 2048)
    with torch.device("meta"):
        ours = build_denoiser(run.model, 2048, run.text.length).state_dict()
        ours_projector = Projector(1536, 768).state_dict()
    expected = {f"denoiser.{name}": value.shape for name, value in ours.items()}
    expected |= {f"projector.{name}": value.shape for name, value in ours_projector.items()}
    for tensors in (result.raw, result.ema):
        assert {name: value.shape for name, value in tensors.items()} == expected
    report = result.report
    assert report.used.keys() | report.recomputed.keys() == every.keys()
    assert report.recomputed.keys() == {"denoiser.pos_embed", "ema_denoiser.pos_embed"}
    for released, name in report.used.items():
        tensors = result.ema if released.startswith("ema_denoiser.") else result.raw
        assert tensors[name].flatten()[0] == numbers[released].flatten()[0]
    assert len({value.data_ptr() for value in result.raw.values()}) == len(expected)  # no two of one


def _compare(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine, other, atol=1e-5 * other.abs().max().item(), rtol=0)


@pytest.mark.parametrize("which", ["raw", "ema"])
def test_output_features_and_gradients_are_the_references(
    weights: dict[str, Tensor], imported: Imported, which: str
) -> None:
    run = config()
    prefix, tensors = ("denoiser.", imported.raw) if which == "raw" else ("ema_denoiser.", imported.ema)
    network, projector = build_denoiser(run.model, TINY.text_width, TINY.text_length), Projector(48, 11)
    network.load_state_dict(part(tensors, "denoiser."))
    projector.load_state_dict(part(tensors, "projector."))
    theirs = {name: value.clone().requires_grad_() for name, value in part(weights, prefix).items()}
    projecting = {name: v.clone().requires_grad_() for name, v in part(weights, "diffusion_trainer.proj.0.").items()}
    names = released_names(TEXT_TO_IMAGE, network.state_dict())

    torch.manual_seed(3)
    given = torch.randn(2, 3, 20, 20), torch.tensor([0.15, 0.8]), torch.randn(2, 7, 20)
    cotangents = torch.randn(2, 3, 20, 20), torch.randn(2, 25, 11)
    ours_in, theirs_in = ([value.clone().requires_grad_() for value in given] for _ in range(2))
    prediction = network(*ours_in)
    image, features = forward(theirs, TINY, *theirs_in, align_layer=run.model.repa_layer)
    ours_out = prediction.image, projector(prediction.features)
    theirs_out = image, project(projecting, features)
    assert image.std() > 0.3 and features.std() > 0.3
    _compare((*ours_out, prediction.features), (*theirs_out, features))

    parameters = dict(network.named_parameters())
    ours_wanted = [*ours_in, *(parameters[name] for name in names.values()), *projector.parameters()]
    of_projector = (projecting[f"{n}.{kind}"] for n in (0, 2, 4) for kind in ("weight", "bias"))
    theirs_wanted = [*theirs_in, *(theirs[name] for name in names), *of_projector]
    ours_gradients, theirs_gradients = (
        torch.autograd.grad(sum((o * c).mean() for o, c in zip(out, cotangents, strict=True)), wanted)
        for out, wanted in ((ours_out, ours_wanted), (theirs_out, theirs_wanted))
    )
    assert all(gradient.abs().max() > 1e-6 for gradient in theirs_gradients)
    _compare(ours_gradients, theirs_gradients)


def test_the_way_back_gives_every_key_and_byte(weights: dict[str, Tensor], imported: Imported, tmp_path: Path) -> None:
    exported = export_weights(config(), imported.raw, imported.ema)
    assert exported["state_dict"].keys() == weights.keys()
    for name, value in exported["state_dict"].items():
        if name.endswith(".pos_embed"):
            torch.testing.assert_close(value, weights[name], atol=1e-6, rtol=0)
        else:
            assert torch.equal(value, weights[name]), name
    torch.save(exported, tmp_path / "y.ckpt")
    again = import_weights(Checkpoint(tmp_path / "y.ckpt"), config(), TINY.text_width)
    for one, other in ((again.raw, imported.raw), (again.ema, imported.ema)):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_half_precision_becomes_fp32(weights: dict[str, Tensor], tmp_path: Path) -> None:
    half = {name: value.bfloat16() for name, value in weights.items()}
    result = import_weights(stored(tmp_path / "x.ckpt", half), config(), TINY.text_width)
    head = result.raw["denoiser.head.weight"]
    assert head.dtype == torch.float32
    assert torch.equal(head, half["denoiser.final_layer.linear.weight"].float())


def test_an_average_alone_stands_for_both(weights: dict[str, Tensor], tmp_path: Path) -> None:
    alone = {name: value for name, value in weights.items() if name.startswith("ema_")}
    result = import_weights(stored(tmp_path / "x.ckpt", alone), config(), TINY.text_width)
    assert result.raw.keys() == result.ema.keys()
    assert all(torch.equal(result.raw[name], result.ema[name]) for name in result.raw)
    assert not any(name.startswith("projector.") for name in result.raw)
    assert [note.partition(":")[0] for note in result.report.notes] == ["raw", "projector"]


def test_what_is_left_is_listed(weights: dict[str, Tensor], tmp_path: Path) -> None:
    more = {"conditioner.weight": torch.zeros(2, 3)}
    checkpoint = stored(tmp_path / "x.ckpt", weights | more, hyper_parameters={"device": torch.device("cpu")})
    left = import_weights(checkpoint, config(), TINY.text_width).report.left
    assert left == {
        "state_dict.conditioner.weight": "tensor [2, 3]",
        "epoch": "2",
        "global_step": "360000",
        "pytorch-lightning_version": "'2.4.0'",
        "loops": "dict of 1",
        "optimizer_states": "list of 1",
        "lr_schedulers": "list of 0",
        "hyper_parameters": "dict of 1",
        "class or function torch.device": "not looked for: nothing of a file is run",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"denoiser.blocks.1.norm1.weight": None}, r"it lacks denoiser.blocks.1.norm1.weight$"),
        ({"ema_denoiser.blocks.3.norm1.weight": torch.ones(48)}, r"it has ema_denoiser.blocks.3.norm1.weight$"),
        ({"denoiser.a": torch.ones(1), "denoiser.b": torch.ones(1)}, r"it has denoiser.a and 1 more$"),
        ({"denoiser.y_embedder.proj.weight": torch.ones(48, 9)}, r"proj.weight is \[48, 9\], by the config \[48, 20\]"),
        ({"diffusion_trainer.proj.0.2.bias": None}, r"it lacks diffusion_trainer.proj.0.2.bias"),
        ({"denoiser.pos_embed": torch.zeros(1, 24, 48)}, r"pos_embed is \[1, 24, 48\]: it should be"),
        ({"denoiser.pos_embed": torch.zeros(1, 25, 48)}, r"pos_embed is not the table of sines"),
        ({"ema_denoiser.pos_embed": torch.full((1, 25, 48), torch.nan)}, r"pos_embed is not the table of sines"),
    ],
)
def test_another_network_is_refused(
    weights: dict[str, Tensor], tmp_path: Path, change: dict[str, Tensor | None], words: str
) -> None:
    changed = {name: value for name, value in {**weights, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=words):
        import_weights(stored(tmp_path / "x.ckpt", changed), config(), TINY.text_width)


def test_weights_of_something_else(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path / "x.ckpt", {"model.weight": torch.ones(1)})
    assert trained_resolution(checkpoint, 4) is None
    with pytest.raises(ConfigError, match="x.ckpt is not a checkpoint of PixelGen"):
        import_weights(checkpoint, config(), TINY.text_width)


def test_a_network_without_released_names_is_not_exported(imported: Imported) -> None:
    with pytest.raises(ConfigError, match=r"no name for denoiser.labels"):
        export_weights(config(), {**imported.raw, "denoiser.labels.weight": torch.ones(1)}, imported.ema)
