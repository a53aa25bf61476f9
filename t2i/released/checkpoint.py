"""Checkpoints as PyTorch and Lightning write them, read without running anything in them.

- Three containers: torch.save's zip, torch.save's older format without one, and safetensors.
- A pickle runs code by naming functions. Here one table maps names to a dictionary, ways to rebuild a tensor, and
  types; any other name becomes `Inert`, which accepts every call and does nothing. Nothing is imported.
- torch.load(weights_only=True) refuses a whole file for one unknown class, and Lightning stores hyper-parameters of any
  class, some of them dictionaries, which its list cannot be extended with.
- Tensors are mapped from the file: an optimizer's state, two thirds of a checkpoint, is never read.
- Values that are no tensor, or cannot be read, are listed in `unusable` with the cause.
"""

from __future__ import annotations

import json
import mmap
import pickle
import struct
import warnings
import zipfile
import zlib
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from data.errors import UserError
from data.files import refuse_lfs_pointer
from t2i.config.base import ConfigError

AVERAGE = "state_dict_ema"
"""Key of the EMA of the state_dict in a checkpoint without Lightning, if it has one."""
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of a name that DDP, torch.compile, FSDP and activation checkpointing add."""
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_MOST_HEADER = 100_000_000
"""Bytes of a header of safetensors, as in that library."""


class Inert(dict[Any, Any]):
    """Stands for a class or function of a file: it accepts any call and any state, and keeps only items."""

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
    """The memory of one or more tensors: its type, and the key of its bytes in the file."""

    dtype: Any
    key: Any


class StoredTensor(NamedTuple):
    """A tensor in a file. Offset and strides count elements. Its values are not trusted."""

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


class Unreadable(NamedTuple):
    """Stands for a tensor that cannot be read."""

    cause: str


def _unreadable(function: str, *arguments: Any) -> Unreadable:
    if function == "_rebuild_wrapper_subclass":
        return Unreadable("a DTensor or another tensor of several parts, and should be saved as one whole tensor")
    return Unreadable(f"a tensor that torch rebuilds by {function}, and should be a plain one")


class _TypedTensor(Inert):
    """torch._utils._rebuild_tensor_v3, for dtypes newer than typed storages, such as fp8."""

    __slots__ = ()

    def __new__(cls, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
        _grad, _hooks, dtype, *_ = rest
        return StoredTensor(Storage(dtype, storage.key), offset, size, stride)


class _OfType(Inert):
    """torch._utils._rebuild_from_type_v2, for a subclass of Tensor: its data is read, its type is not."""

    __slots__ = ()

    def __new__(cls, function: Any, kind: Any, arguments: Any, state: Any) -> Any:
        made = function(*arguments)
        return made if isinstance(made, StoredTensor | Unreadable) else Unreadable("a tensor of an unknown type")


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}
_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Inert,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _TypedTensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _Parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _OfType,
    ("torch.storage", "UntypedStorage"): torch.uint8,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{("torch", name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
}
_READ = tuple(_SAFETENSORS.values())
"""Dtypes of tensors that are read. For others the size is known if torch knows the dtype."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.unknown: set[str] = set()
        self.storages: dict[Any, tuple[Any, Any]] = {}
        """Type and number of elements of each storage, by its key."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        self.unknown.add(f"{module}.{name}")
        if module == "torch":  # by its name, since it may be the type of a tensor
            return type(name, (Inert,), {"__slots__": ()})
        return partial(_unreadable, name) if module == "torch._utils" and name.startswith("_rebuild_") else Inert

    def persistent_load(self, pid: Any) -> Any:
        kind, *about = pid
        if kind != "storage":
            return Inert()
        dtype, key, _device, count, *view = about
        if any(view):
            raise pickle.UnpicklingError("a storage that is part of another, as PyTorch before 0.4 wrote it")
        self.storages[key] = dtype, count
        return Storage(dtype, key)


class _Place(NamedTuple):
    """Where a storage's bytes are in the file, and their CRC-32 if the file has one."""

    start: int
    size: int
    crc: int | None = None


class Checkpoint:
    """A checkpoint file: torch.save's, with or without a zip, or safetensors. Its weights are under "state_dict"; a
    file without that key is the state dict itself. A ConfigError is raised for any other file, or a damaged one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights: dict[str, StoredTensor] = {}
        """The state dict, and behind `state_dict_ema.` the EMA's, if it has one of its own; without what wrappers
        add to names."""
        self.unusable: dict[str, str] = {}
        """What is under the names of weights and is no tensor that can be read: what it is, to follow "it is"."""
        self.unknown: list[str] = []
        """Classes and functions that the file names, which were not looked for."""
        self._places: dict[Any, _Place] = {}
        self._checked = set[Any]()
        try:
            with path.open("rb") as file:
                head = file.read(64)
                refuse_lfs_pointer(head, str(path))
                file.seek(0)
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if head else None
                content = self._read(file, head)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (zipfile.BadZipFile, StopIteration) as error:
            raise ConfigError(
                f"{path} is no checkpoint as torch.save or safetensors writes it, or not all of one"
            ) from error
        except UserError:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise ConfigError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        if isinstance(content, dict) and any(isinstance(v, StoredTensor | Unreadable) for v in content.values()):
            content = content if "state_dict" in content else {"state_dict": content}
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            raise ConfigError(f"{path} is no checkpoint of a network: it has no state_dict")
        weights = ("state_dict", AVERAGE)
        self.rest: dict[Any, Any] = {key: value for key, value in content.items() if key not in weights}
        """What the file has beside the weights: training's progress, its optimizer, hyper-parameters."""
        for key, prefix in (("state_dict", ""), (AVERAGE, f"{AVERAGE}.")):
            self._add(key, content.get(key, {}), prefix)

    def _read(self, file: BinaryIO, head: bytes) -> Any:
        """The file's content, with `StoredTensor` for tensors."""
        if head[:2] == b"PK":
            return self._read_zip(file)
        if head[8:9] == b"{":
            return self._read_safetensors(file)
        if head[:1] == b"\x80":
            return self._read_legacy(file)
        raise zipfile.BadZipFile

    def _read_zip(self, file: BinaryIO) -> Any:
        with zipfile.ZipFile(file) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
            for entry in archive.infolist():
                if entry.compress_type == zipfile.ZIP_STORED:  # torch.save compresses nothing
                    # The bytes begin behind a header of 30 bytes, a name and padding, all of them the entry's own.
                    file.seek(entry.header_offset + 26)
                    name, padding = struct.unpack("<HH", file.read(4))
                    start = entry.header_offset + 30 + name + padding
                    key = entry.filename.removeprefix(f"{root}data/")
                    self._places[key] = _Place(start, entry.file_size, entry.CRC)
            with archive.open(f"{root}data.pkl") as pickled:
                unpickler = _Unpickler(pickled)  # type: ignore[arg-type]
                content = unpickler.load()
        self.unknown = sorted(unpickler.unknown)
        return content

    def _read_legacy(self, file: BinaryIO) -> Any:
        """Five pickles (mark, version, machine, content, keys of the storages), then for each key a count and bytes."""
        if _Unpickler(file).load() != _LEGACY_MAGIC or _Unpickler(file).load() != _LEGACY_VERSION:
            raise zipfile.BadZipFile
        _Unpickler(file).load()
        unpickler = _Unpickler(file)
        content = unpickler.load()
        self.unknown = sorted(unpickler.unknown)
        at = (keys := _Unpickler(file).load()) and file.tell()
        for key in keys:
            dtype, count = unpickler.storages[key]
            if not isinstance(dtype, torch.dtype):
                raise ConfigError(
                    f"{self.path} holds a {_type_name(dtype)}, whose size is not known, nor with it where other "
                    "tensors begin: save it with torch.save's zip, or without that tensor"
                )
            self._places[key] = _Place(at + 8, count * dtype.itemsize)
            at += 8 + count * dtype.itemsize
        return content

    def _read_safetensors(self, file: BinaryIO) -> Any:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > _MOST_HEADER:
            raise zipfile.BadZipFile
        found: dict[str, Any] = {}
        for name, about in json.loads(file.read(size)).items():
            if name == "__metadata__":
                continue
            first, last = about["data_offsets"]
            shape, dtype = tuple(about["shape"]), _SAFETENSORS.get(about["dtype"])
            self._places[name] = _Place(8 + size + first, last - first)
            if dtype is None:
                found[name] = Unreadable(f"of the type {about['dtype']}")
                continue
            stride = tuple(accumulate(shape[:0:-1], int.__mul__, initial=1))[::-1] if shape else ()
            found[name] = StoredTensor(Storage(dtype, name), 0, shape, stride)
        return {"state_dict": found}

    def _add(self, key: str, state_dict: Any, prefix: str) -> None:
        if not isinstance(state_dict, dict):
            raise ConfigError(f"{self.path} is damaged: its {key} is no dictionary")
        for name, value in state_dict.items():
            own = prefix + ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)
            if own in self.weights or own in self.unusable:
                self.weights.pop(own, None)
                self.unusable[own] = "there twice, with and without a wrapper's name"
            elif isinstance(value, Unreadable):
                self.unusable[own] = value.cause
            elif not isinstance(value, StoredTensor) or not _makes_sense(value):
                self.unusable[own] = f"no tensor ({kind_name(value)})"
            elif value.storage.dtype not in _READ:
                self.unusable[own] = f"of the type {_type_name(value.storage.dtype)}"
            else:
                self.weights[own] = value

    def tensor(self, name: str) -> Tensor:
        """One of the weights, as a view of the file: do not write to it. A ConfigError if it is damaged."""
        stored = self.weights[name]
        try:
            if 0 in stored.size:
                return torch.empty(stored.size, dtype=stored.storage.dtype)
            content = self._content(stored.storage.key)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                flat = torch.frombuffer(content, dtype=stored.storage.dtype)
            return flat.as_strided(stored.size, stored.stride, stored.offset)
        except Exception as error:  # whatever is wrong with a record that anybody may have written
            raise ConfigError(f"{self.path} is damaged: {name}: {' '.join(str(error).split())}") from error

    def _content(self, key: str) -> memoryview:
        """A storage's bytes, checked once: many tensors may share one."""
        place = self._places[key]
        content = memoryview(self._mapping)[place.start : place.start + place.size]  # type: ignore[arg-type]
        if key not in self._checked:
            if len(content) != place.size or place.crc not in (None, zlib.crc32(content)):
                raise ValueError("its bytes are not those that were written")
            self._checked.add(key)
        return content


def kind_name(value: Any) -> str:
    """The type of a value of a file, in words."""
    if isinstance(value, Inert):
        return "dict" if value else "object"
    return type(value).__name__


def _type_name(dtype: Any) -> str:
    """A dtype by torch's name, known or not: "complex64"."""
    return getattr(dtype, "__name__", str(dtype).removeprefix("torch."))


def _makes_sense(stored: StoredTensor) -> bool:
    is_size = isinstance(stored.size, tuple) and all(type(length) is int and length >= 0 for length in stored.size)
    return is_size and isinstance(stored.storage, Storage)
