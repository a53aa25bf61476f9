"""Reading checkpoints: nothing in a file is run, tensors are torch.load's, and damage is said in one sentence."""

from __future__ import annotations

import argparse
import functools
import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from released_pixelgen import lightning
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from data.errors import UserError
from t2i.config.base import ConfigError
from t2i.released.checkpoint import _KNOWN, Checkpoint, Inert

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def with_pickle(path: Path, pickled: bytes) -> Path:
    """A checkpoint's zip with any pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return path


class Attributes(dict[str, Any]):
    """As Lightning's AttributeDict: a dictionary of a class of its own."""


class Tree:
    """As omegaconf's containers: its state refers to itself."""

    def __init__(self) -> None:
        self.parent = self
        self.content = {"lr": 1e-4}

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise AssertionError("code of a class in the file was run")


class Members(list[int]):
    pass


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1


def test_every_tensor_is_torch_loads(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    weights = {
        **{str(dtype): torch.arange(5).to(dtype) for dtype in (torch.float64, torch.float32, torch.float16)},
        **{str(dtype): torch.arange(5).to(dtype) for dtype in (torch.bfloat16, torch.int64, torch.bool, torch.int8)},
        **{str(dtype): torch.arange(5).to(dtype) for dtype in (torch.uint8, torch.int16, torch.int32)},
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "shared": base,
        "expanded": torch.full((1,), 3.0).expand(1000, 1000),
        "scalar": torch.tensor(7.0),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    file = save(tmp_path / "x.ckpt", lightning(weights))
    expected = torch.load(file, weights_only=True)["state_dict"]
    checkpoint = Checkpoint(file)
    assert list(checkpoint.weights) == list(expected)
    for name, tensor in expected.items():
        read = checkpoint.tensor(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name
        assert tuple(checkpoint.weights[name].size) == tensor.shape
    assert checkpoint.unknown == []
    assert checkpoint.rest["global_step"] == 360_000 and len(checkpoint.rest["optimizer_states"]) == 1


def test_classes_of_any_kind_are_inert(tmp_path: Path) -> None:
    hyper = {
        "omegaconf": Tree(),
        "attributes": Attributes(lr=1.0),
        "namespace": argparse.Namespace(lr=1.0),
        "partial": functools.partial(torch.optim.AdamW, lr=1e-4),
        "default": defaultdict(list, a=[1]),
        "members": Members([1, 2]),
        "slotted": Slotted(),
        "set": {1, 2},
        "function": os.system,
        "dtype": torch.bfloat16,
        "path": Path("/data"),
        "key": {Slotted: 1},
    }
    checkpoint = Checkpoint(save(tmp_path / "x.ckpt", lightning(WEIGHTS, hyper_parameters=hyper)))
    assert torch.equal(checkpoint.tensor("a"), WEIGHTS["a"])
    found = checkpoint.rest["hyper_parameters"]
    assert all(type(found[name]) is Inert for name in hyper.keys() - {"function", "dtype", "key"})
    assert found["function"] is Inert and found["dtype"] is torch.bfloat16
    assert found["attributes"] == {"lr": 1.0} and found["default"] == {"a": [1]}
    module = os.system.__module__
    for name in ("functools.partial", f"{module}.system", "argparse.Namespace", f"{__name__}.Tree"):
        assert name in checkpoint.unknown


class Call:
    """A pickle of it asks for a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("function", [os.system, exec, eval, getattr])
def test_a_call_in_a_file_is_not_made(tmp_path: Path, protocol: int, function: Any) -> None:
    canary = tmp_path / "canary"
    words = {
        os.system: (f"touch {canary}",),
        exec: (f"open({str(canary)!r}, 'w')",),
        eval: (f"open({str(canary)!r}, 'w')",),
        getattr: (Call(open, str(canary), "w"), "name"),
    }
    content = {"state_dict": {}, "trap": Call(function, *words[function])}
    harmful = pickle.dumps(content, protocol)
    checkpoint = Checkpoint(with_pickle(tmp_path / "x.ckpt", harmful))
    assert not canary.exists()
    assert type(checkpoint.rest["trap"]) is Inert
    pickle.loads(harmful)
    assert canary.exists()  # the trap is one


RAW = {
    "inst": b"(S'touch me'\nios\nsystem\n",
    "obj": b"(cos\nsystem\nS'touch me'\no",
    "newobj": b"cos\nsystem\n(S'touch me'\nt\x81",
    "dotted": b"\x80\x04\x8c\x08builtins\x8c\x09exec.call\x93(S'touch me'\ntR",
    "build": b"ccollections\nOrderedDict\n)R}S'__reduce__'\ncos\nsystem\nsb",
    "build_on_class": b"ccollections\nOrderedDict\n(}}S'__init__'\ncos\nsystem\nstb",
    "build_on_rebuild": b"ctorch._utils\n_rebuild_tensor_v2\n(}}S'__new__'\ncos\nsystem\nstb",
    "call_of_a_dtype": b"ctorch\nFloatStorage\n(S'touch me'\ntR",
    "persistent": b"(S'module'\ncos\nsystem\nS'0'\nS'cpu'\nK\x01tQ",
    "extension": b"\x82\x01",
}


@pytest.mark.parametrize("name", RAW)
def test_no_operation_of_a_pickle_gets_further(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran: list[object] = []
    monkeypatch.setattr(os, "system", lambda *words: ran.append(words))
    before = {cls: dict(vars(cls)) for cls in (Inert, OrderedDict)}
    operations = b"\x80\x02}(S'state_dict'\n}S'trap'\n" + RAW[name] + b"u."
    file = with_pickle(tmp_path / "x.ckpt", operations)
    try:
        Checkpoint(file)
    except ConfigError as error:
        assert "damaged" in str(error)
    assert not ran
    assert {cls: dict(vars(cls)) for cls in before} == before
    assert torch.equal(Checkpoint(save(tmp_path / "good", lightning(WEIGHTS))).tensor("a"), WEIGHTS["a"])
    if name in ("inst", "obj", "build"):
        trapped = pickle.loads(operations)["trap"]
        assert ran or trapped.__reduce__ is os.system  # the traps are some


def test_a_tensor_cannot_reach_out_of_its_storage(tmp_path: Path) -> None:
    file = save(tmp_path / "x.ckpt", lightning(WEIGHTS))
    checkpoint = Checkpoint(file)
    stored = checkpoint.weights["a"]
    wrong = [
        stored._replace(size=(2, 4)),
        stored._replace(offset=1),
        stored._replace(offset=-1),
        stored._replace(stride=(-3, 1)),
        stored._replace(stride=(3,)),
        stored._replace(storage=stored.storage._replace(key="9")),
        stored._replace(storage=stored.storage._replace(dtype="float")),
        stored._replace(storage=None),
    ]
    for spoilt in wrong:
        checkpoint.weights["a"] = spoilt
        with pytest.raises(ConfigError, match=r"x.ckpt is damaged: a: ."):
            checkpoint.tensor("a")


def test_a_storage_is_checked_once_however_many_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, checked = torch.arange(12.0), list[int]()
    file = save(tmp_path / "x.ckpt", lightning({"low": base[:5], "high": base[5:], "other": torch.ones(3)}))
    checkpoint = Checkpoint(file)
    crc32 = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda content: checked.append(len(content)) or crc32(content))
    assert torch.equal(torch.cat([checkpoint.tensor("low"), checkpoint.tensor("high")]), base)
    assert torch.equal(checkpoint.tensor("other"), torch.ones(3))
    assert checked == [48, 12]


def test_changed_bytes_are_found(tmp_path: Path) -> None:
    file = save(tmp_path / "x.ckpt", lightning(WEIGHTS))
    content = bytearray(file.read_bytes())
    at = bytes(content).index(struct.pack("<6f", *range(6)))
    content[at + 5] ^= 1
    file.write_bytes(content)
    checkpoint = Checkpoint(file)
    assert torch.equal(checkpoint.tensor("b"), WEIGHTS["b"])
    with pytest.raises(ConfigError, match=r"damaged: a: its bytes are not those that were written"):
        checkpoint.tensor("a")


def _bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("container", ["legacy", "safetensors", "bare"])
def test_other_containers_give_the_same(tmp_path: Path, container: str) -> None:
    base = torch.randn(4, 6)
    weights = {**WEIGHTS, "scalar": torch.tensor(7.0), "empty": torch.empty(0, 3), "fp8": base.to(torch.float8_e4m3fn)}
    file = tmp_path / "x.ckpt"
    if container == "safetensors":
        save_file(weights, file, metadata={"format": "pt"})
    else:
        weights |= {"transposed": base.T, "slice": base[1:3, ::2], "shared": base}
        older = {"_use_new_zipfile_serialization": False} if container == "legacy" else {}
        torch.save(weights if container == "bare" else lightning(weights), file, **older)
    checkpoint = Checkpoint(file)
    assert sorted(checkpoint.weights) == sorted(weights) and not checkpoint.unusable
    for name, tensor in weights.items():
        read = checkpoint.tensor(name)
        assert read.dtype == tensor.dtype and torch.equal(read.float(), tensor.float()), name


def test_the_names_of_wrappers_are_taken_off(tmp_path: Path) -> None:
    names = ("module._orig_mod.blocks.0.w", "blocks._checkpoint_wrapped_module.1.w", "_orig_mod.submodule.w")
    checkpoint = Checkpoint(save(tmp_path / "x", {"state_dict": {name: torch.ones(1) for name in names}}))
    assert list(checkpoint.weights) == ["blocks.0.w", "blocks.1.w", "submodule.w"]


def test_a_name_with_and_without_a_wrapper_is_neither(tmp_path: Path) -> None:
    names = ("a", "module.a", "_orig_mod.a", "b")
    checkpoint = Checkpoint(save(tmp_path / "x", {"state_dict": {name: torch.ones(1) for name in names}}))
    assert list(checkpoint.weights) == ["b"]
    assert checkpoint.unusable == {"a": "there twice, with and without a wrapper's name"}


class Tagged(torch.Tensor):
    """A subclass that is plain inside."""


def test_what_is_no_tensor_matters_to_nobody_who_does_not_need_it(tmp_path: Path) -> None:
    sparse = torch.ones(2).to_sparse()
    others = {"none": None, "number": 3, "sparse": sparse, "meta": torch.empty(2, device="meta"), 5: "five"}
    tagged = torch.ones(2).as_subclass(Tagged)
    checkpoint = Checkpoint(save(tmp_path / "x", {"state_dict": {**WEIGHTS, **others, "tagged": tagged}}))
    assert checkpoint.weights.keys() == {"a", "b", "tagged"}
    assert torch.equal(checkpoint.tensor("tagged"), torch.ones(2))
    assert checkpoint.unusable["none"] == "no tensor (NoneType)" and checkpoint.unusable["5"] == "no tensor (str)"
    assert checkpoint.unusable["sparse"].startswith("a tensor that torch rebuilds by _rebuild_sparse_tensor")
    assert checkpoint.unusable["meta"].startswith("a tensor that torch rebuilds by _rebuild_meta_tensor")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("legacy", [False, True])
def test_types_that_are_not_read_matter_to_nobody_who_does_not_need_them(tmp_path: Path, legacy: bool) -> None:
    names = ("complex64", "complex128", "uint16", "uint32", "float8_e4m3fnuz", "float8_e5m2fnuz")
    others = {name: torch.ones(3).to(getattr(torch, name)) for name in names}
    quantized = [
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, item) for item in (torch.qint8, torch.quint8, torch.qint32)
    ]
    weights = {**others, **{str(item.dtype): item for item in quantized}, **WEIGHTS}
    torch.save(lightning(weights), tmp_path / "x", _use_new_zipfile_serialization=not legacy)
    checkpoint = Checkpoint(tmp_path / "x")
    assert checkpoint.weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in WEIGHTS.items())
    assert {name: checkpoint.unusable.pop(name) for name in names} == {name: f"of the type {name}" for name in names}
    assert len(checkpoint.unusable) == 3 and all("_rebuild_qtensor" in why for why in checkpoint.unusable.values())


def test_types_that_torch_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for legacy in (False, True):
        weights = {**WEIGHTS, "c": torch.ones(3, dtype=torch.complex64), "d": torch.ones(3, dtype=torch.uint16)}
        torch.save(lightning(weights), tmp_path / f"{legacy}", _use_new_zipfile_serialization=not legacy)
    for name in ("ComplexFloatStorage", "uint16"):  # as if they came after this torch
        monkeypatch.delitem(_KNOWN, ("torch", name))
    checkpoint = Checkpoint(tmp_path / "False")
    assert checkpoint.unusable == {"c": "of the type ComplexFloatStorage", "d": "of the type uint16"}
    assert torch.equal(checkpoint.tensor("a"), WEIGHTS["a"])
    with pytest.raises(ConfigError, match="True holds a ComplexFloatStorage, whose size is not known"):
        Checkpoint(tmp_path / "True")


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_dtensor_is_called_one(tmp_path: Path, one_rank: None) -> None:
    sharded = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
    cause = "a DTensor or another tensor of several parts, and should be saved as one whole tensor"
    for content in ({"state_dict": {**WEIGHTS, "sharded": sharded}}, {"sharded": sharded}):
        assert Checkpoint(save(tmp_path / "x", content)).unusable == {"sharded": cause}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no checkpoint"),
        (_bytes(lightning(WEIGHTS))[:-40], "not all of one"),
        (_bytes([1, 2]), "has no state_dict"),
        (_bytes({"model": {}}), "has no state_dict"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", r"Git LFS pointer.*`git lfs pull`"),
        (b"\x80\x02}.", "is no checkpoint"),
        (struct.pack("<Q", 1 << 60) + b"{}", "is no checkpoint"),
        (struct.pack("<Q", 9) + b'{"a": 1', "is damaged"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        Checkpoint(tmp_path / "x.ckpt")


def test_other_zips_and_missing_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(ConfigError, match="is no checkpoint"):
        Checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match=r"absent: cannot be read: No such file"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(ConfigError, match="is damaged: "):
        Checkpoint(with_pickle(tmp_path / "y.ckpt", b"\x80\x02}K"))
