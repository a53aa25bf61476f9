"""What the training jobs share: command line, processes, curriculum."""

from __future__ import annotations

import sys

from launch.arguments import parse
from launch.departure import departure
from launch.process import joined_world
from t2i.train.curriculum import run

DEFAULT_CONFIG = "configs/pixelgen_xxl.yaml"


def train(description: str, only: int | None, default_config: str = DEFAULT_CONFIG) -> None:
    """Parse the command line, join the ranks, and train one stage (`only`, from 0) or all."""
    config = parse(description.splitlines()[0], default_config, sys.argv[1:])
    departure.limit(config.limits.wall_clock_minutes)

    def leave() -> str | None:
        departure.listen()  # once there is something to save
        return departure.reason

    with joined_world() as world:
        try:
            run(config, world, only, leave)
        finally:
            departure.settle()
