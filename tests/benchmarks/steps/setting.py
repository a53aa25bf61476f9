"""What is measured: configs/pixelgen_xxl.yaml, frozen networks with random weights, and a batch of drawn scenes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.loader import Batch
from data.packing import shapes
from steps import networks
from t2i.config import RunConfig
from t2i.config_loading import load_config, override, stage_config

ROOT = Path(__file__).resolve().parents[3]
CONFIG = "configs/pixelgen_xxl.yaml"
CACHE = Path(".cache/xxl")
SCENES_SEED = 0
RANDOM = ["text encoder", "VGG16", "DINOv2"]
"""What has random weights in these benchmarks."""


def machine() -> dict[str, Any]:
    """What the step runs on."""
    models = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "cpu": next(models).partition(": ")[2],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(gib, 1),
    }


def first_stage(overrides: dict[str, Any], qwen: dict[str, Any], dinov2: dict[str, Any]) -> tuple[RunConfig, str]:
    """The first stage and its name; its frozen networks are made, unless they are there."""
    run = load_config(ROOT / CONFIG)
    config, stage = stage_config(override(run, overrides), 0), run.stages[0]["name"]
    captions = [scene.caption for scene in scenes(config)]
    networks.qwen(Path(config.text.model), qwen, captions)
    networks.dinov2(Path(config.objective.features_path), dinov2)
    assert config.objective.lpips_path is not None
    networks.vgg16(config.objective.lpips_path)
    return config, stage


def scenes(config: RunConfig) -> list[shapes.Scene]:
    """A batch of them."""
    return [shapes.scene(SCENES_SEED, number) for number in range(config.train.batch_size)]


def batch_of_scenes(config: RunConfig) -> Batch:
    """The stage's first batch, of drawn scenes and their captions."""
    drawn = scenes(config)
    pictures = np.stack([shapes.draw(scene, config.data.size[0]) for scene in drawn])
    return Batch(
        pixels=torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(),
        captions=[scene.caption for scene in drawn],
        ids=[f"scenes/{scene.index}" for scene in drawn],
        slots=np.arange(len(drawn)),
        state={},
        set_aside=[],
        wait_s=0.0,
    )
