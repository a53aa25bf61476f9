"""Packing existing samples: those of tars, or those of a folder of images, which is read as virtual tars.

Every member is kept, whatever training would make of it; only a sample without an image is skipped.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import numpy as np

from data.errors import BadSample, DataError
from data.listing import IMAGE_EXTENSIONS, format_left_out
from data.packing.spec import (
    DatasetSpec,
    ImageEncoder,
    PackOptions,
    Sample,
    Skipped,
    fingerprint,
    prefetch,
    sample_key,
    skipped,
)
from data.shards.index import SourceIndex, index_source, list_left_out
from data.shards.tar import parse_sample
from data.store import Store
from data.store.virtual import FolderStore

_LONGEST_NAME = 100
"""Bytes of a member's name in a plain tar header."""
_MOST_A_READ = 4 << 20
"""Bytes of a request; up to 16 requests are in flight or wait for their use."""


@dataclass(frozen=True)
class _Request:
    """Neighbouring samples of a shard: the number of the first one, and their row numbers."""

    shard: int
    first: int
    rows: list[int]


@dataclass(frozen=True)
class _Reader:
    index: SourceIndex
    encoder: ImageEncoder

    def __call__(self, items: Sequence[int]) -> Iterator[Sample | Skipped]:
        for made in prefetch(self._read, self._requests(items)):
            yield from made

    def _requests(self, items: Sequence[int]) -> Iterator[_Request]:
        """Join neighbours where that is cheaper than another request; never in a folder, where each is its own file."""
        most = min(_MOST_A_READ, 2 * self.index.store.readahead)
        ends = np.cumsum(self.index.counts)
        request: _Request | None = None
        for row in items:
            shard = int(np.searchsorted(ends, row, side="right"))
            sample = row - int(ends[shard] - self.index.counts[shard])
            if request and shard == request.shard and row == request.rows[-1] + 1:
                offsets = self.index.offsets(shard)
                if offsets[sample + 1] - offsets[request.first] <= most:
                    request.rows.append(row)
                    continue
            if request:
                yield request
            request = _Request(shard, sample, [row])
        if request:
            yield request

    def _read(self, request: _Request) -> list[Sample | Skipped]:
        last = request.first + len(request.rows)
        offsets = self.index.offsets(request.shard)[request.first : last + 1].tolist()
        name, version = self.index.names[request.shard], self.index.versions[request.shard]
        content = memoryview(self.index.store.read(name, offsets[0], offsets[-1], version=version))
        return [
            self._row(row, name, request.first + n, content[offsets[n] - offsets[0] : offsets[n + 1] - offsets[0]])
            for n, row in enumerate(request.rows)
        ]

    def _row(self, row: int, shard: str, sample: int, content: memoryview) -> Sample | Skipped:
        where = f"{shard} sample {sample}"
        try:
            raw = parse_sample(content)
            # A virtual tar's name holds its members' folder, and dots in keys are written %2E.
            name = unquote(posixpath.join(posixpath.dirname(shard), raw.key))
            where = f"{where} ({name})"
            return self._sample(sample_key(row, name), raw.members)
        except BadSample as fault:
            return skipped(where, fault)

    def _sample(self, key: str, members: dict[str, bytes]) -> Sample:
        image = next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)
        if image is None:
            raise BadSample("missing_image")
        extension, pixels = self.encoder(members[image])
        others = {name: content for name, content in members.items() if name != image}
        # If another member has the right extension, the old one is kept, so that nothing is lost.
        made = {image if extension in others else extension: pixels, **others}
        for name in made:
            # TarWriter drops names that begin so, and a plain header has no room for longer ones.
            if name.startswith("_") or len(f"{key}.{name}".encode("utf-8", "replace")) > _LONGEST_NAME:
                raise BadSample("bad_member_name", name[:_LONGEST_NAME])
        return Sample(key, made)


def samples_of_tars(index: SourceIndex, pack_options: PackOptions, name: str = "tars") -> DatasetSpec:
    """Describe the samples of existing tars, with all their members."""
    corrupt = {"rest of a corrupt shard": len(index.corruption)} if index.corruption else {}
    table = zip(index.names, index.sizes.tolist(), index.versions, index.counts.tolist(), strict=True)
    return pack_options.dataset_spec(
        name,
        int(index.counts.sum()),
        _Reader(index, pack_options),
        origin=index.store.url,
        fingerprint=fingerprint(table),
        left_out={**list_left_out(index), **corrupt},
    )


def samples_of_folder(store: Store, pack_options: PackOptions) -> DatasetSpec:
    """Describe a folder's images, at any depth, with the files of the same names.

    Every process holds the names of all files, about 200 bytes each. Raises DataError if there is no image.
    """
    folder, left_out = FolderStore(store), Counter[str]()
    if not folder.list(left_out=left_out):
        formats = ", ".join(IMAGE_EXTENSIONS)
        raise DataError(f"source {store.url}: it should be a folder with images ({formats}){format_left_out(left_out)}")
    return samples_of_tars(index_source(folder, "source"), pack_options, "folder")
