"""From a sample that a lane comes by to what a network trains on: pixels and a caption."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data.decode import Pixels, SmallImages, decode
from data.errors import BadSample, Filtered
from data.select import UNIFORMS, select
from data.stream import Visit

Crop = Literal["center", "random", "adm"]


@dataclass(frozen=True)
class ImageSettings:
    """What becomes of images: `resolution` is H = W or (H, W), in pixels."""

    resolution: int | tuple[int, int]
    small_images: SmallImages = "drop"
    """Whether an image with a side below the resolution's is passed over or enlarged."""
    crop: Crop = "center"
    """Which part is taken; "adm": the middle, resized as ADM does."""
    horizontal_flip: bool = False
    """Mirror every second image, at random."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution


def example(visit: Visit, images: ImageSettings) -> tuple[Pixels, str]:
    """Choose a sample's caption and decode its image, uint8 (3, H, W).

    What is random is a function of the sample and its source's epoch.

    Raises:
        Filtered: the rules or the resolution leave it out.
        BadSample: its content cannot be used.
    """
    # Numbers that nothing depends on are not drawn: they would cost as much as the rest that is not decoding.
    chance = visit.uniforms("caption", UNIFORMS).tolist() if visit.rules.random else [0.5] * UNIFORMS
    selected = select(visit.members, visit.rules, chance)
    random = images.crop == "random" or images.horizontal_flip
    vertical, horizontal, mirror = visit.uniforms("image", 3).tolist() if random else [0.5] * 3
    try:
        pixels = decode(
            selected.image,
            images.size,
            small_images=images.small_images,
            min_side=visit.rules.min_side,
            max_aspect_ratio=visit.rules.max_aspect_ratio,
            crop=(vertical, horizontal) if images.crop == "random" else (0.5, 0.5),
            as_adm=images.crop == "adm",
            flip=images.horizontal_flip and mirror < 0.5,
        )
    except (BadSample, Filtered, MemoryError):
        raise
    except Exception as fault:  # one odd file in a hundred million must not end a run
        raise BadSample("undecodable_image", f"{type(fault).__name__}: {fault}") from fault
    return pixels, selected.caption
