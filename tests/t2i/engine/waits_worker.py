"""How often an optimizer step of each engine makes its host wait for the device."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "helpers"))
from cases import LR, Case, build, loss_of, share
from host_reads import HostReads

from launch.process import joined_world, quiet


def waits(case: Case) -> int:
    engine = build(case)
    parts = share(case)
    reads = HostReads()
    for watched in (nullcontext(), reads):  # some things happen once
        with watched:
            for part in parts:
                engine.backward(loss_of(engine.network, 0, part, len(parts)))
            engine.step(lambda _: LR, lambda _: None)
    engine.close()
    return len(reads.found)


def main() -> None:
    with joined_world() as world:
        quiet(world.rank)
        torch.set_num_threads(1)
        print(json.dumps({name: waits(Case(name, torch.bfloat16, 2)) for name in ("fsdp", "zero1")}))


if __name__ == "__main__":
    main()
