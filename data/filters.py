"""What a sample consists of and whether it counts: its image, its caption, filters, and aspect-ratio buckets.

- A choice is a pure function of the sample's bytes, the filters and a few given numbers.
- Metadata is parsed only where a filter or caption reads it.
- A member that is not text, or metadata that is not a JSON object, is bad content. A number that is missing or out of
  range only filters. Filters on the image's size are applied by `data.decode`.

Buckets are sizes of about equal area. SDXL's table, which PixArt and Sana use too, follows a rule: 40 sizes for side
1024, and half of each for 512. PixelDiT has its own 7 sizes for 1024, and SDXL's for 512. An image goes to the bucket
whose ratio of height to width, rounded to 2 decimals, differs least from its own; of two as near, to the wider.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from data.errors import BadSample, DataError, Filtered
from data.listing import IMAGE_EXTENSIONS

Size = tuple[int, int]
"""Height and width, in pixels."""

_SDXL_PARTS = 16
"""The side of a square in the unit of SDXL's table."""
_SDXL_EXCEPTION = (21, 11)
"""1344 x 704 at 1024: the one size of the rule that the published tables do not have."""
_PIXELDIT = ((752, 1344), (896, 1344), (896, 1200), (1024, 1024), (1200, 896), (1344, 896), (1344, 752))
_PIXELDIT_PARTS = 64
"""The side 1024 in the unit of PixelDiT's table."""


def sdxl_sizes(side: int) -> tuple[Size, ...]:
    """List SDXL's 40 sizes for squares of `side` pixels, a multiple of 16.

    They are the multiples of side / 16 from side / 2 to 2 side whose area is 0.9 to 1 of the square's, but one.
    """
    _check_side("sdxl", side, _SDXL_PARTS)
    unit, area = side // _SDXL_PARTS, _SDXL_PARTS**2
    sides = range(_SDXL_PARTS // 2, 2 * _SDXL_PARTS + 1)
    found = ((h, w) for h in sides for w in sides if 9 * area <= 10 * h * w <= 10 * area and (h, w) != _SDXL_EXCEPTION)
    return tuple((h * unit, w * unit) for h, w in found)


def pixeldit_sizes(side: int) -> tuple[Size, ...]:
    """List PixelDiT's 7 sizes for 1024, scaled to squares of `side` pixels, a multiple of 64."""
    _check_side("pixeldit", side, _PIXELDIT_PARTS)
    return tuple((h * side // 1024, w * side // 1024) for h, w in _PIXELDIT)


def _check_side(table: str, side: int, parts: int) -> None:
    if side < 1 or side % parts:
        raise DataError(f"resolution {side} must be a multiple of {parts} for the buckets of {table}")


@dataclass(frozen=True)
class Buckets:
    """Sizes that images train at, and how many samples of one size stay together.

    Raises:
        DataError: there are no sizes, a number is below 1, or two ratios are equal to 2 decimals.
    """

    sizes: tuple[Size, ...]
    group_size: int

    def __post_init__(self) -> None:
        if not self.sizes or min(map(min, self.sizes)) < 1:
            raise DataError(f"buckets {list(map(list, self.sizes))}: name at least one [height, width], in pixels")
        if self.group_size < 1:
            raise DataError(f"group_size {self.group_size} must be at least 1")
        seen: dict[float, Size] = {}
        for size in self.sizes:
            if (other := seen.get(_ratio(size))) is not None:
                raise DataError(
                    f"buckets {list(other)} and {list(size)} have the same ratio of height to width, {_ratio(size)}: "
                    "keep one of them"
                )
            seen[_ratio(size)] = size

    @cached_property
    def _by_ratio(self) -> dict[float, Size]:
        return {_ratio(size): size for size in sorted(self.sizes, key=_ratio)}

    def nearest(self, height: int, width: int) -> Size:
        """The size for an upright image of `height` x `width` pixels."""
        ratio = height / width
        return self._by_ratio[min(self._by_ratio, key=lambda bucket_ratio: abs(bucket_ratio - ratio))]


def _ratio(size: Size) -> float:
    return round(size[0] / size[1], 2)


UNIFORMS = 3
"""Numbers in (0, 1) that `Filters.select` takes: choice of caption, whether to prefix, which prefix."""

PREFIXES = (
    "A photo of ",
    "A picture of ",
    "An image of ",
    "A view of ",
    "A depiction of ",
    "This picture shows ",
    "Pictured here: ",
    "What you see is ",
)

_FIELD = "json:"
"""Prefix of the name of a caption that is a field of the metadata."""

Range = tuple[float | None, float | None]


@dataclass(frozen=True)
class Filters:
    """What a source's samples consist of, and which of them to filter out.

    Members are named by their extension in lower case: "jpg", "txt", "seg.png". Fields of the metadata are named by
    their path, joined by dots, or by a name with dots: "scores.aesthetic".

    Attributes:
        images: members that may be the image; the first that exists is taken.
        captions: members, or "json:FIELD", that may be the caption, each with its weight in the random choice. A field
            may be a text or a list of texts, such as COCO's five, which share its weight.
        metadata: the member that is a JSON object.
        min_side: least pixels of the image's shorter side.
        max_aspect_ratio: most that the longer side may be of the shorter, at least 1; None takes any.
        min_caption_words: least words of the caption.
        max_caption_words: most words of the caption; None takes any.
        fields: metadata field -> (least, most), both inclusive, None for no bound. A number in quotes is a number,
            true and false are 1 and 0, and a field that is missing or anything else is outside.
        prefix_probability: share of the short captions that get one of `PREFIXES`.
        prefix_below_words: a caption of fewer words is short.

    Raises:
        DataError: a value that makes no sense, by name.
    """

    images: tuple[str, ...] = IMAGE_EXTENSIONS
    captions: Mapping[str, float] = field(default_factory=lambda: {"txt": 1.0})
    metadata: str = "json"
    min_side: int = 0
    max_aspect_ratio: float | None = None
    min_caption_words: int = 0
    max_caption_words: int | None = None
    fields: Mapping[str, Range] = field(default_factory=dict)
    prefix_probability: float = 0.0
    prefix_below_words: int = 30

    @property
    def random(self) -> bool:
        """Whether the caption depends on chance."""
        fields = any(name.startswith(_FIELD) for name in self.captions)  # may be lists
        return len(self.captions) > 1 or fields or self.prefix_probability > 0

    def __post_init__(self) -> None:
        _require(len(self.images) > 0, "images", self.images, "name at least one member")
        _require(len(self.captions) > 0, "captions", dict(self.captions), "name at least one member")
        members = [("images", name) for name in self.images] + [("metadata", self.metadata)]
        members += [("captions", name) for name in self.captions if not name.startswith(_FIELD)]
        for where, name in members:
            plain = name and name == name.lower() and not name.startswith(".") and "/" not in name
            _require(bool(plain), where, name, 'write the extension in lower case without the first dot: "jpg"')
        for name, weight in self.captions.items():
            _require(0 < weight < math.inf, f"captions[{name!r}]", weight, "a weight is above 0 and finite")
        names = [("captions", name.removeprefix(_FIELD)) for name in self.captions if name.startswith(_FIELD)]
        for where, name in names + [("fields", name) for name in self.fields]:
            _require(all(name.split(".")), where, name, 'name a field by its path: "scores.aesthetic"')
        for name, (least, most) in self.fields.items():
            ordered = (-math.inf if least is None else least) <= (math.inf if most is None else most)
            _require(ordered, f"fields[{name!r}]", (least, most), "a range is (least, most), in this order")
        _require(self.min_side >= 0, "min_side", self.min_side, "pixels are 0 or more")
        ratio = self.max_aspect_ratio
        _require(ratio is None or ratio >= 1, "max_aspect_ratio", ratio, "longer to shorter side is 1 or more")
        words = (self.min_caption_words, self.max_caption_words)
        _require(words[0] >= 0, "min_caption_words", words[0], "words are 0 or more")
        within = words[1] is None or words[1] >= max(words[0], 1)
        _require(within, "max_caption_words", words[1], "it is 1 or more and not below min_caption_words")
        _require(0 <= self.prefix_probability <= 1, "prefix_probability", self.prefix_probability, "it lies in [0, 1]")
        _require(self.prefix_below_words >= 0, "prefix_below_words", self.prefix_below_words, "words are 0 or more")

    def select(self, members: Mapping[str, bytes], uniforms: Sequence[float]) -> tuple[bytes, str]:
        """Choose a sample's image and caption, and apply the filters that need no picture.

        The choice is among the captions that are not empty, by weight; the filters apply to the chosen one.

        Args:
            members: the sample's members by extension in lower case.
            uniforms: `UNIFORMS` numbers in (0, 1) that belong to the sample.

        Raises:
            BadSample: with reason "bad_caption" (not UTF-8 text) or "bad_metadata".
            Filtered: with reason "missing_image", "missing_caption", "empty_caption", "caption_words" or "field:NAME".
        """
        image = next((members[name] for name in self.images if name in members), None)
        if image is None:
            raise Filtered("missing_image", f"its members are {', '.join(members) or 'none'}")
        metadata = _metadata(members, self)
        for name, bounds in self.fields.items():
            _check_field(metadata, name, bounds)
        caption = _choose(_captions(members, metadata, self), uniforms[0])
        words = len(caption.split())
        most = self.max_caption_words
        if words < self.min_caption_words or (most is not None and words > most):
            raise Filtered("caption_words", str(words))
        if words < self.prefix_below_words and uniforms[1] < self.prefix_probability:
            caption = _prefixed(caption, uniforms[2])
        return image, caption


def _require(holds: bool, name: str, value: object, right: str) -> None:
    if not holds:
        raise DataError(f"{name} = {value!r}: {right}")


def _metadata(members: Mapping[str, bytes], filters: Filters) -> Mapping[str, Any]:
    """The metadata as far as a filter or caption reads it; {} where the sample has none."""
    wanted = filters.fields or any(name.startswith(_FIELD) for name in filters.captions)
    if not wanted or filters.metadata not in members:
        return {}
    try:
        metadata = json.loads(members[filters.metadata])
    except (ValueError, RecursionError) as fault:
        raise BadSample("bad_metadata", str(fault)) from fault
    if not isinstance(metadata, dict):
        raise BadSample("bad_metadata", f"it is no JSON object but {type(metadata).__name__}")
    return metadata


def _look_up(metadata: Mapping[str, Any], name: str) -> Any:
    """The value at a path such as "scores.aesthetic", or of a field with that whole name; None if there is none."""
    if name in metadata:
        return metadata[name]
    value: Any = metadata
    for part in name.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def _check_field(metadata: Mapping[str, Any], name: str, bounds: Range) -> None:
    value = _look_up(metadata, name)
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):  # words, or an integer of hundreds of digits
        number = math.nan
    least, most = bounds
    if math.isnan(number) or (least is not None and number < least) or (most is not None and number > most):
        raise Filtered(f"field:{name}", repr(value)[:80])


def _captions(members: Mapping[str, bytes], metadata: Mapping[str, Any], filters: Filters) -> list[tuple[str, float]]:
    """The captions that are not empty, and their weights."""
    found, is_there = [], False
    for name, weight in filters.captions.items():
        value = _look_up(metadata, name.removeprefix(_FIELD)) if name.startswith(_FIELD) else members.get(name)
        values = value if isinstance(value, list) else [value]
        texts = [_text(name, each) for each in values if each is not None]
        filled = [text for text in texts if text]
        found += [(text, weight / len(filled)) for text in filled]
        is_there = is_there or bool(texts)
    if not is_there:
        raise Filtered("missing_caption", f"none of {', '.join(filters.captions)}")
    if not found:
        raise Filtered("empty_caption")
    return found


_KINDS = {dict: "an object: name one of its fields", list: "a list in a list", bool: "true or false"}


def _text(name: str, value: Any) -> str:
    try:
        text = value.decode("utf-8-sig") if isinstance(value, bytes) else value
        if not isinstance(text, str):
            kind = _KINDS.get(type(text), "a number")
            raise BadSample("bad_caption", f"{name} should be a text or a list of texts, and is {kind}")
        text.encode("utf-8")  # JSON may escape half a character
    except UnicodeError as fault:
        raise BadSample("bad_caption", f"{name}: {fault}") from fault
    return text.strip()


def _choose(captions: Sequence[tuple[str, float]], uniform: float) -> str:
    left = uniform * math.fsum(weight for _, weight in captions)
    for text, weight in captions[:-1]:
        left -= weight
        if left < 0:
            return text
    return captions[-1][0]  # rounding may leave a rest


def _prefixed(caption: str, uniform: float) -> str:
    if caption.lower().startswith(tuple(prefix.lower() for prefix in PREFIXES)):
        return caption
    return PREFIXES[int(uniform * len(PREFIXES))] + caption
