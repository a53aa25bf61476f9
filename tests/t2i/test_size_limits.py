"""Sizes that may be asked for: what drawing takes, as traced, and the largest that fits."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_model import config, write_random_model

from data.errors import UserError
from t2i.config.loading import validate_config
from t2i.pipeline import Pipeline
from t2i.size_limits import (
    Limits,
    _group_bytes,
    check_fits,
    drawing_bytes,
    find_limits,
    free_bytes,
    line_of_peaks,
    most_patches,
    traced_bytes,
)

CPU = torch.device("cpu")
LIMITS = Limits(patch=16, max_pixels=512 * 512, reason="the memory here")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return Pipeline.load(write_random_model(tmp_path_factory.mktemp("model") / "model"), "ema", CPU)


@pytest.mark.parametrize("size", [(512, 512), (16, 16), (256, 1024), (16, 16384)])
def test_sizes_that_are_allowed(size: tuple[int, int]) -> None:
    LIMITS.check(*size)


@pytest.mark.parametrize(
    ("height", "width", "words"),
    [
        (512, 500, "width 500: must be a multiple of the model's patch, 16 pixels, such as 496"),
        (7, 512, "height 7: must be a multiple of the model's patch, 16 pixels, such as 16"),
        (512, 0, "width 0: must be a multiple of the model's patch, 16 pixels, such as 16"),
        (1024, 1024, "1024 x 1024: the memory here allows at most 262,144 pixels in all, such as 512 x 512"),
        (512, 2048, "width x height 2048 x 512: .* such as 1024 x 256"),
    ],
)
def test_sizes_that_are_refused_say_what_would_be_right(height: int, width: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        LIMITS.check(height, width)


@pytest.mark.parametrize("shape", [(1, 1), (9, 16), (1, 1000), (5000, 3)])
@pytest.mark.parametrize("most", [1, 7, 1024])
def test_the_largest_like_a_shape_is_allowed_itself(shape: tuple[int, int], most: int) -> None:
    limits = Limits(16, most * 256, "the memory here")
    height, width = limits.largest_like(*shape)
    limits.check(height, width)


def test_the_search_finds_the_last_that_fits() -> None:
    def takes(patches: int) -> int:
        return 3 * patches * patches + 7

    for available in (0, 6, 20, 1000, 12345, 10**7):
        fitting = [n for n in range(1, 2000) if takes(n) <= available]
        assert most_patches(takes, available, 1000) == min(1000, max(fitting, default=0))


def test_the_trace_counts_what_lives_at_once() -> None:
    """Of a network without blocks to speak of: attention's scores, and their exponentials, outgrow all else."""
    run = config(width=8, heads=2, depth=1, text_depth=0, repa_layer=1)
    peak = traced_bytes(run, 384)
    patches = 4096
    scores = 4 * 2 * run.model.heads * patches * (patches + run.text.length)  # fp32, both halves of guidance
    # The scores less their largest, and the exponentials of that: two at once beside the scores themselves.
    assert 2 * scores < peak(patches) < 3.5 * scores
    assert peak(2 * patches) == pytest.approx(4 * peak(patches), rel=0.02)


@pytest.mark.parametrize("model", [
    {"condition": "class", "classes": 3, "width": 48, "depth": 4, "heads": 2, "bottleneck": 8, "repa_layer": 1,
     "context_tokens": 2, "context_start": 1},
    {"family": "pixeldit", "prediction": "velocity", "width": 48, "depth": 2, "heads": 2, "repa_layer": 1},
    {"family": "pixeldit", "condition": "class", "prediction": "velocity", "classes": 3, "width": 48, "depth": 2,
     "heads": 2, "repa_layer": 1},
])  # fmt: skip
def test_every_family_is_traced(model: dict[str, object]) -> None:
    run = validate_config({"model": {"patch_size": 4} | model, "data": {"resolution": 16}}, "test")
    peak = traced_bytes(run, 0 if run.model.condition == "class" else 384)
    values = 2 * 64 * 48 * 4  # of the patches' tokens once, both halves of guidance
    assert 4 * values < peak(64) < peak(128) < 4 * peak(64) + 10**6


def test_no_real_memory_is_taken_by_the_trace() -> None:
    run = config()
    before = free_bytes(CPU)
    assert traced_bytes(run, 384)(2**20) > 10 * before


def test_limits_of_a_model(pipeline: Pipeline) -> None:
    gib = 2**30
    little, much = find_limits(pipeline, gib // 16, None), find_limits(pipeline, gib, None)
    assert 16 * 16 < little.max_pixels < much.max_pixels
    assert little.reason == "the memory here"
    chosen = find_limits(pipeline, gib, 1000)
    assert (chosen.max_pixels, chosen.reason) == (992, "this server")
    assert find_limits(pipeline, gib // 16, 2**24).reason == "the memory here"


def test_a_model_that_does_not_fit(pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match="0.00 GiB of free memory are too little to draw at 16 x 16"):
        find_limits(pipeline, 1000, None)
    with pytest.raises(UserError, match="--max_pixels 15: must hold one patch at least, 16 pixels"):
        find_limits(pipeline, 2**30, 15)


def tight(most: int) -> Callable[[int], int]:
    """A stand-in for a GPU: 3 rows of so many columns take 100 bytes and 7 a patch; more than `most` do not fit."""

    def peak(columns: int) -> int:
        if columns > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 100 + 7 * 3 * columns

    return peak


@pytest.mark.parametrize("most", [20, 16, 8, 7, 2])
def test_sizes_that_do_not_fit_are_not_measured(most: int) -> None:
    line = line_of_peaks(tight(most), 3, 8)
    assert [line(patches) for patches in (3, 24, 48, 3000)] == [100 + 7 * n for n in (3, 24, 48, 3000)]


def test_a_single_column_that_fits_counts_as_a_share() -> None:
    assert [line_of_peaks(tight(1), 3, 8)(patches) for patches in (3, 6)] == [121, 242]


def test_a_gpu_that_holds_not_even_a_column(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2i.size_limits.traced_bytes", lambda *given: line_of_peaks(tight(0), 4, 4))
    with pytest.raises(UserError, match="GiB of free memory are too little to draw at 16 x 16"):
        find_limits(pipeline, 2**40, None)


def test_free_memory_is_less_than_all(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 400\nactive_file 200\n")
    assert _group_bytes(tmp_path) == 700  # cached files make way
    (tmp_path / "memory.max").write_text("max\n")
    assert _group_bytes(tmp_path) == _group_bytes(tmp_path / "none") == sys.maxsize
    assert 0 < free_bytes(CPU) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_what_fits_is_let_through_and_what_does_not_names_size_need_and_room(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = drawing_bytes(pipeline, 3)(32 * 48 // 16)
    monkeypatch.setattr("t2i.size_limits.free_bytes", lambda device: needed)
    check_fits(pipeline, (32, 48), 3, "--size 32x48", "ask for less")
    with pytest.raises(
        UserError, match=r"^--size 32x48: 4 at once take about 0.\d GiB .* free, enough for \d+x\d+: ask"
    ):
        check_fits(pipeline, (32, 48), 4, "--size 32x48", "ask for less")
    with pytest.raises(UserError, match="3 at once"):
        check_fits(pipeline, (32, 48), 3, "--size 32x48", "ask for less", ranks=2)  # which share the machine's memory
    monkeypatch.setattr("t2i.size_limits.free_bytes", lambda device: 10)
    with pytest.raises(UserError, match=r"^x: a picture takes about 0.0 GiB of memory, and 0.0 GiB are free: ask"):
        check_fits(pipeline, (32, 48), 1, "x", "ask for less")


def test_more_patches_than_can_be_traced_take_no_less_than_in_proportion(pipeline: Pipeline) -> None:
    takes = drawing_bytes(pipeline)
    assert takes(10**15) >= 10**15 // 2**20 * takes(2**20)


def test_a_batch_shares_the_weights(pipeline: Pipeline) -> None:
    one, eight = drawing_bytes(pipeline)(64), drawing_bytes(pipeline, 8)(64)
    assert 4 * one < eight < 8 * one
