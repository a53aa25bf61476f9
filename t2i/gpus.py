"""What GPUs can do, by name: the one table that the planner and the trainer's MFU share."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU model."""

    name: str
    peak_bf16: float
    """Dense bf16 FLOP/s of the vendor's data sheet, without sparsity."""
    memory_gib: float
    """GiB that a process can see: the data sheet's less what the driver keeps, rounded down."""


_MODELS = (
    Gpu("B200", 2250e12, 178),
    Gpu("H200", 989e12, 139),
    Gpu("GH200", 989e12, 94),
    Gpu("H100", 989e12, 79),
    Gpu("H800", 989e12, 79),
    Gpu("H20", 148e12, 95),
    Gpu("A100", 312e12, 79),
    Gpu("A800", 312e12, 79),
    Gpu("A100-40GB", 312e12, 39),
    Gpu("L40S", 362e12, 44),
    Gpu("4090", 165e12, 23.5),
)
GPUS = {gpu.name.lower(): gpu for gpu in _MODELS}
"""By name in lower case. SXM models; the A100 and A800 are those of 80 GB unless their name says otherwise."""


def find_gpu(device_name: str) -> Gpu | None:
    """The model that a device's name contains as a word ("NVIDIA H100 80GB HBM3"), if the table has it."""
    words = set(re.findall(r"[A-Za-z0-9]+", device_name.lower()))
    return next((gpu for name, gpu in GPUS.items() if name in words), None)
