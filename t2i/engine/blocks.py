"""The repeated blocks of a network: compiled, checkpointed and sharded one by one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


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
