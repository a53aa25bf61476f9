"""What must be alike on all ranks of a job: its settings and the files they name, the source, and the versions,
variables and devices that change numbers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from t2i.build import choose_dtype
from t2i.config_loading import fields_of
from t2i.source import source_files

PACKAGES = (
    *("torchvision", "deepspeed", "transformers", "tokenizers", "sentencepiece", "safetensors", "numpy", "scipy"),
    *("lpips", "webdataset", "pillow", "simplejpeg", "opencv-python-headless", "pyarrow", "flash-attn"),
)
VARIABLES = (
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
)
_ENDS = 1 << 20
"""Bytes at the beginning and at the end of a file by which it is known, besides its size."""


def agreed_values(settings: Mapping[str, Any], device: torch.device) -> dict[str, str]:
    """What this rank has, by name, to be compared with the other ranks'.

    Args:
        settings: the job's config or options, as a tree. A value that is a path counts with what a file of this
            path, or a folder with a config, holds.
        device: on which this rank computes.
    """
    values: dict[str, str] = {}
    for name, value in fields_of(dict(settings)).items():
        values[name] = value if isinstance(value, str) else json.dumps(value, default=str)
        if isinstance(value, Path) or (isinstance(value, str) and "/" in value):
            values |= {f"{name}: {file}": ends for file, ends in _contents(Path(value)).items()}
    values |= {"device": device.type, "engine.dtype auto": str(choose_dtype("auto", device)).removeprefix("torch.")}
    values |= {
        "version of python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "version of torch": torch.__version__,
    }
    values |= {f"version of {name}": _version(name) for name in PACKAGES}
    values |= {f"variable {name}": os.environ.get(name, "not set") for name in VARIABLES}
    return values | {f"source {name}": digest[:12] for name, digest in source_files().items()}


def differences(own: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names of the values that differ, settings first."""
    return [name for name in {**own, **other} if own.get(name) != other.get(name)]


def digest(values: Mapping[str, str]) -> str:
    """One SHA-256 of all values."""
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _contents(path: Path) -> dict[str, str]:
    """Digests of a file, or of the files in a model's folder, by name; nothing of other folders."""
    try:
        if path.is_file():
            return {path.name: _digest_ends(path)}
        if (path / "config.yaml").is_file() or (path / "config.json").is_file():
            return {file.name: _digest_ends(file) for file in sorted(path.iterdir()) if file.is_file()}
    except OSError:  # whoever reads it in earnest says so
        pass
    return {}


def _digest_ends(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = sha256(file.read(_ENDS))
        if size > _ENDS:
            file.seek(max(_ENDS, size - _ENDS))
            ends.update(file.read(_ENDS))
    return f"{size} bytes, {ends.hexdigest()[:12]}"
