"""A start's first update that is not finite: in which terms and parameters, and whether eager code agrees."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from t2i.engine.interface import StepResult
from t2i.train.processes import World
from t2i.train.step import Trained

NAMED = 4
"""Parameters that a sentence names."""


def never(loss: float, grad_norm: float) -> str:
    """The veto of a step that is repeated to look at it."""
    return "repeated without compilation"


def is_finite(trained: Trained) -> bool:
    """Whether loss and gradient norm are."""
    return math.isfinite(trained.means["loss"]) and math.isfinite(trained.result.grad_norm)


def _parameters(result: StepResult, world: World) -> str:
    """The first parameters whose gradient is not finite on any rank, and how many more there are."""
    names = list(dict.fromkeys(name for part in world.gather(list(result.not_finite)) for name in part))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def explain(trained: Trained, repeat: Callable[[], Trained] | None, world: World, tell: Callable[[str], None]) -> None:
    """Say in which loss terms and parameters a step is not finite, and whether it is without compilation.

    All ranks take part: they know the same loss and norm, so each comes here, and repeats the step, or none does.

    Args:
        repeat: makes the same step again, with an update that is vetoed; None: nothing is compiled.
        tell: takes sentences.
    """
    terms = ", ".join(name for name, value in trained.means.items() if not math.isfinite(value))
    told = [f"the gradient norm is {trained.result.grad_norm}"]
    if terms:
        told.append(f"not finite in the loss: {terms}")
    if parameters := _parameters(trained.result, world):
        told.append(f"not finite in the gradient: {parameters}")
    tell(f"the first update of this start is not finite; {'; '.join(told)}")
    if repeat is None:
        return
    tell("repeating it without compilation")
    with torch.compiler.set_stance("force_eager"):
        eager = repeat()
    if is_finite(eager):
        tell(
            f"without compilation it is finite (loss {eager.means['loss']:.4g}, gradient norm "
            f"{eager.result.grad_norm:.4g}): the compiled blocks compute something else on this machine, train with "
            "--engine.compile false"
        )
    else:
        tell("without compilation it is not finite either: the compiler is not at fault")
