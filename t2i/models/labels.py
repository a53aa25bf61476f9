"""Class labels as a condition: what takes the text encoder's place where a network draws classes.

A sample's caption is its label in digits, "207"; the empty caption stands for no class, as it does for text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.errors import UserError
from t2i.upload import upload


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

    def __call__(self, captions: list[str], plain: bool = False) -> list[Tensor]:
        """Labels (), int64; plain or not, a label is the same.

        Raises:
            UserError: a caption is no label.
        """
        return list(upload(np.array([self._number(caption) for caption in captions], np.int64), self._device))

    def cut(self, captions: Sequence[str], plain: bool = False) -> int:
        """None is."""
        return 0

    def null_caption(self) -> Tensor:
        """The null class (), int64."""
        return self([""])[0]
