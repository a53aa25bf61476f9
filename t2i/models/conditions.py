"""What a denoiser is told of a sample: states of its caption, or its class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Conditioner(Protocol):
    """Turns captions into what a denoiser is told of them: `TextEncoder` or `ClassLabels`."""

    width: int
    """Width E of a caption's states; 0 where a caption is a number."""
    dtype: torch.dtype
    """Of what it returns."""

    def __call__(self, captions: list[str], plain: bool = False) -> list[Tensor]:
        """Each caption's states (L, E), whose lengths may differ, or class (), on its device; not to be written to.

        Args:
            plain: without the instruction that captions have before them otherwise (text.instruction): negative prompts
                are read like this, and the empty caption always is.
        """

    def cut(self, captions: Sequence[str], plain: bool = False) -> int:
        """How many captions are longer than what is read of them."""

    def null_caption(self) -> Tensor:
        """What stands for no caption: states or a class."""


def stack_conditions(conditions: Sequence[Tensor], length: int = 0) -> Tensor:
    """Captions' states as one tensor (B, L, E), or their classes (B,).

    Args:
        conditions: as a conditioner gives them.
        length: the least L; it is that of the longest states. Shorter ones are filled up with zeros.
    """
    if conditions[0].ndim == 0:
        return torch.stack(list(conditions))
    states = pad_sequence(list(conditions), batch_first=True)
    return F.pad(states, (0, 0, 0, max(0, length - states.shape[1])))
