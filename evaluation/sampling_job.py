"""What jobs that draw pictures from a model have in common: what a picture depends on, how the processes share the work
out, how fast they were, and pictures as files that are whole or absent.

A job's folder: held by one job at a time, with a manifest of what its files are made from, so that a job that was
killed goes on where it stood and nothing else is mixed with it.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from data.errors import UserError
from data.files import FileLock, atomic_write, remove_partials
from data.progress import progress_bar
from t2i.config.loading import changes
from t2i.distributed import World
from t2i.model_folder import FILES, WhichWeights
from t2i.pipeline import Pipeline, batches_of

LOCK = ".lock"


def write_json(path: Path, tree: Any) -> None:
    """Write JSON's types to a file that is whole or absent."""
    atomic_write(path, (json.dumps(tree, indent=1) + "\n").encode())


@contextmanager
def held(world: World, out: Path, lock: Path | None = None) -> Iterator[None]:
    """Keep other jobs away from a job's folder, which is made if need be, or from a file. A collective.

    Args:
        out: what `--out` names.
        lock: the lock's file; by default it is in the folder.

    Raises:
        UserError: another job holds it, or it cannot be written to.
    """
    locks: list[FileLock] = []

    def take() -> None:
        path = lock or out / LOCK
        try:
            locks.append(FileLock(path, f"--out {out}"))
            if lock is None:
                remove_partials(out)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written to: {error.strerror}") from error

    world.broadcast_from_rank0(take)
    try:
        yield
    finally:
        for it in locks:
            it.release()


def begin_or_go_on(
    manifest: Path,
    fingerprint: dict[str, Any],
    beside: Mapping[str, Any] = MappingProxyType({}),
    what: str = "pictures drawn otherwise",
    advice: str = "give another name",
) -> None:
    """Write the manifest of a new, empty folder, or see that it is of the same work.

    Args:
        manifest: the file; its folder, which is held, is made if need be.
        fingerprint, beside: see `check_or_write_manifest`.
        what: it holds if it is another's, in words.
        advice: what to do where it is another's.

    Raises:
        UserError: the folder holds files of others or made otherwise, or cannot be written to.
    """
    folder = manifest.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not manifest.exists():
            files = (it for it in folder.rglob("*") if it.is_file() and not it.name.startswith("."))
            if (other := next(files, None)) is not None:
                other = other.relative_to(folder)
                raise UserError(f"--out {folder}: holds {other} that this job has not begun: {advice}")
        differ = check_or_write_manifest(manifest, fingerprint, beside)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written to: {error.strerror}") from error
    if differ:
        raise UserError(f"--out {folder}: holds {what} ({', '.join(differ)}): {advice}")


def begin_scores(out: Path, job: str, images: Path, **more: int) -> None:
    """Begin in a job's folder, which is held, with the scores of images that others made, or go on with them.

    Args:
        job: which job scores them.
        images: their folder.
        more: what else the scores depend on for good.

    Raises:
        UserError: it holds anything else, or cannot be written to.
    """
    scored = {"job": job, "images": str(images.resolve()), **more}
    begin_or_go_on(out / "scored.json", scored, what="scores of other images", advice="give another folder")


def check_or_write_manifest(
    manifest: Path, fingerprint: dict[str, Any], beside: Mapping[str, Any] = MappingProxyType({})
) -> list[str]:
    """Write down what a folder's files are made from; if that is known already, compare.

    Args:
        manifest: the file; its folder is there.
        fingerprint: everything that the files depend on, in JSON's types.
        beside: what else is worth knowing of them, which is not compared.

    Returns:
        Dotted names of what differs from the manifest that was there; none: go on.

    Raises:
        UserError: what is there is no manifest.
    """
    if not manifest.exists():
        write_json(manifest, {**beside, **fingerprint})
        return []
    try:
        begun = {name: value for name, value in json.loads(manifest.read_bytes()).items() if name not in beside}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{manifest}: is not what this job writes: give another name") from error
    return changes(begun, json.loads(json.dumps(fingerprint)))


T = TypeVar("T")

_SPEED = "speed.json"


def fingerprint(pipeline: Pipeline, model: Path, which: WhichWeights) -> dict[str, Any]:
    """What every picture of a model folder depends on besides sampling, size and prompt, in JSON's types."""
    with (model / FILES[which]).open("rb") as file:
        weights = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    objective = pipeline.config.objective
    return {
        "weights": weights,
        "dtype": str(next(pipeline.denoiser.parameters()).dtype),
        "noise_scale": objective.noise_scale,
        "t_eps": objective.t_eps,
    }


def count_cut(world: World, pipeline: Pipeline, prompts: Sequence[str]) -> dict[str, int]:
    """How many prompts are longer than what the model reads of them, which rank 0 says; for a job's manifest."""
    cut = pipeline.conditioner.cut(prompts)
    if cut and world.is_rank0:
        percent = 100 * cut / len(prompts)
        share = f"{percent:.0f} % of prompts" if percent >= 1 else f"{percent:.1g} % of prompts"
        most = f"text.length {pipeline.config.text.length} tokens"
        print(f"{share} ({cut:,} of {len(prompts):,}) are longer than {most} and are cut", file=sys.stderr)
    return {"cut_prompts": cut}


def unfinished_batches(pictures: Sequence[T], batch_size: int, is_missing: Callable[[T], bool]) -> list[Sequence[T]]:
    """Those batches of a job's pictures from which any is missing.

    A batch is made of the same pictures whatever is there already and however many processes draw: a kernel may round
    a picture's numbers otherwise at another place of its batch.
    """
    return [batch for batch in batches_of(pictures, batch_size) if any(map(is_missing, batch))]


def draw_together(
    world: World,
    out: Path,
    batches: Sequence[Sequence[T]],
    draw: Callable[[Sequence[T], Callable[[int], object]], object],
) -> None:
    """Have the processes draw whole batches, and note how fast they were. A collective.

    Args:
        out: the job's folder.
        batches: of pictures, the same on every rank; neighbours, since they share prompts, are drawn by one.
        draw: draws the pictures of some of them, and calls what it is given with how many it has just drawn.
    """
    mine = [picture for batch in world.split_for_rank(batches) for picture in batch]
    began = time.perf_counter()
    with progress_bar(len(mine), "image", "drawing", shown=world.is_rank0) as bar:
        world.raise_on_all_ranks(lambda: draw(mine, bar.update))
    seconds = time.perf_counter() - began
    world.broadcast_from_rank0(lambda: _note_speed(out / _SPEED, sum(map(len, batches)), seconds, world))


def _note_speed(path: Path, images: int, seconds: float, world: World) -> None:
    """Write down how fast images were drawn, unless more have been timed before."""
    if images and (not path.exists() or json.loads(path.read_text())["images"] < images):
        device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
        rate = {"images_per_s": round(images / seconds, 4), "images": images, "seconds": round(seconds, 1)}
        write_json(path, {**rate, "devices": f"{world.size} × {device}"})


def read_speed(out: Path) -> dict[str, Any] | None:
    """What `draw_together` noted in a job's folder; None: nothing."""
    path = out / _SPEED
    return json.loads(path.read_text()) if path.exists() else None


def write_png(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an image, uint8 (H, W, 3), as a PNG that is whole if it is there."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    atomic_write(path, buffer.getvalue())
