"""Packing samples that are there, in tars or in a folder of images, which is read as if it were tars, too.

Every member comes along, whatever training would make of it; only what has no image is left out.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import numpy as np

from data.errors import BadSample, DataError
from data.formats import IMAGE_EXTENSIONS
from data.listing import told
from data.packing.contents import Contents, LeftOut, Sample
from data.packing.images import Images
from data.packing.recipe import Recipe
from data.packing.rows import ahead, fingerprint, left_out, sample_key
from data.shards.index import SourceIndex, index_source, list_left_out
from data.shards.tar import parse_sample
from data.store import Store
from data.store.folder import FolderStore

_LONGEST_NAME = 100
"""Bytes of a member's name in a plain tar header."""
_MOST_A_READ = 4 << 20
"""Bytes; eight reads are under way at a time, and as many wait for their use."""


@dataclass(frozen=True)
class _Request:
    """Neighbouring samples of a shard: the number of the first, and those of their rows."""

    shard: int
    first: int
    rows: list[int]


@dataclass(frozen=True)
class _Reader:
    index: SourceIndex
    images: Images

    def __call__(self, items: Sequence[int]) -> Iterator[Sample | LeftOut]:
        for made in ahead(self._read, self._requests(items)):
            yield from made

    def _requests(self, items: Sequence[int]) -> Iterator[_Request]:
        """Join neighbours as far as that is cheaper than another request; of a folder, whose files are many, none."""
        most = min(_MOST_A_READ, 2 * self.index.store.readahead)
        ends = np.cumsum(self.index.counts)
        held: _Request | None = None
        for row in items:
            shard = int(np.searchsorted(ends, row, side="right"))
            sample = row - int(ends[shard] - self.index.counts[shard])
            if held and shard == held.shard and row == held.rows[-1] + 1:
                offsets = self.index.offsets(shard)
                if offsets[sample + 1] - offsets[held.first] <= most:
                    held.rows.append(row)
                    continue
            if held:
                yield held
            held = _Request(shard, sample, [row])
        if held:
            yield held

    def _read(self, request: _Request) -> list[Sample | LeftOut]:
        last = request.first + len(request.rows)
        offsets = self.index.offsets(request.shard)[request.first : last + 1].tolist()
        name, version = self.index.names[request.shard], self.index.versions[request.shard]
        content = memoryview(self.index.store.read(name, offsets[0], offsets[-1], version=version))
        return [
            self._row(row, name, request.first + n, content[offsets[n] - offsets[0] : offsets[n + 1] - offsets[0]])
            for n, row in enumerate(request.rows)
        ]

    def _row(self, row: int, shard: str, sample: int, content: memoryview) -> Sample | LeftOut:
        where = f"{shard} sample {sample}"
        try:
            raw = parse_sample(content)
            # A folder's shards have its members' folder, and their dots as %2E.
            name = unquote(posixpath.join(posixpath.dirname(shard), raw.key))
            where = f"{where} ({name})"
            return self._sample(sample_key(row, name), raw.members)
        except BadSample as fault:
            return left_out(where, fault)

    def _sample(self, key: str, members: dict[str, bytes]) -> Sample:
        image = next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)
        if image is None:
            raise BadSample("missing_image")
        extension, pixels = self.images(members[image])
        others = {name: content for name, content in members.items() if name != image}
        # Under its old name where the right one is taken: nothing gets lost.
        made = {image if extension in others else extension: pixels, **others}
        for name in made:
            # TarWriter leaves out what begins so, and a plain header has no room for more.
            if name.startswith("_") or len(f"{key}.{name}".encode("utf-8", "replace")) > _LONGEST_NAME:
                raise BadSample("bad_member_name", name[:_LONGEST_NAME])
        return Sample(key, made)


def samples_of_tars(index: SourceIndex, recipe: Recipe, name: str = "tars") -> Contents:
    """List the samples of existing tars to pack anew, with all their members."""
    damaged = {"rest of a damaged shard": len(index.damage)} if index.damage else {}
    table = zip(index.names, index.sizes.tolist(), index.versions, index.counts.tolist(), strict=True)
    return recipe.contents(
        name,
        int(index.counts.sum()),
        _Reader(index, recipe.images),
        origin=index.store.url,
        fingerprint=fingerprint(table),
        left_out={**list_left_out(index), **damaged},
    )


def samples_of_folder(store: Store, recipe: Recipe) -> Contents:
    """List a folder's images, at any depth, to pack with the files beside them of the same name.

    Every process holds the names of all files, about 200 bytes each.

    Raises:
        DataError: there is no image.
    """
    folder, left_out = FolderStore(store), Counter[str]()
    if not folder.list(left_out=left_out):
        formats = ", ".join(IMAGE_EXTENSIONS)
        raise DataError(f"source {store.url}: it should be a folder with images ({formats}){told(left_out)}")
    return samples_of_tars(index_source(folder, "source"), recipe, "folder")
