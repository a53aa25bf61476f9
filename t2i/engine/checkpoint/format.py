"""Checkpoints on disk: their names and checks, reading them, and which of them are kept.

- A folder is a checkpoint if its manifest is there; what is incomplete or about to be removed has a name that begins
  with a dot.
- The manifest holds the SHA-256 of every part and of itself, so a bit that flips in the trainer's state is found too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from data.errors import UserError
from data.files import sha256
from t2i.engine.engine import Shards

FORMAT = 2
MANIFEST = "manifest.json"
EPHEMERAL = "ephemeral"
"""An empty file that marks an ephemeral checkpoint."""
_PART = re.compile(r"rank_\d{5}\.safetensors")
_STEP = re.compile(r"step_\d{8,}")
_HASHING_THREADS = 4


class CheckpointError(UserError):
    """A checkpoint that cannot be used, with the reason."""


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def part_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def is_step(name: str) -> bool:
    return _STEP.fullmatch(name) is not None


def step_of(path: Path) -> int:
    assert is_step(path.name), path
    return int(path.name.removeprefix("step_"))


def checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints of a stage, oldest first."""
    found = [path for path in folder.glob("step_*") if is_step(path.name) and (path / MANIFEST).exists()]
    return sorted(found, key=step_of)


@dataclass(frozen=True)
class Retention:
    """Keeps the newest `keep` regular checkpoints, and for good those at multiples of `keep_every` steps (0: none).

    Of the ephemeral ones the newest is kept, until a regular one is newer.
    """

    keep: int
    keep_every: int = 0

    def expired(self, ephemeral: Mapping[int, bool], latest: int, needed_before: int | None = None) -> list[int]:
        """The steps of checkpoints to remove.

        Args:
            ephemeral: for the step of each checkpoint, whether it is ephemeral.
            latest: step of the one just written. Later ones neither count nor are removed: they are damaged, or
                training would have resumed from them.
            needed_before: the newest from before this step is kept, for a rollback.
        """
        present = sorted(step for step in ephemeral if step <= latest)
        regular = [step for step in present if not ephemeral[step]]
        kept = {latest, *regular[-self.keep :]}
        kept |= {step for step in regular if self.keep_every and step % self.keep_every == 0}
        if needed_before is not None:  # the newest: going further back costs steps
            kept |= set([step for step in present if step < needed_before][-1:])
        return [step for step in present if step not in kept]


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def manifest_text(body: dict[str, Any]) -> str:
    """The manifest's text: format, body and checksum."""
    body = {"format": FORMAT, **body}
    return json.dumps({**body, "sha256": _digest(body)})


def parse_manifest(text: str | bytes | bytearray, where: str) -> dict[str, Any]:
    """Read a manifest and check it.

    Raises:
        CheckpointError: it is truncated, was changed, or has another format.
    """
    try:
        body = json.loads(text)
        written = body.pop("sha256")
        kind = body["format"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{where}: the manifest is truncated or malformed: {error}") from error
    if kind != FORMAT:
        raise CheckpointError(
            f"{where}: format {kind}, this version reads {FORMAT}: resume with the version that wrote it"
        )
    if written != _digest(body):
        raise CheckpointError(f"{where}: the manifest was changed: its checksum does not match")
    for part in body["parts"]:
        if not _PART.fullmatch(part["file"]):
            raise CheckpointError(f"{where}: the manifest names {part['file']!r}, which is no rank's file")
    return body


class Checkpoint:
    """A committed checkpoint, opened for reading.

    Raises:
        CheckpointError: its manifest is unreadable, truncated, changed or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = (path / MANIFEST).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: the manifest cannot be read: {error}") from error
        self.manifest = parse_manifest(text, str(path))

    def verify(self) -> None:
        """Check every file against its checksum.

        Raises:
            CheckpointError: one is missing or was changed.
        """
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            for fault in pool.map(self._fault_of, self.manifest["parts"]):
                if fault is not None:
                    raise CheckpointError(fault)

    def _fault_of(self, part: dict[str, Any]) -> str | None:
        file = self.path / part["file"]
        try:
            if (size := file.stat().st_size) != part["bytes"]:
                return f"{file}: truncated, {size} of {part['bytes']} bytes are there"
            return None if sha256(file) == part["sha256"] else f"{file}: its checksum is not the manifest's"
        except FileNotFoundError:
            return f"{file}: missing"
        except OSError as error:
            return f"{file}: cannot be read: {error}"

    @property
    def state(self) -> dict[str, Any]:
        """The trainer's global state."""
        return self.manifest["state"]

    def read(self, shards: Shards, kinds: Mapping[str, Mapping[str, Tensor]], optional: str | None = None) -> None:
        """Read slices into tensors.

        Args:
            shards: which slice of each parameter to read.
            kinds: for each kind to read (`param`, `ema`, or a moment), the tensors (numel,) to fill, by name.
            optional: prefix of parameters that may differ or be missing: their tensors are left as they are.

        Raises:
            CheckpointError: the checkpoint is of another model or optimizer.
        """
        ours = {name: list(shard.shape) for name, shard in shards.items()}
        theirs = self.manifest["shapes"]
        differing = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        if optional is not None:
            kinds = {k: {n: t for n, t in targets.items() if n not in differing} for k, targets in kinds.items()}
            differing = [name for name in differing if not name.startswith(optional)]
        if differing:
            raise CheckpointError(
                f"{self.path} is of another model: {len(differing)} parameters differ, first {differing[0]} "
                f"({theirs.get(differing[0])} there, {ours.get(differing[0])} here)"
            )
        for part in self.manifest["parts"]:
            wanted = [
                (name, start, low, high)
                for name, (start, stop) in part["slices"].items()
                if name in shards and (low := max(start, shards[name].start)) < (high := min(stop, shards[name].stop))
            ]
            if wanted:
                self._read_part(part["file"], wanted, shards, kinds)

    def _read_part(
        self,
        file_name: str,
        wanted: list[tuple[str, int, int, int]],
        shards: Shards,
        kinds: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """Read from one rank's file; `wanted`: name, start of the file's slice, start and stop of what to read."""
        with safe_open(self.path / file_name, framework="pt") as file:
            present = set(file.keys())
            for name, start, low, high in wanted:
                for kind, targets in kinds.items():
                    if name not in targets:
                        continue
                    if f"{kind}/{name}" not in present:
                        raise CheckpointError(
                            f"{self.path} holds no {kind} of {name}: it was trained with another optimizer"
                        )
                    part = file.get_slice(f"{kind}/{name}")[low - start : high - start]
                    targets[name][low - shards[name].start : high - shards[name].start] = part


def newest(folder: Path, before: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint, or None, and what is wrong with newer ones; `before`: only of earlier steps."""
    faults = []
    for path in reversed([path for path in checkpoints(folder) if before is None or step_of(path) < before]):
        try:
            Checkpoint(path).verify()
        except CheckpointError as error:
            faults.append(str(error))
        else:
            return path, faults
    return None, faults


def params_of(shards: Shards) -> dict[str, Tensor]:
    """The master weights by name, as `Checkpoint.read` fills them."""
    return {name: shard.param for name, shard in shards.items()}


def moments_of(shards: Shards) -> dict[str, dict[str, Tensor]]:
    """The moments by kind and parameter name, as `Checkpoint.read` fills them."""
    kinds: dict[str, dict[str, Tensor]] = {}
    for name, shard in shards.items():
        for moment, tensor in shard.state.items():
            kinds.setdefault(moment, {})[name] = tensor
    return kinds
