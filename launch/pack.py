"""Pack the built-in demo data into WebDataset shards.

    python launch/pack.py openmoji --out shards/openmoji        # 3,953 drawings with their names, 10 s
    python launch/pack.py shapes --out shards/shapes --count 20000

Each writes OUT/train/*.tar, OUT/heldout/*.tar and, last, OUT/dataset.json. The same command again does
nothing when that is there, and goes on where it was stopped when it is not.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from jsonargparse import ArgumentError, auto_cli

import data.openmoji
import data.pack
import data.shapes
from data.errors import UserError

_FOLDER_FAULTS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT)


def openmoji(
    out: Path,
    size: int = 64,
    heldout: float = 0.05,
    seed: int = 0,
    shard_size: int = 1000,
    workers: int | None = None,
) -> None:
    """Pack OpenMoji's drawings, captioned with their English names (CC BY-SA 4.0).

    Args:
        out: Folder for the shards; new, empty, or left by the same command.
        size: Side of the pictures in pixels.
        heldout: Share of the drawings that goes into OUT/heldout, an emoji always with all its variants.
        seed: Decides the order and which are held out.
        shard_size: Most samples in a shard; shards of a split differ by at most one.
        workers: Processes; by default one per processor core. Does not change the result.
    """
    _pack(data.openmoji.contents(size, heldout, seed), out, shard_size, workers)


def shapes(
    out: Path,
    count: int,
    size: int = 64,
    heldout: float = 0.05,
    seed: int = 0,
    shard_size: int = 1000,
    workers: int | None = None,
) -> None:
    """Pack drawn scenes of one to four shapes, captioned in GenEval's grammar, with their ground truth.

    Args:
        out: Folder for the shards; new, empty, or left by the same command.
        count: Number of scenes, the held-out ones included.
        size: Side of the pictures in pixels.
        heldout: Share of the scenes that goes into OUT/heldout.
        seed: Decides the scenes.
        shard_size: Most samples in a shard; shards of a split differ by at most one.
        workers: Processes; by default one per processor core. Does not change the result.
    """
    _pack(data.shapes.contents(count, size, heldout, seed), out, shard_size, workers)


def _pack(contents: data.pack.Contents, out: Path, shard_size: int, workers: int | None) -> None:
    try:
        done = data.pack.pack(contents, out, shard_size, workers or len(os.sched_getaffinity(0)))
    except OSError as error:
        if error.errno not in _FOLDER_FAULTS:
            raise
        raise UserError(f"out is {out}: it should be a folder to write into: {error.strerror}") from error
    counts = ", ".join(f"{n} {split}" for split, n in done.summary["samples"].items())
    left_out = "".join(f"; left out: {n} ({why})" for why, n in done.summary["left_out"].items())
    verb = "was already packed, nothing to do" if done.was_finished else "packed"
    print(f"{out} {verb}: {counts}{left_out}")


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code; a user's mistake is one sentence and code 2."""
    try:
        auto_cli(
            [openmoji, shapes],
            args=args,
            as_positional=False,
            exit_on_error=False,
            description="Pack the built-in demo data into WebDataset shards.",
        )
    except (UserError, ArgumentError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
