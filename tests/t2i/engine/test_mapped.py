"""State in files: what it is, and what is refused. That engines compute the same with it is in test_engines.py."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import UserError
from t2i.config import RunConfig
from t2i.engine.mapped import StateFolder
from t2i.plan import Assumptions, plan
from t2i.plan_memory import total
from t2i.plan_stage import StageMemory
from t2i.train.memory import estimate


def file_bytes(device: int) -> int:
    """Bytes that this process maps shared and writable from files without a name on a device."""
    number = f"{os.major(device):02x}:{os.minor(device):02x}"
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = [line.split()[0] for line in lines if " rw-s " in line and f" {number} " in line and "(deleted)" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in (it.split("-") for it in found))


def test_zeros_lie_in_a_file_that_has_no_name_and_goes_with_them(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    before, open_files = file_bytes(tmp_path.stat().st_dev), len(os.listdir("/proc/self/fd"))
    like = torch.ones(1000, 1024)
    zeros = StateFolder(folder).zeros_like(like)
    assert zeros.shape == like.shape and zeros.dtype == torch.float32
    assert not zeros.any()
    zeros += 1
    assert torch.equal(zeros, like)
    assert file_bytes(folder.stat().st_dev) - before == like.nbytes
    assert list(folder.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == open_files  # there are three tensors a parameter
    del zeros
    assert file_bytes(folder.stat().st_dev) == before


def test_a_disk_that_others_fill_is_found_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def refuse(*wanted: int) -> None:
        asked.append(wanted[1:])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(UserError, match=r"engine.state_folder .*: No space left on device"):
        StateFolder(tmp_path).zeros_like(torch.empty(6))
    assert asked == [(0, 24)]


def test_a_slice_of_nothing_is_nothing(tmp_path: Path) -> None:
    assert StateFolder(tmp_path).zeros_like(torch.empty(0, 3)).shape == (0, 3)


def test_state_that_is_not_in_host_memory_is_refused(tmp_path: Path) -> None:
    elsewhere = torch.empty(4, device="meta")  # stands for a GPU
    with pytest.raises(UserError, match=r"engine.state_folder .* device meta.*set engine.offload"):
        StateFolder(tmp_path).zeros_like(elsewhere)


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(shutil.disk_usage(tmp_path).total)
    with pytest.raises(UserError, match=r"engine.state_folder .* GiB are free.*needs .* GiB"):
        StateFolder(tmp_path).zeros_like(huge)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=re.escape(f"engine.state_folder {tmp_path}/file/below: ")):
        StateFolder(tmp_path / "file" / "below").zeros_like(torch.empty(4))


def small(**engine: Any) -> RunConfig:
    sizes = {"model": {"width": 64, "depth": 2, "heads": 2, "repa_layer": 1}, "objective": {"repa_weight": 0}}
    sizes |= {"train": {"batch_size": 4, "micro_batch_size": 2}, "data": {"lanes": 2}}
    return RunConfig.model_validate({**sizes, "engine": engine, "stages": [{"name": "only"}]})


def test_the_plan_counts_no_memory_for_what_is_in_files() -> None:
    plain, mapped = (StageMemory.of(it, 2, 4) for it in (small(), small(state_folder="/scratch")))
    files = mapped.mapped("zero1")
    assert set(files) == {"moments", "average"} and plain.mapped("zero1") == {}
    assert total(files) == 12 * plain.network.total // 2
    assert total(plain.static("zero1")) - total(mapped.static("zero1")) == total(files)
    given = Assumptions.of(gpus=2, gpu="h100", mfu=0.3, sample_bytes=1e5, reference=False)
    said = [" ".join(plan(it, given)["stages"][0]["advice"]) for it in (plain.config, mapped.config)]
    assert ["files in /scratch" in advice for advice in said] == [False, True]


def test_what_is_offloaded_and_in_files_is_taken_from_the_device_once() -> None:
    offloaded = {"zero_stage": 3, "offload": True}
    without, with_files = (
        estimate(small(**engine), 2, torch.float32) for engine in (offloaded, {**offloaded, "state_folder": "/scratch"})
    )
    assert without == with_files
