"""What a rank holds of each parameter: one contiguous slice of the flattened tensor.

ZeRO's and FSDP2's shards are all of this form, so the average, the checkpoint and the optimizer are written
once, over slices by name, and fit every engine and world size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """This rank's slice of one parameter.

    `value` and the tensors of `state` are fp32 views (numel,) of the engine's own memory: writing to them
    writes to the master weight and the optimizer. A rank that holds nothing of a parameter has numel 0. Where
    several ranks hold the same slice, one of them is `primary` and speaks for it.
    """

    shape: torch.Size
    start: int
    value: Tensor
    state: Mapping[str, Tensor]
    primary: bool = True

    @property
    def stop(self) -> int:
        """End of the slice in the flattened parameter."""
        return self.start + self.value.numel()


Shards = Mapping[str, Shard]

BUCKET_NUMEL = 1 << 25


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; the tensor itself where there is one rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_full(shards: Shards, slices: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Whole parameters, on every rank, from each rank's slices of them; all ranks iterate to the end.

    Args:
        shards: shapes and places of the slices.
        slices: fp32 (numel,) a name: the master values, the average or an optimizer state.

    Yields:
        Name and fp32 tensor, in the order of `shards`; a bucket of them is in memory at a time.
    """
    bucket: list[str] = []
    filled = 0
    for name, shard in shards.items():
        bucket.append(name)
        filled += shard.shape.numel()
        if filled >= BUCKET_NUMEL:
            yield from _gather_bucket(shards, slices, bucket)
            bucket, filled = [], 0
    yield from _gather_bucket(shards, slices, bucket)


def _gather_bucket(shards: Shards, slices: Mapping[str, Tensor], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    if not names:
        return
    sizes = [shards[name].shape.numel() for name in names]
    # Every element has exactly one rank that speaks for it, so a sum over zeros is exact.
    device = slices[names[0]].device
    if dist.is_initialized() and dist.get_backend() == "nccl":  # which knows nothing of what lies in host memory
        device = torch.device("cuda", torch.cuda.current_device())
    flat = torch.zeros(sum(sizes), device=device)
    for name, part in zip(names, flat.split(sizes), strict=True):
        if shards[name].primary:
            part[shards[name].start : shards[name].stop] = slices[name]
    all_reduce_sum(flat)
    for name, part in zip(names, flat.split(sizes), strict=True):
        yield name, part.view(shards[name].shape)
