"""For test_data: two ranks whose loaders do not fare alike. Usage: data_iterator_ranks.py FOLDER CASE"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.lane import Source
from data.loader import Loader
from data.sample import ImageSettings
from data.shards.index import open_index
from data.store import open_store
from t2i.config.run import RunConfig
from t2i.distributed import World
from t2i.train import data as data_module
from t2i.train.data import DataIterator


def main(folder: Path, case: str) -> None:
    """Read until something happens; rank 0 prints what each rank met, and where its state is."""
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    data_module._ROUND_S = 0.05
    index = open_index(open_store(str(folder / "shards")), "source", notice=lambda _: None)
    loader = Loader(
        [Source(index)], ImageSettings(8), batch_size=4, lanes=2, seed=0, stage="s", rank=world.rank,
        world_size=world.size, workers=1, shuffle_block=64, buffer_bytes=1 << 30,
    )  # fmt: skip
    whole = loader.take

    def take(within_s: float) -> Any:
        if world.rank == 1 and loader._consumed == 3:
            raise KeyError("odd")
        return whole(within_s)

    if case == "fault":
        loader.take = take
    config = RunConfig.model_validate({"root": folder, "name": "run"})
    if world.is_rank0:
        config.directory.mkdir()
    iterator = DataIterator(loader, world, config, "s", 0, [])
    met, steps = "", 0
    try:
        while steps < 20:
            iterator.next(steps + 1)
            steps += 1
    except Exception as error:
        met = f"{type(error).__name__}: {error}"
    found = world.gather({"met": met, "steps": steps, "batch": iterator.state_dict()["batch"]})
    if world.is_rank0:
        print(json.dumps(found))
    iterator.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
