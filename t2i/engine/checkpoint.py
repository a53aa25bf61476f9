"""Checkpoints in one format for all engines and world sizes.

A checkpoint is a folder `step_N`: one safetensors file a rank with its slices of the fp32 weights, the
optimizer's moments and the average, each under the parameter's name, and `manifest.json`, which says which slice
lies where, the files' SHA-256, and the trainer's global state. A reader takes the slices it needs, so any number
of ranks and any engine can go on from it.

Writing happens beside training: `save` copies the slices to host memory and returns; a thread writes them into a
folder with a dot in front, made durable, and rank 0 commits it by one rename once every rank's part is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.errors import UserError
from t2i.engine.shards import Shards

FORMAT = 1
COMMIT_TIMEOUT_S = 600.0
CLOSE_TIMEOUT_S = 30.0


class CheckpointError(UserError):
    """A checkpoint that cannot be used, with the reason."""


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    """Write a small file so that it is either whole or absent after a crash."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def state_slices(shards: Shards, ema: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Everything a rank saves: `value/NAME`, `ema/NAME` and one `MOMENT/NAME` for each moment. Views."""
    slices: dict[str, Tensor] = {}
    for name, shard in shards.items():
        slices[f"value/{name}"] = shard.value
        slices[f"ema/{name}"] = ema[name]
        slices.update({f"{moment}/{name}": tensor for moment, tensor in shard.state.items()})
    return slices


class CheckpointWriter:
    """Writes the checkpoints of one stage.

    Args:
        folder: holds the stage's checkpoints; visible to all ranks.
        attempt: the same word on all ranks, another one at each start of the run, so that what a killed
            attempt left behind is never mixed with this one's files.
        keep: newest checkpoints to keep.
    """

    def __init__(self, folder: Path, *, rank: int, world_size: int, attempt: str, keep: int) -> None:
        self.folder = folder
        self.rank = rank
        self.world_size = world_size
        self.attempt = attempt
        self.keep = keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._cleared = False

    def save(self, step: int, shards: Shards, ema: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Begin a checkpoint; all ranks call it with the same step and (on rank 0) the global state.

        Raises:
            OSError: the previous checkpoint could not be written.
        """
        self.wait()
        if self.rank == 0 and not self._cleared:
            self._clear_leftovers()
        held = {name: shard for name, shard in shards.items() if shard.primary}
        snapshot = {key: tensor.detach().to("cpu", copy=True) for key, tensor in state_slices(held, ema).items()}
        places = {name: [shard.start, shard.stop] for name, shard in held.items()}
        shapes = {name: list(shard.shape) for name, shard in shards.items()}

        def work() -> None:
            try:
                self._write(step, snapshot, places, shapes, state)
            except BaseException as error:  # handed to the training thread by `wait`
                self._error = error

        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def _clear_leftovers(self) -> None:
        """Remove what killed attempts left uncommitted; the other ranks may be writing this attempt's already."""
        for leftover in self.folder.glob(".step_*"):
            if not leftover.name.endswith(f".{self.attempt}"):
                shutil.rmtree(leftover, ignore_errors=True)  # a dying rank may still be writing there
        self._cleared = True

    def wait(self) -> None:
        """Wait for the checkpoint under way and raise what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait for the checkpoint under way on the way out; what it says no longer stops anything."""
        if self._thread is not None:
            self._thread.join(timeout=CLOSE_TIMEOUT_S)

    def _write(
        self,
        step: int,
        snapshot: dict[str, Tensor],
        places: dict[str, list[int]],
        shapes: dict[str, list[int]],
        state: dict[str, Any],
    ) -> None:
        aside = self.folder / f".step_{step:08d}.{self.attempt}"
        aside.mkdir(parents=True, exist_ok=True)
        path = aside / f"rank_{self.rank:05d}.safetensors"
        save_file(snapshot, path)
        sync(path)
        part = {"file": path.name, "sha256": sha256(path), "slices": places}
        _write_durably(aside / f"rank_{self.rank:05d}.json", json.dumps(part))
        if self.rank == 0:
            self._commit(aside, self.folder / f"step_{step:08d}", shapes, state)

    def _commit(self, aside: Path, final: Path, shapes: dict[str, list[int]], state: dict[str, Any]) -> None:
        """Rank 0: wait for every rank's part, write the manifest, rename, drop old checkpoints."""
        reports = [aside / f"rank_{rank:05d}.json" for rank in range(self.world_size)]
        deadline = time.monotonic() + COMMIT_TIMEOUT_S
        while not all(report.exists() for report in reports):
            if time.monotonic() > deadline:
                raise OSError(f"{aside}: not all ranks have written their part after {COMMIT_TIMEOUT_S:.0f} s")
            time.sleep(0.02)
        manifest = {
            "format": FORMAT,
            "state": state,
            "shapes": shapes,
            "parts": [json.loads(report.read_text()) for report in reports],
        }
        _write_durably(aside / "manifest.json", json.dumps(manifest))
        for report in reports:
            report.unlink()
        if final.exists():  # damaged, or training would have gone on from it
            shutil.rmtree(final)
        aside.rename(final)
        sync(self.folder)
        # Later ones are damaged too: they do not count towards those that are kept.
        for old in [path for path in checkpoints(self.folder) if path <= final][: -self.keep]:
            shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints of a stage, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "manifest.json").exists())


class Checkpoint:
    """A committed checkpoint, opened for reading.

    Raises:
        CheckpointError: its manifest is torn or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.manifest = json.loads((path / "manifest.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: the manifest cannot be read: {error}") from error
        if self.manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {self.manifest['format']}, this version reads {FORMAT}")

    def verify(self) -> None:
        """Check every file against its checksum.

        Raises:
            CheckpointError: one is missing or not as written.
        """
        for part in self.manifest["parts"]:
            file = self.path / part["file"]
            if not file.exists() or sha256(file) != part["sha256"]:
                raise CheckpointError(f"{file}: missing, or its checksum is not the manifest's")

    @property
    def state(self) -> dict[str, Any]:
        """The trainer's global state."""
        return self.manifest["state"]

    def read(self, shards: Shards, kinds: Mapping[str, Mapping[str, Tensor]], optional: str | None = None) -> None:
        """Fill this rank's slices.

        Args:
            shards: which slice of each parameter is wanted.
            kinds: for each kind to read (`value`, `ema`, or a moment), the tensors (numel,) to fill by name.
            optional: prefix of parameters that may differ or be missing: theirs are left as they are.

        Raises:
            CheckpointError: it is of a model with other parameters.
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
            with safe_open(self.path / part["file"], framework="pt") as file:
                present = set(file.keys())
                for name, (start, stop) in part["slices"].items():
                    if name not in shards:
                        continue
                    low, high = max(start, shards[name].start), min(stop, shards[name].stop)
                    if low >= high:
                        continue
                    for kind, targets in kinds.items():
                        if name in targets:
                            if f"{kind}/{name}" not in present:
                                raise CheckpointError(
                                    f"{self.path} holds no {kind} of {name}: it was trained with another optimizer"
                                )
                            piece = file.get_slice(f"{kind}/{name}")[low - start : high - start]
                            targets[name][low - shards[name].start : high - shards[name].start] = piece


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are as written, and what was wrong with newer ones."""
    faults = []
    for path in reversed(checkpoints(folder)):
        try:
            Checkpoint(path).verify()
        except CheckpointError as error:
            faults.append(str(error))
        else:
            return path, faults
    return None, faults


def values_of(shards: Shards) -> dict[str, Tensor]:
    """The master weights by name, as `Checkpoint.read` fills them."""
    return {name: shard.value for name, shard in shards.items()}


def moments_of(shards: Shards) -> dict[str, dict[str, Tensor]]:
    """The moments by kind and parameter name, as `Checkpoint.read` fills them."""
    kinds: dict[str, dict[str, Tensor]] = {}
    for name, shard in shards.items():
        for moment, tensor in shard.state.items():
            kinds.setdefault(moment, {})[name] = tensor
    return kinds
