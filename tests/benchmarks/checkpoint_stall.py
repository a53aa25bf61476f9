"""What a checkpoint costs training: the stall of a save, against saving in the training path.

    python tests/benchmarks/checkpoint_stall.py      # about 3 minutes

Two ranks train the denoiser of configs/demo.yaml under ZeRO-1, as it is and twice as wide (the perceptual networks and
the text encoder are left out, so real steps take longer). Every save is of the same state; `slow` is a disk that makes
20 MB/s a rank durable. Seconds are those of the slowest rank, medians over the saves.

stall_s             `CheckpointWriter.save`, after which training goes on; the first one apart
durable_s           until the checkpoint is committed, while no step is trained; save_mb_s is by this
torch_save_s        `torch.save` of the same tensors, made durable, and a barrier: all of it is stall
save_checkpoint_s   DeepSpeed's own, which makes nothing durable and holds no EMA: all of it is stall
step_s              a training step, `step_beside_s` while a checkpoint is being written
skipped             of 8 saves, one a step, those that overtook the one before
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from steps.applied import applied
from torch import Tensor

from launch.process import joined_world, quiet
from t2i.build import build_network, choose_dtype
from t2i.config.loading import load_config
from t2i.distributed import World
from t2i.engine.checkpoint import Checkpoint, CheckpointWriter, moments_of, newest, params_of
from t2i.engine.ema import Ema
from t2i.train.build import build_engine

ROOT = Path(__file__).parents[2]
SLOW_BYTES_S = 20e6
SAVES = 5
TEXT_WIDTH = 384


class Training:
    """Steps of a model, and its checkpoints."""

    def __init__(self, world: World, scale: int) -> None:
        config = load_config(ROOT / "configs/demo.yaml")
        model = config.model.model_copy(
            update={"width": scale * config.model.width, "heads": scale * config.model.heads}
        )
        config = config.model_copy(update={"model": model})
        self.world, self.dtype = world, choose_dtype("auto", world.device)
        network = build_network(config, TEXT_WIDTH, None)
        self.parameters = sum(p.numel() for p in network.parameters())
        self.engine = build_engine(config, network, world, self.dtype)
        self.ema = Ema(self.engine.shards, 0.99)
        samples = config.train.batch_size // world.size
        self.image = torch.randn(samples, 3, *config.data.size, dtype=self.dtype)
        self.text = torch.randn(samples, config.text.length, TEXT_WIDTH, dtype=self.dtype)

    def step(self) -> None:
        t = torch.rand(len(self.image))
        predicted, _ = self.engine.network(self.image, t, self.text)
        self.engine.backward((predicted.float() - self.image.float()).square().mean())
        applied(self.engine.step(lambda muon: 1e-4, lambda norm: None))
        self.ema.update()

    def tensors(self) -> dict[str, Any]:
        shards = self.engine.shards
        return {"param": params_of(shards), "ema": self.ema.params, **moments_of(shards)}


def slowest(world: World, seconds: float) -> float:
    return max(world.gather(seconds))


def timed(world: World, call: Callable[[], Any]) -> float:
    world.barrier()
    began = time.perf_counter()
    call()
    return slowest(world, time.perf_counter() - began)


def median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def slow_fsync(descriptor: int, fsync: Callable[[int], None] = os.fsync) -> None:
    time.sleep(os.fstat(descriptor).st_size / SLOW_BYTES_S)
    fsync(descriptor)


def torch_save(training: Training, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    with (path / f"{training.world.rank}.pt").open("wb") as file:
        torch.save(training.tensors(), file)
        file.flush()
        os.fsync(file.fileno())
    training.world.barrier()


def new_writer(training: Training, folder: Path) -> CheckpointWriter:
    world = training.world
    return CheckpointWriter(
        folder, rank=world.rank, world_size=world.size, attempt_id=folder.name, keep=1, gather=world.gather
    )


def saving(training: Training, folder: Path, saves: int) -> dict[str, Any]:
    """Saves one after the other, each of them waited for; steps are trained while every second one is written."""
    world, writer = training.world, new_writer(training, folder)
    began = time.perf_counter()
    writer.allocate(training.engine.shards, training.ema.params)
    reserve_s = slowest(world, time.perf_counter() - began)
    stalls, durable, beside = [], [], []
    for number in range(1, saves + 1):
        training.step()
        world.barrier()
        began = time.perf_counter()
        outcome = writer.save(number, training.engine.shards, training.ema.params, {})
        assert outcome.started
        stalls.append(slowest(world, outcome.stall_s))
        while number % 2 and max(world.gather(writer._thread.is_alive())):
            beside.append(timed(world, training.step))
        assert writer.wait() == number
        if number % 2 == 0:
            durable.append(slowest(world, time.perf_counter() - began))
    assert writer.take_events() == []
    return {
        "reserve_s": round(reserve_s, 4),
        "first_stall_s": round(stalls[0], 4),
        "stall_s": median(stalls[1:]),
        "durable_s": median(durable),
        "step_beside_s": median(beside),
    }


def overtaking(training: Training, folder: Path) -> dict[str, Any]:
    """Saves after every step."""
    writer, stalls = new_writer(training, folder), []
    for number in range(1, 9):
        training.step()
        training.world.barrier()  # the wait for a slower rank is not the save's
        outcome = writer.save(number, training.engine.shards, training.ema.params, {}, may_skip=True)
        stalls.append(slowest(training.world, outcome.stall_s))
    skipped = set(training.world.gather(writer.skipped))
    assert len(skipped) == 1, "ranks disagree"
    writer.wait()
    return {"skipped": skipped.pop(), "largest_stall_s": round(max(stalls), 4)}


def loading(training: Training, folder: Path, size: int) -> dict[str, float]:
    world = training.world
    path = newest(folder)[0]
    assert path is not None
    checked = [timed(world, Checkpoint(path).verify) for _ in range(3)]
    read = [timed(world, lambda: Checkpoint(path).read(training.engine.shards, training.tensors())) for _ in range(3)]
    return {"verify_mb_s": round(size / 1e6 / median(checked)), "read_mb_s": round(size / 1e6 / median(read))}


def measure(world: World, folder: Path, scale: int) -> dict[str, Any]:
    training = Training(world, scale)
    for _ in range(2):
        training.step()
    step_s = median([timed(world, training.step) for _ in range(5)])
    shared: list[Tensor] = [tensor for kind in training.tensors().values() for tensor in kind.values()]
    size = sum(world.gather(sum(4 * tensor.numel() for tensor in shared)))
    out: dict[str, Any] = {"parameters": training.parameters, "state_mb": round(size / 1e6), "step_s": step_s}
    fast = saving(training, folder / "fast", SAVES)
    fast["torch_save_s"] = median([timed(world, lambda: torch_save(training, folder / "torch")) for _ in range(3)])
    deepspeed = training.engine._engine
    plain = [timed(world, lambda: deepspeed.save_checkpoint(str(folder / "deepspeed"), tag="a")) for _ in range(3)]
    fast["save_checkpoint_s"] = median(plain)
    fast |= {"save_mb_s": round(size / 1e6 / fast["durable_s"]), **loading(training, folder / "fast", size)}
    fsync = os.fsync
    os.fsync = slow_fsync
    try:
        slow = saving(training, folder / "slow", 2)
        slow |= overtaking(training, folder / "overtaken")
        slow["torch_save_s"] = round(timed(world, lambda: torch_save(training, folder / "torch")), 4)
    finally:
        os.fsync = fsync
    for kind, numbers in (("fast", fast), ("slow", slow)):
        out[kind] = numbers | {"stall_in_steps": round(numbers["stall_s"] / step_s, 3)}
    training.engine.close()
    world.barrier()
    if world.is_rank0:
        shutil.rmtree(folder)
    return out


def worker(folder: Path) -> None:
    with joined_world() as world:
        quiet(world.rank)
        results = {name: measure(world, folder / name, scale) for name, scale in (("demo", 1), ("twice as wide", 2))}
        if world.is_rank0:
            print(json.dumps({"world_size": world.size, "device": world.device.type, **results}, indent=1))


def main() -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, folder]
        environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *command], check=True, env=environment)


if __name__ == "__main__":
    if "RANK" in os.environ:
        worker(Path(sys.argv[1]))
    else:
        main()
