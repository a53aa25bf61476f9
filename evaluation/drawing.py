"""What jobs that draw pictures from a model have in common: what a picture depends on, how the processes share the work
out, how fast they were, and pictures as files that are whole or absent."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from data.files import atomic_write
from data.progress import progress_bar
from evaluation.parts import write_json
from t2i.model_folder import FILES, WhichWeights
from t2i.pipeline import Pipeline, batches_of
from t2i.train.processes import World

T = TypeVar("T")

_SPEED = "speed.json"


def made_of(pipeline: Pipeline, model: Path, which: WhichWeights) -> dict[str, Any]:
    """What every picture of a model folder depends on besides sampling, size and prompt, in JSON's types."""
    with (model / FILES[which]).open("rb") as file:
        weights = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    objective = pipeline.config.objective
    return {
        "weights": weights,
        "dtype": str(next(pipeline.denoiser.parameters()).dtype),
        "noise_scale": objective.noise_scale,
        "min_noise": objective.min_noise,
    }


def count_cut(world: World, pipeline: Pipeline, prompts: Sequence[str]) -> dict[str, int]:
    """How many prompts are longer than what the model reads of them, which rank 0 says; for a job's manifest."""
    cut = pipeline.conditioner.cut(prompts)
    if cut and world.is_main:
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
    mine = [picture for batch in world.share(batches) for picture in batch]
    began = time.perf_counter()
    with progress_bar(len(mine), "image", "drawing", shown=world.is_main) as bar:
        draw(mine, bar.update)
    world.barrier()
    seconds = time.perf_counter() - began
    world.from_main(lambda: _note_speed(out / _SPEED, sum(map(len, batches)), seconds, world))


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
