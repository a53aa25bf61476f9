"""What each economy of the training step is worth: the time of a step with each switched off in turn, and all together.

    python tests/benchmarks/train_step.py                # a middle size, every economy: minutes
    python tests/benchmarks/train_step.py --size xxl     # PixelGen-XXL: 24 GiB of memory, 18 GB of disk, longer
    python tests/benchmarks/train_step.py --size small   # to try the code

The step is the trainer's own (t2i/train/step.py, ZeRO-1 on one process, FSDP2 and files for XXL) on one batch of drawn
scenes at 256 px. Qwen3, VGG16 and DINOv2-B have random weights: the losses mean nothing, their cost does. Off means:

    gating               LPIPS and P-DINO on all samples; the gated ones' distances are left out after
    features once        DINOv2 on the clean images for P-DINO and again for alignment
    captions once        captions encoded by micro-batch, those that caption dropout takes too
    compile              eager
    bf16 weights         fp32 weights, cast at each use (autocast), of the network, VGG16 and DINOv2

Each leaves the loss what it was, but for rounding (tests/t2i/train/test_economies.py). `model.text_padding: mask` does
not, so it stands apart: its ratio to `attend`, and what the pads cost it that it need not compute (`padding`).

Prints one JSON object. Variants take turns, a ratio is the median over the rounds of (off / on), all times are wall
clock. `share_of_matmul` is the FLOPs of the step (matrix products and convolutions, counted) over its time, relative to
a bare matrix product of bf16 in the same round. `parts` are stamped in a step of its own (steps/clock.py).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from steps import networks
from steps.clock import StepClock, watch_step, watch_text
from steps.economies import CaptionsByMicroBatch, SpendthriftObjective
from steps.setting import CACHE, CONFIG, RANDOM, ROOT, batch_of_scenes, first_stage, machine
from torch.utils.flop_counter import FlopCounterMode

from launch.process import joined_world, quiet
from t2i.build import build_text
from t2i.config import RunConfig
from t2i.config_loading import merge, validate_config
from t2i.engine.ema import Ema
from t2i.engine.interface import Engine
from t2i.models import text as text_module
from t2i.models.text import TextEncoder
from t2i.train.build import build_ema, build_engine, build_network, build_objective
from t2i.train.processes import World
from t2i.train.step import TrainingStep

FROZEN = {"features_path": str(CACHE / "dinov2"), "lpips_path": str(CACHE / "vgg16.pth")}
MIDDLE: dict[str, Any] = {
    "model": {"width": 768, "depth": 8, "heads": 12, "text_depth": 2, "bottleneck": 128, "repa_layer": 4},
    "text": {"model": str(CACHE / "middle" / "qwen3")},
    "objective": FROZEN,
    "train": {"batch_size": 16, "micro_batch_size": 8},
    "validation": {"every": 0},
}
MIDDLE_QWEN = networks.QWEN3_1B7 | {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}
SMALL: dict[str, Any] = merge(
    MIDDLE,
    {
        "model": {"width": 96, "depth": 2, "heads": 3, "text_depth": 1, "bottleneck": 16, "repa_layer": 1},
        "text": {"model": str(CACHE / "small" / "qwen3")},
        "data": {"resolution": 64},
        "objective": {"features_path": str(CACHE / "small" / "dinov2")},
    },
)
SMALL_QWEN = networks.QWEN3_1B7 | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 8}
SMALL_DINOV2 = networks.DINOV2_B | {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
XXL: dict[str, Any] = {
    "text": {"model": str(CACHE / "qwen3")},
    "objective": FROZEN,
    "train": {"batch_size": 2, "micro_batch_size": 1},
    "engine": {"name": "fsdp", "checkpoint_blocks": True, "state_folder": str(CACHE / "state")},
    "validation": {"every": 0},
}


@dataclass(frozen=True)
class Variant:
    """A way to make the step."""

    kind: str = "compiled"
    """Of its engine and frozen networks; each has its own weights."""
    objective: dict[str, bool] = field(default_factory=dict)
    """Economies of the loss that are off."""
    captions_once: bool = True
    pads: bool = False
    """Compute pads to the full length under mask too."""


KINDS: dict[str, dict[str, Any]] = {
    "compiled": {"engine": {"dtype": "bf16", "compile": True}},
    "eager": {"engine": {"dtype": "bf16", "compile": False}},
    "autocast": {"engine": {"dtype": "fp32", "compile": True}},
    "autocast, eager": {"engine": {"dtype": "fp32", "compile": False}},
    "mask": {"engine": {"dtype": "bf16", "compile": True}, "model": {"text_padding": "mask"}},
}
GATING, FEATURES = {"all_samples": True, "features_twice": False}, {"all_samples": False, "features_twice": True}
BOTH = {"all_samples": True, "features_twice": True}
OFF: dict[str, Variant] = {
    "gating": Variant(objective=GATING),
    "features once": Variant(objective=FEATURES),
    "captions once": Variant(captions_once=False),
    "compile": Variant("eager"),
    "bf16 weights": Variant("autocast"),
    "all": Variant("autocast, eager", BOTH, captions_once=False),
}
MASKS = {"mask": Variant("mask"), "mask, pads computed": Variant("mask", pads=True)}


Step = Callable[..., float]


class Built:
    """Engine, frozen networks and text encoder of a kind."""

    def __init__(self, config: RunConfig, stage: str, world: World) -> None:
        self.config, self.stage, self.world = config, stage, world
        dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
        self.autocast = dtype == torch.float32
        self.text: TextEncoder = build_text(config, world.device, torch.bfloat16, config.engine.compile)
        self.null_caption = self.text.null_caption()
        self.objective = build_objective(config.objective, world.device, dtype, config.engine.compile)
        network = build_network(config, self.text.width, self.objective.patch_features)
        self.parameters = sum(p.numel() for p in network.parameters())
        self.engine: Engine = build_engine(config, network, world, dtype)
        self.ema: Ema = build_ema(config, self.engine)

    def step(self, variant: Variant) -> Step:
        """A step in this way: a call that returns its loss, and applies the update unless it is told why not."""
        objective = SpendthriftObjective(self.objective, **variant.objective) if variant.objective else self.objective
        make = TrainingStep if variant.captions_once else CaptionsByMicroBatch
        train = make(self.config, self.stage, self.world, self.text, self.null_caption, objective, self.engine)
        batch = batch_of_scenes(self.config)

        def call(vetoed: str | None = None) -> float:
            cast = torch.autocast(self.world.device.type, torch.bfloat16) if self.autocast else nullcontext()
            with padded(self.config) if variant.pads else nullcontext(), cast:
                trained = train(batch, 0, lambda loss, norm: vetoed)
            self.ema.update()
            return trained.means["loss"]

        return call


@contextmanager
def padded(config: RunConfig) -> Iterator[None]:
    """Captions of full length, whatever the padding."""
    step, text_module.LENGTH_STEP = text_module.LENGTH_STEP, config.text.length
    try:
        yield
    finally:
        text_module.LENGTH_STEP = step


def matmul_flops(size: int = 4096, seconds: float = 1.0) -> float:
    """FLOP/s of a bare matrix product in bf16."""
    a, b = torch.randn(size, size, dtype=torch.bfloat16), torch.randn(size, size, dtype=torch.bfloat16)
    a @ b
    began, rounds = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ b
        rounds += 1
    return 2 * size**3 * rounds / (time.perf_counter() - began)


def flops(built: Built) -> float:
    """Of one step, as an eager one makes it."""
    with FlopCounterMode(display=False) as counter:
        built.step(Variant("eager"))()
    return float(counter.get_total_flops())


def parts(built: Built) -> dict[str, float]:
    """Seconds of one step by part; the engine is of no use after it."""
    clock = StepClock(built.world.device)
    watch_text(clock, built.text)
    watch_step(clock, built.objective, built.engine, built.ema)
    call = built.step(Variant())
    call()
    clock.seconds.clear()
    clock.enter("other")
    call()
    clock.enter("end")
    return {part: round(seconds, 3) for part, seconds in clock.seconds.items()}


def timed(call: Step) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(tree: Callable[[str], RunConfig], stage: str, world: World, rounds: int, together: bool) -> dict[str, Any]:
    """All variants.

    Args:
        tree: a kind's config.
        rounds: over all variants.
        together: hold all kinds in memory and let the variants take turns; else kind by kind, each `rounds` times.
    """
    variants = {"on": Variant(), **OFF, **MASKS}
    seconds: dict[str, list[float]] = defaultdict(list)
    losses: dict[str, float] = {}
    matmul: list[float] = []
    of_kind = {kind: {n: v for n, v in variants.items() if v.kind == kind} for kind in KINDS}
    found: dict[str, Any] = {}

    def first(built: Built, group: dict[str, Variant]) -> dict[str, Step]:
        calls = {name: built.step(variant) for name, variant in group.items()}
        for name, call in calls.items():  # compiles; all see the first weights
            losses[name] = call("the first weights are to stay")
        for call in calls.values():
            call()
        return calls

    def turn(calls: dict[str, Step]) -> None:
        matmul.append(matmul_flops())
        for name, call in calls.items():
            seconds[name].append(timed(call))

    kept: dict[str, Built] = {}
    calls: dict[str, Step] = {}
    for kind, group in of_kind.items():
        built = Built(tree(kind), stage, world)
        calls |= first(built, group)
        if kind == "compiled":
            stats = torch._dynamo.utils.counters["stats"]
            found |= {"parameters": built.parameters, "graphs_compiled": stats["unique_graphs"]}
        if kind == "eager":
            found["flops"] = flops(built)
        if not together:
            for _ in range(rounds):
                turn(calls)
            if kind == "compiled":
                found["parts"] = parts(built)
            calls.clear()
            del built
            gc.collect()
        else:
            kept[kind] = built
    if together:
        for _ in range(rounds):
            turn(calls)
        found["parts"] = parts(kept["compiled"])
    return found | summary(seconds, losses, matmul, found["flops"])


def summary(
    seconds: dict[str, list[float]], losses: dict[str, float], matmul: list[float], step_flops: float
) -> dict[str, Any]:
    """The ratios, medians over rounds."""

    def ratio(off: str, on: str) -> float:
        return round(statistics.median(a / b for a, b in zip(seconds[off], seconds[on], strict=True)), 3)

    on, bare = statistics.median(seconds["on"]), statistics.median(matmul)
    return {
        "step_s": round(on, 3),
        "off": {name: ratio(name, "on") for name in OFF if name != "all"},
        "ratio_vs_all_off": ratio("all", "on"),
        "text_padding": {
            "attend / mask": ratio("on", "mask"),
            "padding": ratio("mask, pads computed", "mask"),
        },
        "matmul_gflops": round(bare / 1e9),
        "share_of_matmul": round(step_flops / on / bare, 3),
        "losses of the first step": losses,
        "seconds": {name: [round(it, 3) for it in taken] for name, taken in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=["middle", "xxl", "small"], default="middle", help="of the networks")
    parser.add_argument("--rounds", type=int, default=None, help="over all variants; 5, for XXL 1")
    given = parser.parse_args()
    os.chdir(ROOT)
    quiet(rank=0)
    overrides, qwen, dinov2 = {
        "middle": (MIDDLE, MIDDLE_QWEN, networks.DINOV2_B),
        "xxl": (XXL, networks.QWEN3_1B7, networks.DINOV2_B),
        "small": (SMALL, SMALL_QWEN, SMALL_DINOV2),
    }[given.size]
    config, stage = first_stage(overrides, qwen, dinov2)
    rounds = given.rounds or (1 if given.size == "xxl" else 5)

    def tree(kind: str) -> RunConfig:
        return validate_config(merge(config.model_dump(mode="json"), KINDS[kind]), CONFIG)

    with joined_world() as world:
        outcome = {
            "config": f"{CONFIG}, stage {stage}",
            "overrides": overrides,
            "random weights": RANDOM,
            "machine": machine(),
            "rounds": rounds,
            **measure(tree, stage, world, rounds, together=given.size != "xxl"),
        }
        print(json.dumps(outcome, indent=1))


if __name__ == "__main__":
    main()
