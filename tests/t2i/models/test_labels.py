"""Labels: digits below the number of classes, and the null class for the empty caption."""

from __future__ import annotations

import pytest
import torch

from data.errors import UserError
from t2i.models.text import ClassLabels

LABELS = ClassLabels(10, torch.device("cpu"))


def test_captions_are_numbers_and_the_empty_one_is_the_null_class() -> None:
    found = LABELS(["3", "9", "", "007"])
    assert [label.item() for label in found] == [3, 9, 10, 7] and {label.dtype for label in found} == {torch.long}
    assert LABELS.null_caption().shape == () and LABELS.null_caption() == 10


@pytest.mark.parametrize("caption", ["10", "-1", "a dog", "3.0", "1_0", "²", "٣", " 3"])
def test_anything_else_is_refused(caption: str) -> None:
    with pytest.raises(UserError, match="a number from 0 to 9"):
        LABELS(["3", caption])
