"""Pixels of any colour space to sRGB, by the image's ICC profile and littleCMS at the perceptual intent.

A profile that is broken, or of another colour space than the pixels, is ignored. Few profiles serve many images: each
is compiled once, and one that changes sRGB by at most one level, as most do, is skipped.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import TiffImageFile

Pixels = NDArray[np.uint8]
_Mode = Literal["L", "RGB", "CMYK"]

_SPACES: dict[bytes, _Mode] = {b"GRAY": "L", b"RGB ": "RGB", b"CMYK": "CMYK"}
"""Pillow's modes by an ICC profile's colour space."""
_MOST_PROFILE_BYTES = 4 << 20
_SRGB = ImageCms.createProfile("sRGB")
_LATTICE = 17
"""Values of each channel that decide whether a profile is sRGB's."""


def to_srgb(pixels: Pixels, icc: bytes | None) -> Pixels:
    """Gray, RGB or CMYK (h, w, 1, 3 or 4) to sRGB (h, w, 3) by its profile; 255 is white, or full ink in CMYK."""
    channels = pixels.shape[2]
    if icc is not None and (space := _SPACES.get(icc[16:20])):
        if channels == 1 and space == "RGB":
            pixels, channels = np.repeat(pixels, 3, axis=2), 3
        if channels == {"L": 1, "RGB": 3, "CMYK": 4}[space] and (transform := _transform(icc, space)):
            return np.array(transform.apply(_image(pixels)))
    if channels == 1:
        return np.repeat(pixels, 3, axis=2)
    if channels == 4:
        paper = 255 - pixels.astype(np.uint16)
        return (paper[..., :3] * paper[..., 3:] // 255).astype(np.uint8)
    return pixels


def flatten(image: Image.Image, icc: bytes | None) -> tuple[Pixels, bytes | None]:
    """An image's pixels (h, w, 1, 3 or 4), blended with white by alpha, and the profile that still converts them.

    Raises:
        ValueError: the range of its values is not known.
    """
    if image.mode.startswith("I;16"):
        return _gray16(image), icc
    if image.mode in ("I", "F"):
        return _gray32(image), icc
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        colours = rgba.convert("RGB")
        if icc is not None:  # the white is sRGB's, so what is blended with it must be sRGB
            gray = image.mode in ("1", "L", "LA")
            colours = Image.fromarray(to_srgb(np.asarray(colours)[..., : 1 if gray else 3], icc))
        white = Image.new("RGB", image.size, "white")
        white.paste(colours, mask=rgba.getchannel("A"))
        return np.array(white), None
    if image.mode in ("1", "L"):
        return np.array(image.convert("L"))[..., None], icc
    return np.array(image if image.mode in ("RGB", "CMYK") else image.convert("RGB")), icc


def _gray16(image: Image.Image) -> Pixels:
    wide = np.asarray(image)
    gray = ((wide.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if _is_negative(image):
        gray = 255 - gray
    if "transparency" in image.info:
        gray[wide == image.info["transparency"]] = 255
    return gray[..., None]


def _gray32(image: Image.Image) -> Pixels:
    """Floats with 1 as white. For 32-bit and signed integers there is no convention."""
    values = np.asarray(image)
    if image.mode != "F" or not (values.min() >= 0 and values.max() <= 1):  # nan fails this, too
        raise ValueError("its values should be integers of at most 16 bits or floats from 0 to 1")
    gray = (values * 255 + 0.5).astype(np.uint8)
    return (255 - gray if _is_negative(image) else gray)[..., None]


def _is_negative(image: Image.Image) -> bool:
    """Whether 0 is white, which Pillow takes into account only up to 8 bits."""
    photometric_interpretation = 262
    return isinstance(image, TiffImageFile) and image.tag_v2.get(photometric_interpretation) == 0


def _image(pixels: Pixels) -> Image.Image:
    if pixels.shape[2] == 4:
        return Image.frombuffer("CMYK", pixels.shape[1::-1], pixels.tobytes(), "raw", "CMYK", 0, 1)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


@lru_cache(maxsize=32)
def _transform(icc: bytes, space: _Mode) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; None if they are sRGB already, or the profile cannot be used."""
    if len(icc) > _MOST_PROFILE_BYTES:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        transform = ImageCms.ImageCmsTransform(profile, ImageCms.ImageCmsProfile(_SRGB), space, "RGB")
    except (OSError, ValueError):
        return None
    if space == "CMYK":
        return transform
    axis = np.linspace(0, 255, 256 if space == "L" else _LATTICE).astype(np.uint8)
    lattice = np.stack(np.meshgrid(*[axis] * (1 if space == "L" else 3), indexing="ij"), axis=-1)
    lattice = lattice.reshape(1, -1, lattice.shape[-1])
    moved = np.asarray(transform.apply(_image(lattice))).astype(int) - lattice
    return transform if np.abs(moved).max() > 1 else None
