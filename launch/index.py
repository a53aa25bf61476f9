"""Index shards: how many samples each has and where they lie, so that training starts at once on any number of shards.

    python launch/index.py s3://bucket/prefix                                  # writes s3://bucket/prefix/index.json
    python launch/index.py s3://bucket/a /data/b --out manifests/both.json     # several prefixes in one manifest

Beside each shard it writes the offsets of its samples (00000.tar.idx) and what is in none (00000.tar.left_out.json), or
beside the manifest if the shards are read-only; the manifest comes last. The same command resumes an interrupted run.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.errors import UserError
from data.files import name_in_errors
from data.inspect.page import size_of
from data.listing import format_left_out
from data.shards.manifest import MANIFEST, build_manifest, open_place
from data.store import StoreOptions, open_store
from launch.cli import run
from t2i.config.base import PathText

_NAMED = 20


def index(sources: list[PathText], /, options: StoreOptions, out: PathText | None = None, workers: int = 16) -> None:
    """Index the shards of directories and s3:// prefixes, and list them in one manifest.

    Args:
        sources: Directories or s3://bucket/prefix with .tar shards, at any depth.
        out: Path or s3:// URL of the manifest; by default index.json at the root of the one source.
        workers: Shards that are read at a time.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}: it should be at least 1")
    if out is None and len(sources) > 1:
        raise UserError(f"--out is not given: it should name the manifest, as there are {len(sources)} sources")
    stores = [open_store(source, options) for source in sources]
    out = out or f"{stores[0].url}/{MANIFEST}"
    if "://" not in out:
        with name_in_errors(f"--out is {out}"):
            Path(out).parent.mkdir(parents=True, exist_ok=True)
    built = build_manifest(stores, *open_place(out, options), workers)
    corrupt = ""
    if built.corrupt:
        more = f"; and {len(built.corrupt) - _NAMED} more, see the manifest" if len(built.corrupt) > _NAMED else ""
        corrupt = f"; {len(built.corrupt)} corrupt: {'; '.join(built.corrupt[:_NAMED])}{more}"
    counts = f"{built.shards:,} shards, {built.samples:,} samples, {size_of(built.bytes)}"
    print(f"{out}: {counts}{corrupt}{format_left_out(built.left_out)}")


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run((index,), args, __doc__, "; the same command resumes")


if __name__ == "__main__":
    sys.exit(main())
