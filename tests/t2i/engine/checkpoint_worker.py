"""Two real ranks, of which rank 1 has a slow disk: both begin and skip the same saves. Argument: a folder."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from t2i.distributed import World
from t2i.engine.checkpoint import CheckpointWriter, checkpoints
from t2i.engine.engine import Shard


def main() -> None:
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    folder = Path(sys.argv[1])
    if world.rank == 1:
        fsync = os.fsync
        os.fsync = lambda fd: (time.sleep(0.2), fsync(fd))[1]
    value = torch.full((10,), float(world.rank))
    shards = {"a": Shard(torch.Size([20]), 10 * world.rank, value, {})}
    writer = CheckpointWriter(
        folder, rank=world.rank, world_size=world.size, attempt_id="x", keep=99, gather=world.gather
    )
    begun, stalls = [], []
    for step in range(1, 31):
        time.sleep(0.03 * (world.rank == step % 2))
        saving = writer.save(step, shards, {"a": value}, {}, may_skip=step < 30)
        begun.append(saving.started)
        if step < 30:
            stalls.append(saving.stall_s)
    committed = writer.wait()
    (told,) = {tuple(steps) for steps in world.gather([n for n, yes in enumerate(begun, 1) if yes])}
    outcome = {
        "begun": told,
        "skipped": world.gather(writer.skipped),
        "committed": world.gather(committed),
        "stall_s": max(world.gather(max(stalls))),
        "there": [int(path.name[5:]) for path in checkpoints(folder)],
        "events": len(writer.take_events()),
    }
    if world.is_rank0:
        print(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
