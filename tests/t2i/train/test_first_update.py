"""A start whose first update is not finite says where, and whether the compiler is at fault."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2i.distributed import World
from t2i.engine.engine import StepResult, not_finite, prepare_blocks
from t2i.train.guard import explain, is_finite
from t2i.train.step import StepOutput

WORLD = World(0, 1, torch.device("cpu"))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def losing_its_way(graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
    """A compiler whose code is wrong."""
    return lambda *inputs: tuple(out * math.nan for out in graph(*inputs))


def step_of(network: nn.Module, x: Tensor) -> StepOutput:
    """A step without an engine."""
    network.zero_grad()
    loss = network(x).square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    norm = float(nn.utils.get_total_norm(list(gradients.values())))
    result = StepResult(norm, None if math.isfinite(norm) else "not finite", not_finite(gradients.items()))
    return StepOutput({"loss": float(loss), "loss_lpips": 1.0}, result, 0.0)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_compiler_is_named_where_eager_code_is_finite(monkeypatch, checkpointed: bool) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: compile_(forward, backend=losing_its_way))
    network, x = Network(), torch.randn(2, 3)
    prepare_blocks(network, compiled=True, checkpointed=[*network.blocks] if checkpointed else [])  # type: ignore[arg-type]
    trained, told = step_of(network, x), []
    assert not is_finite(trained)
    explain(trained, lambda: step_of(network, x), WORLD, told.append)
    assert told[0] == (
        "the first update of this start is not finite; the gradient norm is nan; not finite in the loss: loss; "
        "not finite in the gradient: blocks.0.weight, blocks.0.bias, blocks.1.weight, blocks.1.bias and 2 more"
    )
    assert told[1] == "repeating it without compilation"
    assert told[2].startswith("without compilation it is finite (loss ") and "--engine.compile false" in told[2]
    assert not is_finite(step_of(network, x))  # compiled again


def test_the_compiler_is_cleared_where_eager_code_is_not_finite_either() -> None:
    network, told = Network(), []
    handle = network.blocks[1].bias.register_hook(lambda gradient: gradient * math.inf)
    x = torch.randn(2, 3)
    explain(step_of(network, x), lambda: step_of(network, x), WORLD, told.append)
    handle.remove()
    assert told[0].endswith("not finite; the gradient norm is inf; not finite in the gradient: blocks.1.bias")
    assert told[2] == "without compilation it is not finite either: the compiler is not at fault"
    assert is_finite(step_of(network, x))


def test_nothing_is_repeated_where_nothing_is_compiled() -> None:
    told: list[str] = []
    explain(StepOutput({"loss": 0.5}, StepResult(math.nan, "nan", ["head.weight"]), 0.0), None, WORLD, told.append)
    assert len(told) == 1 and told[0].endswith("the gradient norm is nan; not finite in the gradient: head.weight")
