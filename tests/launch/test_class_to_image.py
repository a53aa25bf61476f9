"""Class-conditional runs under the real launchers, and the samples that their models draw for ADM's evaluation."""

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
from tiny import draw_classes, ranks_of, run, start, tiny_classes, write_config

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
    run("deepspeed", "class_to_image.py", "--config", str(config))
    return root / "tiny"


def test_a_run_learns_labels_and_leaves_a_model(trained: Path) -> None:
    weights = load_file(trained / "classes" / "model" / "model.safetensors")
    assert weights["null_caption"].shape == () and weights["null_caption"] == 3
    labels = weights["denoiser.label.weight"]
    assert labels.shape == (4, 48)
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
    tree["engine"] = {"dtype": "fp32", "checkpoint_blocks": True}
    run("python", "class_to_image.py", "--config", str(write_config(tmp_path / "config.yaml", tree)), ranks=1)
    mine, theirs = losses(tmp_path / "tiny"), losses(trained)
    for step in range(1, 9):
        assert mine["train", step] == pytest.approx(theirs["train", step], rel=1e-4)


def test_what_is_no_class_stops_a_run_before_it_begins(images: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "config.yaml", tiny_classes(images, tmp_path)))
    output = run("python", "class_to_image.py", "--config", config, "--model.classes", "4", ranks=1, code=2)
    assert "has folders for 3 classes" in output.splitlines()[-1]
    shutil.copytree(images, tmp_path / "other")
    (tmp_path / "other" / "heldout" / "n00").rename(tmp_path / "other" / "heldout" / "n09")
    config = str(write_config(tmp_path / "other.yaml", tiny_classes(tmp_path / "other", tmp_path)))
    output = run("python", "class_to_image.py", "--config", config, ranks=1, code=2)
    assert "give both the same folders" in output.splitlines()[-1]


@pytest.fixture(scope="module")
def samples(trained: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("samples") / "one.npz"
    model = str(trained / "classes" / "model")
    run("python", "sample_classes.py", "--model", model, "--out", str(out), *DRAW, ranks=1)
    return out


def test_the_npz_is_adms(samples: Path) -> None:
    with np.load(samples) as file:
        assert sorted(file.files) == ["arr_0", "arr_1"]
        drawn, labels = file["arr_0"], file["arr_1"]
    assert drawn.shape == (COUNT, SIDE, SIDE, 3) and drawn.dtype == np.uint8
    assert labels.tolist() == [i % 3 for i in range(COUNT)]
    assert len(np.unique(drawn.reshape(COUNT, -1), axis=0)) == COUNT
    assert [path.name for path in samples.parent.iterdir()] == ["one.npz"]


def test_an_image_is_a_function_of_its_index(samples: Path, trained: Path, tmp_path: Path) -> None:
    """As launch/sample.py draws image number i // classes of class i modulo classes."""
    (tmp_path / "prompts.txt").write_text("0\n1\n2\n")
    model = str(trained / "classes" / "model")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--pictures", "4", *DRAW[2:]]
    run("python", "sample.py", "--model", model, "--out", str(tmp_path / "out"), *options, ranks=1)
    from PIL import Image

    with np.load(samples) as file:
        for i, image in enumerate(file["arr_0"]):
            png = Image.open(tmp_path / "out" / f"{i % 3:05d}_{i // 3}.png")
            np.testing.assert_array_equal(image, np.asarray(png))


def test_killed_and_gone_on_with_on_two_processes_it_is_the_same_file(
    samples: Path, trained: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "two.npz", str(trained / "classes" / "model")
    slow = [*DRAW[:2], "--sampling", '{"batch_size": 2, "steps": 4}']
    command = ["--model", model, "--out", str(out), *slow]
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
    output = run("python", "sample_classes.py", *command[:-1], '{"batch_size": 2, "steps": 5}', ranks=1, code=2)
    assert "holds parts of other samples (sampling)" in output.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in parts.glob("*.bin")} == kept
    run("torchrun", "sample_classes.py", *command)
    assert out.read_bytes() == samples.read_bytes() and not parts.exists()


def test_the_average_is_not_the_raw_model(trained: Path) -> None:
    raw, average = (load_file(trained / "classes" / "model" / f"{name}.safetensors") for name in ("model", "ema"))
    assert not torch.equal(raw["denoiser.label.weight"], average["denoiser.label.weight"])
    assert not ranks_of(trained.parent / "config.yaml")
