"""Images in an `.npz` in ADM's form: `arr_0`, uint8 (N, H, W, 3), and other arrays beside."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.files import atomic_path


def write_npz(
    path: Path, shape: tuple[int, int, int, int], images: Iterable[bytes], others: Mapping[str, NDArray[Any]]
) -> None:
    """Write an `.npz`, whole or not at all; equal content is equal files.

    Args:
        shape: of all images, (N, H, W, 3).
        images: their bytes, piece by piece: 50,000 images of 256 px are 9.8 GB, more than a rank should hold.
        others: arrays by name.
    """
    # A member's date is ZipInfo's own, so that equal content is equal files.
    with atomic_path(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for piece in images:
                file.write(piece)
        for name, array in others.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as file:
                np.lib.format.write_array(file, array)
