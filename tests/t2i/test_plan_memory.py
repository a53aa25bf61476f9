"""State that is offloaded or in files, in the planner's memory and in what a stage is refused for."""

from __future__ import annotations

from typing import Any

import torch

from t2i.config.run import RunConfig
from t2i.plan.choice import Assumptions
from t2i.plan.command import plan
from t2i.plan.memory import StageMemory, total
from t2i.train.preflight import estimate


def small(**engine: Any) -> RunConfig:
    sizes = {"model": {"width": 64, "depth": 2, "heads": 2, "repa_layer": 1}, "objective": {"repa_weight": 0}}
    sizes |= {"train": {"batch_size": 4, "micro_batch_size": 2}, "data": {"lanes": 2}}
    return RunConfig.model_validate({**sizes, "engine": engine, "stages": [{"name": "only"}]})


def test_the_plan_counts_no_memory_for_what_is_in_files() -> None:
    plain, mapped = (StageMemory.of(item, 2, 4) for item in (small(), small(offload_dir="/scratch")))
    files = mapped.mapped("zero1")
    assert set(files) == {"moments", "ema"} and plain.mapped("zero1") == {}
    assert total(files) == 12 * plain.network.total // 2
    assert total(plain.static("zero1")) - total(mapped.static("zero1")) == total(files)
    given = Assumptions.from_config(gpus=2, gpu="h100", mfu=0.3, sample_bytes=1e5, reference=False)
    said = [" ".join(plan(item, given)["stages"][0]["advice"]) for item in (plain.config, mapped.config)]
    assert ["files in /scratch" in advice for advice in said] == [False, True]


def test_what_is_offloaded_and_in_files_is_taken_from_the_device_once() -> None:
    offloaded = {"zero_stage": 3, "offload": True}
    without, with_files = (
        estimate(small(**engine), 2, torch.float32) for engine in (offloaded, {**offloaded, "offload_dir": "/scratch"})
    )
    assert without == with_files
