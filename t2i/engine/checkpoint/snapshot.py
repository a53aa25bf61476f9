"""What a rank saves, as it was at one moment: one buffer in host memory, laid out as the file it becomes.

The buffer is made once, pinned where the state is on a GPU, and used by every save: a checkpoint costs the training
path one copy. The file is safetensors, written from the buffer piece by piece while it is hashed: nothing is copied
again, nothing is read back, and Python's lock is free meanwhile, so that training does not wait for it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from t2i.engine.engine import Shards
from t2i.engine.optimizer import OffloadDir

_PIECE_BYTES = 8 << 20


def _sources(shards: Shards, ema: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything a rank saves: `value/NAME`, `ema/NAME` and one `MOMENT/NAME` for each moment. Views, none empty."""
    slices: dict[str, Tensor] = {}
    for name, shard in shards.items():
        if shard.primary and shard.param.numel():
            slices[f"value/{name}"] = shard.param
            slices[f"ema/{name}"] = ema[name]
            slices.update({f"{moment}/{name}": tensor for moment, tensor in shard.state.items()})
    return slices


class Snapshot:
    """A rank's state in host memory.

    Args:
        folder: maps the buffer to a file there.
    """

    def __init__(self, folder: OffloadDir | None = None) -> None:
        self._folder = folder
        self._buffer = torch.empty(0)
        self._used = 0
        self._header = b""
        self.places: dict[str, list[int]] = {}
        """First element and end of the slice of each parameter that this rank holds and speaks for."""
        self.shapes: dict[str, list[int]] = {}
        """Shape of every parameter."""

    def reserve(self, shards: Shards, ema: Mapping[str, Tensor]) -> None:
        """Make the buffer: seconds for some GB that are pinned or touched for the first time."""
        sources = _sources(shards, ema)
        numel = sum(tensor.numel() for tensor in sources.values())
        if numel > self._buffer.numel():
            pinned = any(tensor.is_cuda for tensor in sources.values())
            self._buffer = self._folder.zeros(numel) if self._folder else torch.zeros(numel, pin_memory=pinned)

    def take(self, shards: Shards, ema: Mapping[str, Tensor]) -> None:
        """Copy the state; when this returns, training may change it."""
        self.reserve(shards, ema)
        self.places = {n: [s.start, s.stop] for n, s in shards.items() if s.primary and s.param.numel()}
        self.shapes = {name: list(shard.shape) for name, shard in shards.items()}
        entries, at, devices = {}, 0, set()
        for key, tensor in _sources(shards, ema).items():
            assert tensor.dtype == torch.float32, key
            self._buffer[at : at + tensor.numel()].copy_(tensor.detach(), non_blocking=True)
            offsets = [4 * at, 4 * (at + tensor.numel())]
            entries[key] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": offsets}
            at += tensor.numel()
            devices.add(tensor.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        self._header, self._used = len(header).to_bytes(8, "little") + header, at

    def write(self, path: Path) -> tuple[str, int]:
        """Write the file, durably; its SHA-256 and its size in bytes."""
        content = self._buffer[: self._used].numpy().data.cast("B") if self._used else memoryview(b"")
        digest = hashlib.sha256(self._header)
        with path.open("wb") as file:
            file.write(self._header)
            for start in range(0, len(content), _PIECE_BYTES):
                piece = content[start : start + _PIECE_BYTES]
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest(), len(self._header) + len(content)
