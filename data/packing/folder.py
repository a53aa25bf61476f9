"""Packing a folder of images: `a.jpg` with `a.txt` and, if it is there, `a.json`, at any depth.

The names of its files are held in memory, about 300 bytes each, as a folder can only be listed whole.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import DataError
from data.packing.contents import Contents, LeftOut, Sample
from data.packing.images import Images
from data.packing.rows import (
    IMAGE_EXTENSIONS,
    Part,
    ahead,
    check_caption,
    image_extension,
    parts,
    read_file,
    sample_key,
    usable,
)
from data.store import Store

_OTHER_IMAGES = ("gif", "bmp", "tif", "tiff")
"""To be encoded again; they do not pass through."""


@dataclass(frozen=True)
class _Files(Sequence[Any]):
    """A split of a folder; a slice of it is its rows with their files' names: image, caption, metadata or ""."""

    rows: Part
    files: list[tuple[str, str, str]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return [(row, self.files[row]) for row in self.rows[index]]


@dataclass(frozen=True)
class _FolderReader:
    store: Store
    images: Images

    def __call__(self, items: Sequence[tuple[int, tuple[str, str, str]]]) -> Iterator[Sample | LeftOut]:
        return ahead(lambda item: usable(item[1][0], lambda: self._sample(*item)), items)

    def _sample(self, row: int, files: tuple[str, str, str]) -> Sample:
        image, caption, meta = files
        text = check_caption(read_file(self.store, caption) if caption else None)
        extension, content = self.images(read_file(self.store, image), image_extension(image))
        members = {extension: content, "txt": text}
        if meta:
            members["json"] = read_file(self.store, meta)
        return Sample(sample_key(row, posixpath.splitext(image)[0]), members)


def folder_of_images(store: Store, images: Images, heldout: float = 0.0, seed: int = 0) -> Contents:
    """List a folder's images, at any depth, to pack with the .txt and, if any, the .json of the same name.

    Raises:
        UserError: `heldout` is outside its range.
        DataError: there is no image.
    """
    groups: dict[str, dict[str, str]] = {}
    sizes: dict[str, int] = {}
    for info in store.list():
        stem, dot, extension = info.name.rpartition(".")
        if (extension := extension.lower()) in (*IMAGE_EXTENSIONS, *_OTHER_IMAGES, "txt", "json") and dot:
            groups.setdefault(stem, {})[extension] = info.name
            sizes[info.name] = info.size
    files, without_image, digest = [], 0, hashlib.blake2b(digest_size=8)
    for stem in sorted(groups):
        found = groups[stem]
        image = next((found[e] for e in (*IMAGE_EXTENSIONS, *_OTHER_IMAGES) if e in found), None)
        if image is None:
            without_image += "txt" in found
        else:
            files.append((image, found.get("txt", ""), found.get("json", "")))
            for name in filter(None, files[-1]):
                digest.update(f"{name}\t{sizes[name]}\n".encode("utf-8", "surrogateescape"))
    if not files:
        raise DataError(f"source {store.url}: it should be a folder with images ({'|'.join(IMAGE_EXTENSIONS)})")
    return Contents(
        name="folder",
        arguments={"heldout": heldout, "seed": seed, "resize": images.resize, "quality": images.quality},
        splits={split: _Files(rows, files) for split, rows in parts(len(files), heldout, seed).items()},
        read=_FolderReader(store, images),
        about={"origin": store.url},
        left_out={"missing_image": without_image} if without_image else {},
        versions={"contents": digest.hexdigest(), **images.versions()},
    )
