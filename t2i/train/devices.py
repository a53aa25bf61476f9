"""What a run's ranks compute on, in words."""

from __future__ import annotations

import os
from collections import Counter

import torch

from t2i.build import choose_dtype
from t2i.train.processes import World


def describe_devices(world: World) -> str:
    """Such as "8 x NVIDIA H100 80GB HBM3", or "CPU: 2 cores, fast bf16". A collective."""
    if world.device.type == "cuda":
        mine = torch.cuda.get_device_name(world.device)
    else:
        fast = choose_dtype("auto", world.device) == torch.bfloat16
        mine = f"CPU: {len(os.sched_getaffinity(0))} cores, {'fast' if fast else 'no fast'} bf16"
    counts = Counter(world.gather(mine))
    if counts == {mine: 1} and world.device.type == "cpu":
        return mine
    return ", ".join(f"{count} x {name}" for name, count in counts.items())
