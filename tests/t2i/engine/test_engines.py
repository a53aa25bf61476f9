"""All engines compute what plain PyTorch computes on the whole batch, and resume from each other's checkpoints.

One launch a world size: 4, then 1, which reads what 4 wrote, then 2, which reads what 1 wrote.
"""

from __future__ import annotations

from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "engine_worker.py"
WORLD_SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def outcomes(launch, tmp_path_factory) -> dict[int, dict]:
    folder = tmp_path_factory.mktemp("engines")
    four = launch(WORKER, 4, str(folder / "four"), "-")
    one = launch(WORKER, 1, str(folder / "one"), str(folder / "four"))
    two = launch(WORKER, 2, str(folder / "two"), str(folder / "one"))
    return {1: one, 2: two, 4: four}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_losses_and_norms_are_those_of_plain_pytorch(outcomes, world_size: int) -> None:
    for case in outcomes[world_size]["cases"]:
        tolerance = 1e-5 if case["exact"] else 1e-2
        assert case["losses"] < tolerance, case
        assert case["norms"] < tolerance, case


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_weights_and_ema_are_those_of_plain_pytorch(outcomes, world_size: int) -> None:
    for case in outcomes[world_size]["cases"]:
        assert case["masters_at_start"] == 0, case  # also under bf16: masters are not made from rounded weights
        assert case["params"] < (1e-5 if case["exact"] else 1e-2), case
        assert case["ema"] < (1e-6 if case["exact"] else 1e-2), case
        assert case["weights_are_masters"] < 1e-6, case  # the same forward pass, in either dtype


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_nothing_non_finite_or_skipped_reaches_weights(outcomes, world_size: int) -> None:
    for case in outcomes[world_size]["cases"]:
        reasons = case["reasons"]
        assert [step for step, reason in enumerate(reasons) if reason is not None] == [4, 6], case
        assert "gradient norm is" in reasons[4]
        bad = set(reasons[4].partition(" in ")[2].split())
        assert {"projector.layers.0.weight", "projector.layers.4.bias", "denoiser.blocks.0.attn.qkv.weight"} <= bad, (
            case
        )
        assert not any(".head." in name for name in bad), case
        assert reasons[6] == "skipped by the test"
        assert case["optimizer_steps"] == len(reasons) - 2


def test_gradients_are_clipped_only_where_configured(outcomes) -> None:
    # The comparison with plain PyTorch covers both: clipping moves the weights by far more than its tolerance.
    assert outcomes[2]["clipping_shows"] > 1e-3
    assert sum("no clipping" in case["case"] for case in outcomes[2]["cases"]) == 5


def test_gradients_are_summed_in_fp32(outcomes) -> None:
    assert len(outcomes[2]["rounded"]) == 5
    assert all(share < 0.3 for share in outcomes[2]["rounded"].values()), outcomes[2]["rounded"]


def test_moments_and_ema_in_files_change_no_bit(outcomes) -> None:
    assert len(outcomes[2]["mapped"]) == 5
    for case in outcomes[2]["mapped"]:
        assert {case[key] for key in ("losses", "norms", "params", "ema")} == {0.0}, case
        assert case["shared"] == [[False], [True]], case


def test_a_backward_that_would_lose_gradients_is_refused(outcomes) -> None:
    assert len(outcomes[2]["refused"]) == 5
    for case in outcomes[2]["refused"]:
        assert all(case["refused"]), case


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_resuming_is_exact_on_the_same_engine_and_within_rounding_on_others(outcomes, world_size: int) -> None:
    for case in outcomes[world_size]["resumed"]:
        differences = {key: case[key] for key in ("losses", "norms", "params", "ema")}
        if case["from"] == "itself":
            assert set(differences.values()) == {0.0}, case
        else:
            assert max(differences["losses"], differences["norms"]) < 1e-5, case
            assert differences["params"] < 1e-5, case
            assert differences["ema"] < 1e-6, case
