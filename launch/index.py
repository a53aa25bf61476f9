"""Index shards: how many samples each has and where they lie, for training to start at once on any number of them.

    python launch/index.py s3://bucket/prefix                                  # writes s3://bucket/prefix/index.json
    python launch/index.py s3://bucket/a /data/b --out manifests/both.json     # several prefixes in one manifest

Beside each shard it writes the offsets of its samples (00000.tar.idx; beside the manifest where the shards may only be
read), and the manifest last. The same command again reads what is there, so it goes on where it was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from data.errors import StoreError, UserError
from data.shards.manifest import MANIFEST, build_manifest, open_place
from data.store import StoreOptions, open_store

_NAMED = 20


def index(
    sources: list[str],
    out: str | None = None,
    workers: int = 16,
    endpoint: str | None = None,
    region: str | None = None,
    profile: str | None = None,
    anonymous: bool = False,
    requester_pays: bool = False,
) -> None:
    """Index the shards of directories and s3:// prefixes, and list them in one manifest.

    Args:
        sources: Directories or s3://bucket/prefix with .tar shards, at any depth.
        out: Path or s3:// URL of the manifest; by default index.json at the root of the one source.
        workers: Shards that are read at a time.
        endpoint: URL of another S3 server than Amazon's.
        region: Region of the bucket; by default the profile's.
        profile: Profile of the AWS credentials file.
        anonymous: Send no credentials.
        requester_pays: Agree to be charged for the requests.
    """
    if workers < 1:
        raise UserError(f"workers is {workers}: it should be at least 1")
    if out is None and len(sources) > 1:
        raise UserError(f"out is not given: it should name the manifest, as there are {len(sources)} sources")
    options = StoreOptions(
        endpoint=endpoint, region=region, profile=profile, anonymous=anonymous, requester_pays=requester_pays
    )
    stores = [open_store(source, options) for source in sources]
    out = out or f"{stores[0].url}/{MANIFEST}"
    if "://" not in out:
        try:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"out is {out}: its folder cannot be made: {error.strerror}") from error
    built = build_manifest(stores, *open_place(out, options), workers)
    damaged = "; ".join(built.damaged[:_NAMED])
    if built.damaged:
        more = f"; and {len(built.damaged) - _NAMED} more, see the manifest" if len(built.damaged) > _NAMED else ""
        damaged = f"; {len(built.damaged)} damaged: {damaged}{more}"
    print(f"{out}: {built.shards:,} shards, {built.samples:,} samples, {built.bytes / 1e9:,.2f} GB{damaged}")


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code; a user's mistake is one sentence and code 2."""
    description = "Index .tar shards for training; the same command again goes on where it was stopped."
    parser = ArgumentParser(exit_on_error=False, description=description)
    parser.add_argument("sources", nargs="+", type=str, help="directories or s3://bucket/prefix with .tar shards")
    parser.add_function_arguments(index, skip={"sources"})
    try:
        index(**parser.parse_args(args).as_dict())
    except (UserError, ArgumentError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except StoreError as error:
        print(f"error: {error}; the same command goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
