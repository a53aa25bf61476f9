"""Sets of images to measure: an `.npz` in ADM's form, or a folder.

An `.npz` is read front to back, whether its members are compressed or not: 50,000 images of 256 px are 9.8 GB. A
folder's images are those of every format that is decoded, its subfolders' too, in the order of their paths, decoded by
several threads; what the folder holds besides is counted (`data/listing.py`), and so is grid.png of GenEval's layout,
whose pictures lie beside it. All images of a set have one size; the networks bring it to theirs.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from data.decode import Pixels, decode_file
from data.errors import UserError
from data.formats import IMAGE_EXTENSIONS
from data.listing import is_image, told, why_not_decoded
from data.store import open_store
from t2i.engine.checkpoint.format import sha256

_THREADS = 8
_MEMBER = "arr_0.npy"


class Images(Protocol):
    """A set of images, in order."""

    size: tuple[int, int]
    """Height and width of every image, in pixels."""
    left_out: Counter[str]
    """What a folder holds besides, by reason."""

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """SHA-256 of an `.npz`; of a folder, of what `sha256sum` prints of its images, in their order."""

    def batches(self, groups: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """The images of these numbers, which ascend from group to group, as uint8 (B, 3, H, W).

        Raises:
            UserError: an image cannot be read, or is of another size.
        """


def open_images(path: Path, crop: int | None) -> Images:
    """A set of images by its path.

    Args:
        path: an `.npz` with `arr_0`, or a folder.
        crop: side in pixels that a folder's images are brought to as ADM's are, by `data.adm`; None leaves them as
            they are. An `.npz` is taken as it is.

    Raises:
        UserError: it is neither, or holds no images.
    """
    if path.is_dir():
        return FolderImages(path, crop)
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path)
    raise UserError(f"{path}: must be a folder of images or an .npz with arr_0")


class NpzImages:
    """`arr_0`, uint8 (N, H, W, 3)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as file:
                shape, fortran, dtype = _header(file)
                self._start = file.tell()
        except KeyError as error:
            raise UserError(f"{path}: holds no arr_0, the images") from error
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: cannot be read as an .npz: {error}") from error
        if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran or 0 in shape:
            raise UserError(f"{path}: arr_0 must be uint8 (N, H, W, 3), and is {dtype} {shape}")
        self.size, self.left_out = (shape[1], shape[2]), Counter[str]()
        self._count = shape[0]

    def __len__(self) -> int:
        return self._count

    def digest(self) -> str:
        return sha256(self.path)

    def batches(self, groups: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        height, width = self.size
        length = height * width * 3
        with zipfile.ZipFile(self.path) as archive, archive.open(_MEMBER) as file:

            def read(number: int) -> Pixels:
                try:
                    file.seek(self._start + number * length)
                    data = file.read(length)
                except (OSError, EOFError, zipfile.BadZipFile) as error:
                    raise UserError(f"{self.path}: arr_0 cannot be read: {error}") from error
                if len(data) < length:
                    raise UserError(f"{self.path}: ends within image {number} of {self._count}")
                return np.frombuffer(data, np.uint8).reshape(height, width, 3).transpose(2, 0, 1)

            yield from _ahead(groups, read, 1)  # one thread, since there is one place in the file


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


class FolderImages:
    """The images below a folder.

    Args:
        path: the folder.
        crop: as for `open_images`.
    """

    def __init__(self, path: Path, crop: int | None) -> None:
        self.path = path
        self.left_out = Counter[str]()
        names = {info.name for info in open_store(str(path)).list(left_out=self.left_out)}
        others = {name: reason for name in sorted(names) if (reason := _why_none(name, names)) is not None}
        self.left_out.update(others.values())
        self.files = [path / name for name in sorted(names - others.keys())]
        if not self.files:
            raise UserError(f"{path}: holds no images ({', '.join(IMAGE_EXTENSIONS)}){told(self.left_out)}")
        self._crop = crop
        self.size = (crop, crop) if crop else self._read(0).shape[1:]

    def __len__(self) -> int:
        return len(self.files)

    def digest(self) -> str:
        def line(file: Path) -> str:
            return f"{sha256(file)}  {file.relative_to(self.path).as_posix()}\n"

        with ThreadPoolExecutor(_THREADS) as pool:
            return hashlib.sha256("".join(pool.map(line, self.files)).encode()).hexdigest()

    def batches(self, groups: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        return _ahead(groups, self._checked, _THREADS)

    def _read(self, number: int) -> Pixels:
        file = self.files[number]
        return decode_file(file, adm_side=self._crop)

    def _checked(self, number: int) -> Pixels:
        pixels = self._read(number)
        if pixels.shape[1:] != self.size:
            sizes = [f"{width} x {height}" for height, width in (pixels.shape[1:], self.size)]
            raise UserError(
                f"{self.files[number]}: is {sizes[0]} pixels and {self.files[0].name} {sizes[1]}: give --size, "
                "to which all are cropped, or make them alike"
            )
        return pixels


def _why_none(name: str, names: Collection[str]) -> str | None:
    """Why a file is no image of the set; None where it is one."""
    folder, _, base = name.rpartition("/")
    if base == "grid.png" and f"{folder}/metadata.jsonl".lstrip("/") in names:
        return "grids of GenEval's layout"
    return None if is_image(name) else why_not_decoded(name) or "files that are no images"


def _ahead(groups: Iterable[Sequence[int]], read: Callable[[int], Pixels], threads: int) -> Iterator[Tensor]:
    """Batches of images, of which the next is read while one is used."""
    waiting: deque[list[Future[Pixels]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for group in groups:
            waiting.append([pool.submit(read, number) for number in group])
            if len(waiting) > 1:
                yield _stacked(waiting.popleft())
        while waiting:
            yield _stacked(waiting.popleft())


def _stacked(pixels: Sequence[Future[Pixels]]) -> Tensor:
    return torch.from_numpy(np.stack([it.result() for it in pixels]))
