"""Counting on PyTorch's meta device: shapes without memory, in seconds.

- FLOPs are those of matrix products and convolutions (two a multiply-add), not of elementwise operations, norms,
  softmax and resizing.
- Saved tensors are those of eager PyTorch on a GPU, where attention and RMSNorm are one kernel each; on the meta device
  both would be several operations with intermediate results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

META = torch.device("meta")


def count_flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class FusedKernels(TorchFunctionMode):
    """Attention and RMSNorm save what a GPU's fused kernels save. Only a forward pass runs under it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        if func is nn.functional.rms_norm:
            return _RMSNorm.apply(args[0])
        return func(*args, **(kwargs or {}))


class _ForwardAlone(torch.autograd.Function):
    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("only a forward pass may run under FusedKernels")


class _Attention(_ForwardAlone):
    """Saves queries, keys, values, the result and the logarithm of each row's sum."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _ = q @ k.transpose(-1, -2) @ v  # for its FLOPs
        out = torch.empty_like(q)  # laid out like the queries, as the kernels' results are
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class _RMSNorm(_ForwardAlone):
    """Saves the input and each row's scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)


Storages = dict[int, int]
"""Bytes of each storage by its address."""


class SavedTensors:
    """The storages that autograd saves for the backward pass under it, each once, without the network's own.

    Args:
        network: whose parameters and buffers are left out.
        blocks: modules of it, none inside another; storages saved while one runs count for it.

    Attributes:
        of_block: what each block saves.
        given: the tensors that each block is called with.
        outside: what is saved while no block runs.
    """

    def __init__(self, network: nn.Module | None = None, blocks: Sequence[nn.Module] = ()) -> None:
        own = [*network.parameters(), *network.buffers()] if network is not None else []
        self._seen = {tensor.untyped_storage()._cdata for tensor in own}
        self._alive: list[Tensor] = []  # a storage that is freed gives its address to the next
        self._blocks, self._hooks = blocks, ExitStack()
        self.of_block: list[Storages] = [{} for _ in blocks]
        self.given: list[Storages] = [{} for _ in blocks]
        self.outside: Storages = {}
        self._now = self.outside

    def __enter__(self) -> SavedTensors:
        self._hooks.enter_context(saved_tensors_hooks(self._keep, lambda tensor: tensor))
        for index, block in enumerate(self._blocks):
            self._hooks.enter_context(block.register_forward_pre_hook(self._begins(index), with_kwargs=True))
            self._hooks.enter_context(block.register_forward_hook(self._ends))
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()

    def _begins(self, index: int) -> Callable[..., None]:
        def begin(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._now = self.of_block[index]
            self.given[index] = self._storages(_tensors([*args, *kwargs.values()]))

        return begin

    def _ends(self, *of_block: Any) -> None:
        self._now = self.outside

    def _storages(self, tensors: Iterable[Tensor]) -> Storages:
        found = list(tensors)
        self._alive += found
        return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in found}

    def _keep(self, tensor: Tensor) -> Tensor:
        found = self._storages([tensor])
        if not found.keys() & self._seen:
            self._now |= found
            self._seen |= found.keys()
        return tensor


def _tensors(values: Iterable[object]) -> list[Tensor]:
    """The tensors among a call's arguments and in its tuples."""
    found = []
    for value in values:
        parts = value if isinstance(value, tuple) else (value,)
        found += [part for part in parts if isinstance(part, Tensor)]
    return found


def saved_bytes(run: Callable[[], object], besides: nn.Module | None = None) -> int:
    """Bytes that autograd saves for the backward of `run`, each storage once, without a module's own tensors."""
    with SavedTensors(besides) as kept:
        run()
    return sum(kept.outside.values())
