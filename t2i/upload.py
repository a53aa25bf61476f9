"""Arrays from the host to a device, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on a device, in its own type; on a CPU it shares the array's memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from other memory waits for all work before it
    return tensor.to(device, non_blocking=True)
