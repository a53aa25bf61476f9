"""From a sample that a lane comes by to what a network trains on: pixels and a caption.

The samples of one lane in groups of one size, for batches of aspect-ratio buckets.

- The lane's samples wait in their buckets, still encoded, until as many of one size are there as stay together; then
  they are decoded. So the lane's groups are a function of its stream, the buckets and the group's size alone.
- What waits is part of the lane's state, by where it lies: it is carried from epoch to epoch, and read again where a
  run goes on. A bucket that little comes to may keep up to group_size - 1 samples of a lane for long.
- One that cannot be decoded is set aside, the rest of its group waits on, and the lane takes another sample of the
  same source: the sources' weights hold as they do without buckets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from data.decode import Pixels, SmallImages, decode, image_size
from data.errors import BadSample, Filtered
from data.filters import UNIFORMS, Buckets, Rules, Size, select
from data.lane import Found, LaneStream, SetAside, Visit

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


@dataclass(frozen=True)
class Group:
    """Samples of one size."""

    pixels: torch.Tensor
    """uint8 (group_size, 3, H, W), RGB."""
    captions: list[str]
    ids: list[str]


class LaneGroups:
    """The endless stream of one lane's groups.

    Args:
        stream: the lane's samples, from where `state` stands.
        images: what becomes of them.
        buckets: the sizes, and how many samples make a group.
        pin_memory: make the pixels' memory page-locked.
        state: what `state()` returned, to go on after it: that of the stream, and "waiting": [[source, epoch,
            position], ...], bucket by bucket in their order; None begins.
    """

    def __init__(
        self,
        stream: LaneStream,
        images: ImageSettings,
        buckets: Buckets,
        pin_memory: bool,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._stream, self._group_size, self._pin_memory = stream, buckets.group_size, pin_memory
        self._choose = partial(choose, images=images)
        self._waiting: dict[Size, list[Found[Undecoded]]] = {size: [] for size in buckets.sizes}
        self._unread: list[tuple[str, int, int]] = [
            (str(name), int(epoch), int(position)) for name, epoch, position in (state["waiting"] if state else ())
        ]
        """What waits and was not read again yet."""

    def state(self) -> dict[str, Any]:
        """Return the cursor after the last group yielded, as plain JSON values."""
        names = self._stream.names
        waiting = [list(place) for place in self._unread]
        waiting += [[names[it.source], *it.place] for members in self._waiting.values() for it in members]
        return self._stream.state() | {"waiting": waiting}

    def read_so_far(self) -> Counter[str]:
        """As `LaneStream.read_so_far`."""
        return self._stream.read_so_far()

    def take_set_aside(self) -> list[SetAside]:
        """As `LaneStream.take_set_aside`."""
        return self._stream.take_set_aside()

    def next(self) -> Group:
        """Return the next group: of the bucket that fills first, or first in the table where two are full.

        Raises:
            DataError, StoreError, FetcherClosed: as `LaneStream.find` does.
        """
        if self._unread:
            found = self._stream.find_again(self._unread, self._choose)
            self._unread = []
            self._admit(*found)
        while True:
            full = next((size for size, members in self._waiting.items() if len(members) >= self._group_size), None)
            if full is None:
                self._admit(self._stream.find(self._choose))
            elif (group := self._decode(full)) is not None:
                return group

    def _admit(self, *found: Found[Undecoded]) -> None:
        for it in found:
            self._waiting[it.made.size].append(it)

    def _decode(self, size: Size) -> Group | None:
        """The first group of a bucket; None if one of it cannot be decoded, and the others wait on."""
        members, later = self._waiting[size][: self._group_size], self._waiting[size][self._group_size :]
        pixels = torch.empty((self._group_size, 3, *size), dtype=torch.uint8, pin_memory=self._pin_memory)
        array = pixels.numpy()
        good: list[Found[Undecoded]] = []
        bad: list[Found[Undecoded]] = []
        for it in members:
            try:
                array[len(good)] = it.made.decode()
            except (Filtered, BadSample) as why:
                self._stream.give_up(it, why)
                bad.append(it)
            else:
                good.append(it)
        if bad:
            self._waiting[size] = good + later
            self._admit(*(self._stream.find(self._choose, it.source) for it in bad))
            return None
        self._waiting[size] = later
        for it in good:
            self._stream.use(it)
        return Group(pixels, [it.made.caption for it in good], [it.id for it in good])
