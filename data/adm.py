"""The centre crop that ImageNet's generative models are compared on, of ADM (Dhariwal and Nichol, 2021).

Halved by a box filter while the shorter side is at least twice the target's, then bicubic to the target, then the
middle. Pillow's filters to the bit: FID moves with the resampling of the images it is computed against.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def adm_crop(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 to (side, side, 3)."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))
