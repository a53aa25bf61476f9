"""How well an edit keeps the background: MSE and SSIM of the pixels outside the edited region.

The PixelDiT paper (section D.2, Table 14) says no more of its own than that. Here:
- Values are 0 to 1. MSE is the mean over the outside pixels and their three channels.
- SSIM is computed over the whole image, as a map, with Wang et al.'s Gaussian window (11 pixels, sigma 1.5), averaged
  over channels, then over the outside pixels. The windows of pixels near the region reach into it; so there is a second
  number, of the result with the source's pixels put back inside the region.

Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004), equation 13.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]
Inside = NDArray[np.bool_]
"""(H, W): the pixels of the edited region."""

METRICS = ("mse", "ssim", "ssim_replaced")
_SIGMA, _RADIUS = 1.5, 5
_C1, _C2 = 0.01**2, 0.03**2


def ssim_map(first: Floats, second: Floats) -> Floats:
    """SSIM (H, W) around each pixel of two images (H, W, 3) in [0, 1]; images are mirrored at their edges."""
    blur = partial(gaussian_filter, sigma=_SIGMA, radius=_RADIUS, axes=(0, 1))
    mean1, mean2 = blur(first), blur(second)
    variance1, variance2 = blur(first * first) - mean1**2, blur(second * second) - mean2**2
    covariance = blur(first * second) - mean1 * mean2
    alike = (2 * mean1 * mean2 + _C1) * (2 * covariance + _C2)
    return np.asarray((alike / ((mean1**2 + mean2**2 + _C1) * (variance1 + variance2 + _C2))).mean(-1))


def background_scores(source: Pixels, result: Pixels, inside: Inside) -> dict[str, float]:
    """ "mse", "ssim" and "ssim_replaced" of the background.

    Args:
        source: uint8 (H, W, 3).
        result: the same after the edit.
        inside: what was to be edited; not everything.
    """
    assert source.shape == result.shape and source.shape[:2] == inside.shape and not inside.all()
    before, after = source / 255.0, result / 255.0
    outside = ~inside
    replaced = np.where(inside[..., None], before, after)
    return {
        "mse": float(np.square(after - before)[outside].mean()),
        "ssim": float(ssim_map(before, after)[outside].mean()),
        "ssim_replaced": float(ssim_map(before, replaced)[outside].mean()),
    }
