"""What the trainer may ask of an engine, whichever library shards the state behind it.

- All engines compute the same numbers within rounding. Master weights, moments and gradients are fp32; gradients are
  summed over micro-steps and ranks in fp32.
- The global gradient norm is known before weights move. An update that is skipped or not finite reaches neither
  weights nor moments.
- A rank holds one contiguous slice of each flattened parameter. ZeRO's and FSDP2's shards both have this form, so
  EMA, checkpoints and the optimizer are written once, over slices by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Shard:
    """This rank's slice of one parameter.

    `param` (the master weight) and the tensors of `state` (the moments) are fp32 views (numel,) of the engine's
    memory: writing to them writes to the engine. A rank that holds nothing of a parameter has numel 0. Where several
    ranks hold the same slice, one of them has `is_primary` and saves it.
    """

    shape: torch.Size
    start: int
    param: Tensor
    state: Mapping[str, Tensor]
    is_primary: bool = True

    @property
    def stop(self) -> int:
        """End of the slice in the flattened parameter."""
        return self.start + self.param.numel()


Shards = Mapping[str, Shard]


class Piece(NamedTuple):
    """Where this rank's slice of a parameter lies: in the flattened parameter, and in a tensor of the optimizer.

    `tensor` is fp32 and contiguous; it may hold slices of many parameters (ZeRO's flat partitions), one, or none.
    """

    name: str
    shape: torch.Size
    start: int
    tensor: Tensor
    offset: int
    numel: int
    is_primary: bool = True

    def of(self, tensor: Tensor) -> Tensor:
        """The slice (numel,) of a tensor that is laid out like `self.tensor`."""
        return tensor.reshape(-1)[self.offset : self.offset + self.numel]


BUCKET_NUMEL = 1 << 25
PERSISTENT_NUMEL = 100_000
"""Parameters up to this size stay whole on every rank under ZeRO-3."""


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_full(shards: Shards, slices: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and whole fp32 tensor of every parameter, in the order of `shards`, on every rank.

    `slices` are this rank's, fp32 (numel,) by name: master weights, EMA or a moment. All ranks iterate to the end; one
    bucket of parameters is in memory at a time.
    """
    bucket: list[str] = []
    filled = 0
    for name, shard in shards.items():
        bucket.append(name)
        filled += shard.shape.numel()
        if filled >= BUCKET_NUMEL:
            yield from _gather_bucket(shards, slices, bucket)
            bucket, filled = [], 0
    if bucket:
        yield from _gather_bucket(shards, slices, bucket)


def _gather_bucket(shards: Shards, slices: Mapping[str, Tensor], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    sizes = [shards[name].shape.numel() for name in names]
    device = slices[names[0]].device
    if dist.is_initialized() and dist.get_backend() == "nccl":  # cannot reduce tensors in host memory
        device = torch.device("cuda", torch.cuda.current_device())
    # Exactly one rank contributes each element, so the sum over zeros is exact.
    flat = torch.zeros(sum(sizes), device=device)
    for name, part in zip(names, flat.split(sizes), strict=True):
        if shards[name].is_primary:
            part[shards[name].start : shards[name].stop] = slices[name]
    all_reduce_sum(flat)
    for name, part in zip(names, flat.split(sizes), strict=True):
        yield name, part.view(shards[name].shape)


class HasBlocks(Protocol):
    """A network of repeated blocks, which are compiled, checkpointed and sharded one by one."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """In the order in which they run; they hold most of the parameters."""


def prepare_blocks(network: HasBlocks, *, compiled: bool, checkpointed: Collection[nn.Module]) -> None:
    """Compile the blocks, and apply activation checkpointing to those in `checkpointed`.

    Each block's `forward` is wrapped, which leaves the engines' hooks outside. Copy the network before, as copies
    would share the wrapped functions.
    """
    for block in network.blocks:
        forward = torch.compile(block.forward) if compiled else block.forward
        if block in checkpointed:
            forward = partial(checkpoint, forward, use_reentrant=False)
        block.forward = forward


class StepResult(NamedTuple):
    """Outcome of one optimizer step."""

    grad_norm: float
    """Global, before clipping."""
    skip_reason: str | None
    """Why the update was not applied, or None if it was."""
    not_finite: Sequence[str] = ()
    """If the norm is not finite: the parameters of which this rank's slice of the gradient is not finite."""


SkipUpdate = Callable[[float], str | None]
"""Given the global gradient norm, before weights move: why the update should be skipped, or None."""


def check_update(grad_norm: float, skip_update: SkipUpdate, gradients: Iterable[tuple[str, Tensor]]) -> StepResult:
    """Whether an update may be applied; `gradients`, by name, are read only if the norm is not finite."""
    if math.isfinite(grad_norm):
        return StepResult(grad_norm, skip_update(grad_norm))
    return StepResult(grad_norm, f"the gradient norm is {grad_norm}", not_finite(gradients))


def not_finite(gradients: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the gradients that are not finite."""
    return [name for name, gradient in gradients if not gradient.isfinite().all()]


class Engine(Protocol):
    """A trained network, sharded over the ranks."""

    network: nn.Module
    """Called for the forward pass of a micro-step."""
    shards: Shards
    optimizer_steps: int
    """Updates applied to the moments: AdamW's bias correction counts with it. May be set."""

    def backward(self, loss: Tensor) -> None:
        """The one backward of a micro-step: `loss` is the scalar sum of everything that is minimised.

        Gradients are averaged over micro-steps and ranks.

        Raises:
            RuntimeError: `network` was not called since the last backward, or the optimizer step has all its
                micro-steps already: a second backward would lose or double gradients.
        """

    def step(self, lr: Callable[[bool], float], skip_update: SkipUpdate) -> StepResult:
        """Apply the accumulated gradient, unless it is not finite or `skip_update` gives a reason.

        `lr` returns the learning rate of a parameter group; its argument says whether the group is Muon's.
        """

    def sync_params_from_master(self) -> None:
        """Update the network's weights after the master weights (`shards`) were written to."""

    def close(self) -> None:
        """Release hooks and memory, so that the next stage can build its own engine."""


class MicroSteps:
    """Counts the micro-steps of an optimizer step, and refuses a backward that would lose or double gradients."""

    def __init__(self, network: nn.Module, accumulation: int) -> None:
        self._accumulation = accumulation
        self._done = 0
        self._forward_seen = False
        network.register_forward_hook(self._see_forward)

    def _see_forward(self, *_: Any) -> None:
        self._forward_seen = True

    def begin_backward(self) -> None:
        """Count one backward."""
        if not self._forward_seen:
            raise RuntimeError("a second backward in one micro-step would lose gradients: sum the losses")
        if self._done == self._accumulation:
            raise RuntimeError(f"the optimizer step has its {self._accumulation} micro-steps already: call step")
        self._forward_seen = False
        self._done += 1

    @property
    def complete(self) -> bool:
        """Whether the optimizer step has all its micro-steps."""
        return self._done == self._accumulation

    def finish(self) -> None:
        """End the optimizer step."""
        if not self.complete:
            raise RuntimeError(f"step after {self._done} of {self._accumulation} micro-steps")
        self._done = 0
