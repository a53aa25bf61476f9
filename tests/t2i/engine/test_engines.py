"""ZeRO-1 computes what plain PyTorch computes on the whole batch, for 1 and 2 ranks, and resumes across them."""

from __future__ import annotations

from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "engine_worker.py"


@pytest.fixture(scope="module")
def outcomes(launch, tmp_path_factory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("engine")
    one = launch(WORKER, 1, str(folder / "one"), "-")
    two = launch(WORKER, 2, str(folder / "two"), str(folder / "one"))
    return {1: one, 2: two}


@pytest.mark.parametrize("world_size", [1, 2])
def test_engine_agrees_with_plain_pytorch(outcomes, world_size: int) -> None:
    for case in outcomes[world_size]["cases"]:
        exact = case["case"].startswith("float32")
        assert case["masters_at_start"] == 0, case  # also under bf16: masters are not made from rounded weights
        assert case["norms"] < (1e-5 if exact else 1e-2), case
        assert case["values"] < (2e-6 if exact else 2e-2), case
        assert case["ema"] < (1e-6 if exact else 1e-2), case


def test_gradients_are_summed_in_fp32(outcomes) -> None:
    # On one rank without accumulation the gradient is a bf16 number: it comes from bf16 weights. A sum is none.
    cases = [case for case in outcomes[2]["cases"] if case["case"].startswith("bfloat16, accumulation 2")]
    assert len(cases) == 2
    assert not any(case["rounded_gradient"] for case in cases)


@pytest.mark.parametrize("world_size", [1, 2])
def test_nothing_non_finite_or_vetoed_reaches_weights(outcomes, world_size: int) -> None:
    for case in outcomes[world_size]["cases"]:
        vetoes = case["vetoes"]
        assert [step for step, veto in enumerate(vetoes) if veto is not None] == [3, 5], case
        assert "gradient norm is" in vetoes[3]
        assert vetoes[5] == "vetoed by the test"
        assert case["updates"] == len(vetoes) - 2


def test_weights_of_the_network_are_the_rounded_masters(outcomes) -> None:
    for case in outcomes[2]["cases"]:
        assert case["low_precision"] < (1e-12 if case["case"].startswith("float32") else 4e-3), case


def test_resume_is_exact_on_as_many_ranks_and_within_rounding_on_others(outcomes) -> None:
    for world_size in (1, 2):
        assert outcomes[world_size]["resumed"]["same"] == {"values": 0.0, "ema": 0.0}
    other = outcomes[2]["resumed"]["other"]
    assert other["values"] < 1e-5
    assert other["ema"] < 1e-6
