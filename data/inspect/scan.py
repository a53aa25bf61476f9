"""What is in a source: a random subset of its samples, read, measured and judged as in training.

- One sample is drawn from each of n equally long ranges of the source: spread over all shards, the same for the same
  seed, and in the order of the shards, so that neighbours share a request.
- Sizes and formats are read from headers. Only a full decode finds an image that is broken after its header, so
  `decodes` of the samples are decoded as in training; the others cost no more than reading.
- Findings of parts add up to those of the whole, and do not grow with the number of samples.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from data import randomness
from data.decode import decode, image_size
from data.errors import BadSample, DataError, Filtered
from data.fetch import Fetcher
from data.filters import UNIFORMS, Filters
from data.lane import RawSample
from data.listing import format_of
from data.prefetch import request_bytes
from data.sample import ImageSettings, make_sample
from data.shards.index import SourceIndex
from data.shards.tar import TarSample, parse_sample
from data.store import OnFault

ASPECT_RATIOS = {
    "1:3": 1 / 3, "1:2": 1 / 2, "9:16": 9 / 16, "2:3": 2 / 3, "3:4": 3 / 4, "4:5": 4 / 5, "1:1": 1.0,
    "5:4": 5 / 4, "4:3": 4 / 3, "3:2": 3 / 2, "16:9": 16 / 9, "2:1": 2.0, "3:1": 3.0,
}  # fmt: skip
"""Width to height; an image counts under the nearest one."""

_NAMED = 5
"""Samples that illustrate a reason."""
_MOST_MEMBERS = 1000
_FINE_BELOW = 10_000


class Tally:
    """Counts of whole numbers, exact below 10,000 and rounded to three digits above, so that it stays small."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, value: int) -> None:
        self._counts[value if value < _FINE_BELOW else int(float(f"{value:.2e}"))] += 1

    def update(self, other: Tally) -> None:
        self._counts.update(other._counts)

    @property
    def total(self) -> int:
        return self._counts.total()

    def quantile(self, share: float) -> int:
        """The smallest number that at least `share`, in [0, 1], of all numbers (at least one) do not exceed."""
        values = np.array(sorted(self._counts))
        reached = np.cumsum([self._counts[value] for value in values.tolist()])
        return int(values[np.searchsorted(reached, share * reached[-1] - 1e-9)])

    def below(self, limit: float) -> int:
        return sum(count for value, count in self._counts.items() if value < limit)


@dataclass
class Reason:
    """The samples skipped for one reason: their number, and the first of them as (id, detail)."""

    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)

    def update(self, other: Reason) -> None:
        self.count += other.count
        self.first = (self.first + other.first)[:_NAMED]


Reasons = dict[tuple[str, bool], Reason]
"""By reason, and whether only a decoded sample can show it."""


@dataclass(frozen=True)
class Tile:
    """A sample on the page; `jpeg` is a thumbnail, `width` and `height` are those of the image."""

    id: str
    caption: str
    width: int
    height: int
    jpeg: bytes


@dataclass
class Findings:
    """Properties of some samples: of `read` samples `decoded` were judged in full, of which `usable` would train."""

    read: int = 0
    decoded: int = 0
    usable: int = 0
    members: Counter[str] = field(default_factory=Counter)
    member_bytes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    aspect_ratios: Counter[str] = field(default_factory=Counter)
    """By name in `ASPECT_RATIOS`."""
    shorter: Tally = field(default_factory=Tally)
    """Pixels of the shorter side."""
    longer: Tally = field(default_factory=Tally)
    elongation: Tally = field(default_factory=Tally)
    """Longer to shorter side, in hundredths."""
    image_bytes: Tally = field(default_factory=Tally)
    words: Tally = field(default_factory=Tally)
    """Words of the captions as stored, before any filter or prefix."""
    bad: Reasons = field(default_factory=dict)
    filtered: Reasons = field(default_factory=dict)
    sheet: list[Tile] = field(default_factory=list)

    def update(self, other: Findings) -> None:
        """Add the findings of the samples that follow."""
        self.read += other.read
        self.decoded += other.decoded
        self.usable += other.usable
        for name in ("members", "member_bytes", "formats", "aspect_ratios"):
            counts: Counter[str] = getattr(self, name)
            more: Counter[str] = getattr(other, name)
            # Keys with dots give every sample "extensions" of its own.
            counts.update({key: n for key, n in more.items() if key in counts or len(counts) < _MOST_MEMBERS})
        for name in ("shorter", "longer", "elongation", "image_bytes", "words"):
            getattr(self, name).update(getattr(other, name))
        for reasons, found in ((self.bad, other.bad), (self.filtered, other.filtered)):
            for reason, samples in found.items():
                reasons.setdefault(reason, Reason()).update(samples)
        self.sheet += other.sheet


ANY_SIZE = ImageSettings(64, small_images="upscale")
"""Settings where no resolution is given: no image is too small, and every one is decoded to its end."""

_CHUNK = 64
"""Samples that a thread reads in one task."""
_DRAWN_AT_ONCE = 1 << 16
_THUMBNAIL_SIDE = 320
_THUMBNAIL_QUALITY = 82
_UNDECODED = {
    "HEIC or MP4": (4, b"ftyp"), "JPEG XL": (0, b"\xff\x0a"), "JPEG XL box": (4, b"JXL "), "JPEG 2000": (4, b"jP  "),
    "HTML or XML": (0, b"<"),
}  # fmt: skip
NO_FORMAT = "unknown"


@dataclass(frozen=True)
class _Pick:
    """A sample to read: its number in the source, its place, and what to do with it."""

    number: int
    shard: int
    sample: int
    decode: bool
    show: bool


def inspect(
    index: SourceIndex,
    filters: Filters,
    images: ImageSettings,
    *,
    samples: int | None = 2000,
    decodes: int | None = 2000,
    sheet: int = 48,
    seed: int = 0,
    progress: Callable[[int], object] = lambda n: None,
) -> Findings:
    """Read and judge a random subset of a source's samples.

    Args:
        images: as in training, or `ANY_SIZE`.
        samples: how many to read; None for all.
        decodes: how many of them to decode in full; None for all.
        sheet: thumbnails of decoded and usable samples.
        seed: decides which samples are drawn, and their random choices.
        progress: called with the number of samples read since the last call.

    Raises:
        DataError: a number is below 1, or a shard is gone or changed since it was indexed.
        StoreError: faults outlasted the retries.
    """
    for name, number in (("samples", samples), ("decodes", decodes)):
        if number is not None and number < 1:
            raise DataError(f"{name} is {number}: it should be at least 1, or all")
    findings = Findings()
    pending: deque[tuple[int, Future[Findings]]] = deque()
    read = partial(_read_chunk, index, filters, images, seed)
    with closing(Fetcher()) as fetcher:
        for chunk in _chunks(index, samples, decodes, sheet, seed):
            pending.append((len(chunk), fetcher.submit(partial(read, chunk), int(len(chunk) * index.mean_bytes))))
            # Results are taken in the order of the source, so that the same seed gives the same findings.
            while len(pending) > 2 * fetcher.limit:
                _take(pending, findings, progress)
        while pending:
            _take(pending, findings, progress)
    return findings


def _take(pending: deque[tuple[int, Future[Findings]]], findings: Findings, progress: Callable[[int], object]) -> None:
    size, future = pending.popleft()
    findings.update(future.result())
    progress(size)


# --- which samples ---


def _chunks(
    index: SourceIndex, samples: int | None, decodes: int | None, sheet: int, seed: int
) -> Iterator[list[_Pick]]:
    """The samples to read, in the order of the source, in chunks of one shard."""
    ends = np.cumsum(index.counts)
    total = int(ends[-1])
    n = min(total, samples or total)
    m = min(n, decodes or n)
    chunk: list[_Pick] = []
    for first in range(0, n, _DRAWN_AT_ONCE):
        places = np.arange(first, min(first + _DRAWN_AT_ONCE, n))
        numbers = _draw(places, n, total, seed)
        shards = np.searchsorted(ends, numbers, side="right")
        decoded = _nth(places, n, m)
        # The samples shown are spread evenly over those decoded.
        shown = decoded & _nth(places * m // n, m, min(sheet, m))
        inside = numbers - (ends - index.counts)[shards]
        for pick in map(_Pick, *(array.tolist() for array in (numbers, shards, inside, decoded, shown))):
            if chunk and (chunk[0].shard != pick.shard or len(chunk) == _CHUNK):
                yield chunk
                chunk = []
            chunk.append(pick)
    yield chunk


def _draw(places: NDArray[np.int64], n: int, total: int, seed: int) -> NDArray[np.int64]:
    """One number from each of the ranges `places` of range(total), cut into n."""
    start, stop = places * total // n, (places + 1) * total // n
    uniforms = randomness.uniform(randomness.key(seed, "inspect", "sample"), places)
    return start + (uniforms * (stop - start)).astype(np.int64)


def _nth(places: NDArray[np.int64], n: int, m: int) -> NDArray[np.bool_]:
    """Whether each place is one of m places spread evenly over range(n)."""
    return np.asarray((places + 1) * m // n > places * m // n)


# --- what they are like ---


def _read_chunk(
    index: SourceIndex, filters: Filters, images: ImageSettings, seed: int, picks: list[_Pick], on_fault: OnFault
) -> Findings:
    """Read and judge some samples of one shard, in its order."""
    findings = Findings()
    judge = _Judge(index, filters, images, seed, findings)
    offsets = index.offsets(picks[0].shard)
    starts, stops = offsets[[pick.sample for pick in picks]], offsets[[pick.sample + 1 for pick in picks]]
    for first, last in _requests(starts, stops, index.store.readahead, request_bytes(index)):
        name, version = index.names[picks[first].shard], index.versions[picks[first].shard]
        begin, end = int(starts[first]), int(stops[last])
        content = memoryview(index.store.read(name, begin, end, version=version, on_fault=on_fault))
        for at in range(first, last + 1):
            judge.add(picks[at], content[int(starts[at]) - begin : int(stops[at]) - begin])
    return findings


def _requests(starts: NDArray[np.int64], stops: NDArray[np.int64], gap: int, most: int) -> Iterator[tuple[int, int]]:
    """Group neighbours into requests (first, last) where that is cheaper than separate ones."""
    first = 0
    for at in range(1, len(starts)):
        if starts[at] - stops[at - 1] > gap or stops[at] - starts[first] > most:
            yield first, at - 1
            first = at
    yield first, len(starts) - 1


class _Judge:
    """Measures and judges samples one by one, into `findings`."""

    def __init__(
        self, index: SourceIndex, filters: Filters, images: ImageSettings, seed: int, findings: Findings
    ) -> None:
        self._index, self._filters, self._images, self._seed, self._findings = index, filters, images, seed, findings
        self._unfiltered = replace(
            filters, fields={}, min_caption_words=0, max_caption_words=None, prefix_probability=0.0
        )
        self._to_show = 0

    def add(self, pick: _Pick, content: memoryview) -> None:
        findings = self._findings
        findings.read += 1
        findings.decoded += pick.decode
        self._to_show += pick.show  # a sample that cannot be shown leaves its place to the next
        shard = f"{self._index.name}/{self._index.names[pick.shard]}"
        try:
            raw = parse_sample(content)
        except BadSample as bad:
            self._skip(findings.bad, bad, f"{shard}/sample {pick.sample}", False)
            return
        size = self._measure(raw, pick.number)
        sample = RawSample(f"{shard}/{raw.key}", raw.members, self._filters, partial(self._uniforms, pick.number))
        in_full = False
        try:
            sample.filters.select(sample.members, sample.uniforms("caption", UNIFORMS).tolist())
            if pick.decode:
                in_full = True
                _, caption = make_sample(sample, self._images)
                findings.usable += 1
                if self._to_show and size is not None:
                    findings.sheet.append(_tile(sample, caption, size))
                    self._to_show -= 1
        except Filtered as filtered:
            self._skip(findings.filtered, filtered, sample.id, in_full)
        except BadSample as bad:
            self._skip(findings.bad, bad, sample.id, in_full)

    def _uniforms(self, number: int, purpose: str, n: int) -> NDArray[np.float64]:
        return randomness.uniform(randomness.key(self._seed, "inspect", purpose), number * n + np.arange(n))

    def _skip(self, reasons: Reasons, why: BadSample | Filtered, id_: str, in_full: bool) -> None:
        reasons.setdefault((why.reason, in_full), Reason()).update(Reason(1, [(id_, why.detail)]))

    def _measure(self, raw: TarSample, number: int) -> tuple[int, int] | None:
        """Count the sample's members; returns (width, height) of its image if its header can be read."""
        findings = self._findings
        findings.members.update(raw.members.keys())
        findings.member_bytes.update({name: len(content) for name, content in raw.members.items()})
        try:
            uniforms = self._uniforms(number, "caption", UNIFORMS).tolist()
            findings.words.add(len(self._unfiltered.select(raw.members, uniforms)[1].split()))
        except Filtered:  # an empty caption
            findings.words.add(0)
        except BadSample:
            pass  # `add` counts it
        image = _image(raw.members, self._filters)
        if image is None:
            return None
        findings.formats[image_format(image)] += 1
        findings.image_bytes.add(len(image))
        size = header_size(image)
        if size is not None:
            findings.shorter.add(min(size))
            findings.longer.add(max(size))
            findings.elongation.add(round(100 * max(size) / min(size)))
            findings.aspect_ratios[_nearest_aspect_ratio(*size)] += 1
        return size


def _image(members: Mapping[str, bytes], filters: Filters) -> bytes | None:
    return next((members[name] for name in filters.images if name in members), None)


def image_format(image: bytes) -> str:
    """A file's format by its first bytes, whatever its name says; `NO_FORMAT` if it is none that is known."""
    if (format_ := format_of(image)) is not None:
        return format_.name
    return next((name for name, (at, magic) in _UNDECODED.items() if image.startswith(magic, at)), NO_FORMAT)


def header_size(image: bytes) -> tuple[int, int] | None:
    """(width, height) of the upright image, from its header; None if that cannot be read."""
    try:
        height, width = image_size(image)
    except BadSample:  # decoding counts it
        return None
    return width, height


def _nearest_aspect_ratio(width: int, height: int) -> str:
    return min(ASPECT_RATIOS, key=lambda name: abs(math.log(width / height / ASPECT_RATIOS[name])))


def _tile(sample: RawSample, caption: str, size: tuple[int, int]) -> Tile:
    """A sample for the page, with its whole image as a thumbnail."""
    width, height = size
    scale = min(1.0, _THUMBNAIL_SIDE / max(size))
    small = (max(1, round(height * scale)), max(1, round(width * scale)))
    pixels = decode(_image(sample.members, sample.filters) or b"", small, small_images="upscale")
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels.transpose(1, 2, 0)), quality=_THUMBNAIL_QUALITY)
    return Tile(sample.id, caption, width, height, bytes(jpeg))
