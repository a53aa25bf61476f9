"""State in files that are mapped into memory, for machines whose memory does not hold it.

- The system keeps what there is room for and writes the rest out: slower than memory, but no process is killed for it.
- A file has no name: what is to last is in checkpoints, and a run that is killed leaves nothing behind.
- Its blocks are reserved at once: a page that finds the disk full in mid-training would end the process (SIGBUS).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.errors import UserError

ZerosLike = Callable[[Tensor], Tensor]
"""Makes the zeros that a moment or an average begins as: `torch.zeros_like`, or that of a `StateFolder`."""


@dataclass(frozen=True)
class StateFolder:
    """A folder, made if need be, on whose disk state lies."""

    folder: Path

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """Zeros of the shape of an fp32 tensor in host memory, over a file that lives as long as they do.

        Raises:
            UserError: the tensor is on a GPU, or the folder cannot be written to or has no room.
        """
        if tensor.device.type != "cpu":
            raise UserError(
                f"{self._field}: the optimizer's state is on the device {tensor.device.type}, and only what lies in "
                "host memory can be mapped: set engine.offload, or leave engine.state_folder out"
            )
        assert tensor.dtype == torch.float32
        return self.zeros(tensor.numel()).view(tensor.shape)

    @property
    def _field(self) -> str:
        return f"engine.state_folder {self.folder}"

    def zeros(self, numel: int) -> Tensor:
        """fp32 zeros (numel,) over a file that lives as long as they do.

        Raises:
            UserError: the folder cannot be written to or has no room.
        """
        if numel == 0:  # nothing cannot be mapped
            return torch.zeros(0)
        field, size = self._field, 4 * numel
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if size > free:  # else the disk would be filled before the system refuses
                raise UserError(
                    f"{field}: {free / 2**30:.3g} GiB are free, and the next part of the optimizer's state needs "
                    f"{size / 2**30:.3g} GiB: give a folder with 28 bytes for each parameter of a rank"
                )
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                return torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=numel)
        except OSError as error:
            raise UserError(f"{field}: cannot hold the optimizer's state: {error.strerror}") from error
