"""Gradient balancing is that of the global batch under every engine."""

from __future__ import annotations

from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "balance_worker.py"


def test_two_ranks_come_to_the_ratio_of_one_process(launch) -> None:
    outcome = launch(WORKER, 2)
    assert abs(outcome["expected"] - 1) > 0.5
    one, other = outcome["found"]
    assert one == other and len(one) == 7
    for case, weight in one.items():
        # In bf16 the prediction itself is another.
        assert weight == pytest.approx(outcome["expected"], rel=5e-2 if "bfloat16" in case else 1e-4), case
