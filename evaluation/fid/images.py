"""The images that are compared: samples and references, each an `.npz` in ADM's form or a folder.

An `.npz` is read front to back, whether its members are compressed or not: 50,000 images of 256 px are 9.8 GB. A
folder's images are those of every format that is decoded, in subfolders too, in the order of their paths; other files
are counted (`data/listing.py`), and so is grid.png of GenEval's layout, whose images are beside it. All images of a set
have one size; the networks resize them.

A reference `.npz`, which is written here too, may hold statistics:

    mu, sigma      mean (d,) and covariance (d, d) of the pooled features of the whole reference set
    mu_s, sigma_s  the same of the spatial features
    arr_0          uint8 (N, H, W, 3): 10,000 of its images, for precision and recall
    about          in files of this project alone: what the statistics are of, as JSON

ADM's own have no `about`: they are of Inception, and ADM says elsewhere of how many images.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.decode import Pixels, decode_file
from data.errors import UserError
from data.files import refuse_lfs_pointers, sha256
from data.listing import IMAGE_EXTENSIONS, format_left_out, is_image, why_not_decoded
from data.store import open_store
from evaluation.fid.estimators import Gaussian
from evaluation.fid.networks import Network
from evaluation.npz import write_npz

_THREADS = 8
_MEMBER = "arr_0.npy"


class Images(Protocol):
    """A set of images, in order."""

    size: tuple[int, int]
    """Height and width of every image, in pixels."""
    left_out: Counter[str]
    """How many other files a folder holds, by reason."""

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """SHA-256 of an `.npz`, or of what `sha256sum` prints for a folder's images in their order."""

    def batches(self, groups: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """The images of these numbers, which ascend, as uint8 (B, 3, H, W), a tensor a group.

        Raises:
            UserError: an image cannot be read, or is of another size.
        """


def open_images(path: Path, crop: int | None) -> Images:
    """The images of an `.npz` or a folder; a folder's are cropped as ADM's are to a side of `crop` pixels, if given.

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
            refuse_lfs_pointers(path, "images")
            with zipfile.ZipFile(path) as archive, archive.open(_MEMBER) as file:
                shape, fortran, dtype = _header(file)
                self._start = file.tell()
        except KeyError as error:
            raise UserError(f"{path}: holds no arr_0, the images") from error
        except UserError:
            raise
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

            yield from _prefetched(groups, read, 1)  # one thread, since the file has one position


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


class FolderImages:
    """The images below a folder, see `open_images`."""

    def __init__(self, path: Path, crop: int | None) -> None:
        self.path = path
        self.left_out = Counter[str]()
        names = {info.name for info in open_store(str(path)).list(left_out=self.left_out)}
        others = {name: reason for name in sorted(names) if (reason := _why_not(name, names)) is not None}
        self.left_out.update(others.values())
        self.files = [path / name for name in sorted(names - others.keys())]
        if not self.files:
            raise UserError(f"{path}: holds no images ({', '.join(IMAGE_EXTENSIONS)}){format_left_out(self.left_out)}")
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
        return _prefetched(groups, self._checked, _THREADS)

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


def _why_not(name: str, names: Collection[str]) -> str | None:
    """Why a file is no image of the set, or None if it is one."""
    folder, _, base = name.rpartition("/")
    if base == "grid.png" and f"{folder}/metadata.jsonl".lstrip("/") in names:
        return "grids of GenEval's layout"
    return None if is_image(name) else why_not_decoded(name) or "files that are no images"


def _prefetched(groups: Iterable[Sequence[int]], read: Callable[[int], Pixels], threads: int) -> Iterator[Tensor]:
    """Batches of images; the next is read while one is used."""
    waiting: deque[list[Future[Pixels]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for group in groups:
            waiting.append([pool.submit(read, number) for number in group])
            if len(waiting) > 1:
                yield _stacked(waiting.popleft())
        while waiting:
            yield _stacked(waiting.popleft())


def _stacked(pixels: Sequence[Future[Pixels]]) -> Tensor:
    return torch.from_numpy(np.stack([read.result() for read in pixels]))


KEPT = 10_000
"""Images of a reference set that precision and recall are computed from."""
_IMAGES = "arr_0"
_NAMES = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def kept_numbers(count: int) -> list[int]:
    """Which of `count` images are kept for precision and recall: KEPT at even distances, or all if there are fewer."""
    return list(range(count)) if count <= KEPT else [i * count // KEPT for i in range(KEPT)]


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        images: for precision and recall, and for the statistics unless there are any; None for an `.npz` without.
        gaussians: `pooled` and, if the `.npz` has it, `spatial`; None if they are still to be measured.
        about: what the `.npz` says its statistics are of; may be empty.
    """

    path: Path
    images: Images | None
    gaussians: dict[str, Gaussian] | None
    about: dict[str, Any]

    def digest(self) -> str:
        """As `Images.digest`."""
        return self.images.digest() if self.images else sha256(self.path)


def open_reference(path: Path, crop: int | None, network: Network) -> Reference:
    """A reference `.npz`, or a set of images, see `open_images`.

    Raises:
        UserError: it is neither, damaged, or holds statistics of another network.
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
    """The arrays of an `.npz`, but for the images, which may be gigabytes, an empty one."""
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
    """Write a reference `.npz` that is whole or absent; equal references give equal files.

    Args:
        about: what the Gaussians, `pooled` and `spatial`, are of, in JSON's types.
        groups: the numbers of the images to keep, in batches.
    """
    arrays: dict[str, NDArray[Any]] = {"about": np.array(json.dumps(about, sort_keys=True))}
    for kind, (mean, covariance) in _NAMES.items():
        arrays |= {mean: gaussians[kind].mean, covariance: gaussians[kind].covariance}
    shape = (sum(map(len, groups)), *images.size, 3)
    kept = (batch.permute(0, 2, 3, 1).contiguous().numpy().tobytes() for batch in images.batches(groups))
    write_npz(path, shape, kept, arrays)
