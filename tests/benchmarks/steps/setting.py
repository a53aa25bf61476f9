"""What is measured: configs/pixelgen_xxl.yaml with frozen networks of random weights, on a batch of drawn scenes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import launch  # noqa: F401  # it names DeepSpeed's accelerator, which else says on stdout that it guesses
from data.loader import Batch
from data.packing import shapes
from steps import networks
from t2i.build import build_text, choose_dtype
from t2i.config.loading import load_config, merge, override, stage_config
from t2i.config.run import RunConfig
from t2i.distributed import World
from t2i.train.build import build_ema, build_engine, build_network, build_objective

ROOT = Path(__file__).resolve().parents[3]
CONFIG = "configs/pixelgen_xxl.yaml"
CACHE = Path(".cache/xxl")
SCENES_SEED = 0


@dataclass(frozen=True)
class Size:
    """Overrides of the config, and the frozen networks."""

    overrides: dict[str, Any]
    qwen: dict[str, Any] = field(default_factory=lambda: networks.QWEN3_1B7)
    dinov2: dict[str, Any] = field(default_factory=lambda: networks.DINOV2_B)

    def with_(self, overrides: dict[str, Any]) -> Size:
        """With more of them."""
        return Size(merge(self.overrides, overrides), self.qwen, self.dinov2)


XXL = Size(
    {
        "train": {"batch_size": 2, "micro_batch_size": 1},
        "engine": {
            "name": "fsdp",
            "dtype": "bf16",
            "compile": False,
            "activation_checkpointing": True,
            "offload_dir": str(CACHE / "state"),
        },
        "validation": {"every": 0},
    }
)
"""For 24 GiB. FSDP2 and not ZeRO-1, for its anonymous memory: 4 bytes a parameter of masters and 4 of gradients, and a
block of bf16 weights at a time; ZeRO-1 has 2 of weights more, and as it starts 4 of first values."""

MIDDLE = Size(
    {
        "model": {"width": 640, "depth": 8, "heads": 10, "text_depth": 2, "bottleneck": 128, "repa_layer": 4},
        "train": {"batch_size": 16, "micro_batch_size": 8},
        "validation": {"every": 0},
    },
    networks.QWEN3_1B7
    | {
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
)
"""Five engines of it fit into 24 GiB."""

_SMALL_MODEL = {"width": 96, "depth": 3, "heads": 3, "text_depth": 1, "bottleneck": 16, "repa_layer": 2}


def small(size: Size) -> Size:
    """To try the code: all else as in `size`."""
    return Size(
        merge(size.overrides, {"model": _SMALL_MODEL, "data": {"resolution": 64}}),
        networks.QWEN3_1B7 | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 8},
        networks.DINOV2_B | {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    )


def first_stage(size: Size) -> tuple[RunConfig, str]:
    """The first stage's config and its name; the frozen networks are made, unless they are there."""
    paths = {
        "text": {"model": str(networks.qwen(CACHE, size.qwen))},
        "objective": {
            "features_path": str(networks.dinov2(CACHE, size.dinov2)),
            "lpips_path": str(networks.vgg16(CACHE)),
        },
    }
    run = load_config(ROOT / CONFIG)
    return stage_config(override(run, merge(size.overrides, paths)), 0), run.stages[0]["name"]


def about(stage: str, size: Size) -> dict[str, Any]:
    """What was measured, and on what."""
    models = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "config": f"{CONFIG}, stage {stage}",
        "overrides": size.overrides,
        "random weights": ["text encoder", "VGG16", "DINOv2"],
        "machine": {
            "cpu": next(models).partition(": ")[2],
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "memory_gib": round(gib, 1),
        },
    }


class Built:
    """What a stage trains with.

    Args:
        begun: the network is not at its very start: what begins at zero is random, so that all takes part.
    """

    def __init__(self, config: RunConfig, stage: str, world: World, begun: bool = False) -> None:
        self.config, self.stage, self.world = config, stage, world
        dtype = choose_dtype(config.engine.dtype, world.device)
        # As the public code's, the encoder is bf16 whatever the network is.
        self.text = build_text(config, world.device, torch.bfloat16, config.engine.compile)
        self.null_caption = self.text.null_caption()
        self.objective = build_objective(
            config.objective, config.model.prediction, world.device, dtype, config.engine.compile
        )
        network = build_network(config, self.text.width, self.objective.patch_features)
        if begun:
            torch.manual_seed(0)
            for parameter in network.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.02)
        assert network.projector is not None
        self.parameters = {
            name: sum(p.numel() for p in part.parameters())
            for name, part in (("denoiser", network.denoiser), ("projector", network.projector))
        }
        self.engine = build_engine(config, network, world, dtype)
        self.ema = build_ema(config, self.engine)


def batch_of_scenes(config: RunConfig) -> Batch:
    """The stage's first batch, of drawn scenes and their captions."""
    scenes = [shapes.scene(SCENES_SEED, number) for number in range(config.train.batch_size)]
    pictures = np.stack([shapes.draw(scene, config.data.size[0]) for scene in scenes])
    return Batch(
        pixels=[torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()],
        captions=[scene.caption for scene in scenes],
        ids=[f"scenes/{scene.index}" for scene in scenes],
        slots=np.arange(len(scenes)),
        state={},
        bad=[],
        wait_s=0.0,
    )
