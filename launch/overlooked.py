"""Whether a job works on the CPU though a GPU seems to be there: days are lost before that is noticed."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch

_SIGNS = (
    "proc/driver/nvidia/version",
    "dev/nvidiactl",
    "dev/nvidia[0-9]*",
    "dev/dxg",  # GPUs under Windows' Linux
    "dev/kfd",  # AMD's
)
_NVIDIA = "0x10de"


def gpu_signs(root: Path = Path("/")) -> list[str]:
    """What says that this machine has a GPU or the driver of one."""
    found = [f"/{path.relative_to(root)}" for sign in _SIGNS for path in sorted(root.glob(sign))]
    for vendor in sorted(root.glob("sys/bus/pci/devices/*/vendor")):
        kind = vendor.with_name("class")
        if vendor.read_text().strip() == _NVIDIA and kind.exists() and kind.read_text().startswith("0x03"):
            found.append(f"the PCI device {vendor.parent.name}")
    if (tool := shutil.which("nvidia-smi")) is not None:
        found.append(tool)
    return found


def why_no_gpu() -> str:
    """Why PyTorch finds none, and what to do, as far as it can be told."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is built for CPUs alone: install a build for this machine's GPUs"
    if (hidden := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None and not torch.cuda.device_count():
        return f"CUDA_VISIBLE_DEVICES is {hidden!r}, which may hide it: unset it, or ask the scheduler for GPUs"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"PyTorch {torch.__version__} says: {' '.join(str(error).split())}"
    return f"PyTorch {torch.__version__} does not say why"


def warn_of_overlooked_gpu(signs: list[str]) -> None:
    """Say it loudly on stderr, in a job that is about to work on the CPU; nothing where nothing speaks of a GPU."""
    if not signs:
        return
    shown = ", ".join(signs[:3]) + (f" and {len(signs) - 3} more signs" if len(signs) > 3 else "")
    bar = "!" * 80
    print(f"{bar}\nON THE CPU, though a GPU seems to be there ({shown}).\n{why_no_gpu()}.\n{bar}", file=sys.stderr)
