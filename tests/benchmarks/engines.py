"""Every engine on a small PixelGen: milliseconds a step, memory at rest, and the cost of the EMA.

    python tests/benchmarks/engines.py [--ranks 2] [--dtype bf16]

Prints one JSON object. For each engine, of one rank: `step_ms` and `ema_ms` (medians), and bytes a parameter of the
model at rest, between steps: what the engine itself holds (`static`, of which `shards` are masters and moments) and
what the EMA adds (`ema`). `plain` is PyTorch without an engine: fp32 weights, AdamW, arithmetic in the dtype by
rounding the weights. Bytes are of all storages that are alive, each counted once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from steps.applied import applied
from torch.func import functional_call

from launch.process import joined_world, quiet
from t2i.build import TrainingNetwork
from t2i.config.run import EngineConfig, RunConfig
from t2i.engine.ema import Ema
from t2i.models.pixelgen import PixelGen
from t2i.train.build import build_engine

SIDE, PATCH, TEXT, TEXT_WIDTH, BATCH, STEPS, WARM_UP = 32, 4, 16, 64, 8, 12, 4
ENGINES = {
    "zero0": EngineConfig(zero_stage=0),
    "zero1": EngineConfig(zero_stage=1),
    "zero2": EngineConfig(zero_stage=2),
    "zero3": EngineConfig(zero_stage=3),
    "fsdp": EngineConfig(name="fsdp"),
    "fsdp, not resharded": EngineConfig(name="fsdp", reshard_after_forward=False),
    "fsdp, checkpointed": EngineConfig(name="fsdp", activation_checkpointing=True),
}


def alive() -> int:
    """Bytes of all tensors' storages."""
    gc.collect()
    sizes: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.layout == torch.strided:
            for tensor in (thing, thing.grad) if thing.is_leaf else (thing,):
                if tensor is not None and type(tensor) in (torch.Tensor, torch.nn.Parameter):
                    storage = tensor.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def network() -> TrainingNetwork:
    torch.manual_seed(0)
    sizes = {"width": 384, "depth": 6, "heads": 6, "text_depth": 1, "patch_size": PATCH, "bottleneck": 64}
    return TrainingNetwork(PixelGen(**sizes, text_width=TEXT_WIDTH, text_length=TEXT, repa_layer=1), None)


def batch(size: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(size, 3, SIDE, SIDE), torch.rand(size), torch.randn(size, TEXT, TEXT_WIDTH)


def milliseconds(run: Callable[[], object]) -> float:
    dist.barrier()
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3


def measure(step: Callable[[], object], average: Callable[[], object]) -> dict[str, float]:
    times = [(milliseconds(step), milliseconds(average)) for _ in range(STEPS)][WARM_UP:]
    step_ms, ema_ms = (statistics.median(column) for column in zip(*times, strict=True))
    return {"step_ms": round(step_ms, 1), "ema_ms": round(ema_ms, 2)}


def plain(dtype: torch.dtype, size: int) -> dict[str, float]:
    """One process without an engine, on one rank's samples."""
    before = alive()
    module = network()
    named = dict(module.named_parameters())
    parameters = sum(p.numel() for p in named.values())
    optimizer = torch.optim.AdamW(named.values(), lr=1e-4, fused=True)
    average = [p.detach().clone() for p in named.values()]
    inputs = batch(size)

    def step() -> None:
        optimizer.zero_grad()
        image, _ = functional_call(module, {n: p.to(dtype) for n, p in named.items()}, inputs)
        (image - inputs[0]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()

    found = measure(step, lambda: torch._foreach_lerp_(average, [p.detach() for p in named.values()], 1e-4))
    optimizer.zero_grad()
    ema = sum(a.numel() * 4 for a in average) / parameters
    return found | {"static": round((alive() - before) / parameters - ema, 2), "ema": ema}


def engine(config: EngineConfig, dtype: torch.dtype, size: int, world) -> dict[str, float]:
    before = alive()
    run = RunConfig(engine=config)
    run.train.batch_size, run.train.micro_batch_size = size * world.size, size
    module = network()
    parameters = sum(p.numel() for p in module.parameters())
    built = build_engine(run, module, world, dtype)
    del module
    inputs = batch(size)
    ema = Ema(built.shards, 0.9999)

    def step() -> None:
        image, _ = built.network(*inputs)
        built.backward((image - inputs[0]).square().mean())
        applied(built.step(lambda _: 1e-4, lambda _: None))

    found = measure(step, ema.update)
    average = sum(value.numel() * 4 for value in ema.params.values())
    shards = sum(
        tensor.numel() * 4 for shard in built.shards.values() for tensor in (shard.param, *shard.state.values())
    )
    held = alive() - before - average
    built.close()
    return found | {
        "static": round(held / parameters, 2),
        "shards": round(shards / parameters, 2),
        "ema": round(average / parameters, 2),
    }


def worker(dtype: torch.dtype) -> None:
    with joined_world() as world:
        quiet(world.rank)
        torch.set_num_threads(1)
        size = BATCH // world.size
        result: dict = {"ranks": world.size, "dtype": str(dtype).removeprefix("torch.")}
        result["parameters"] = sum(p.numel() for p in network().parameters())
        result["plain"] = plain(dtype, size)
        for name, config in ENGINES.items():
            result[name] = engine(config, dtype, size, world)
            gc.collect()
        if world.is_rank0:
            print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        worker(torch.bfloat16 if arguments.dtype == "bf16" else torch.float32)
        return
    root = Path(__file__).parents[2]
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}", __file__]
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(root)} | os.environ
    done = subprocess.run(
        [sys.executable, *command, "--dtype", arguments.dtype],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    print(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
