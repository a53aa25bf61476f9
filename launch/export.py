"""Write a model folder as a checkpoint in the layout of the public code of its family.

    python launch/export.py runs/pixelgen_xxl/sft512/model --out pixelgen.ckpt
    python launch/export.py runs/pixelgen_xl/imagenet256/model --out pixelgen_xl.ckpt
    python launch/export.py runs/pixeldit_t2i/shapes1024/model --out pixeldit.pth

It holds weights, average and projector, and neither an optimizer nor the null caption, for which those layouts have no
place: good to draw from there, and to import again, not to go on training with.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data.files import FileLock, atomic_path, lock_beside
from launch.cli import run
from t2i.config.base import ConfigError, PathText
from t2i.model_folder import read_model
from t2i.released.convert import export_weights


def export(model: PathText, /, out: PathText) -> None:
    """Write a model folder as a checkpoint in the layout of the public code of its family.

    Args:
        model: Folder of a trained model.
        out: The file to write: .ckpt, or .pth of PixelDiT for text to image.
    """
    file, folder = Path(out), Path(model)
    _refuse_what_is_there(file)
    raw, ema = read_model(folder, "raw"), read_model(folder, "ema")
    exported = export_weights(raw.config, raw.tensors, ema.tensors)
    try:
        with FileLock(lock_beside(file), f"out {out}"):
            _refuse_what_is_there(file)
            with atomic_path(file) as partial, partial.open("wb") as opened:  # else a full disk is no OSError
                torch.save(exported.content, opened)
    except OSError as error:
        raise ConfigError(f"out is {out}: it cannot be written: {error.strerror}") from error
    count = len(exported.content["state_dict"])
    print("\n".join([f"{out}: {count} tensors", *exported.notes]))


def _refuse_what_is_there(file: Path) -> None:
    if file.exists():
        raise ConfigError(f"out is {file}: it should not exist yet")


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run((export,), args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
