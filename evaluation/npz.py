"""Class-conditional samples as ADM's evaluation reads them: an `.npz` of uint8 (N, H, W, 3) and classes.

Image i is of class i modulo the number of classes, so any 1000 in a row hold each class once. The images are generated
in parts of one batch; until the `.npz` is written, parts are files in a folder of the same name with `.parts`.
"""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data.files import atomic_path, atomic_write, refuse_existing, remove_partials, sha256, write_json
from evaluation.sampling_job import SamplingJob, from_pipeline, read_speed
from t2i.config.train import SamplingConfig
from t2i.pipeline import Picture, Pipeline


def write_npz(
    path: Path, shape: tuple[int, int, int, int], images: Iterable[bytes], others: Mapping[str, NDArray[Any]]
) -> None:
    """Write an `.npz` that is whole or absent; equal content gives equal files.

    Args:
        shape: of `arr_0`, (N, H, W, 3).
        images: its bytes, piece by piece: 50,000 images of 256 px are 9.8 GB, more than a rank should hold.
        others: further arrays by name.
    """
    # ZipInfo's default date, so that equal content gives equal files.
    with atomic_path(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for piece in images:
                file.write(piece)
        for name, array in others.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as file:
                np.lib.format.write_array(file, array)


@dataclass(frozen=True)
class _Parts(SamplingJob):
    """A part is the bytes of a batch's images, (n, H, W, 3); `paths` has the part of each image."""

    image_bytes: int = 0

    def is_missing(self, number: int) -> bool:
        if number % self.batch_size:  # the first image of a part answers for all
            return False
        path, images = self.paths[number], min(self.batch_size, len(self.paths) - number)
        return not path.exists() or path.stat().st_size != images * self.image_bytes

    def save(self, numbers: Sequence[int], images: Tensor) -> None:
        atomic_write(self.paths[numbers[0]], images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())


@dataclass(frozen=True)
class ClassSamples:
    """Samples on their way into an `.npz`.

    Attributes:
        out: the `.npz`.
        count: images.
        classes: of the model.
        size: height and width in pixels.
        sampling: its batch size is the number of images in a part.
    """

    out: Path
    count: int
    classes: int
    size: tuple[int, int]
    sampling: SamplingConfig

    @property
    def folder(self) -> Path:
        """Where the parts are."""
        return self.out.with_name(self.out.name + ".parts")

    def _part(self, number: int) -> Path:
        return self.folder / f"{number // self.sampling.batch_size:06d}.bin"

    def begin(self) -> None:
        """Remove what killed processes left.

        Raises:
            UserError: `out` is there already, and not because its parts are still to be removed.
        """
        if not self.folder.exists():
            refuse_existing(self.out, "--out")
        remove_partials(self.folder)

    def job(self, pipeline: Pipeline, fingerprint: Mapping[str, Any]) -> SamplingJob:
        """The job that generates the parts; `fingerprint` is what else the images depend on."""
        numbers = range(self.count)
        samples = [Picture(str(i % self.classes), i // self.classes) for i in numbers]
        settings = self.sampling.model_dump(mode="json")
        return _Parts(
            self.folder / "samples.json",
            {**fingerprint, "count": self.count, "size": self.size, "sampling": settings},
            {},
            [self._part(i) for i in numbers],
            self.sampling.batch_size,
            from_pipeline(pipeline, samples, self.sampling, self.size),
            advice="remove it",
            image_bytes=math.prod(self.size) * 3,
        )

    def assemble(self) -> None:
        """Write the `.npz` of all parts and its metadata, and remove the parts."""
        labels = np.arange(self.count, dtype=np.int64) % self.classes
        images = (self._part(i).read_bytes() for i in range(0, self.count, self.sampling.batch_size))
        write_npz(self.out, (self.count, *self.size, 3), images, {"arr_1": labels})
        manifest = json.loads((self.folder / "samples.json").read_text())
        about = {"sha256": sha256(self.out), **manifest, "speed": read_speed(self.folder)}
        write_json(self.out.with_suffix(".json"), about)
        shutil.rmtree(self.folder)


def generated_with(out: Path, digest: str) -> dict[str, Any] | None:
    """What the samples of an `.npz` with this SHA-256 were generated with, and how fast, or None if that is unknown."""
    path = out.with_suffix(".json")
    known = json.loads(path.read_text()) if out.suffix == ".npz" and path.exists() else None
    if not isinstance(known, dict) or known.pop("sha256", None) != digest:
        return None
    return known
