"""ADM's crop against its own words in Pillow, from the file to the pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data.decode import decode


def picture(width: int, height: int, form: str, **options: object) -> bytes:
    rng = np.random.default_rng(width * height)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse, np.int16) + rng.integers(-30, 31, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, form, **options)
    return buffer.getvalue()


def in_pillow(data: bytes, side: int) -> np.ndarray:
    """Halve by boxes while both sides stay at or above the target, bicubic to it, cut the middle."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    while image.width >= 2 * side and image.height >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.BOX)
    scale = side / min(image.width, image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side].transpose(2, 0, 1)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (64, 64), (127, 129), (33, 90), (128, 400)])
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("JPEG", {"quality": 85, "subsampling": 2}),
    ],
    ids=["png", "jpeg444", "jpeg420"],
)
def test_the_crop_is_adms_to_the_bit(width: int, height: int, form: str, options: dict[str, int]) -> None:
    data = picture(width, height, form, **options)
    found = decode(data, 64, small_images="upscale", as_adm=True)
    assert found.shape == (3, 64, 64)
    np.testing.assert_array_equal(found, in_pillow(data, 64))
    other = decode(data, 64, small_images="upscale")
    assert (width, height) == (64, 64) or not np.array_equal(found, other)


def test_it_is_mirrored_after_all_else() -> None:
    data = picture(90, 77, "PNG")
    plain, mirrored = (decode(data, 32, as_adm=True, flip=flip) for flip in (False, True))
    np.testing.assert_array_equal(mirrored, plain[:, :, ::-1])
