"""From a raw sample to what a network trains on: pixels and a caption, one lane at a time.

`SingleSizeLane` decodes each sample as the lane comes to it. `BucketLane` yields groups of one size for aspect-ratio
buckets: samples wait in their buckets, still encoded, until a group is complete, and are then decoded. So a lane's
groups are a function of its stream, the buckets and the group's size alone.

- Waiting samples are part of the lane's state, by their places in the order: they are carried from epoch to epoch, and
  read again on resume. A rare size may keep up to group_size - 1 samples of a lane waiting for long.
- A sample that cannot be decoded is skipped, the rest of its group waits on, and the lane takes another sample of the
  same source: the sources' weights hold as they do without buckets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch

from data.decode import Pixels, SmallImages, decode, image_size
from data.errors import BadSample, Filtered
from data.filters import UNIFORMS, Buckets, Filters, Size
from data.lane import Candidate, LaneStream, Quarantined, RawSample

Crop = Literal["center", "random", "adm"]


@dataclass(frozen=True)
class ImageSettings:
    """What becomes of images: `resolution` is H = W or (H, W), in pixels."""

    resolution: int | Size
    small_images: SmallImages = "drop"
    """Whether an image with a side below those it would train at is skipped or enlarged."""
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
class EncodedSample:
    """A sample's caption, and its image before it is decoded."""

    image: bytes
    caption: str
    size: Size
    """(H, W) that the image will have."""
    images: ImageSettings
    filters: Filters
    chance: tuple[float, float, float]
    """Numbers in (0, 1): the crop's vertical and horizontal position, and whether to mirror."""

    def decode(self) -> Pixels:
        """Decode the image, uint8 (3, H, W).

        Raises:
            Filtered: the filters or the size leave it out.
            BadSample: it cannot be decoded.
        """
        images, (vertical, horizontal, mirror) = self.images, self.chance
        with _unexpected_is_bad():
            return decode(
                self.image,
                self.size,
                small_images=images.small_images,
                min_side=self.filters.min_side,
                max_aspect_ratio=self.filters.max_aspect_ratio,
                crop=(vertical, horizontal) if images.crop == "random" else (0.5, 0.5),
                as_adm=images.crop == "adm",
                flip=images.horizontal_flip and mirror < 0.5,
            )


def select(raw: RawSample, images: ImageSettings) -> EncodedSample:
    """Filter a sample and choose its caption and its image's size.

    What is random is a function of the sample and its source's epoch.

    Raises:
        Filtered: the filters leave it out; with buckets, also by the size that the image's header states.
        BadSample: its content cannot be used.
    """
    # Numbers that nothing depends on are not drawn: they would cost as much as all the rest but decoding.
    chance = raw.uniforms("caption", UNIFORMS).tolist() if raw.filters.random else [0.5] * UNIFORMS
    image, caption = raw.filters.select(raw.members, chance)
    size = images.size if images.buckets is None else _bucket(image, raw.filters, images, images.buckets)
    random = images.crop == "random" or images.horizontal_flip
    vertical, horizontal, mirror = raw.uniforms("image", 3).tolist() if random else [0.5] * 3
    return EncodedSample(image, caption, size, images, raw.filters, (vertical, horizontal, mirror))


def make_sample(raw: RawSample, images: ImageSettings) -> tuple[Pixels, str]:
    """Filter a sample, choose its caption and decode its image, uint8 (3, H, W).

    Raises:
        Filtered: the filters or the size leave it out.
        BadSample: its content cannot be used.
    """
    encoded = select(raw, images)
    return encoded.decode(), encoded.caption


def _bucket(image: bytes, filters: Filters, images: ImageSettings, buckets: Buckets) -> Size:
    with _unexpected_is_bad():
        height, width = image_size(image, min_side=filters.min_side, max_aspect_ratio=filters.max_aspect_ratio)
    size = buckets.nearest(height, width)
    if images.small_images == "drop" and (height < size[0] or width < size[1]):
        raise Filtered("small_image", f"{width} x {height} for {size[1]} x {size[0]}")
    return size


@contextmanager
def _unexpected_is_bad() -> Iterator[None]:
    """One odd file in a hundred million must not end a run."""
    try:
        yield
    except (BadSample, Filtered, MemoryError):
        raise
    except Exception as fault:
        raise BadSample("undecodable_image", f"{type(fault).__name__}: {fault}") from fault


Allocate = Callable[[Size], torch.Tensor]
"""(H, W) to memory for a group's pixels, uint8 (group_size, 3, H, W)."""


class Lane(Protocol):
    """One lane's endless groups of samples, with and without buckets."""

    def next(self, allocate: Allocate) -> tuple[list[str], list[str]]:
        """Write the next group's pixels into memory from `allocate`, and return its captions and ids.

        `allocate` may be called again, and then the memory of the last call counts.

        Raises:
            DataError, StoreError, FetcherClosed: as `LaneStream.find` does.
        """

    def state_dict(self) -> dict[str, Any]:
        """The position after the last group yielded, as JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after a state; to be called before the first group is taken."""

    def read_so_far(self) -> Counter[str]:
        """As `LaneStream.read_so_far`."""

    def take_bad(self) -> list[Quarantined]:
        """As `LaneStream.take_bad`."""


class SingleSizeLane:
    """A lane whose samples all have the resolution's size, in groups of one: a `Lane`."""

    def __init__(self, stream: LaneStream, images: ImageSettings) -> None:
        self._stream, self._images = stream, images
        self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict
        self.read_so_far, self.take_bad = stream.read_so_far, stream.take_bad

    def next(self, allocate: Allocate) -> tuple[list[str], list[str]]:
        """As `Lane.next`."""
        memory = allocate(self._images.size).numpy()
        id_, (memory[0], caption) = self._stream.next(partial(make_sample, images=self._images))
        return [caption], [id_]


class BucketLane:
    """A lane whose samples go into aspect-ratio buckets: a `Lane`.

    Its state is the stream's, and "waiting": [[source, epoch, position], ...], bucket by bucket in their order.
    """

    def __init__(self, stream: LaneStream, images: ImageSettings, buckets: Buckets) -> None:
        self._stream, self._group_size = stream, buckets.group_size
        self._select = partial(select, images=images)
        self._waiting: dict[Size, list[Candidate[EncodedSample]]] = {size: [] for size in buckets.sizes}
        self._to_read: list[tuple[str, int, int]] = []  # places of samples that waited when the state was saved
        self.read_so_far, self.take_bad = stream.read_so_far, stream.take_bad

    def state_dict(self) -> dict[str, Any]:
        """As `Lane.state_dict`."""
        names = self._stream.names
        waiting = [list(place) for place in self._to_read]
        waiting += [[names[one.source], *one.place] for bucket in self._waiting.values() for one in bucket]
        return self._stream.state_dict() | {"waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `Lane.load_state_dict`."""
        self._stream.load_state_dict(state)
        self._to_read = [(str(name), int(epoch), int(position)) for name, epoch, position in state["waiting"]]

    def next(self, allocate: Allocate) -> tuple[list[str], list[str]]:
        """As `Lane.next`; the group is of the bucket that fills first, or first in the table where two are full."""
        if self._to_read:
            candidates = self._stream.find_again(self._to_read, self._select)
            self._to_read = []
            self._add(*candidates)
        while True:
            full = next((size for size, bucket in self._waiting.items() if len(bucket) >= self._group_size), None)
            if full is None:
                self._add(self._stream.find(self._select))
            elif (group := self._decode(full, allocate)) is not None:
                return [one.result.caption for one in group], [one.id for one in group]

    def _add(self, *candidates: Candidate[EncodedSample]) -> None:
        for one in candidates:
            self._waiting[one.result.size].append(one)

    def _decode(self, size: Size, allocate: Allocate) -> list[Candidate[EncodedSample]] | None:
        """Decode the first group of a bucket; None if one of it cannot be decoded, and the others wait on."""
        group, later = self._waiting[size][: self._group_size], self._waiting[size][self._group_size :]
        memory = allocate(size).numpy()
        good: list[Candidate[EncodedSample]] = []
        bad: list[Candidate[EncodedSample]] = []
        for one in group:
            try:
                memory[len(good)] = one.result.decode()
            except (Filtered, BadSample) as why:
                self._stream.reject(one, why)
                bad.append(one)
            else:
                good.append(one)
        if bad:
            self._waiting[size] = good + later
            self._add(*(self._stream.find(self._select, one.source) for one in bad))
            return None
        self._waiting[size] = later
        for one in good:
            self._stream.accept(one)
        return good
