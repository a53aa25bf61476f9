"""Write a model folder as a checkpoint in the layout of the public code of its family.

    python launch/export.py runs/pixelgen_xxl/sft512/model --out pixelgen.ckpt
    python launch/export.py runs/pixelgen_xl/imagenet256/model --out pixelgen_xl.ckpt
    python launch/export.py runs/pixeldit_t2i/shapes1024/model --out pixeldit.pth

It holds weights, EMA and projector, but no optimizer and no null caption, for which those layouts have no place: use it
to generate with the public code or to import it again, not to resume training.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data.files import FileLock, atomic_path, lock_beside, name_in_errors, refuse_existing
from launch.cli import run
from t2i.config.base import PathText
from t2i.model_folder import read_model
from t2i.released.convert import export_weights


def export(model: PathText, /, out: PathText) -> None:
    """Write a model folder as a checkpoint in the layout of the public code of its family.

    Args:
        model: Folder of a trained model.
        out: The file to write: .ckpt, or .pth of PixelDiT for text to image.
    """
    file, folder = Path(out), Path(model)
    refuse_existing(file, "--out")
    raw, ema = read_model(folder, "raw"), read_model(folder, "ema")
    exported = export_weights(raw.config, raw.tensors, ema.tensors)
    with name_in_errors(f"--out {out}"), FileLock(lock_beside(file), f"--out {out}"):
        refuse_existing(file, "--out")
        # An open file, since torch.save to a path raises no OSError for a full disk.
        with atomic_path(file) as partial, partial.open("wb") as opened:
            torch.save(exported.content, opened)
    count = len(exported.content["state_dict"])
    print("\n".join([f"{out}: {count} tensors", *exported.notes]))


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run((export,), args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
