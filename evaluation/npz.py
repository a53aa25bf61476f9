"""Images in an `.npz` in ADM's form: `arr_0`, uint8 (N, H, W, 3), and other arrays beside.

Class-conditional samples as ADM's evaluation reads them: one `.npz`, `arr_0` the images and `arr_1` the classes.

- Image i is of class i modulo the number of classes, so that any 1000 in a row hold each class once, and is a function
  of the weights, the sampler, the seed and i.
- The images are drawn in parts of one batch, shared out over the processes. A part is a file beside the `.npz` that is
  written aside and renamed, so what a killed job has drawn is there for the next, on any number of processes.
"""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.files import atomic_path, atomic_write, remove_partials, sha256
from evaluation.sampling_job import begin_or_go_on, read_speed, write_json
from t2i.config.train import SamplingConfig
from t2i.pipeline import Picture, Pipeline, batches_of


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


_NOTE = "samples.json"


@dataclass(frozen=True)
class Samples:
    """A set of samples in the making.

    Attributes:
        out: the `.npz`; its parts lie in the folder of the same name with `.parts`.
        count: images.
        classes: of the model.
        size: height and width of an image, in pixels.
        sampling: how they are drawn; its batch is a part.
    """

    out: Path
    count: int
    classes: int
    size: tuple[int, int]
    sampling: SamplingConfig

    @property
    def parts(self) -> range:
        """Their numbers."""
        return range(-(-self.count // self.sampling.batch_size))

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.out.with_name(self.out.name + ".parts")

    def indices(self, part: int) -> range:
        """The images of a part."""
        first = part * self.sampling.batch_size
        return range(first, min(first + self.sampling.batch_size, self.count))

    def path(self, part: int) -> Path:
        """A part's file: its images' bytes, (n, H, W, 3)."""
        return self.folder / f"{part:06d}.bin"

    def missing(self) -> list[range]:
        """The images of the parts that are not there whole."""

        def whole(part: int) -> bool:
            path = self.path(part)
            return path.exists() and path.stat().st_size == len(self.indices(part)) * math.prod(self.size) * 3

        return [self.indices(part) for part in self.parts if not whole(part)]

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Make the folder, or see that the parts that are there are of the same samples. `out` is held.

        Args:
            fingerprint: what else the images depend on, in JSON's types.

        Raises:
            UserError: they are not, `out` is there already, or the folder cannot be made.
        """
        # Beside its parts, it may lack what is known of it.
        if self.out.exists() and not self.folder.exists():
            raise UserError(f"--out {self.out} is there already: remove it or give another name")
        remove_partials(self.folder)
        settings = self.sampling.model_dump(mode="json")
        asked = {**fingerprint, "count": self.count, "size": self.size, "sampling": settings}
        begin_or_go_on(self.folder / _NOTE, asked, what="parts of other samples", advice="remove it")

    def draw(self, pipeline: Pipeline, mine: Sequence[int], drawn: Callable[[int], object]) -> None:
        """Draw these images, whole parts, and tell of each part how many it was."""
        for indices in batches_of(mine, self.sampling.batch_size):
            pictures = [Picture(str(i % self.classes), i // self.classes) for i in indices]
            images = pipeline.draw(pictures, self.sampling).permute(0, 2, 3, 1).contiguous()
            atomic_write(self.path(indices[0] // self.sampling.batch_size), images.numpy().tobytes())
            drawn(len(indices))

    def assemble(self) -> None:
        """Write the `.npz` of all parts and what is known of it, and remove them."""
        labels = np.arange(self.count, dtype=np.int64) % self.classes
        images = (self.path(part).read_bytes() for part in self.parts)
        write_npz(self.out, (self.count, *self.size, 3), images, {"arr_1": labels})
        note = json.loads((self.folder / _NOTE).read_text())
        write_json(_about(self.out), {"sha256": sha256(self.out), **note, "speed": read_speed(self.folder)})
        shutil.rmtree(self.folder)


def _about(out: Path) -> Path:
    return out.with_suffix(".json")


def drawn_as(out: Path, digest: str) -> dict[str, Any] | None:
    """What an `.npz` of samples was drawn with, and how fast; None: nothing is known of a file of this SHA-256."""
    path = _about(out)
    known = json.loads(path.read_text()) if out.suffix == ".npz" and path.exists() else None
    if not isinstance(known, dict) or known.pop("sha256", None) != digest:
        return None
    return known
