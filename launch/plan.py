"""What a run will need, before anything is spent: parameters, memory, FLOPs, days, bandwidth, disk.

    python launch/plan.py --config configs/pixelgen_xxl.yaml --gpus 8 --gpu h800
    python launch/plan.py --gpus 64 --gpu h200 --mfu 0.3 --train.micro_batch_size 16    # any field of the config, too
    python launch/plan.py --gpus 8 --gpu h800 --reference                               # as the public code computes
    python launch/plan.py --gpus 8 --gpu h800 --json

A few seconds of arithmetic: no weights, no data, no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json

from launch.cli import config_parser, read_config
from launch.process import main
from launch.train import DEFAULT_CONFIG
from t2i.plan.choice import Assumptions
from t2i.plan.command import plan as plan_run
from t2i.plan.command import tables
from t2i.plan.memory import GPUS


def plan() -> None:
    """Parse the command line and print the plan."""
    parser = config_parser(__doc__, DEFAULT_CONFIG)
    parser.add_argument("--gpus", type=int, default=8, help="GPUs in all, over all machines")
    parser.add_argument("--gpu", default="h800", help=f"their model: {', '.join(GPUS)}")
    utilisation = "share of the peak that the step reaches, over all its FLOPs; by default the paper's"
    parser.add_argument("--mfu", type=float, default=0.22, help=utilisation)
    parser.add_argument("--sample_kb", type=float, default=100.0, help="mean KB of a sample")
    parser.add_argument("--reference", action="store_true", help="count FLOPs and memory as the public code needs them")
    parser.add_argument("--json", action="store_true", help="print JSON in bytes, seconds and FLOPs")
    config, options = read_config(parser, sys.argv[1:])
    given = Assumptions.from_config(
        options["gpus"], options["gpu"], options["mfu"], 1000 * options["sample_kb"], options["reference"]
    )
    found = plan_run(config, given)
    print(json.dumps(found, indent=1) if options["json"] else tables(found))


if __name__ == "__main__":
    main(plan)
