"""What each economy of the training step is worth: the time of a step with each switched off in turn, and all together.

    python tests/benchmarks/train_step.py               # a middle size, every economy: a quarter of an hour
    python tests/benchmarks/train_step.py --size xxl    # PixelGen-XXL: 24 GiB of memory, 18 GB of disk, longer
    python tests/benchmarks/train_step.py --small       # small networks, to try the code

The step is the trainer's own (t2i/train/step.py) in one process, under ZeRO-1, or for XXL under FSDP2 with checkpointed
blocks and state in files, on one batch of drawn scenes at 256 px. Qwen3, VGG16 and DINOv2-B have random weights: the
losses mean nothing, their cost does. Off means:

    gating               LPIPS and P-DINO on all samples; the gated ones' distances are left out after
    features once        DINOv2 on the clean images for P-DINO and again for alignment
    captions once        captions encoded by micro-batch, those that caption dropout takes too
    compile              eager
    bf16 weights         fp32 weights, cast at each use (autocast), of the network, VGG16 and DINOv2

Each leaves the loss what it was (tests/t2i/train/test_economies.py), but for rounding: `losses` are those of a skipped
step on the first weights. `model.text_padding: mask` does not, so it stands apart: its ratio to `attend`, and what the
pads would cost it that it need not compute (`padding`).

Prints one JSON object. Variants that are held in memory together take turns: all at the middle size; of XXL those of
one kind, one kind after the other, with `on` measured in the first alone. A ratio is the median over the rounds of off
over on. `share_of_matmul` is the FLOPs of the step (matrix products and convolutions, counted, those included that
checkpointing makes again) over its time, relative to a bare product of bf16 matrices in the same round. `parts` are
stamped in a step of its own (steps/clock.py). Times are wall clock.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
from steps import setting
from steps.applied import applied
from steps.clock import StepClock, watch_step, watch_text
from steps.economies import CaptionsByMicroBatch, SpendthriftObjective
from steps.setting import CONFIG, MIDDLE, ROOT, XXL, Built, about, batch_of_scenes, first_stage
from torch.utils.flop_counter import FlopCounterMode

from launch.process import joined_world, quiet
from t2i.config.loading import merge, validate_config
from t2i.config.run import RunConfig
from t2i.distributed import World
from t2i.models import text
from t2i.train.step import TrainingStep

Step = Callable[..., float]
"""Makes a step, applies its update unless it is told why not, and returns its loss.

Raises RuntimeError where the update was to be applied and was not."""


@dataclass(frozen=True)
class Variant:
    """A way to make the step."""

    kind: str = "compiled"
    """Of engine and frozen networks; each kind has its own."""
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
VARIANTS: dict[str, Variant] = {
    "on": Variant(),
    "gating": Variant(objective={"all_samples": True}),
    "features once": Variant(objective={"features_twice": True}),
    "captions once": Variant(captions_once=False),
    "compile": Variant("eager"),
    "bf16 weights": Variant("autocast"),
    "all": Variant("autocast, eager", {"all_samples": True, "features_twice": True}, captions_once=False),
    "mask": Variant("mask"),
    "mask, pads computed": Variant("mask", pads=True),
}
ECONOMIES = ("gating", "features once", "captions once", "compile", "bf16 weights")


def step_of(built: Built, variant: Variant) -> Step:
    """A step in this way."""
    device, full = built.world.device, built.config.text.length
    objective = SpendthriftObjective(built.objective, **variant.objective) if variant.objective else built.objective
    make = TrainingStep if variant.captions_once else CaptionsByMicroBatch
    train = make(built.config, built.stage, built.world, built.text, built.null_caption, objective, built.engine)
    batch = batch_of_scenes(built.config)
    cast = variant.kind.startswith("autocast")

    def call(skip_reason: str | None = None) -> float:
        whole = rounded_up_to(full) if variant.pads else nullcontext()
        with whole, torch.autocast(device.type, torch.bfloat16, enabled=cast):
            trained = train(batch, 0, lambda loss, norm: skip_reason)
        if skip_reason is None:
            applied(trained.result)
            built.ema.update()
        return trained.means["loss"]

    return call


@contextmanager
def rounded_up_to(length: int) -> Iterator[None]:
    """Under `mask`, captions are padded to multiples of this many tokens."""
    usual, text.LENGTH_STEP = text.LENGTH_STEP, length
    try:
        yield
    finally:
        text.LENGTH_STEP = usual


def say(line: str) -> None:
    """How far it is, on stderr."""
    print(f"{time.strftime('%T')} {line}", file=sys.stderr, flush=True)


def timed(call: Step, device: torch.device) -> float:
    """Seconds of a step."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    began = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - began


def matmul_flops(device: torch.device, size: int = 4096) -> float:
    """FLOP/s of a bare matrix product in bf16."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))

    def products() -> float:
        for _ in range(10):
            a @ b
        return 0.0

    products()
    return 10 * 2 * size**3 / timed(products, device)


def flops(built: Built) -> float:
    """Of one step, as an eager one makes it."""
    with FlopCounterMode(display=False) as counter:
        step_of(built, Variant("eager"))()
    return float(counter.get_total_flops())


def parts(built: Built) -> dict[str, float]:
    """Seconds of one step by part; the engine is of no use after it."""
    clock = StepClock(built.world.device)
    watch_text(clock, built.text)
    watch_step(clock, built.objective, built.engine, built.ema)
    call = step_of(built, Variant())
    call()
    clock.seconds.clear()
    clock.enter("other")
    call()
    clock.enter("end")
    return {part: round(seconds, 3) for part, seconds in clock.seconds.items()}


class Measurement:
    """Seconds of all variants, by round.

    Args:
        config_of: a kind's config.
        rounds: of each group of kinds.
        warm_up: steps of each variant before those that count: some graphs are made again once a shape has changed.
    """

    def __init__(
        self, config_of: Callable[[str], RunConfig], stage: str, world: World, *, rounds: int, warm_up: int
    ) -> None:
        self._config_of, self._stage, self._world = config_of, stage, world
        self._rounds, self._warm_up = rounds, warm_up
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.losses: dict[str, float] = {}
        self.matmul: list[float] = []
        self.once: dict[str, Any] = {}
        """What one kind alone is asked for."""

    def measure(self, kinds: list[str]) -> None:
        """Those variants whose kinds these are, in turns."""
        kept = {kind: Built(self._config_of(kind), self._stage, self._world, begun=True) for kind in kinds}
        steps = {
            name: step_of(kept[variant.kind], variant) for name, variant in VARIANTS.items() if variant.kind in kinds
        }
        for name, step in steps.items():  # compiles
            say(f"first step of '{name}'")
            self.losses[name] = round(step("its loss is that of the first weights"), 5)
        if not self._warm_up:  # one all the same: the first update makes the files that hold the state
            next(iter(steps.values()))()
        for _ in range(self._warm_up):
            for step in steps.values():
                step()
        if "compiled" in kept:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            self.once |= {"parameters": kept["compiled"].parameters, "graphs_compiled_by_then": graphs}
        for _ in range(self._rounds):
            if "on" in steps:
                self.matmul.append(matmul_flops(self._world.device))
            for name, step in steps.items():
                self.seconds[name].append(timed(step, self._world.device))
                say(f"{name}: {self.seconds[name][-1]:.2f} s")
        if "eager" in kept:
            self.once["flops"] = flops(kept["eager"])
        if "compiled" in kept:
            self.once["parts"] = parts(kept["compiled"])

    def ratio(self, off: str, on: str) -> float:
        """Median over rounds."""
        return round(statistics.median(a / b for a, b in zip(self.seconds[off], self.seconds[on], strict=True)), 3)

    def summary(self) -> dict[str, Any]:
        """All there is to say."""
        shares = [self.once["flops"] / s / bare for s, bare in zip(self.seconds["on"], self.matmul, strict=True)]
        return {
            **self.once,
            "step_s": round(statistics.median(self.seconds["on"]), 3),
            "off": {name: self.ratio(name, "on") for name in ECONOMIES},
            "ratio_vs_all_off": self.ratio("all", "on"),
            "text_padding": {
                "attend / mask": self.ratio("on", "mask"),
                "padding": self.ratio("mask, pads computed", "mask"),
            },
            "matmul_gflops": round(statistics.median(self.matmul) / 1e9),
            "share_of_matmul": round(statistics.median(shares), 3),
            "losses": self.losses,
            "seconds": {name: [round(second, 3) for second in taken] for name, taken in self.seconds.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=["middle", "xxl"], default="middle", help="of the networks")
    parser.add_argument("--small", action="store_true", help="small networks instead, to try the code")
    parser.add_argument("--rounds", type=int, default=None, help="5; for XXL 1")
    given = parser.parse_args()
    os.chdir(ROOT)
    quiet(rank=0)
    size = {"middle": MIDDLE, "xxl": XXL}[given.size]
    size = setting.small(size) if given.small else size
    config, stage = first_stage(size)
    full = given.size == "xxl"
    rounds = given.rounds or (1 if full else 5)

    def config_of(kind: str) -> RunConfig:
        return validate_config(merge(config.model_dump(mode="json"), KINDS[kind]), CONFIG)

    with joined_world() as world:
        measurement = Measurement(config_of, stage, world, rounds=rounds, warm_up=0 if full else 2)
        for kinds in [[kind] for kind in KINDS] if full else [list(KINDS)]:
            measurement.measure(kinds)
            gc.collect()
        print(json.dumps({**about(stage, size), "rounds": rounds, **measurement.summary()}, indent=1))


if __name__ == "__main__":
    main()
