"""What the trainer may ask of an engine, whichever library shards the state behind it.

All engines compute the same numbers within rounding. Masters, moments and gradients are fp32, gradients are summed
over micro-steps and ranks in fp32, the global gradient norm is known before weights move, and an update that is
vetoed or not finite reaches neither weights nor moments.

What a rank holds of each parameter: one contiguous slice of the flattened tensor.

ZeRO's and FSDP2's shards are all of this form, so the average, the checkpoint and the optimizer are written
once, over slices by name, and fit every engine and world size.

The repeated blocks of a network: compiled, checkpointed and sharded one by one.
"""

from __future__ import annotations

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


class HasBlocks(Protocol):
    """A network that says which of its modules are its blocks."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """In the order in which they run; they hold most of the parameters."""


def prepare_blocks(network: HasBlocks, *, compiled: bool, checkpointed: Collection[nn.Module]) -> None:
    """Compile the blocks, and of some keep only the inputs for the backward pass, which computes the rest again.

    It is the blocks' `forward` that is wrapped, so that the hooks of the engines stay outside. Copies of the network
    are to be made before: they would share the wrapped functions.
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
    vetoed: str | None
    """Why the update was not applied; None: it was."""
    not_finite: Sequence[str] = ()
    """Where the norm is not finite: the parameters whose gradient, as far as this rank holds it, is not either."""


def not_finite(gradients: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those that are not finite."""
    return [name for name, gradient in gradients if not gradient.isfinite().all()]


class Engine(Protocol):
    """A trained network, sharded over the ranks."""

    network: nn.Module
    """Called for the forward pass of a micro-step."""
    shards: Shards
    """What this rank holds of each parameter: fp32 masters and moments, as views of the engine's memory."""
    optimizer_steps: int
    """Updates applied to the moments: AdamW's bias correction counts with it. May be set."""

    def backward(self, loss: Tensor) -> None:
        """The one backward of a micro-step: `loss` is the scalar sum of everything that is minimised.

        Gradients are averaged over micro-steps and ranks.

        Raises:
            RuntimeError: `network` was not called since the last backward, or the optimizer step has all its
                micro-steps already: a second backward would lose or double gradients.
        """

    def step(self, lr: Callable[[bool], float], veto: Callable[[float], str | None]) -> StepResult:
        """Apply the accumulated gradient, unless it is not finite or vetoed.

        Args:
            lr: learning rate of a group; the argument says whether it is Muon's.
            veto: sees the global gradient norm before weights move; a reason stops the update.
        """

    def refresh(self) -> None:
        """Bring the network's weights up to date after the masters (`shards`) were written to."""

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
        """Enter one backward."""
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
