"""Samples that stay the same for every seed, stage and world size: for validation, and to see that there are any."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from data.decode import Pixels
from data.errors import DataError
from data.example import ImageSettings, example
from data.fetch import Fetcher
from data.order import SourceOrder, check_sources
from data.stream import LaneSource, LaneStream, Source

# Part of what makes the samples fixed: another number is another order.
_SHUFFLE_BLOCK = 1024
_AHEAD_BYTES = 32 << 20
# Of a source of millions, a wrong name of a member or a field is told after these.
_MOST_MISSES = 5000


class TooFewSamples(DataError):
    """Sources have fewer usable samples than were asked for; `found` is how many."""

    def __init__(self, message: str, found: int = 0) -> None:  # by the message alone when unpickled
        super().__init__(message)
        self.found = found


@dataclass(frozen=True)
class FixedSamples:
    """Samples for validation: pixels uint8 (n, 3, H, W), captions, ids."""

    pixels: torch.Tensor
    captions: list[str]
    ids: list[str]


def fixed_samples(sources: Sequence[Source], n: int, images: ImageSettings) -> FixedSamples:
    """Read the first n different usable samples of one fixed order.

    Args:
        sources: the sources, with different names.
        n: number of samples, 1 or more.
        images: what becomes of their images.

    Raises:
        TooFewSamples: the sources have fewer.
        DataError: their weights or names are wrong.
        StoreError: the network or a disk failed for longer than the retries last.
    """
    check_sources([source.weight for source in sources], [source.index.name for source in sources])
    ordered = [
        LaneSource(
            source, SourceOrder(source.index.name, source.index.counts, 1, _SHUFFLE_BLOCK, 0, "fixed"), _AHEAD_BYTES
        )
        for source in sources
    ]
    found: dict[str, tuple[Pixels, str]] = {}
    with closing(Fetcher()) as fetcher:
        stream = LaneStream(ordered, 0, 1, fetcher, _MOST_MISSES)
        while len(found) < n:
            id_, result = stream.next(lambda visit: example(visit, images))
            found.setdefault(id_, result)
            epochs = [epoch for epoch, _ in stream.state()["sources"].values()]
            if len(found) < n and min(epochs) > 0:
                names = ", ".join(repr(source.index.name) for source in sources)
                raise TooFewSamples(f"{n} were asked for, but of {names} only {len(found)} can be used", len(found))
    stacked = np.stack([pixels for pixels, _ in found.values()])
    return FixedSamples(torch.from_numpy(stacked), [caption for _, caption in found.values()], list(found))
