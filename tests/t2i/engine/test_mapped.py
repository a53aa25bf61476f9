"""State in files: what it is, and what is refused. That engines compute the same with it is in test_engines.py."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from data.errors import UserError
from t2i.engine.optimizer import OffloadDir


def file_bytes(device: int) -> int:
    """Bytes that this process maps shared and writable from files without a name on a device."""
    number = f"{os.major(device):02x}:{os.minor(device):02x}"
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = [line.split()[0] for line in lines if " rw-s " in line and f" {number} " in line and "(deleted)" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in (limits.split("-") for limits in found))


def test_zeros_lie_in_a_file_that_has_no_name_and_goes_with_them(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    before, open_files = file_bytes(tmp_path.stat().st_dev), len(os.listdir("/proc/self/fd"))
    like = torch.ones(1000, 1024)
    zeros = OffloadDir(folder).zeros_like(like)
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
    with pytest.raises(UserError, match=r"engine.offload_dir .*: No space left on device"):
        OffloadDir(tmp_path).zeros_like(torch.empty(6))
    assert asked == [(0, 24)]


def test_a_slice_of_nothing_is_nothing(tmp_path: Path) -> None:
    assert OffloadDir(tmp_path).zeros_like(torch.empty(0, 3)).shape == (0, 3)


def test_state_that_is_not_in_host_memory_is_refused(tmp_path: Path) -> None:
    elsewhere = torch.empty(4, device="meta")  # stands for a GPU
    with pytest.raises(UserError, match=r"engine.offload_dir .* device meta.*set engine.offload"):
        OffloadDir(tmp_path).zeros_like(elsewhere)


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(shutil.disk_usage(tmp_path).total)
    with pytest.raises(UserError, match=r"engine.offload_dir .* GiB are free.*needs .* GiB"):
        OffloadDir(tmp_path).zeros_like(huge)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=re.escape(f"engine.offload_dir {tmp_path}/file/below: ")):
        OffloadDir(tmp_path / "file" / "below").zeros_like(torch.empty(4))
