"""environment.json of a run: versions, machine, source, and what was trained on, stand-ins named."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from data.files import atomic_write
from t2i.config import RunConfig
from t2i.source import describe_source
from t2i.train.build import stand_ins
from t2i.train.stage_data import StageData

PACKAGES = ("torch", "deepspeed", "transformers", "webdataset", "lpips", "safetensors", "numpy")


def write_environment(
    config: RunConfig, stage: RunConfig, data: StageData, parameters: int, world_size: int, devices: str
) -> None:
    """Write it, with stand-ins and the data's licences of all stages so far."""
    path = config.directory / "environment.json"
    before: dict[str, Any] = {"stand_ins": [], "data": []}
    if path.exists():
        with suppress(ValueError):  # torn by a disk that was full
            before = json.loads(path.read_text())
    known = {entry["name"]: entry for entry in before["data"]}
    for source, opened in zip(stage.data.sources, data.sources, strict=True):
        known[source.name] = {
            "name": source.name,
            "url": source.url,
            "licence": source.licence,
            "credit": source.credit,
            "samples": int(opened.index.counts.sum()),
        }
    environment = {
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
        "device": devices,
        "world_size": world_size,
        "parameters": parameters,
        "stand_ins": list(dict.fromkeys([*before["stand_ins"], *stand_ins(stage.objective)])),
        "data": list(known.values()),
        **describe_source(),
    }
    atomic_write(path, json.dumps(environment, indent=1).encode())
