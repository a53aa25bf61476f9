"""Rank of the test of the dry run: what it changes, and what comes of the steps after it; peak memory on the way.

Argument: a file with a stage as JSON.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from launch.process import joined_world, quiet
from t2i.build import build_network, build_text
from t2i.config.loading import validate_config
from t2i.config.run import RunConfig
from t2i.distributed import World
from t2i.engine.ema import Ema
from t2i.train.build import build_engine, build_objective
from t2i.train.preflight import dry_run, estimate, made_up_batch, no_update
from t2i.train.step import TrainingStep

CPU, STAGE = torch.device("cpu"), "stage"
ENGINES = {"zero1 bf16": {"dtype": "bf16"}, "zero1 fp32": {"dtype": "fp32"}, "fsdp": {"name": "fsdp", "dtype": "bf16"}}


class Trainer:
    """A stage's networks and its step, without data and checkpoints."""

    def __init__(self, config: RunConfig, world: World) -> None:
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.engine.dtype]
        self.config, self.world = config, world
        self.text = build_text(config, CPU, dtype)
        self.objective = build_objective(config.objective, config.model.prediction, CPU, torch.float32, compiled=False)
        self.averaged = build_network(config, self.text.width, None).denoiser.to(CPU, dtype)
        self.dtype = dtype

    @property
    def frozen_bytes(self) -> int:
        networks = self.text, self.objective.image_distance, self.averaged
        return sum(p.numel() * p.itemsize for network in networks for p in network.parameters())

    def begin(self) -> None:
        torch.manual_seed(0)
        network = build_network(self.config, self.text.width, self.objective.patch_features)
        self.engine = build_engine(self.config, network, self.world, self.dtype)
        self.ema = Ema(self.engine.shards, 0.9)
        null_caption = self.text.null_caption()
        self.train = TrainingStep(self.config, STAGE, self.world, self.text, null_caption, self.objective, self.engine)

    def step(self, step: int) -> None:
        batch = made_up_batch(self.config, STAGE, step, self.world)
        trained = self.train(batch, step, lambda loss, norm: None)
        assert trained.result.vetoed is None
        self.ema.update()

    def state(self) -> dict[str, str]:
        """Everything that a step may change, hashed."""
        shards = self.engine.shards
        weights = [getattr(p, "_local_tensor", p) for p in self.engine.network.parameters()]
        tensors = {
            "masters": [shard.value for shard in shards.values()],
            "moments": [moment for shard in shards.values() for moment in shard.state.values()],
            "ema": list(self.ema.values.values()),
            "weights": weights,
            "torch's generator": [torch.get_rng_state()],
        }
        others = {
            "optimizer_steps": self.engine.optimizer_steps,
            "random": random.getstate(),
            "numpy": np.random.get_state(),
        }
        return {name: digest(found) for name, found in tensors.items()} | {n: repr(it) for n, it in others.items()}


def digest(tensors: list[Tensor]) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return whole.hexdigest()


def peak_bytes(record: profile) -> int:
    """Most bytes of tensors at once of those made meanwhile, counted by PyTorch's allocator."""
    events = [it for it in record.profiler.kineto_results.events() if it.name() == "[memory]"]
    changes = [it.nbytes() for it in sorted(events, key=lambda it: it.start_ns())]
    return int(np.cumsum(changes).max())


def outcome(config: RunConfig, world: World) -> dict:
    """Two steps, a dry run, two steps; and the same without the dry run."""
    trainer = Trainer(config, world)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        trainer.begin()
        trainer.step(0)
    trainer.step(1)
    before, terms = trainer.state(), trainer.train(made_up_batch(config, STAGE, 2, world), 2, no_update).means
    sentence = dry_run(trainer.train, config, STAGE, world)
    after = trainer.state()
    for step in (2, 3):
        trainer.step(step)
    end = trainer.state()
    trainer.engine.close()
    trainer.begin()
    for step in range(4):
        trainer.step(step)
    without = trainer.state()
    trainer.engine.close()
    found = estimate(config, world.size, trainer.dtype)
    return {
        "changed": [name for name in before if before[name] != after[name]],
        "changed later": [name for name in end if end[name] != without[name]],
        "steps change": [name for name in before if before[name] != end[name]],
        "terms": terms,
        "sentence": sentence,
        "peak": trainer.frozen_bytes + peak_bytes(record),
        "least": found.least,
        "expected": found.expected,
    }


def main() -> None:
    tree = json.loads(Path(sys.argv[1]).read_text())
    outcomes = {}
    with joined_world() as world:
        quiet(world.rank)
        torch.set_num_threads(1)
        for name, engine in ENGINES.items():
            everywhere = world.gather(outcome(validate_config({**tree, "engine": engine}, "test"), world))
            outcomes[name] = everywhere
        if world.is_rank0:
            print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
