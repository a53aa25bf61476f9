"""Class-conditional runs, and the samples that their models draw for ADM's evaluation."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import draw_classes, run, start, tiny_classes, write_config

from data.files import sha256
from evaluation.npz import generated_with
from t2i.config.base import ConfigError
from t2i.config.loading import stage_config, validate_config
from t2i.pipeline import Picture, Pipeline
from t2i.train.data import open_data

pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra 'demo'")

COUNT, SIDE = 11, 16
DRAW = ["--samples", str(COUNT), "--sampling", '{"batch_size": 2, "steps": 4}']


def losses(run_directory: Path) -> dict[tuple[str, int], float]:
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    return {(line["kind"], line["step"]): line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory) -> Path:
    """The folder of a run on two processes."""
    root = tmp_path_factory.mktemp("trained")
    config = write_config(root / "config.yaml", tiny_classes(images, root))
    run("forked", "class_to_image.py", "--config", str(config))
    return root / "tiny"


def test_a_run_learns_labels_and_leaves_a_model(trained: Path) -> None:
    weights, average = (load_file(trained / "classes" / "model" / f"{name}.safetensors") for name in ("model", "ema"))
    assert weights.keys() == average.keys()
    assert weights["null_caption"].shape == () and weights["null_caption"] == 3
    labels = weights["denoiser.label.weight"]
    assert labels.shape == (4, 48) and not torch.equal(labels, average["denoiser.label.weight"])
    found = losses(trained)
    assert found["validation", 8] < 0.9 * found["validation", 0]
    assert {path.name for path in (trained / "classes" / "samples").glob("*.png")} == {
        f"step_{step:06d}.png" for step in (0, 4, 8)
    }


def test_one_process_with_other_micro_batches_drops_and_learns_the_same(
    trained: Path, images: Path, tmp_path: Path
) -> None:
    changes = {"train": {"steps": 8, "batch_size": 8, "micro_batch_size": 4}, "validation": {"every": 0}}
    tree = tiny_classes(images, tmp_path, **changes)
    tree["engine"] = {"dtype": "fp32", "activation_checkpointing": True}
    run("forked", "class_to_image.py", "--config", str(write_config(tmp_path / "config.yaml", tree)), ranks=1)
    mine, theirs = losses(tmp_path / "tiny"), losses(trained)
    for step in range(1, 9):
        assert mine["train", step] == pytest.approx(theirs["train", step], rel=1e-4)


def test_folders_that_are_not_the_models_classes_are_refused(images: Path, tmp_path: Path) -> None:
    tree = tiny_classes(images, tmp_path)
    tree["model"]["classes"] = 4
    with pytest.raises(ConfigError, match="has folders for 3 classes"):
        open_data(stage_config(validate_config(tree, "here"), 0), "classes", {})
    shutil.copytree(images, tmp_path / "other")
    (tmp_path / "other" / "heldout" / "n00").rename(tmp_path / "other" / "heldout" / "n09")
    config = validate_config(tiny_classes(tmp_path / "other", tmp_path), "here")
    with pytest.raises(ConfigError, match="give both the same folders"):
        open_data(stage_config(config, 0), "classes", {})


@pytest.fixture(scope="module")
def samples(trained: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("samples") / "one.npz"
    model = str(trained / "classes" / "model")
    run("forked", "sample_classes.py", "--model", model, "--out", str(out), *DRAW, ranks=1)
    return out


def test_the_npz_is_adms(samples: Path) -> None:
    with np.load(samples) as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
        drawn, labels = file["arr_0"], file["arr_1"]
    assert drawn.shape == (COUNT, SIDE, SIDE, 3) and drawn.dtype == np.uint8
    assert labels.tolist() == [i % 3 for i in range(COUNT)]
    assert len(np.unique(drawn.reshape(COUNT, -1), axis=0)) == COUNT
    assert sorted(path.name for path in samples.parent.iterdir()) == ["one.json", "one.npz"]


def test_beside_the_npz_is_what_it_was_drawn_with(samples: Path, tmp_path: Path) -> None:
    found = generated_with(samples, sha256(samples))
    assert found is not None
    assert found["count"] == COUNT and found["size"] == [SIDE, SIDE] and found["sampling"]["steps"] == 4
    assert found["speed"]["images"] == COUNT and found["speed"]["images_per_s"] > 0
    assert generated_with(samples, "0" * 64) is None  # another file of this name
    assert generated_with(tmp_path / "none.npz", sha256(samples)) is None
    (tmp_path / "one.json").write_text("[]")  # nothing of ours
    assert generated_with(tmp_path / "one.npz", sha256(samples)) is None


def test_an_image_is_a_function_of_its_index(samples: Path, trained: Path) -> None:
    """Image i is picture i // classes of class i modulo classes, drawn among whatever others."""
    pipeline = Pipeline.load(trained / "classes" / "model", "ema", torch.device("cpu"))
    sampling = pipeline.config.sampling.model_copy(update={"batch_size": 2, "steps": 4})
    drawn = pipeline.draw([Picture(str(i % 3), i // 3) for i in reversed(range(COUNT))], sampling)
    with np.load(samples) as file:
        np.testing.assert_array_equal(file["arr_0"], drawn.flip(0).permute(0, 2, 3, 1).numpy())


def test_killed_and_gone_on_with_on_two_processes_it_is_the_same_file(
    samples: Path, trained: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "two.npz", str(trained / "classes" / "model")
    command = ["--model", model, "--out", str(out), *DRAW]
    process = start("python", "sample_classes.py", *command, ranks=1)
    parts = tmp_path / "two.npz.parts"
    deadline = time.monotonic() + 200
    while len(list(parts.glob("*.bin"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.bin")}
    assert 2 <= len(kept) < 6 and not out.exists()
    output = run("forked", "sample_classes.py", *command[:-1], '{"batch_size": 2, "steps": 5}', ranks=1, code=2)
    assert "holds images made with other settings (sampling.steps)" in output.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in parts.glob("*.bin")} == kept
    damaged = min(kept)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    out.touch()  # killed after the parts were put together, and before they were removed
    run("forked", "sample_classes.py", *command)
    assert out.read_bytes() == samples.read_bytes() and not parts.exists()
    output = run("forked", "sample_classes.py", *command, ranks=1, code=2)
    assert "two.npz exists: remove it, or give another name" in output.splitlines()[-1]
