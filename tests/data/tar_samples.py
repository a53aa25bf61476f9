"""Small tars for the tests of `data`: written with tarfile, each image a colour that encodes its number."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import simplejpeg

from data.index import SourceIndex, index_source
from data.store import open_store


def jpeg(number: int, size: int = 16) -> bytes:
    """A flat image whose colour tells images 0 to 215 apart after compression and resizing."""
    colour = [40 * (number % 6) + 20, 40 * (number // 6 % 6) + 20, 40 * (number // 36 % 6) + 20]
    pixels = np.full((size, size, 3), colour, dtype=np.uint8)
    return bytes(simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="444"))


def tar_bytes(members: Sequence[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
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
    return index_source(open_store(str(folder)), name)
