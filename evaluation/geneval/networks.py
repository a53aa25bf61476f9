"""The frozen networks of a detector: where their weights lie, whether they are the published ones, how they run.

- Nothing is downloaded: a model is a folder or file, or what the Hugging Face cache holds under its name.
- A file whose name tells its own SHA-256, as those of OpenMMLab and of the Hugging Face cache do, is held to it: a
  download that was cut off never scores anything. Whether a hash is the published one goes into the identity.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from data.errors import UserError
from data.files import refuse_lfs_pointers
from t2i.engine.checkpoint.format import sha256

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""File names of weights in a folder, those that transformers prefers first."""
_IN_NAME = re.compile(r"-([0-9a-f]{8})\.pth")  # OpenMMLab's
_BLOB = re.compile(r"[0-9a-f]{64}")  # what a large file of the Hugging Face cache is a link to


def cached(name: str) -> Path | None:
    """The folder in the Hugging Face cache that holds a model's configuration; None: there is none."""
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no name of a model
        return None
    return Path(found).parent if isinstance(found, str) else None


def weight_file(folder: Path) -> Path:
    """The one file with the weights in a folder of transformers'.

    Raises:
        UserError: there is none.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} holds no weights: {' or '.join(_WEIGHTS)} should be there")


def identify(path: Path, published: Collection[str]) -> dict[str, Any]:
    """Tell which weights a file holds.

    Args:
        published: SHA-256 of the published files, or how they begin.

    Returns:
        "file", "sha256", and "pinned": whether it is a published one.

    Raises:
        UserError: its name says another hash than it has, or it is a Git LFS pointer.
    """
    refuse_lfs_pointers(path, "weights")
    digest = sha256(path)
    named = _IN_NAME.search(path.name)
    blob = _BLOB.fullmatch(path.resolve().name)
    claimed = named[1] if named else blob[0] if blob else ""
    if not digest.startswith(claimed):
        raise UserError(f"{path} is damaged: its SHA-256 is {digest}, its name says {claimed}; download it again")
    return {"file": path.name, "sha256": digest, "pinned": digest.startswith(tuple(published))}


@contextmanager
def exact() -> Iterator[None]:
    """Run networks in fp32 without TF32 or autocast, whatever a training run around this has chosen."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution
