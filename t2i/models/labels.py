"""Class labels as a condition: what takes the text encoder's place where a network draws classes.

A sample's caption is its label in digits, "207"; the empty caption stands for no class, as it does for text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.errors import UserError


class Conditioner(Protocol):
    """Turns captions into what a denoiser is told of them: `TextEncoder` or `ClassLabels`."""

    width: int
    """Width E of a caption's states; 0 where a caption is a number."""
    dtype: torch.dtype
    """Of what it returns."""

    def __call__(self, captions: list[str]) -> list[Tensor]:
        """Each caption's states (L, E), whose lengths may differ, or class (), on its device; not to be written to."""

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


class ClassLabels:
    """Labels 0 ... `classes` - 1; the number `classes` is the null class."""

    width = 0
    dtype = torch.long

    def __init__(self, classes: int, device: torch.device) -> None:
        self.classes = classes
        self._device = device

    def _number(self, caption: str) -> int:
        if not caption:
            return self.classes
        label = int(caption) if caption.isascii() and caption.isdigit() else self.classes
        if label >= self.classes:
            raise UserError(
                f"the caption {caption[:80]!r} is no class: model.condition is class and model.classes "
                f"{self.classes}, so a caption is a number from 0 to {self.classes - 1}"
            )
        return label

    def __call__(self, captions: list[str]) -> list[Tensor]:
        """Labels (), int64.

        Raises:
            UserError: a caption is no label.
        """
        labels = torch.tensor([self._number(caption) for caption in captions], dtype=self.dtype)
        return list(labels.to(self._device, non_blocking=True))

    def null_caption(self) -> Tensor:
        """The null class (), int64."""
        return self([""])[0]
