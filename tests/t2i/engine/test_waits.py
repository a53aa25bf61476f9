"""A step waits for its device where the gradient norm is wanted, and nowhere else."""

from __future__ import annotations

from pathlib import Path

WORKER = Path(__file__).parent / "waits_worker.py"


def test_the_norm_is_the_one_number_that_an_engine_reads(launch) -> None:
    outcome = launch(WORKER, 1)
    assert outcome["fsdp"] == 1
    # DeepSpeed looks at the norm twice more, when nothing is under way but what follows from it.
    assert 1 <= outcome["zero1"] <= 3
