"""The one job that generates images: under sample, sample_classes, geneval, dpg and edit.

A job locks its output, writes a manifest of all that its images depend on, and generates the images that are missing.
Files are whole or absent, so a killed job resumes where it stood, on any number of processes, to the same images. A
folder that holds anything else is refused.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from data.errors import UserError
from data.files import FileLock, lock_beside, name_in_errors, remove_partials, write_json, write_png
from data.progress import progress_bar
from t2i.config.loading import changes
from t2i.config.train import SamplingConfig
from t2i.distributed import World
from t2i.model_folder import FILES, WhichWeights
from t2i.pipeline import Picture, Pipeline, batches_of

Generate = Callable[[Sequence[int]], Iterable[Tensor]]
"""From the numbers of a job's images, in whole batches, to the images, uint8 (b, 3, H, W), a tensor a batch."""

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_SPEED = "speed.json"


@dataclass(frozen=True)
class SamplingJob:
    """Images that processes generate together, numbered from 0.

    Attributes:
        manifest: file in the job's folder that says what its images are made from.
        fingerprint: all that the images depend on, in JSON's types.
        metadata: what else the manifest says of them; it is never compared.
        paths: the PNG file of each image.
        batch_size: images a batch.
        generate: makes the images of whole batches.
        prepare: makes what the images need in the folder, once the manifest is there. Rank 0 calls it.
        advice: what to do with a folder of other images.
    """

    manifest: Path
    fingerprint: Mapping[str, Any]
    metadata: Mapping[str, Any]
    paths: Sequence[Path]
    batch_size: int
    generate: Generate
    prepare: Callable[[], object] = lambda: None
    advice: str = "give another name"

    def is_missing(self, number: int) -> bool:
        """Whether an image is still to be generated."""
        return not self.paths[number].exists()

    def save(self, numbers: Sequence[int], images: Tensor) -> None:
        """Write the images of a batch that are missing."""
        for number, image in zip(numbers, images, strict=True):
            if self.is_missing(number):
                write_png(self.paths[number], image.permute(1, 2, 0).numpy())

    def run(self, world: World) -> None:
        """Generate what is missing, and record how fast that was. A collective; the output is locked.

        Raises:
            UserError: the folder holds other images or files, or cannot be written.
        """
        batches = world.broadcast_from_rank0(self.begin)
        mine = world.split_for_rank(batches)  # neighbours, since they share prompts
        began = time.perf_counter()
        with progress_bar(sum(map(len, mine)), "image", "generating", shown=world.is_rank0) as bar:
            world.raise_on_all_ranks(lambda: self.make(mine, bar.update))
        seconds, images = time.perf_counter() - began, sum(map(len, batches))
        world.broadcast_from_rank0(lambda: _record_speed(self.manifest.parent / _SPEED, images, seconds, world))

    def begin(self) -> list[Sequence[int]]:
        """Begin or resume in the folder; the batches from which any image is missing.

        A batch is made of the same images whatever is there already and however many processes there are: a kernel may
        round an image's numbers differently at another place of its batch.
        """
        begin_or_resume(self.manifest, self.fingerprint, self.metadata, advice=self.advice)
        with name_in_errors(f"--out {self.manifest.parent}"):
            self.prepare()
        batches = batches_of(range(len(self.paths)), self.batch_size)
        return [batch for batch in batches if any(map(self.is_missing, batch))]

    def make(self, batches: Sequence[Sequence[int]], advance: Callable[[int], object]) -> None:
        """Generate and save these batches; `advance` is given the number of images after each."""
        images_of = self.generate([number for batch in batches for number in batch])
        for batch, images in zip(batches, images_of, strict=True):
            self.save(batch, images)
            advance(len(batch))


def from_pipeline(
    pipeline: Pipeline, samples: Sequence[Picture], sampling: SamplingConfig, size: tuple[int, int]
) -> Generate:
    """Generate these samples at a height and width in pixels; equal prompts are best neighbours."""
    return lambda numbers: pipeline.draw_batches([samples[number] for number in numbers], sampling, size)


@contextmanager
def lock_output(world: World, out: Path, is_file: bool = False) -> Iterator[None]:
    """Keep other jobs away from what `--out` names: a folder, which is made if need be, or a file. A collective.

    Raises:
        UserError: another job holds it, or it cannot be written.
    """
    locks: list[FileLock] = []

    def take() -> None:
        with name_in_errors(f"--out {out}"):
            locks.append(FileLock(lock_beside(out) if is_file else out / ".lock", f"--out {out}"))
            if not is_file:
                remove_partials(out)

    world.broadcast_from_rank0(take)
    try:
        yield
    finally:
        for lock in locks:
            lock.release()


def begin_or_resume(
    manifest: Path,
    fingerprint: Mapping[str, Any],
    metadata: Mapping[str, Any] = _NOTHING,
    what: str = "images made with other settings",
    advice: str = "give another name",
    where: str = "",
) -> None:
    """Write the manifest of a new, empty folder, or see that the one that is there is of the same work.

    Args:
        manifest: the file; its folder, which is locked, is made if need be.
        fingerprint: all that the folder's files depend on, in JSON's types.
        metadata: what else to write to the manifest; it is not compared.
        what: the folder holds, in words, where the fingerprint is another.
        advice: ends the sentence of an error.
        where: begins it; by default --out with the folder.

    Raises:
        UserError: the folder holds other files or other work, or cannot be written.
    """
    folder = manifest.parent
    where = where or f"--out {folder}"
    with name_in_errors(where):
        folder.mkdir(parents=True, exist_ok=True)
        if not manifest.exists():
            files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
            if (other := next(files, None)) is not None:
                name = other.relative_to(folder)
                raise UserError(f"{where}: holds {name}, which this job has not written: {advice}")
            write_json(manifest, {**metadata, **fingerprint})
            return
        try:
            begun = {name: value for name, value in json.loads(manifest.read_bytes()).items() if name not in metadata}
        except (ValueError, AttributeError) as error:
            raise UserError(f"{manifest}: is not what this job writes: give another name") from error
    if differ := changes(begun, json.loads(json.dumps(dict(fingerprint)))):
        raise UserError(f"{where}: holds {what} ({', '.join(differ)}): {advice}")


def begin_scores(out: Path, job: str, images: Path, **more: int) -> None:
    """Begin or resume scoring images that others made; `more` is what else the scores of the folder depend on.

    Raises:
        UserError: the folder, which is locked, holds anything else, or cannot be written.
    """
    scored = {"job": job, "images": str(images.resolve()), **more}
    begin_or_resume(out / "scored.json", scored, what="scores of other images", advice="give another folder")


def fingerprint(pipeline: Pipeline, model: Path, which: WhichWeights) -> dict[str, Any]:
    """What every image of a model folder depends on besides sampling, size and prompt, in JSON's types."""
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
    """For a job's manifest: how many prompts are longer than what the model reads of them. Rank 0 says so."""
    cut = pipeline.conditioner.cut(prompts)
    if cut and world.is_rank0:
        percent = 100 * cut / len(prompts)
        share = f"{percent:.0f} % of prompts" if percent >= 1 else f"{percent:.1g} % of prompts"
        limit = f"text.length {pipeline.config.text.length} tokens"
        print(f"{share} ({cut:,} of {len(prompts):,}) are longer than {limit} and are cut", file=sys.stderr)
    return {"cut_prompts": cut}


def _record_speed(path: Path, images: int, seconds: float, world: World) -> None:
    """Keep the speed of the start that generated the most images."""
    if images and (not path.exists() or json.loads(path.read_text())["images"] < images):
        device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
        rate = {"images_per_s": round(images / seconds, 4), "images": images, "seconds": round(seconds, 1)}
        write_json(path, {**rate, "devices": f"{world.size} × {device}"})


def read_speed(folder: Path) -> dict[str, Any] | None:
    """How fast a job generated, as its folder says, or None."""
    path = folder / _SPEED
    return json.loads(path.read_text()) if path.exists() else None
