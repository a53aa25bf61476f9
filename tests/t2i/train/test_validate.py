"""Grids and means over ranks' samples."""

from __future__ import annotations

import numpy as np
import torch

from t2i.diffusion.objective import LossTerms
from t2i.train.scoring import tile
from t2i.train.step import GlobalMeans


def test_tiles_are_row_by_row_and_the_rest_is_white() -> None:
    images = np.stack([np.full((3, 2, 4), value, np.uint8) for value in range(5)])
    grid = tile(images, 3)
    assert grid.shape == (4, 12, 3)
    assert grid[::2, ::4, 0].tolist() == [[0, 1, 2], [3, 4, 255]]


def test_means_are_over_samples_and_empty_terms_are_left_out() -> None:
    terms = LossTerms()
    terms.add("a", torch.tensor(6.0), 2)
    terms.add("a", torch.tensor(0.0), 1)
    assert GlobalMeans(terms, ["a", "b"], torch.device("cpu")).read() == {"a": 2.0}
