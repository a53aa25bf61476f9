"""Compare runs: which settings differ, what training cost, and the losses and scores that it reached.

    python launch/compare.py runs/prove runs/prove_wider
    python launch/compare.py runs/prove-0 runs/prove-1 runs/prove-2 runs/wider-0 runs/wider-1 runs/wider-2
    python launch/compare.py runs/a runs/b --out compared           # and curves and images, in compared/compare.html

Runs of the same code whose settings differ in the seed alone become one group: mean and standard deviation. A folder
with a GenEval summary.json and no run is taken, too.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import Literal

from evaluation.compare.page import check_groups, format_comparison, write_comparison
from evaluation.compare.read import read_groups
from evaluation.compare.tables import all_tables
from launch.cli import run
from t2i.config.base import PathText


def compare(
    runs: list[PathText], /, out: PathText | None = None, seeds: Literal["together", "apart"] = "together"
) -> None:
    """Print tables that compare runs.

    Args:
        runs: Folders of runs, or of GenEval scores; the first is the baseline.
        out: Folder for compare.html, a page that also has curves and images.
        seeds: Whether runs that differ in nothing but the seed make one group.
    """
    groups = read_groups([Path(run) for run in runs], together=seeds == "together")
    if out is not None:
        check_groups(groups)
    sections = all_tables(groups)
    print(format_comparison(groups, sections))
    if out is not None:
        print(f"\nthe page is {write_comparison(Path(out), groups, sections)}")


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run((compare,), args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
