"""Where a pack goes: a folder or an S3 prefix, held for one pack from its first shard to its last.

- `dataset.json.partial`, the plan, is written before anything else, so that the same command takes up where it was
  stopped and another command is refused.
- In a folder a lock keeps a second process from writing beside the first; lock and plan go at the end. S3 has no locks,
  and two processes with the same plan write the same bytes; the plan stays, so that packing needs no right to delete.

Packing samples that are there, in tars or in a folder of images, which is read as if it were tars, too.

Every member comes along, whatever training would make of it; only what has no image is left out.
"""

from __future__ import annotations

import errno
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote

import numpy as np

from data.errors import BadSample, DataError, UserError
from data.files import FileLock
from data.listing import IMAGE_EXTENSIONS, told
from data.packing.contents import DatasetSpec, Images, Skipped, PackOptions, Sample, ahead, fingerprint, left_out, sample_key
from data.shards.index import SourceIndex, index_source, list_left_out
from data.shards.tar import parse_sample
from data.store import Store, StoreOptions, WritableStore, open_store
from data.store.virtual import FolderStore

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

    def __call__(self, items: Sequence[int]) -> Iterator[Sample | Skipped]:
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


def samples_of_tars(index: SourceIndex, recipe: PackOptions, name: str = "tars") -> DatasetSpec:
    """List the samples of existing tars to pack anew, with all their members."""
    corrupt = {"rest of a corrupt shard": len(index.corruption)} if index.corruption else {}
    table = zip(index.names, index.sizes.tolist(), index.versions, index.counts.tolist(), strict=True)
    return recipe.contents(
        name,
        int(index.counts.sum()),
        _Reader(index, recipe.images),
        origin=index.store.url,
        fingerprint=fingerprint(table),
        left_out={**list_left_out(index), **corrupt},
    )


def samples_of_folder(store: Store, recipe: PackOptions) -> DatasetSpec:
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


SUMMARY = "dataset.json"
PLAN = "dataset.json.partial"
LOCK = "dataset.json.lock"

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_WRITTEN_HERE = {"source": str, "arguments": dict, "versions": dict, "rows": dict}


class Output:
    """A folder, which need not exist before it is held, or an S3 prefix. Pickles.

    Raises:
        UserError: `url` is neither.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        if "://" in url and not url.startswith("s3://"):
            raise UserError(f"out is {url}: it should be a folder or s3://bucket/prefix")
        self.url, self._options = url, options
        self._folder = None if "://" in url else Path(url)

    @cached_property
    def store(self) -> WritableStore:
        """Its store; a folder must exist by now."""
        return open_store(self.url, self._options)

    def below(self, split: str) -> WritableStore:
        """Open the store of a split that is there."""
        return open_store(f"{self.url.rstrip('/')}/{split}", self._options)

    def names(self) -> set[str]:
        """List what there is."""
        return {info.name for info in self.store.list()}

    def finished(self, plan: dict[str, Any]) -> dict[str, Any] | None:
        """Return what the summary of a finished pack says; None where there is no summary.

        Raises:
            UserError: it is the summary of another pack, or of something else.
        """
        if self._folder is not None and not self._folder.is_dir():
            return None
        return self._same(SUMMARY, plan)

    @contextmanager
    def hold(self, plan: dict[str, Any]) -> Iterator[None]:
        """Begin or take up this pack.

        Raises:
            UserError: anything else is there, or another process packs into the folder, or it cannot be written.
        """
        if self._folder is None:
            self._begin(plan)
            yield
            return
        try:
            lock = FileLock(self._folder / LOCK, f"another process is packing: out {self.url}")
        except OSError as error:
            raise UserError(f"out is {self.url}: it should be a folder to write into: {error.strerror}") from error
        with lock:
            self._begin(plan)
            for left_behind in self._folder.glob("*/*.partial"):
                left_behind.unlink()
            yield
            (self._folder / PLAN).unlink()

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Give a local path where a large object may grow before it is `put`, and remove what is left there.

        Raises:
            UserError: there is no room, or no right to write.
        """
        with ExitStack() as stack:
            # In a folder it grows beside its place: a rename costs nothing, where a copy writes all of it twice.
            place = self._folder or Path(stack.enter_context(TemporaryDirectory(prefix="pack-")))
            # The process's number keeps a worker that outlived its parent from writing into the same file.
            path = place / f"{name}.{os.getpid()}.partial"
            stack.callback(path.unlink, missing_ok=True)
            try:
                path.parent.mkdir(exist_ok=True)
                yield path
            except OSError as error:
                if error.errno not in _NOT_WRITABLE:
                    raise
                raise UserError(f"{path} cannot be written: {error.strerror}") from error

    def put(self, path: Path, name: str) -> None:
        """Make the file that was written to `scratch(name)` appear under its name, whole."""
        if self._folder is None:
            self.store.upload(name, path)
            return
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # else the rename may outlive the content when the machine goes down
        os.replace(path, self._folder / name)

    def _begin(self, plan: dict[str, Any]) -> None:
        if self._same(PLAN, plan) is not None:
            return
        if self.names() - {LOCK}:
            raise UserError(f"out is {self.url}: it should be new or empty, and it holds other files")
        self.store.write(PLAN, json.dumps(plan).encode())

    def _same(self, name: str, plan: dict[str, Any]) -> dict[str, Any] | None:
        """What an object says of the pack that is here, which must be that of the plan."""
        if self.store.info(name) is None:
            return None
        there = self._parse(name, bytes(self.store.read(name)))
        was, now = ({"source": it["source"], **it["arguments"], **it["versions"]} for it in (there, plan))
        for field in [*now, *(was.keys() - now.keys())]:
            if was.get(field) != now.get(field):
                raise UserError(
                    f"out is {self.url}: it should be another place, for this one holds a pack whose {field} "
                    f"is {was.get(field)}, not {now.get(field)}"
                )
        return there

    def _parse(self, name: str, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(content)
            if all(isinstance(found[key], kind) for key, kind in _WRITTEN_HERE.items()):
                return dict(found)
        except (ValueError, TypeError, LookupError):
            pass
        raise UserError(
            f"out is {self.url}: it should be new or empty, and it holds a {name} that this command did not write"
        )
