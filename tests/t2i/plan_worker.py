"""Rank of the test that measures static memory: bytes of the demo's model on each engine, in both dtypes, by component.

Networks and engines are built as the trainer builds them. Measured are storages of tensors, halfway through the second
optimizer step, when moments are there and gradients wait; of each component the rank with the most counts.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from launch.process import joined_world, quiet
from t2i.build import build_network, build_text
from t2i.config.loading import validate_config
from t2i.config.run import RunConfig
from t2i.diffusion.objective import Objective
from t2i.diffusion.perceptual import PatchFeatures
from t2i.distributed import World
from t2i.engine.ema import Ema
from t2i.engine.engine import BUCKET_NUMEL, Engine
from t2i.models.text import TextEncoder
from t2i.plan.memory import CAPTION_CACHE, FP32, engine_of
from t2i.train.build import build_engine, build_objective

ENGINES = [{"zero_stage": stage} for stage in range(4)] + [{"name": "fsdp"}]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CPU = torch.device("cpu")


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Bytes of each storage by its address; the meta device holds nothing."""
    found = {}
    for tensor in tensors:
        local = getattr(tensor, "_local_tensor", tensor)
        if local is not None and local.device.type == "cpu":
            storage = local.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found


def live() -> dict[int, int]:
    """Storages of all tensors that Python knows, and of their gradients."""
    gc.collect()
    tensors = [it for it in gc.get_objects() if issubclass(type(it), Tensor)]
    return storages([*tensors, *(tensor.grad for tensor in tensors if tensor.is_leaf)])


class Account:
    """What has come since it was opened, each storage under the first component that claims it."""

    def __init__(self) -> None:
        self._before = live()
        self._claimed: set[int] = set()
        self.parts: dict[str, int] = {}

    def claim(self, name: str, found: dict[int, int]) -> None:
        new = {at: size for at, size in found.items() if at not in self._claimed and self._before.get(at) != size}
        self._claimed |= new.keys()
        self.parts[name] = sum(new.values())


def micro_step(engine: Engine, config: RunConfig, text_width: int, dtype: torch.dtype) -> None:
    text = torch.randn(1, config.text.length, text_width, dtype=dtype)
    image, projected = engine.network(torch.randn(1, 3, *config.data.size), torch.rand(1), text)
    engine.backward(image.square().mean() + projected.float().square().mean())


def outside(config: RunConfig, text: TextEncoder, objective: Objective, account: Account) -> dict[str, int]:
    """What a rank holds besides its engine, by the planner's components."""
    account.claim("text encoder", storages(text.parameters()))
    text([str(number) for number in range(config.text.cache)])
    account.claim(CAPTION_CACHE, storages(text._cache.values()))
    account.claim("perceptual networks", storages(objective.image_distance.parameters()))
    averaged = build_network(config, text.width, objective.patch_features).denoiser.to(CPU, text.net.dtype)
    account.claim("sampling copy", storages(averaged.parameters()))
    return account.parts


def inside(config: RunConfig, text_width: int, features: PatchFeatures, world: World) -> dict[str, int]:
    """What a rank holds of its engine, by the planner's components."""
    dtype, account = DTYPES[config.engine.dtype], Account()
    engine = build_engine(config, build_network(config, text_width, features), world, dtype)
    ema = Ema(engine.shards, config.ema.decay)
    for _ in range(2):
        micro_step(engine, config, text_width, dtype)
    engine.step(lambda muon: 1e-3, lambda norm: None)
    ema.update()
    micro_step(engine, config, text_width, dtype)

    parameters, shards = list(engine.network.parameters()), engine.shards.values()
    account.claim("masters", storages(shard.param for shard in shards))
    account.claim("moments", storages(moment for shard in shards for moment in shard.state.values()))
    account.claim("ema", storages(ema.params.values()))
    account.claim("weights", storages([*parameters, *(getattr(p, "ds_tensor", None) for p in parameters)]))
    everything = live()
    account.claim("bucket", {at: size for at, size in everything.items() if size >= FP32 * BUCKET_NUMEL})
    account.claim("gradients", everything)  # and whatever else there is

    micro_step(engine, config, text_width, dtype)  # a step is ended before its engine is
    engine.step(lambda muon: 1e-3, lambda norm: None)
    engine.close()
    return account.parts


def main() -> None:
    """Argument: a file with a stage as JSON."""
    tree = json.loads(Path(sys.argv[1]).read_text())
    measured = {}
    with joined_world() as world:
        quiet(world.rank)
        torch.set_num_threads(1)
        for name, dtype in DTYPES.items():
            config, account = validate_config(tree, "test"), Account()
            text, objective = (
                build_text(config, CPU, dtype),
                build_objective(config.objective, config.model.prediction, CPU, dtype, compiled=False),
            )
            assert objective.patch_features is not None
            frozen = outside(config, text, objective, account)
            for engine in ENGINES:
                config = validate_config({**tree, "engine": {**engine, "dtype": name}}, "test")
                parts = world.gather({**frozen, **inside(config, text.width, objective.patch_features, world)})
                measured[f"{engine_of(config.engine)} {name}"] = {
                    part: max(of_rank[part] for of_rank in parts) for part in parts[0]
                }
        if world.is_rank0:
            print(json.dumps(measured))


if __name__ == "__main__":
    main()
