"""Packing existing tars anew: other shard sizes, unique keys, smaller images; every member comes along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.errors import BadSample
from data.packing.contents import Contents, LeftOut, Sample
from data.packing.images import Images
from data.packing.rows import (
    IMAGE_EXTENSIONS,
    ahead,
    check_caption,
    parts,
    sample_key,
    usable,
)
from data.shards.index import SourceIndex
from data.shards.tar import parse_sample

_LONGEST_NAME = 100
"""Bytes of a member's name in a plain tar header."""
_BYTES_A_READ = 4 << 20


@dataclass(frozen=True)
class _TarsReader:
    index: SourceIndex
    images: Images

    def __call__(self, items: Sequence[int]) -> Iterator[Sample | LeftOut]:
        for rows in ahead(self._read, self._stretches(items), most=3):
            yield from rows

    def _stretches(self, items: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Neighbouring rows of a shard that are read by one request: (shard, [(row, sample in the shard)])."""
        ends = np.cumsum(self.index.counts)
        held: list[tuple[int, int]] = []
        shard, start = -1, 0
        for row in items:
            its_shard = int(np.searchsorted(ends, row, side="right"))
            sample = row - int(ends[its_shard] - self.index.counts[its_shard])
            offsets = self.index.offsets(its_shard)
            if held and (its_shard != shard or row != held[-1][0] + 1 or offsets[sample + 1] - start > _BYTES_A_READ):
                yield shard, held
                held = []
            if not held:
                shard, start = its_shard, int(offsets[sample])
            held.append((row, sample))
        if held:
            yield shard, held

    def _read(self, stretch: tuple[int, list[tuple[int, int]]]) -> list[Sample | LeftOut]:
        shard, rows = stretch
        offsets = self.index.offsets(shard)
        start, stop = int(offsets[rows[0][1]]), int(offsets[rows[-1][1] + 1])
        name, version = self.index.names[shard], self.index.versions[shard]
        content = memoryview(self.index.store.read(name, start, stop, version=version))
        return [
            usable(
                f"{name} sample {sample}",
                lambda row=row, sample=sample: self._sample(  # type: ignore[misc]
                    row, content[int(offsets[sample]) - start : int(offsets[sample + 1]) - start]
                ),
            )
            for row, sample in rows
        ]

    def _sample(self, row: int, content: memoryview) -> Sample:
        raw = parse_sample(content)
        members = dict(raw.members)
        image = next((e for e in IMAGE_EXTENSIONS if e in members), None)
        if image is None:
            raise BadSample("missing_image")
        check_caption(members.get("txt"))
        extension, pixels = self.images(members.pop(image), image)
        members[extension] = pixels
        made = sample_key(row, raw.key)
        for extension in members:
            # TarWriter leaves out what begins so, and a plain header has no room for more.
            if extension.startswith("_") or len(f"{made}.{extension}".encode("utf-8", "replace")) > _LONGEST_NAME:
                raise BadSample("bad_member_name", extension[:_LONGEST_NAME])
        return Sample(made, members)


def samples_of_tars(index: SourceIndex, images: Images, heldout: float = 0.0, seed: int = 0) -> Contents:
    """List the samples of existing tars to pack anew, with all their members.

    Raises:
        UserError: `heldout` is outside its range.
    """
    damaged = len(index.damage)
    return Contents(
        name="tars",
        arguments={"heldout": heldout, "seed": seed, "resize": images.resize, "quality": images.quality},
        splits=dict(parts(int(index.counts.sum()), heldout, seed)),
        read=_TarsReader(index, images),
        about={"origin": index.store.url},
        left_out={"rest of a damaged shard": damaged} if damaged else {},
        versions={"contents": index.fingerprint, **images.versions()},
    )
