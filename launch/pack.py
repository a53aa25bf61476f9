"""Pack images and captions into WebDataset shards, in a folder or on S3.

    python launch/pack.py folder  photos/ --out shards/photos            # a.jpg with a.txt and, if there, a.json
    python launch/pack.py parquet laion/  --out s3://bucket/laion --image_column jpg --caption_column txt
    python launch/pack.py csv     all.tsv --out shards/all --image_column path --caption_column text --resize 1024
    python launch/pack.py tars    s3://bucket/old --out s3://bucket/new --shard_size 5000
    python launch/pack.py openmoji --out shards/openmoji                 # demo data: 3,953 drawings with their names
    python launch/pack.py shapes   --out shards/shapes --count 20000     # demo data: drawn scenes

Each writes OUT/train/*.tar, OUT/heldout/*.tar, their index and, last, OUT/dataset.json. The same command again does
nothing when that is there, and goes on where it was stopped when it is not.
"""

from __future__ import annotations

import errno
import os
import posixpath
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

import data.packing.openmoji
import data.packing.pack
import data.packing.shapes
from data.errors import StoreError, UserError
from data.packing.contents import Contents
from data.packing.images import Images
from data.store import Store, StoreOptions, open_store

_FOLDER_FAULTS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT)
_PARQUET = ".parquet"


@dataclass(frozen=True)
class Options:
    """What packing takes whatever its source.

    Args:
        out: Folder or s3://bucket/prefix for the shards; new, empty, or left by the same command.
        resize: Most pixels of an image's shorter side: larger ones are made smaller and encoded as JPEG.
        quality: Encode every image as JPEG of this quality. By default what needs no resizing passes byte by byte.
        heldout: Share of the rows that goes into OUT/heldout.
        seed: Decides which rows are held out.
        shard_size: Most samples in a shard; the rows of a split's shards differ by at most one.
        workers: Processes; by default one per processor core. Does not change the result.
        endpoint: URL of another S3 server than Amazon's.
        region: Region of the bucket; by default the profile's.
        profile: Profile of the AWS credentials file.
        anonymous: Send no credentials when reading.
        requester_pays: Agree to be charged for the requests when reading.
    """

    out: str
    resize: int | None = None
    quality: int | None = None
    heldout: float = 0.0
    seed: int = 0
    shard_size: int = 1000
    workers: int | None = None
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    anonymous: bool = False
    requester_pays: bool = False

    def open(self, url: str) -> Store:
        """Open a place to read from."""
        return open_store(url, self.reading())

    def reading(self) -> StoreOptions:
        """How to reach a place to read from."""
        return self._store(anonymous=self.anonymous, requester_pays=self.requester_pays)

    def images(self) -> Images:
        """What to do with every image."""
        return Images(self.resize, self.quality)

    def pack(self, contents: Contents) -> None:
        """Write the shards and say so."""
        _pack(contents, self.out, self.shard_size, self.workers, self._store())

    def _store(self, **more: bool) -> StoreOptions:
        return StoreOptions(endpoint=self.endpoint, region=self.region, profile=self.profile, **more)


def folder(source: str, options: Options) -> None:
    """Pack a folder's images, at any depth, with the .txt and, if there, the .json of the same name."""
    from data.packing.folder import folder_of_images

    options.pack(folder_of_images(options.open(source), options.images(), options.heldout, options.seed))


def parquet(
    source: str,
    options: Options,
    image_column: str = "image",
    caption_column: str = "caption",
    root: str | None = None,
) -> None:
    """Pack the rows of a Parquet file or of a folder of them; other plain columns go into each sample's .json.

    Args:
        source: The file, or a folder or s3://bucket/prefix with them.
        options: What all sources share.
        image_column: Column with images: their bytes, their paths, or structs of bytes and path.
        caption_column: Column with captions.
        root: Folder or s3://bucket/prefix that paths are relative to, by default each file's own; nothing outside is
            read.
    """
    from data.packing.parquet_table import parquet_table
    from data.packing.table import Columns, Files

    if source.endswith(_PARQUET):
        store, name = _open_file(source, options)
        names = [name]
    else:
        store = options.open(source)
        names = [info.name for info in store.list(_PARQUET)]
    contents = parquet_table(
        store,
        names,
        Columns(image_column, caption_column),
        Files(options.open(root), beside=False) if root else Files(store),
        options.images(),
        options.heldout,
        options.seed,
    )
    options.pack(contents)


def csv(
    source: str,
    options: Options,
    image_column: str = "path",
    caption_column: str = "caption",
    root: str | None = None,
) -> None:
    """Pack the rows of a CSV or TSV file with a header; its other columns go into each sample's .json.

    Args:
        source: The file, a path or s3:// URL; .tsv and .tab are separated by tabs.
        options: What all sources share.
        image_column: Column with the images' paths.
        caption_column: Column with captions.
        root: Folder or s3://bucket/prefix that paths are relative to, by default the file's own; nothing outside is
            read.
    """
    from data.packing.csv_table import csv_table
    from data.packing.table import Columns, Files

    store, name = _open_file(source, options)
    contents = csv_table(
        store,
        name,
        Columns(image_column, caption_column),
        Files(options.open(root), beside=False) if root else Files(store),
        options.images(),
        options.heldout,
        options.seed,
    )
    options.pack(contents)


def tars(source: str, options: Options, manifest: str | None = None) -> None:
    """Pack the samples of existing tars anew, with all their members.

    Args:
        source: A folder or s3://bucket/prefix with .tar shards, at any depth.
        options: What all sources share.
        manifest: Path or s3:// URL of their index.json (launch/index.py), if that is not at the source's root.
    """
    from data.packing.tars import samples_of_tars
    from data.shards.index import open_index

    index = open_index(options.open(source), "source", manifest, options=options.reading())
    options.pack(samples_of_tars(index, options.images(), options.heldout, options.seed))


def openmoji(
    out: str,
    size: int = 64,
    heldout: float = 0.05,
    seed: int = 0,
    shard_size: int = 1000,
    workers: int | None = None,
) -> None:
    """Pack OpenMoji's drawings, captioned with their English names (CC BY-SA 4.0).

    Args:
        out: Folder or s3://bucket/prefix for the shards; new, empty, or left by the same command.
        size: Side of the pictures in pixels.
        heldout: Share of the drawings that goes into OUT/heldout, an emoji always with all its variants.
        seed: Decides the order and which are held out.
        shard_size: Most samples in a shard; shards of a split differ by at most one.
        workers: Processes; by default one per processor core. Does not change the result.
    """
    _pack(data.packing.openmoji.contents(size, heldout, seed), out, shard_size, workers)


def shapes(
    out: str,
    count: int,
    size: int = 64,
    heldout: float = 0.05,
    seed: int = 0,
    shard_size: int = 1000,
    workers: int | None = None,
) -> None:
    """Pack drawn scenes of one to four shapes, captioned in GenEval's grammar, with their ground truth.

    Args:
        out: Folder or s3://bucket/prefix for the shards; new, empty, or left by the same command.
        count: Number of scenes, the held-out ones included.
        size: Side of the pictures in pixels.
        heldout: Share of the scenes that goes into OUT/heldout.
        seed: Decides the scenes.
        shard_size: Most samples in a shard; shards of a split differ by at most one.
        workers: Processes; by default one per processor core. Does not change the result.
    """
    _pack(data.packing.shapes.contents(count, size, heldout, seed), out, shard_size, workers)


def _open_file(url: str, options: Options) -> tuple[Store, str]:
    folder, name = posixpath.split(url)
    if not name:
        raise UserError(f"source is {url}: it should be a file")
    return options.open(folder or "."), name


def _pack(
    contents: Contents,
    out: str,
    shard_size: int,
    workers: int | None,
    store: StoreOptions = StoreOptions(),  # noqa: B008 (frozen)
) -> None:
    try:
        done = data.packing.pack.pack(contents, out, shard_size, workers or len(os.sched_getaffinity(0)), store)
    except OSError as error:
        if error.errno not in _FOLDER_FAULTS:
            raise
        raise UserError(f"out is {out}: it should be a folder to write into: {error.strerror}") from error
    counts = ", ".join(f"{n} {split}" for split, n in done.summary["samples"].items())
    left_out = "".join(f"; left out: {n} ({why})" for why, n in done.summary["left_out"].items())
    verb = "was already packed, nothing to do" if done.was_finished else "packed"
    print(f"{out} {verb}: {counts}{left_out}")


_FROM_A_SOURCE: tuple[Callable[..., None], ...] = (folder, parquet, csv, tars)
_DEMO: tuple[Callable[..., None], ...] = (openmoji, shapes)


def _parser() -> ArgumentParser:
    description = (__doc__ or "").splitlines()[0]
    parser = ArgumentParser(exit_on_error=False, description=description)
    jobs = parser.add_subcommands(dest="job")
    for job in (*_FROM_A_SOURCE, *_DEMO):
        about = (job.__doc__ or "").splitlines()[0]
        one = ArgumentParser(exit_on_error=False, description=about)
        if job in _FROM_A_SOURCE:
            one.add_argument("source", type=str, help="where the data is: a path or s3://bucket/prefix")
            one.add_class_arguments(Options)
        one.add_function_arguments(job, skip={"source", "options"})
        jobs.add_subcommand(job.__name__, one, help=about)
    return parser


def _run(args: list[str] | None) -> None:
    given = _parser().parse_args(args)
    words: dict[str, Any] = given[given.job].as_dict()
    job = next(job for job in (*_FROM_A_SOURCE, *_DEMO) if job.__name__ == given.job)
    if job in _FROM_A_SOURCE:
        words["options"] = Options(**{field.name: words.pop(field.name) for field in fields(Options)})
    job(**words)


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code; a user's mistake is one sentence and code 2."""
    try:
        _run(args)
    except (UserError, ArgumentError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (StoreError, BrokenProcessPool) as error:
        words = str(error) if isinstance(error, StoreError) else "a process was killed, perhaps for its memory"
        print(f"error: {words}; the same command goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
