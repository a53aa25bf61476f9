"""What samples are compared with: an `.npz` in ADM's form, written here too.

    mu, sigma      mean (d,) and covariance (d, d) of the pooled features of the whole reference set
    mu_s, sigma_s  the same of the spatial ones
    arr_0          uint8 (N, H, W, 3): 10,000 of its images, of which precision and recall are
    about          this project's alone: what the statistics are of, as JSON

ADM's own have no `about`: they are of Inception, and of so many images as ADM says elsewhere.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.files import refuse_lfs_pointers
from evaluation.fid.estimators import Gaussian
from evaluation.fid.images import Images, open_images
from evaluation.fid.networks import Network
from evaluation.npz import write_npz
from t2i.engine.checkpoint.format import sha256

KEPT = 10_000
"""Images of a reference set that precision and recall are of."""
_IMAGES = "arr_0"
_NAMES = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def kept_numbers(count: int) -> list[int]:
    """Which of so many images are kept for precision and recall: KEPT at even distances, or all."""
    return list(range(count)) if count <= KEPT else [i * count // KEPT for i in range(KEPT)]


@dataclass(frozen=True)
class Reference:
    """An opened reference."""

    path: Path
    images: Images | None
    """Of precision and recall; and of the statistics, if there are none yet. None: an `.npz` without."""
    gaussians: dict[str, Gaussian] | None
    """`pooled` and, if the `.npz` has it, `spatial`; None: to be measured."""
    about: dict[str, Any]
    """What the `.npz` says it is of; may be empty."""

    def digest(self) -> str:
        """SHA-256 of an `.npz`, or of a folder as `Images` has it."""
        return self.images.digest() if self.images else sha256(self.path)


def open_reference(path: Path, crop: int | None, network: Network) -> Reference:
    """A reference `.npz`, or a set of images.

    Args:
        path: an `.npz`, or a folder.
        crop: as for `open_images`.
        network: whose statistics they must be.

    Raises:
        UserError: it is neither, not whole, or of another network.
    """
    arrays = _arrays(path) if path.suffix == ".npz" and path.is_file() else {}
    if "mu" not in arrays:
        return Reference(path, open_images(path, crop), None, {})
    about: dict[str, Any] = json.loads(str(arrays["about"])) if "about" in arrays else {}
    _check_network(path, about, network)
    gaussians = {kind: _gaussian(path, arrays, kind, network) for kind, names in _NAMES.items() if names[0] in arrays}
    images = open_images(path, None) if _IMAGES in arrays else None
    return Reference(path, images, gaussians, about)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz`, the images' without content: there may be gigabytes."""
    try:
        with np.load(path) as file:
            return {name: np.empty(0) if name == _IMAGES else file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        refuse_lfs_pointers(path, "reference")
        raise UserError(f"{path}: cannot be read as an .npz: {error}") from error


def _gaussian(path: Path, arrays: dict[str, NDArray[Any]], kind: str, network: Network) -> Gaussian:
    mean, covariance = (_finite(path, arrays, name) for name in _NAMES[kind])
    dim = network.dims[kind]
    if mean.shape != (dim,) or covariance.shape != (dim, dim):
        raise UserError(
            f"{path}: {' and '.join(_NAMES[kind])} must be {(dim,)} and {(dim, dim)} for {network.name}, and are "
            f"{mean.shape} and {covariance.shape}"
        )
    return Gaussian(mean, covariance)


def _check_network(path: Path, about: dict[str, Any], network: Network) -> None:
    features = about.get("features", "inception")
    if features != network.name:
        raise UserError(f"{path}: its statistics are of {features}, not {network.name}: give --features {features}")
    if about.get("weights_sha256", network.sha256) != network.sha256:
        raise UserError(f"{path}: its statistics are of other weights of {network.name}: make it again from its images")


def _finite(path: Path, arrays: dict[str, NDArray[Any]], name: str) -> NDArray[np.float64]:
    if name not in arrays:
        raise UserError(f"{path}: holds no {name}")
    array = arrays[name].astype(np.float64)
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {name} holds numbers that are not finite")
    return array


def write_reference(
    path: Path, gaussians: dict[str, Gaussian], about: dict[str, Any], images: Images, groups: Sequence[Sequence[int]]
) -> None:
    """Write a reference in ADM's form, whole or not at all; equal ones are equal files.

    Args:
        path: of the `.npz`.
        gaussians: `pooled` and `spatial`.
        about: what they are of, in JSON's types.
        images: the reference set.
        groups: the numbers of the images to keep, in batches.
    """
    arrays: dict[str, NDArray[Any]] = {"about": np.array(json.dumps(about, sort_keys=True))}
    for kind, (mean, covariance) in _NAMES.items():
        arrays |= {mean: gaussians[kind].mean, covariance: gaussians[kind].covariance}
    shape = (sum(map(len, groups)), *images.size, 3)
    kept = (batch.permute(0, 2, 3, 1).contiguous().numpy().tobytes() for batch in images.batches(groups))
    try:
        write_npz(path, shape, kept, arrays)
    except OSError as error:
        raise UserError(f"--make-reference {path}: cannot be written: {error.strerror}") from error
