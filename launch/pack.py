"""Pack images and captions into WebDataset shards, in a folder or on S3.

    python launch/pack.py folder  photos/ --out shards/photos            # a.jpg with a.txt and, if there, a.json
    python launch/pack.py parquet laion/  --out s3://bucket/laion --image_column jpg --caption_column txt
    python launch/pack.py csv     all.tsv --out shards/all --image_column path --caption_column text --resize 1024
    python launch/pack.py tars    s3://bucket/old --out s3://bucket/new --shard_size 5000
    python launch/pack.py openmoji --out shards/openmoji                 # demo data: 3,953 drawings with their names
    python launch/pack.py shapes   --out shards/shapes --count 20000     # demo data: drawn scenes

Each writes OUT/train/*.tar, OUT/heldout/*.tar, their index and, last, OUT/dataset.json. The same command resumes an
interrupted pack, and does nothing if OUT/dataset.json is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import os
import posixpath
from collections import Counter
from dataclasses import dataclass, replace

import data.packing.openmoji
import data.packing.pack
import data.packing.shapes
from data.errors import UserError
from data.listing import format_left_out, is_parquet, why_not_parquet
from data.packing.spec import DatasetSpec, PackOptions
from data.store import Store, StoreOptions, open_store
from launch.cli import run
from t2i.config.base import PathText


@dataclass(frozen=True)
class Target:
    """Where the shards go.

    Args:
        out: Folder or s3://bucket/prefix for the shards; new, empty, or left by the same command.
        shard_size: Maximum samples in a shard; the numbers of rows of a split's shards differ by at most one.
        workers: Processes; by default one per processor core. The result does not depend on it.
    """

    out: PathText
    shard_size: int = 1000
    workers: int | None = None

    def pack(self, spec: DatasetSpec, options: StoreOptions) -> None:
        """Write the shards and say so."""
        workers = self.workers if self.workers is not None else len(os.sched_getaffinity(0))
        # These two are for reading what others have made public.
        own = replace(options, anonymous=False, requester_pays=False)
        done = data.packing.pack.pack(spec, self.out, self.shard_size, workers, own)
        counts = ", ".join(f"{n} {split}" for split, n in done.summary["samples"].items())
        captions = f", {n:,} of them without a caption (.txt)" if (n := done.summary["without_caption"]) else ""
        verb = "was already packed, nothing to do" if done.was_finished else "packed"
        print(f"{self.out} {verb}: {counts}{captions}{format_left_out(done.summary['left_out'])}")


def folder(source: PathText, /, target: Target, pack_options: PackOptions, options: StoreOptions) -> None:
    """Pack a folder's images, at any depth, with the files of the same names, such as .txt and .json.

    Captions may also be named a.jpg.txt or a.caption. What is left out is counted by reason.

    Args:
        source: A folder or s3://bucket/prefix.
    """
    from data.packing.tars import samples_of_folder

    target.pack(samples_of_folder(open_store(source, options), pack_options), options)


def tars(
    source: PathText,
    /,
    target: Target,
    pack_options: PackOptions,
    options: StoreOptions,
    manifest: PathText | None = None,
) -> None:
    """Repack the samples of existing tars, with all their members.

    Args:
        source: A folder or s3://bucket/prefix with .tar shards, at any depth.
        manifest: Path or s3:// URL of their index.json (launch/index.py), if that is not at the source's root.
    """
    from data.packing.tars import samples_of_tars
    from data.shards.index import index_source, open_index
    from data.shards.manifest import MANIFEST

    store = open_store(source, options)
    listed = manifest is not None or store.info(MANIFEST) is not None
    index = open_index(store, "source", manifest, options=options) if listed else index_source(store, "source")
    target.pack(samples_of_tars(index, pack_options), options)


def parquet(
    source: PathText,
    /,
    target: Target,
    pack_options: PackOptions,
    options: StoreOptions,
    image_column: str = "image",
    caption_column: str = "caption",
    root: PathText | None = None,
) -> None:
    """Pack the rows of a Parquet file or of a folder of them; other plain columns go into each sample's .json.

    Args:
        source: The file, or a folder or s3://bucket/prefix with them, which may be named .parquet, as Spark does.
        image_column: Column with images: their bytes, their paths, or structs of bytes and path.
        caption_column: Column with captions.
        root: Folder or s3://bucket/prefix that paths are relative to, by default each file's own; nothing outside is
            read.
    """
    from data.packing.parquet_table import parquet_table
    from data.packing.table import Columns, Files

    left_out: Counter[str] = Counter()
    store, names = _parquet_files(source, options, left_out)
    files = Files(open_store(root, options), from_table=False) if root else Files(store)
    spec = parquet_table(store, names, Columns(image_column, caption_column), files, pack_options)
    target.pack(replace(spec, left_out={**spec.left_out, **left_out}), options)


def csv(
    source: PathText,
    /,
    target: Target,
    pack_options: PackOptions,
    options: StoreOptions,
    image_column: str = "path",
    caption_column: str = "caption",
    root: PathText | None = None,
) -> None:
    """Pack the rows of a CSV or TSV file with a header; its other columns go into each sample's .json.

    Args:
        source: The file, a path or s3:// URL, with tabs, commas, semicolons or bars between cells. In a TSV quotes
            belong to the text, unless its header is quoted, or they hold a tab, a newline or a doubled quote.
        image_column: Column with the images' paths.
        caption_column: Column with captions.
        root: Folder or s3://bucket/prefix that paths are relative to, by default the file's own; nothing outside is
            read.
    """
    from data.packing.csv_table import csv_table
    from data.packing.table import Columns, Files

    store, name = _open_file(source, options)
    files = Files(open_store(root, options), from_table=False) if root else Files(store)
    target.pack(csv_table(store, name, Columns(image_column, caption_column), files, pack_options), options)


def openmoji(target: Target, options: StoreOptions, size: int = 64, heldout: float = 0.05, seed: int = 0) -> None:
    """Pack OpenMoji's drawings, captioned with their English names (CC BY-SA 4.0).

    Args:
        size: Side of the images in pixels.
        heldout: Share of the drawings that goes into OUT/heldout; an emoji always goes with all its variants.
        seed: Decides the order and which are held out.
    """
    target.pack(data.packing.openmoji.dataset_spec(size, heldout, seed), options)


def shapes(
    target: Target,
    options: StoreOptions,
    count: int,
    size: int = 64,
    heldout: float = 0.05,
    seed: int = 0,
    heldout_captions: float = 0.0,
) -> None:
    """Pack drawn scenes of one to four shapes, captioned in GenEval's grammar, with their ground truth.

    Args:
        count: Number of scenes, the held-out ones included.
        size: Side of the images in pixels.
        heldout: Share of the scenes that goes into OUT/heldout.
        seed: Decides the scenes, and which captions are held out.
        heldout_captions: Share of the captions that OUT/train never contains, for scores on unseen captions.
    """
    target.pack(data.packing.shapes.dataset_spec(count, size, heldout, seed, heldout_captions), options)


def _parquet_files(source: str, options: StoreOptions, left_out: Counter[str]) -> tuple[Store, list[str]]:
    """The file, or all Parquet files in the folder or below the prefix; other files are counted in `left_out`."""
    if is_parquet(source):
        store, name = _open_file(source, options)
        is_missing = "://" not in source and not os.path.isdir(source)  # to be refused as a file
        if store.info(name) is not None or is_missing:
            return store, [name]
    store, names = open_store(source, options), []
    for info in store.list(left_out=left_out):
        if is_parquet(info.name):
            names.append(info.name)
        elif reason := why_not_parquet(info.name):
            left_out[reason] += 1
    return store, names


def _open_file(url: str, options: StoreOptions) -> tuple[Store, str]:
    place, name = posixpath.split(url)
    if not name:
        raise UserError(f"source is {url}: it should be a file")
    return open_store(place or ".", options), name


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    jobs = (folder, parquet, csv, tars, openmoji, shapes)
    return run(jobs, args, __doc__, "; the same command resumes")


if __name__ == "__main__":
    sys.exit(main())
