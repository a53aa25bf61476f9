"""From a sample that a lane comes by to what a network trains on: pixels and a caption."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from data.buckets import Buckets, Size
from data.decode import Pixels, SmallImages, decode, image_size
from data.errors import BadSample, Filtered
from data.select import UNIFORMS, Rules, select
from data.stream import Visit

Crop = Literal["center", "random", "adm"]


@dataclass(frozen=True)
class ImageSettings:
    """What becomes of images: `resolution` is H = W or (H, W), in pixels."""

    resolution: int | Size
    small_images: SmallImages = "drop"
    """Whether an image with a side below those it would train at is passed over or enlarged."""
    crop: Crop = "center"
    """Which part is taken; "adm": the middle, resized as ADM does."""
    horizontal_flip: bool = False
    """Mirror every second image, at random."""
    buckets: Buckets | None = None
    """Sizes that images train at by their shape, in place of the resolution."""

    @property
    def size(self) -> Size:
        """(H, W) of the resolution."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution

    @property
    def group_size(self) -> int:
        """Samples of a lane that stay together because they are of one size."""
        return self.buckets.group_size if self.buckets is not None else 1


@dataclass(frozen=True)
class Undecoded:
    """What a sample trains as, its image not decoded yet."""

    image: bytes
    caption: str
    size: Size
    """(H, W) that the image will have."""
    images: ImageSettings
    rules: Rules
    chance: tuple[float, float, float]
    """Of the crop from above and from the left, and of mirroring: in (0, 1)."""

    def decode(self) -> Pixels:
        """Decode the image, uint8 (3, H, W).

        Raises:
            Filtered: the rules or the size leave it out.
            BadSample: it cannot be decoded.
        """
        images, (vertical, horizontal, mirror) = self.images, self.chance
        with _odd_files_are_bad():
            return decode(
                self.image,
                self.size,
                small_images=images.small_images,
                min_side=self.rules.min_side,
                max_aspect_ratio=self.rules.max_aspect_ratio,
                crop=(vertical, horizontal) if images.crop == "random" else (0.5, 0.5),
                as_adm=images.crop == "adm",
                flip=images.horizontal_flip and mirror < 0.5,
            )


def choose(visit: Visit, images: ImageSettings) -> Undecoded:
    """Choose a sample's caption and its image's size.

    What is random is a function of the sample and its source's epoch.

    Raises:
        Filtered: the rules leave it out; with buckets, so far as the image's header tells.
        BadSample: its content cannot be used.
    """
    # Numbers that nothing depends on are not drawn: they would cost as much as the rest that is not decoding.
    chance = visit.uniforms("caption", UNIFORMS).tolist() if visit.rules.random else [0.5] * UNIFORMS
    selected = select(visit.members, visit.rules, chance)
    size = images.size if images.buckets is None else _bucket(selected.image, visit.rules, images, images.buckets)
    random = images.crop == "random" or images.horizontal_flip
    vertical, horizontal, mirror = visit.uniforms("image", 3).tolist() if random else [0.5] * 3
    return Undecoded(selected.image, selected.caption, size, images, visit.rules, (vertical, horizontal, mirror))


def example(visit: Visit, images: ImageSettings) -> tuple[Pixels, str]:
    """Choose a sample's caption and decode its image, uint8 (3, H, W).

    Raises:
        Filtered: the rules or the size leave it out.
        BadSample: its content cannot be used.
    """
    chosen = choose(visit, images)
    return chosen.decode(), chosen.caption


def _bucket(image: bytes, rules: Rules, images: ImageSettings, buckets: Buckets) -> Size:
    with _odd_files_are_bad():
        height, width = image_size(image, min_side=rules.min_side, max_aspect_ratio=rules.max_aspect_ratio)
    size = buckets.nearest(height, width)
    if images.small_images == "drop" and (height < size[0] or width < size[1]):
        raise Filtered("small_image", f"{width} x {height} for {size[1]} x {size[0]}")
    return size


@contextmanager
def _odd_files_are_bad() -> Iterator[None]:
    """One odd file in a hundred million must not end a run."""
    try:
        yield
    except (BadSample, Filtered, MemoryError):
        raise
    except Exception as fault:
        raise BadSample("undecodable_image", f"{type(fault).__name__}: {fault}") from fault
