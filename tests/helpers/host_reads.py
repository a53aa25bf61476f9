"""Operations that make a host wait for its device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class HostReads(TorchDispatchMode):
    """Notes, for the time of a `with`, each number that is read from a tensor and each shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS or (func in _INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))
