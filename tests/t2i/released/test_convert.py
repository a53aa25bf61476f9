"""Released weights in our networks: every key and shape of XXL, XL and L, the same numbers, and the way back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from released_cases import CASES, TINY, XL, XXL, Case, L, compare, config, part, stored
from released_class_pixelgen import class_denoiser_shapes
from released_pixelgen import denoiser_shapes, every_shape, position_table, project, random_weights
from torch import Tensor

from t2i.build import build_denoiser
from t2i.config.base import ConfigError
from t2i.config.loading import load_config, stage_config
from t2i.models.layers import Projector
from t2i.released.checkpoint import Checkpoint
from t2i.released.convert import Imported, export_weights, import_weights, trained_resolution

ROOT = Path(__file__).parents[3]
PROJECTOR = "diffusion_trainer.proj.0."


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(denoiser_shapes(TINY), TINY.features)


@pytest.fixture(scope="module")
def imported(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return import_weights(stored(tmp_path_factory.mktemp("x") / "x.ckpt", weights), config(), TINY.text_width)


@pytest.mark.parametrize(
    ("name", "shapes", "stage", "resolution", "parameters"),
    [
        ("pixelgen_xxl", denoiser_shapes(replace(XXL, grid=16)), 0, 256, 1_122_132_736),
        ("pixelgen_xxl", denoiser_shapes(XXL), 2, 512, 1_123_312_384),
        ("pixelgen_xl", class_denoiser_shapes(XL), 0, 256, 676_994_112),
        ("pixelgen_l", class_denoiser_shapes(L), 0, 256, 459_139_808),
    ],
)
def test_every_key_and_shape_has_its_place(
    tmp_path: Path, name: str, shapes: dict[str, tuple[int, ...]], stage: int, resolution: int, parameters: int
) -> None:
    """A whole checkpoint in a small file: each tensor is one number, repeated."""
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters
    every, width = every_shape(shapes, 768), shapes["pos_embed"][2]
    numbers = {name: torch.tensor([float(n)]).expand(shape) for n, (name, shape) in enumerate(every.items())}
    whole = dict(numbers)
    whole["denoiser.pos_embed"] = whole["ema_denoiser.pos_embed"] = position_table(resolution // 16, width)[None]
    checkpoint = stored(tmp_path / "x.ckpt", whole)
    run = stage_config(load_config(ROOT / f"configs/{name}.yaml"), stage)
    assert trained_resolution(checkpoint, run.model.patch_size) == run.data.resolution == resolution
    result = import_weights(checkpoint, run, 2048)
    with torch.device("meta"):
        ours = build_denoiser(run.model, 2048, run.text.length).state_dict()
        ours_projector = Projector(width, width, 768).state_dict()
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


def test_weights_that_are_not_finite_are_refused_by_their_name(weights: dict[str, Tensor], tmp_path: Path) -> None:
    name = "ema_denoiser.blocks.1.mlp.w3.weight"
    wrong = weights | {name: weights[name].clone()}
    wrong[name].view(-1)[:3] = float("nan")
    with pytest.raises(ConfigError, match=rf"x.ckpt: {name} has 3 of [\d,]+ numbers that are not finite"):
        import_weights(stored(tmp_path / "x.ckpt", wrong), config(), TINY.text_width)


@pytest.mark.parametrize("which", ["raw", "ema"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_output_features_and_gradients_are_the_references(case: Case, which: str, tmp_path: Path) -> None:
    run, weights = case.run, random_weights(case.shapes, 11)
    imported = import_weights(stored(tmp_path / "x.ckpt", weights), run, case.text_width)
    prefix, tensors = ("denoiser.", imported.raw) if which == "raw" else ("ema_denoiser.", imported.ema)
    network, projector = build_denoiser(run.model, case.text_width, run.text.length), Projector(48, 48, 11)
    network.load_state_dict(part(tensors, "denoiser."))
    projector.load_state_dict(part(tensors, "projector."))
    learned = [name for name in weights if name.startswith((prefix, PROJECTOR)) and not name.endswith("pos_embed")]
    theirs = {name: weights[name].clone().requires_grad_(name in learned) for name in weights}

    torch.manual_seed(3)
    given, condition = (torch.randn(2, 3, 20, 20), torch.tensor([0.15, 0.8])), case.condition()
    cotangents = torch.randn(2, 3, 20, 20), torch.randn(2, 25, 11)
    ours_in, theirs_in = ([value.clone().requires_grad_() for value in given] for _ in range(2))
    prediction = network(*ours_in, condition)
    image, features = case.forward(part(theirs, prefix), *theirs_in, condition, align_layer=run.model.repa_layer)
    ours_out = prediction.output, projector(prediction.features)
    theirs_out = image, project(part(theirs, PROJECTOR), features)
    assert image.std() > 0.3 and features.std() > 0.3
    compare((*ours_out, prediction.features), (*theirs_out, features))

    parameters = {f"denoiser.{name}": value for name, value in network.named_parameters()}
    parameters |= {f"projector.{name}": value for name, value in projector.named_parameters()}
    ours_gradients, theirs_gradients = (
        torch.autograd.grad(sum((o * c).mean() for o, c in zip(out, cotangents, strict=True)), wanted)
        for out, wanted in (
            (ours_out, [*ours_in, *parameters.values()]),
            (theirs_out, [*theirs_in, *(theirs[name] for name in learned)]),
        )
    )
    assert all(gradient.abs().max() > 1e-6 for gradient in theirs_gradients)
    by_name = dict(zip(parameters, ours_gradients[2:], strict=True))
    released = export_weights(run, by_name, by_name).content["state_dict"]
    compare((*ours_gradients[:2], *(released[name] for name in learned)), theirs_gradients)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_way_back_gives_every_key_and_byte(case: Case, tmp_path: Path) -> None:
    weights = random_weights(case.shapes, 11)
    imported = import_weights(stored(tmp_path / "x.ckpt", weights), case.run, case.text_width)
    exported = export_weights(case.run, imported.raw, imported.ema).content
    assert exported["state_dict"].keys() == weights.keys()
    for name, value in exported["state_dict"].items():
        if name.endswith(".pos_embed"):
            torch.testing.assert_close(value, weights[name], atol=1e-6, rtol=0)
        else:
            assert torch.equal(value, weights[name]), name
    torch.save(exported, tmp_path / "y.ckpt")
    again = import_weights(Checkpoint(tmp_path / "y.ckpt"), case.run, case.text_width)
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


def test_rectangles_are_not_exported(imported: Imported) -> None:
    tree = config()
    rectangles = tree.model_copy(update={"data": tree.data.model_copy(update={"resolution": [8, 16]})})
    with pytest.raises(ConfigError, match=r"data.resolution \[8, 16\]: the released layout has square pictures alone"):
        export_weights(rectangles, imported.raw, imported.ema)
