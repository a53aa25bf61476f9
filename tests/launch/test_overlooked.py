"""A job that runs on the CPU warns if the machine seems to have a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from launch import process
from launch.process import gpu_signs, warn_of_overlooked_gpu, why_no_gpu


def put(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text({"vendor": "0x10de\n", "class": "0x030200\n"}.get(Path(file).name, ""))
    return root


PCI = "sys/bus/pci/devices/0000:01:00.0/"


@pytest.mark.parametrize(
    ("files", "signs"),
    [
        ((), []),
        (("dev/nvidia0", "dev/nvidiactl"), ["/dev/nvidiactl", "/dev/nvidia0"]),
        (("proc/driver/nvidia/version",), ["/proc/driver/nvidia/version"]),
        (("dev/kfd",), ["/dev/kfd"]),
        (("dev/dxg",), ["/dev/dxg"]),
        ((f"{PCI}vendor", f"{PCI}class"), ["the PCI device 0000:01:00.0"]),
        ((f"{PCI}vendor",), []),  # without its class
        (("dev/nvram", "dev/null"), []),
    ],
)
def test_signs_of_a_gpu(tmp_path: Path, monkeypatch, files: tuple[str, ...], signs: list[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert gpu_signs(put(tmp_path, *files)) == signs


def test_the_drivers_tool_is_a_sign(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert gpu_signs(tmp_path) == ["/usr/bin/nvidia-smi"]


def test_the_warning_comes_only_with_signs_of_a_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(process, "why_no_gpu", lambda: "because")
    warn_of_overlooked_gpu([])
    assert capsys.readouterr().err == ""
    warn_of_overlooked_gpu(["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidia2", "/dev/nvidia3"])
    said = capsys.readouterr().err
    assert "!!!" in said and "because" in said
    assert "(/dev/nvidia0, /dev/nvidia1, /dev/nvidia2 and 1 more)" in said


def test_why(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "built for CPUs alone" in why_no_gpu()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert why_no_gpu().startswith("CUDA_VISIBLE_DEVICES is ''")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "init", init)
    assert "driver on your system is too old" in why_no_gpu()
