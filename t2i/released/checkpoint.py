"""Checkpoints as PyTorch and Lightning write them, read without running anything that is in them.

- A pickle runs code by naming functions. Here a name is looked up in one table, of a dictionary, two ways to rebuild
  a tensor, and storage types; any other becomes `Inert`, which takes every call and does nothing. Nothing is imported.
- torch.load(weights_only=True) would not do: it refuses a whole file for one class that it does not know, and
  Lightning stores hyper-parameters of any class, some of them dictionaries, which its list cannot be extended with.
- Tensors stay in the file, mapped into memory: an optimizer's state, two thirds of a checkpoint, is never read.
"""

from __future__ import annotations

import mmap
import pickle
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from t2i.config_base import ConfigError

AVERAGE = "state_dict_ema"
"""Where a checkpoint without Lightning keeps the average of its state_dict, if it does."""


class Inert(dict[Any, Any]):
    """What stands for a class or function of a file: it takes any call and any state, and keeps only items."""

    __slots__ = ()

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__()

    def _ignore(self, *arguments: Any) -> None:
        pass

    __setstate__ = append = extend = add = _ignore
    __hash__ = object.__hash__  # type: ignore[assignment]


class Storage(NamedTuple):
    """The memory of one or more tensors: its type, and the entry of the zip that holds it."""

    dtype: Any
    key: Any


class StoredTensor(NamedTuple):
    """A tensor that lies in a file. Offset and strides count elements. Nothing in it is to be trusted."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


class _Tensor(Inert):
    __slots__ = ()

    def __new__(cls, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
        return StoredTensor(storage, offset, size, stride)


class _Parameter(Inert):
    __slots__ = ()

    def __new__(cls, data: Any, *rest: Any) -> Any:
        return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Inert,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.unknown: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        found = _KNOWN.get((module, name))
        if found is None:
            self.unknown.add(f"{module}.{name}")
        return Inert if found is None else found

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _device, _count = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"a reference to {kind!r}")
        return Storage(dtype, key)


class Checkpoint:
    """A checkpoint file.

    Args:
        path: as torch.save writes it (a zip with data.pkl).

    Raises:
        ConfigError: it is no such file, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._contents: dict[str, memoryview] = {}
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
                self._entries = {entry.filename.removeprefix(f"{root}data/"): entry for entry in archive.infolist()}
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                with archive.open(f"{root}data.pkl") as pickled:
                    unpickler = _Unpickler(pickled)  # type: ignore[arg-type]
                    content = unpickler.load()
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except (zipfile.BadZipFile, StopIteration) as error:
            raise ConfigError(f"{path} is no checkpoint as torch.save writes it, or not all of one") from error
        except Exception as error:  # a spoilt pickle may raise anything
            raise ConfigError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            raise ConfigError(f"{path} is not a checkpoint of PixelGen or PixelDiT: it has no state_dict")
        weights = ("state_dict", AVERAGE)
        self.rest: dict[Any, Any] = {key: value for key, value in content.items() if key not in weights}
        """What the file has beside the weights: training's progress, its optimizer, hyper-parameters."""
        self.unknown = sorted(unpickler.unknown)
        """Classes and functions that the file names, which were not looked for."""
        self.weights: dict[str, StoredTensor] = {}
        """The state dict, and behind `state_dict_ema.` the average's, if it has one of its own."""
        for key, prefix in (("state_dict", ""), (AVERAGE, f"{AVERAGE}.")):
            self._add(key, content.get(key, {}), prefix)

    def _add(self, key: str, state_dict: Any, prefix: str) -> None:
        if not isinstance(state_dict, dict):
            raise ConfigError(f"{self.path} is damaged: its {key} is no dictionary")
        for name, stored in state_dict.items():
            if not (isinstance(name, str) and isinstance(stored, StoredTensor) and _is_size(stored.size)):
                raise ConfigError(f"{self.path} is damaged: {name!r} of its {key} is no tensor")
            self.weights[prefix + name] = stored

    def tensor(self, name: str) -> Tensor:
        """One of the weights, as a view of the file: it must not be written to.

        Raises:
            ConfigError: it is damaged.
        """
        stored = self.weights[name]
        try:
            content = self._content(stored.storage.key)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                flat = torch.frombuffer(content, dtype=stored.storage.dtype)
            return flat.as_strided(stored.size, stored.stride, stored.offset)
        except Exception as error:  # whatever is wrong with a record that anybody may have written
            raise ConfigError(f"{self.path} is damaged: {name}: {' '.join(str(error).split())}") from error

    def _content(self, key: str) -> memoryview:
        """A storage's bytes, checked once: many tensors may share one."""
        if key not in self._contents:
            entry = self._entries[key]
            start = self._start(entry)
            content = memoryview(self._mapping)[start : start + entry.file_size]
            if entry.compress_type != zipfile.ZIP_STORED or zlib.crc32(content) != entry.CRC:
                raise ValueError("its bytes are not those that were written")
            self._contents[key] = content
        return self._contents[key]

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Where an entry's bytes begin: behind a header of 30 bytes, a name and padding, all of them its own."""
        at = entry.header_offset
        name, padding = struct.unpack("<HH", self._mapping[at + 26 : at + 30])
        return int(at + 30 + name + padding)


def _is_size(size: Any) -> bool:
    return isinstance(size, tuple) and all(type(length) is int and length > 0 for length in size)
