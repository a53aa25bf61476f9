"""MSE and SSIM of the background: by hand, by their definition pixel by pixel, and by scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluation.editing.edit_list import METRICS, background_scores, ssim_map

RNG = np.random.default_rng(0)
FIRST = RNG.integers(0, 256, (23, 31, 3), dtype=np.uint8)
NEAR = np.clip(FIRST.astype(int) + RNG.integers(-60, 60, FIRST.shape), 0, 255).astype(np.uint8)
BOX = np.zeros(FIRST.shape[:2], np.bool_)
BOX[5:14, 8:20] = True


def by_definition(first: NDArray[np.float64], second: NDArray[np.float64], row: int, column: int) -> float:
    """SSIM at one pixel that is 5 or more from every edge, from the weighted moments of its 11 x 11 window."""
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    window = np.s_[row - 5 : row + 6, column - 5 : column + 6]
    values = []
    for channel in range(3):
        x, y = first[window][..., channel], second[window][..., channel]
        mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
        var_x, var_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
        cov = (weights * (x - mean_x) * (y - mean_y)).sum()
        values.append(
            ((2 * mean_x * mean_y + 1e-4) * (2 * cov + 9e-4))
            / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4))
        )
    return float(np.mean(values))


@pytest.mark.parametrize(("row", "column"), [(5, 5), (11, 17), (17, 25)])
def test_the_map_is_ssims_definition(row: int, column: int) -> None:
    first, second = FIRST / 255, NEAR / 255
    assert ssim_map(first, second)[row, column] == pytest.approx(by_definition(first, second, row, column), abs=1e-12)


def test_scores_are_scikit_images() -> None:
    metrics = pytest.importorskip("skimage.metrics", reason="needs scikit-image")
    options = {"channel_axis": -1, "data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "full": True}
    replaced = np.where(BOX[..., None], FIRST, NEAR)
    whole, of_replaced = (
        metrics.structural_similarity(FIRST / 255, it / 255, use_sample_covariance=False, **options)[1].mean(-1)
        for it in (NEAR, replaced)
    )
    found = background_scores(FIRST, NEAR, BOX)
    assert found["ssim"] == pytest.approx(whole[~BOX].mean(), abs=1e-12)
    assert found["ssim_replaced"] == pytest.approx(of_replaced[~BOX].mean(), abs=1e-12)
    np.testing.assert_allclose(ssim_map(FIRST / 255, NEAR / 255), whole, atol=1e-12)


def test_an_untouched_image() -> None:
    found = background_scores(FIRST, FIRST, BOX)
    assert tuple(found) == METRICS
    assert found["mse"] == 0 and found["ssim"] == found["ssim_replaced"] == pytest.approx(1, abs=1e-12)


def test_what_changes_inside_alone_touches_the_windows_around_it_unless_it_is_put_back() -> None:
    result = np.where(BOX[..., None], 255 - FIRST, FIRST)
    found = background_scores(FIRST, result, BOX)
    assert found["mse"] == 0 and found["ssim_replaced"] == pytest.approx(1, abs=1e-12)
    assert found["ssim"] < 0.99
    # Out of reach of every window.
    far = background_scores(FIRST, result, _near(BOX))
    assert far["ssim"] == pytest.approx(1, abs=1e-12)


def _near(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels whose windows reach the region."""
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    near = np.zeros_like(inside)
    near[max(0, rows[0] - 5) : rows[-1] + 6, max(0, columns[0] - 5) : columns[-1] + 6] = True
    return near


def test_flat_images() -> None:
    """Without structure SSIM is that of the means; MSE is of values from 0 to 1, over pixels and channels."""
    dark, light = np.full((12, 12, 3), 51, np.uint8), np.full((12, 12, 3), 51, np.uint8)
    light[..., 0] = 102
    inside = np.zeros((12, 12), np.bool_)
    inside[0, 0] = True
    found = background_scores(dark, light, inside)
    assert found["mse"] == pytest.approx(0.2**2 / 3)
    assert found["ssim"] == pytest.approx(((2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4) + 2) / 3)


def test_the_error_is_that_of_the_outside_pixels_alone() -> None:
    result = FIRST.copy()
    result[0, 0] ^= 128  # outside
    result[7, 9] = 255 - FIRST[7, 9]  # inside
    found = background_scores(FIRST, result, BOX)
    assert found["mse"] == pytest.approx((128 / 255) ** 2 / (~BOX).sum())
