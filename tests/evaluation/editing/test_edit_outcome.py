"""The summary of edits: means over edits, intervals over images, and what was not measured."""

from __future__ import annotations

from typing import Any

import pytest

from evaluation.editing.job import format_summary, summarize


def line(entry: int, mse: float | None, why: str = "") -> dict[str, Any]:
    scores = None if mse is None else {"mse": mse, "ssim": 1 - mse, "ssim_replaced": 1 - mse / 2}
    return {"entry": entry, "background": scores, "not_measured": why}


def test_means_are_over_edits() -> None:
    found = summarize([line(0, 0.0), line(0, 0.1), line(0, 0.2), line(1, 0.7), line(2, None, "nothing was found")])
    assert (found["edits"], found["images"], found["measured"]) == (5, 3, 4)
    assert found["not_measured"] == {"nothing was found": 1}
    means = {metric: it["mean"] for metric, it in found["background"].items()}
    assert means == pytest.approx({"mse": 0.25, "ssim": 0.75, "ssim_replaced": 0.875})
    assert all(it["interval"][0] <= it["mean"] <= it["interval"][1] for it in found["background"].values())
    text = format_summary(found)
    assert "background MSE" in text and "0.250000" in text and "1 not measured: nothing was found" in text


def test_edits_of_one_image_make_the_interval_no_narrower() -> None:
    """Each image's edits fare alike: ten of each tell no more than one."""
    few = [line(entry, 0.1 * (entry % 4)) for entry in range(12)]
    many = [it for it in few for _ in range(10)]
    assert summarize(many)["background"]["mse"]["interval"] == pytest.approx(
        summarize(few)["background"]["mse"]["interval"]
    )
    apart = [{**it, "entry": number} for number, it in enumerate(many)]
    low, high = summarize(apart)["background"]["mse"]["interval"]
    wide_low, wide_high = summarize(many)["background"]["mse"]["interval"]
    assert high - low < 0.5 * (wide_high - wide_low)


def test_without_any_region_there_are_no_means() -> None:
    found = summarize([line(0, None, "no region is given")] * 2)
    assert found["background"] == {} and found["measured"] == 0
    assert format_summary(found).splitlines() == [
        "2 edits of 1 images, 0 with a region",
        "2 not measured: no region is given",
    ]
