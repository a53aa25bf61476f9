"""One optimizer step of the full-size model, as training makes it, on a machine without a GPU.

    python tests/benchmarks/xxl.py            # make xxl: a machine of 24 GiB, 18 GB of its disk, 4 minutes
    python tests/benchmarks/xxl.py --small    # the same on small networks, in seconds: to try the code

PixelGen-XXL/16 at 256 px from configs/pixelgen_xxl.yaml, with what it takes to fit printed as `overrides`: two
micro-batches of one drawn scene each, FSDP2, checkpointed blocks, the language model released once the captions are
encoded, moments and average in mapped files.

Qwen3-1.7B, VGG16 and DINOv2-B have their full size and random weights, made once under .cache/xxl: the losses mean
nothing, their cost does. Of the two samples one is over the gate, so that LPIPS and P-DINO see it.

Prints one JSON object: what the step came to; seconds and peaks of memory by part (`steps/clock.py`,
`steps/memory.py`); bytes in mapped files. `moved` compares the masters with the average before it takes them in, which
is where they began: Adam's first step is the learning rate times the gradient's sign. The head and adaLN begin at zero,
so the first image is exactly zero, and only what does not lie behind a zero has a gradient: of the image blocks those
up to alignment's.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from steps import setting
from steps.applied import applied
from steps.clock import StepClock, watch_step, watch_text
from steps.memory import MemoryPeaks
from steps.setting import ROOT, XXL, Built, about, batch_of_scenes, first_stage

from launch.process import joined_world, quiet
from t2i.config.run import RunConfig
from t2i.distributed import World
from t2i.engine.ema import Ema
from t2i.engine.engine import Engine
from t2i.train.guard import Guard
from t2i.train.step import TrainingStep, learning_rate

WATCHED = (
    "denoiser.patch_up.weight",
    "denoiser.text_blocks.0.adaln.weight",
    "denoiser.blocks.0.adaln.weight",
    "denoiser.head.weight",
    "projector.layers.0.weight",
)


def moved(engine: Engine, ema: Ema) -> dict[str, Any]:
    """How far the masters are from the average: their largest change."""
    largest = {name: float((it.param - ema.params[name]).abs().max()) for name, it in engine.shards.items()}
    return {
        "tensors": len(largest),
        "tensors_moved": sum(change > 0 for change in largest.values()),
        "largest": max(largest.values()),
        **{name: largest[name] for name in WATCHED},
    }


def mapped_bytes(engine: Engine, ema: Ema) -> int:
    """Of moments and average in files."""
    moments = [moment for shard in engine.shards.values() for moment in shard.state.values()]
    return sum(it.nbytes for it in (*moments, *ema.params.values()) if it.is_shared())


def measure(config: RunConfig, stage: str, world: World) -> dict[str, Any]:
    """A stage's networks and its first step."""
    clock = StepClock(world.device)
    with MemoryPeaks(lambda: clock.part) as memory:
        with clock.during("build"):
            built = Built(config, stage, world)
            watch_text(clock, built.text)
            watch_step(clock, built.objective, built.engine, built.ema)
            engine, ema = built.engine, built.ema
            train = TrainingStep(config, stage, world, built.text, built.null_caption, built.objective, engine)
        trained = train(batch_of_scenes(config), 0, Guard(config.spike_guard).skip_update)
        with clock.during("comparing"):
            changes = moved(engine, ema)
        applied(trained.result)
        ema.update()
        clock.enter("end")
    total = sum(clock.seconds.values())
    return {
        "parameters": built.parameters,
        "losses": {name: value for name, value in trained.means.items() if "_t0" not in name},
        "grad_norm": trained.result.grad_norm,
        "learning_rate": learning_rate(config.optimizer, 0, config.train.steps, config.optimizer.lr),
        "moved": changes,
        "seconds": {part: round(seconds, 2) for part, seconds in clock.seconds.items()} | {"total": round(total, 2)},
        "memory_gib": memory.gib(),
        "mapped_bytes": mapped_bytes(engine, ema),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small networks, to try the code")
    small = parser.parse_args().small
    os.chdir(ROOT)
    quiet(rank=0)
    size = XXL.with_({"text": {"reload_every_step": True}})
    size = setting.small(size) if small else size
    config, stage = first_stage(size)
    with joined_world() as world:
        print(json.dumps({**about(stage, size), **measure(config, stage, world)}, indent=1))


if __name__ == "__main__":
    main()
