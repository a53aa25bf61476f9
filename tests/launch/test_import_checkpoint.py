"""The two commands: a checkpoint becomes a folder that draws, and a folder the same checkpoint again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from released_cases import CASES
from released_pixeldit import dit_file, dit_weights
from released_pixeldit_cases import TINY, dit_config
from released_pixelgen import Sizes, denoiser_shapes, lightning, random_weights
from safetensors.torch import save_file
from tiny_qwen import save_qwen
from torch import Tensor

import launch.export
import launch.import_checkpoint
from t2i.config.loading import dump_config
from t2i.config.run import SamplingConfig
from t2i.model_folder import read_model
from t2i.pipeline import Picture, Pipeline

SIZES = Sizes(hidden=48, blocks=2, heads=2, text_width=20, text_length=7, text_blocks=1, bottleneck=8, patch=4, grid=5,
              features=11)  # fmt: skip


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(denoiser_shapes(SIZES), SIZES.features)


@pytest.fixture
def place(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    """A folder with x.ckpt, trained at 20 px, and c.yaml."""
    torch.save(lightning(weights), tmp_path / "x.ckpt")
    model = {"patch_size": 4, "width": 48, "depth": 2, "heads": 2, "text_depth": 1, "bottleneck": 8, "repa_layer": 1}
    tree: dict[str, Any] = {
        "model": model,
        "text": {"model": str(save_qwen(tmp_path / "qwen")), "length": 7},
        "data": {"resolution": 16},
        "engine": {"dtype": "fp32"},
        "stages": [
            {"name": "low"},
            {"name": "middle", "data": {"resolution": 20}, "sampling": {"steps": 7}},
            {"name": "late", "data": {"resolution": 20}, "sampling": {"steps": 2}},
            {"name": "high", "data": {"resolution": 32}},
        ],
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def importing(place: Path, *options: str, file: str = "x.ckpt") -> int:
    words = [str(place / file), "--config", str(place / "c.yaml"), "--out", str(place / "model")]
    return launch.import_checkpoint.main([*words, *options])


@pytest.fixture
def refused(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def attempt(*options: str, file: str = "x.ckpt") -> str:
        assert importing(place, *options, file=file) == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert said.startswith("error: ")
        assert not [path for path in place.iterdir() if "import" in path.name]
        return said

    return attempt


def test_a_checkpoint_becomes_a_folder_that_draws(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert importing(place) == 0
    said = capsys.readouterr().out
    assert "102 keys used, 2 recomputed, 6 left: see import.json" in said and "null_attention mean" in said
    assert sorted(path.name for path in place.iterdir()) == ["c.yaml", "model", "qwen", "x.ckpt"]
    report = json.loads((place / "model" / "import.json").read_text())
    assert report["used"]["ema_denoiser.blocks.0.attn.kv_y.weight"] == "denoiser.blocks.0.attn.context_kv.weight"
    raw, ema = (Pipeline.load(place / "model", which, torch.device("cpu")) for which in ("raw", "ema"))
    assert raw.config.data.resolution == 20 and raw.config.sampling.steps == 2  # of the last stage at 20 px
    assert torch.equal(raw.null_caption, raw.conditioner.null_caption())
    assert torch.equal(raw.null_caption, ema.null_caption)
    settings = SamplingConfig(steps=2, batch_size=1)
    pictures = [pipeline.draw([Picture("a red circle")], settings) for pipeline in (raw, ema)]
    assert pictures[0].shape == (1, 3, 20, 20) and not torch.equal(*pictures)


def test_what_is_left_out_may_be_anything(place: Path, weights: dict[str, Tensor]) -> None:
    more = {
        "hparams_type": Path,
        "dtype": torch.bfloat16,
        "tensor": torch.ones(2),
        "complex": 1j,
        "bytes": b"x" * 999,
    }
    left = {"step": None, "queue": torch.empty(0), "scale": torch.ones(2).to(torch.float8_e4m3fn), "blocks": [1, 2]}
    torch.save(lightning({**weights, **left}, **more), place / "x.ckpt")
    assert importing(place) == 0
    report = json.loads((place / "model" / "import.json").read_text())["left"]
    assert report["hparams_type"] == "type" and report["tensor"] == "tensor (2,)" and len(report["bytes"]) <= 200
    assert report["state_dict.step"] == "is no tensor (NoneType)" and report["state_dict.queue"] == "tensor [0]"


@pytest.mark.parametrize("container", ["legacy", "safetensors", "wrapped"])
def test_other_containers_and_wrappers_become_the_same_folder(
    place: Path, weights: dict[str, Tensor], container: str
) -> None:
    assert importing(place) == 0
    (place / "model").rename(place / "first")
    if container == "safetensors":
        save_file(weights, place / "x.ckpt")
    elif container == "legacy":
        torch.save(lightning(weights), place / "x.ckpt", _use_new_zipfile_serialization=False)
    else:
        names = {name: name.replace("blocks.", "blocks._orig_mod.") for name in weights}
        torch.save({f"module.{names[name]}": value for name, value in weights.items()}, place / "x.ckpt")
    assert importing(place) == 0
    for name in ("model.safetensors", "ema.safetensors"):
        assert (place / "model" / name).read_bytes() == (place / "first" / name).read_bytes()


def test_what_is_needed_and_cannot_be_read_is_said_with_its_cause(
    place: Path, refused: Callable[..., str], weights: dict[str, Tensor]
) -> None:
    name = "ema_denoiser.blocks.0.mlp.w3.weight"
    for value, said in ((None, "no tensor (NoneType)"), (torch.empty(0), "empty, a placeholder as ZeRO-3 leaves")):
        torch.save(lightning({**weights, name: value}), place / "x.ckpt")
        assert f"x.ckpt: {name} is {said}" in refused()


def test_placeholders_alone_are_no_weights(place: Path, weights: dict[str, Tensor]) -> None:
    own = {n: v if n.startswith("ema_") else torch.empty(0) for n, v in weights.items()}
    torch.save(lightning(own), place / "x.ckpt")
    assert importing(place) == 0
    notes = json.loads((place / "model" / "import.json").read_text())["notes"]
    assert "raw: the checkpoint has only the ema weights, which stand in for them" in notes


def test_the_folder_becomes_the_same_checkpoint(place: Path, weights: dict[str, Tensor]) -> None:
    assert importing(place) == 0
    assert launch.export.main([str(place / "model"), "--out", str(place / "deep" / "y.ckpt")]) == 0
    assert [path.name for path in (place / "deep").iterdir()] == ["y.ckpt"]
    exported = torch.load(place / "deep" / "y.ckpt", weights_only=True)
    assert exported.keys() == {"epoch", "global_step", "pytorch-lightning_version", "state_dict"}
    assert exported["state_dict"].keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(
            exported["state_dict"][name], value, atol=1e-6 if name.endswith(".pos_embed") else 0, rtol=0
        )


def test_the_other_null_caption(place: Path) -> None:
    assert importing(place, "--null_attention", "zero") == 0
    stored = read_model(place / "model", "raw").null_caption
    computed = Pipeline.load(place / "model", "raw", torch.device("cpu")).conditioner.null_caption()
    assert (stored - computed).abs().max() > 0.1


def test_refusals(place: Path, refused: Callable[..., str], weights: dict[str, Tensor]) -> None:
    assert "absent.ckpt: cannot be read" in refused(file="absent.ckpt")
    assert "c.yaml is no checkpoint" in refused(file="c.yaml")
    other = {name: value[:, :9] if name.endswith(".pos_embed") else value for name, value in weights.items()}
    torch.save(lightning(other), place / "other.ckpt")
    assert "data.resolution should be 12 in one of its stages" in refused(file="other.ckpt")
    (place / "file").touch()
    assert "cannot be written: Not a directory" in refused("--out", str(place / "file" / "model"))
    tree = yaml.safe_load((place / "c.yaml").read_text())
    (place / "c.yaml").write_text(yaml.safe_dump(tree | {"model": tree["model"] | {"text_padding": "mask"}}))
    assert "text_padding mask: it should be attend" in refused()
    tree["model"]["depth"] = 3
    (place / "c.yaml").write_text(yaml.safe_dump(tree))
    assert "it lacks denoiser.blocks.2.adaLN_modulation.0.bias and 11 more" in refused()
    (place / "model").mkdir()
    assert "model exists: remove it" in refused()


def test_export_refuses(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.export.main([str(place), "--out", str(place / "y.ckpt")]) == 2
    assert "is not a model folder" in capsys.readouterr().err
    assert launch.export.main([str(place), "--out", str(place / "x.ckpt")]) == 2
    assert "exists: remove it" in capsys.readouterr().err


@pytest.fixture
def class_place(place: Path) -> Path:
    """The folder with x.ckpt and c.yaml for class to image."""
    case = CASES["XL"]
    torch.save(lightning(random_weights(case.shapes, 11)), place / "x.ckpt")
    (place / "c.yaml").write_text(dump_config(case.run))
    return place


def test_a_checkpoint_for_classes_draws_and_becomes_itself_again(class_place: Path) -> None:
    assert importing(class_place) == 0
    report = json.loads((class_place / "model" / "import.json").read_text())
    assert report["used"]["ema_denoiser.y_embedder.embedding_table.weight"] == "denoiser.label.weight"
    assert report["notes"] == []
    raw, ema = (Pipeline.load(class_place / "model", which, torch.device("cpu")) for which in ("raw", "ema"))
    assert raw.null_caption == ema.null_caption == 5
    settings = SamplingConfig(steps=2, batch_size=2)
    pictures = [pipeline.draw([Picture("0"), Picture("4")], settings) for pipeline in (raw, ema)]
    assert pictures[0].shape == (2, 3, 20, 20) and not torch.equal(*pictures)
    assert launch.export.main([str(class_place / "model"), "--out", str(class_place / "y.ckpt")]) == 0
    written, read = (torch.load(class_place / f"{name}.ckpt")["state_dict"] for name in ("y", "x"))
    assert written.keys() == read.keys()
    for name, value in read.items():
        atol = 1e-6 if name.endswith(".pos_embed") else 0
        torch.testing.assert_close(written[name], value, atol=atol, rtol=0)


def test_an_option_of_captions_is_refused_for_classes(class_place: Path, refused: Callable[..., str]) -> None:
    assert "null_attention zero does nothing for class to image" in refused("--null_attention", "zero")


def test_another_task_is_refused_before_a_text_encoder_is_loaded(
    class_place: Path, refused: Callable[..., str]
) -> None:
    (class_place / "c.yaml").write_text("text: {model: absent}")
    assert "x.ckpt is PixelGen for class to image, 4 blocks of width 48: " in (said := refused())
    assert said.endswith("the config's model.condition should be class, not text")


@pytest.fixture
def dit_place(place: Path) -> Path:
    """The folder with x.ckpt, its average beside the weights, and c.yaml for PixelDiT from text, in two stages."""
    s = TINY["text"]
    torch.save(dit_file(*dit_weights(s)), place / "x.ckpt")
    tree = yaml.safe_load(dump_config(dit_config(s)))
    tree["text"] |= {"model": str(place / "qwen")}
    tree["engine"] |= {"dtype": "fp32"}
    tree["stages"] = [{"name": "low"}, {"name": "high", "data": {"resolution": 32}}]
    (place / "c.yaml").write_text(yaml.safe_dump(tree))
    return place


def test_a_pixeldit_draws_and_becomes_itself_again(dit_place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert importing(dit_place, "--resolution", "20") == 0
    assert "the last block's text: but for its keys and values it is kept" in capsys.readouterr().out
    raw, ema = (Pipeline.load(dit_place / "model", which, torch.device("cpu")) for which in ("raw", "ema"))
    assert raw.config.data.resolution == 20
    assert torch.equal(raw.null_caption, raw.conditioner.null_caption())
    settings = SamplingConfig(steps=2, batch_size=1)
    pictures = [pipeline.draw([Picture("a red circle")], settings) for pipeline in (raw, ema)]
    assert pictures[0].shape == (1, 3, 20, 20) and not torch.equal(*pictures)
    assert launch.export.main([str(dit_place / "model"), "--out", str(dit_place / "y.pth")]) == 0
    assert "zeros" not in capsys.readouterr().out
    written, read = (torch.load(dit_place / name, weights_only=True) for name in ("y.pth", "x.ckpt"))
    assert written.keys() == {"state_dict", "state_dict_ema"}
    for key in written:
        assert written[key].keys() == read[key].keys()
        assert all(torch.equal(written[key][name], read[key][name]) for name in read[key])


def test_where_the_checkpoint_does_not_say_the_last_stage_is_taken(dit_place: Path) -> None:
    assert importing(dit_place) == 0
    assert read_model(dit_place / "model", "raw").config.data.resolution == 32


def test_a_resolution_must_be_one_of_the_stages(dit_place: Path, refused: Callable[..., str]) -> None:
    assert "data.resolution should be 24 in one of its stages" in refused("--resolution", "24")


def test_a_resolution_that_the_checkpoint_gives_is_not_another(place: Path, refused: Callable[..., str]) -> None:
    assert "resolution 16: the checkpoint was trained at 20: leave it out" in refused("--resolution", "16")
