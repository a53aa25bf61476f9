"""A small state cut into the slices that ranks would hold, and checkpoints of it, for the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from t2i.engine.checkpoint import CheckpointWriter
from t2i.engine.engine import Shard


def cut(ranks: int, seed: int = 0) -> list[dict[str, Shard]]:
    """Two parameters cut into the slices that `ranks` ranks would hold; some ranks hold nothing of one."""
    generator = torch.Generator().manual_seed(seed)
    whole = {"a": torch.randn(7, 10, generator=generator), "b": torch.randn(3, generator=generator)}
    shards: list[dict[str, Shard]] = []
    for rank in range(ranks):
        held = {}
        for name, tensor in whole.items():
            flat = tensor.flatten()
            start, stop = rank * len(flat) // ranks, (rank + 1) * len(flat) // ranks
            held[name] = Shard(tensor.shape, start, flat[start:stop].clone(), {"exp_avg": flat[start:stop] * 2})
        shards.append(held)
    return shards


def ema_of(shards: dict[str, Shard]) -> dict[str, torch.Tensor]:
    return {name: shard.param * 3 for name, shard in shards.items()}


def write(folder: Path, step: int, ranks: int = 3, keep: int = 9, attempt_id: str = "x") -> None:
    writers = [
        CheckpointWriter(folder, rank=r, world_size=ranks, attempt_id=attempt_id, keep=keep) for r in range(ranks)
    ]
    for writer, shards in zip(writers, cut(ranks), strict=True):
        writer.save(step, shards, ema_of(shards), {"batches": step})
    for writer in writers:
        writer.wait()
