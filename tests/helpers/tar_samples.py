"""Small tars for the tests of `data`: written with tarfile, each image a colour that encodes its number."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import simplejpeg

from data.errors import DataError
from data.listing import drop_excluded
from data.shards.index import SourceIndex, open_index
from data.store import ObjectInfo, ReadOnly, open_store


def jpeg(number: int, size: int | tuple[int, int] = 16) -> bytes:
    """A flat image, of a side or (height, width), whose colour tells images 0 to 215 apart after compression and
    resizing."""
    colour = [40 * (number % 6) + 20, 40 * (number // 6 % 6) + 20, 40 * (number // 36 % 6) + 20]
    height, width = (size, size) if isinstance(size, int) else size
    pixels = np.full((height, width, 3), colour, dtype=np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="444"))


def tar_bytes(members: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_source(
    folder: Path,
    counts: Sequence[int],
    name: str = "source",
    replaced: Mapping[int, Mapping[str, bytes]] | None = None,
    size: int = 16,
) -> SourceIndex:
    """Shards of `counts` samples, numbered through; `replaced[number]` overrides members by extension."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            parts = {"jpg": jpeg(number, size), "txt": f"caption {number}".encode()}
            parts.update((replaced or {}).get(number, {}))
            members += [(f"{number:06d}.{extension}", content) for extension, content in parts.items()]
            number += 1
        (folder / f"{shard:05d}.tar").write_bytes(tar_bytes(members))
    return open_index(open_store(str(folder)), name, notice=lambda _: None)


class MemoryStore:
    """Objects in memory at a made-up URL; remembers what was read, and can refuse to be written."""

    def __init__(
        self, objects: Mapping[str, bytes], readahead: int = 1024, url: str = "s3://bucket/p", read_only: bool = False
    ) -> None:
        self.url, self.readahead, self.read_only = url, readahead, read_only
        self._objects = {name: (content, "1", 100.0) for name, content in objects.items()}
        self.reads: list[tuple[str, int, int]] = []
        self.versions_asked: list[str | None] = []
        self.writes: list[str] = []
        self.lists = 0
        self.now = 100.0

    def list(self, suffix: str = "", left_out: Counter[str] | None = None) -> list[ObjectInfo]:
        self.lists += 1
        names = drop_excluded(sorted(self._objects), str, Counter() if left_out is None else left_out)
        found = (self.info(name) for name in names if name.endswith(suffix))
        return [info for info in found if info is not None]

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        version: str | None = None,
        on_fault: object = None,
    ) -> bytes:
        if name not in self._objects:
            raise DataError(f"{name} does not exist")
        content, its_version, _ = self._objects[name]
        stop = len(content) if stop is None else stop
        if version not in (None, its_version) or stop > len(content):
            raise DataError(f"{name} changed since it was indexed")
        self.reads.append((name, start, stop))
        self.versions_asked.append(version)
        return content[start:stop]

    def info(self, name: str) -> ObjectInfo | None:
        if name not in self._objects:
            return None
        content, version, modified = self._objects[name]
        return ObjectInfo(name, len(content), version, modified)

    def write(self, name: str, content: bytes) -> None:
        if self.read_only:
            raise ReadOnly(f"{name} may not be written")
        self.writes.append(name)
        before = self._objects.get(name, (b"", "0", 0.0))[1]
        self._objects[name] = (bytes(content), str(int(before) + 1), self.now)

    def upload(self, name: str, path: Path) -> None:
        self.write(name, path.read_bytes())
