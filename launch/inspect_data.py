"""Inspect a source of training data: what is in it, what training would use of it, and which samples come next.

    python launch/inspect_data.py s3://bucket/prefix                                 # prints, and writes inspect.html
    python launch/inspect_data.py /data/shards --samples all --out shards.html
    python launch/inspect_data.py --config configs/demo.yaml --stage 1 --source shapes     # by the config's filters
    python launch/inspect_data.py --config configs/demo.yaml --stage 1 --order 2     # the ids of the first 2 batches
    python launch/inspect_data.py --config configs/demo.yaml --stage 1 --order 2 \\
        --checkpoint runs/demo/low/checkpoints/step_00000200                        # and of the 2 after a checkpoint
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TextIO

import torch
from PIL import Image

from data.errors import UserError
from data.files import atomic_path, name_in_errors
from data.inspect.page import Report, count, printable
from data.inspect.scan import ANY_SIZE, inspect
from data.lane import Source
from data.preview import preview_batches
from data.progress import progress_bar
from data.sample import ImageSettings
from data.shards.index import list_left_out, open_index
from data.store import open_store
from launch.cli import run
from t2i.config.base import ConfigError, PathText
from t2i.config.data import DataConfig, SourceConfig
from t2i.config.loading import load_config, stage_config, validate_section
from t2i.config.run import RunConfig, TextConfig, TrainConfig
from t2i.engine.checkpoint import Checkpoint
from t2i.train.data import image_settings

_OF_SOURCE = ("name", "endpoint", "region", "profile", "anonymous", "requester_pays")
_OF_ORDER = ("batch_size", "lanes", "shuffle_block")
_OF_IMAGES = ("resolution", "small_images")


@dataclass(frozen=True)
class Options:
    """What to inspect, and how closely.

    Args:
        config: YAML file of a run, in place of SOURCE; its sources, filters and S3 options apply.
        stage: Which of the config's stages, by number from 1 or by name; with SOURCE, the stage's name in the order.
        source: Which of the config's sources, if it has several.
        samples: Samples to read, drawn at random from the whole source, or all.
        decode: How many of them to decode in full, or all; only that finds an image that is broken after its header.
        seed: Decides which samples are drawn; with SOURCE and --order, the run's seed.
        sheet: Samples that the page shows.
        out: The HTML page to write.
        order: Print the ids of this many coming global batches instead.
        checkpoint: Folder step_N of a checkpoint from which the order continues.
        name: With SOURCE, its name in ids and in the order; by default the last part of its address.
        manifest: With SOURCE, path or s3:// URL of its index.json, if that is not at its root.
        resolution: With SOURCE, side of the training images in pixels; the order's default is the config's.
        small_images: With SOURCE, whether images below the resolution are dropped or enlarged.
        batch_size: With SOURCE and --order, samples in a global batch.
        lanes: With SOURCE and --order, number of independent orders that the data is cut into.
        shuffle_block: With SOURCE and --order, samples that are shuffled together within a lane.
        endpoint: With SOURCE, URL of another S3 server than Amazon's.
        region: With SOURCE, region of the bucket; by default the profile's.
        profile: With SOURCE, profile of the AWS credentials file.
        anonymous: With SOURCE, send no credentials.
        requester_pays: With SOURCE, agree to be charged for the requests.
    """

    config: PathText | None = None
    stage: str | None = None
    source: str | None = None
    samples: int | Literal["all"] = 2000
    decode: int | Literal["all"] = 2000
    seed: int | None = None
    sheet: int = 48
    out: PathText = "inspect.html"
    order: int | None = None
    checkpoint: PathText | None = None
    name: str | None = None
    manifest: PathText | None = None
    resolution: int | None = None
    small_images: Literal["drop", "upscale"] | None = None
    batch_size: int | None = None
    lanes: int | None = None
    shuffle_block: int | None = None
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    anonymous: bool = False
    requester_pays: bool = False


@dataclass(frozen=True)
class _Job:
    """What to inspect, from options and config."""

    data: DataConfig
    images: ImageSettings
    conditions: str
    stage: str
    seed: int
    batch_size: int
    token_limit: int


def inspect_data(source: PathText | None = None, /, *, options: Options) -> None:
    """Inspect the samples of one source, or print the order of all sources.

    Args:
        source: Directory or s3://bucket/prefix.
        options: What to inspect, and how.
    """
    if (source is None) == (options.config is None):
        raise UserError("give either SOURCE, a directory or s3://bucket/prefix, or --config FILE")
    job = _of_source(source, options) if source is not None else _of_config(options)
    if options.order is not None:
        _print_order(job, options.order, options.checkpoint)
        return
    if options.checkpoint is not None:
        raise UserError("--checkpoint is set: it goes with --order N, which continues from it")
    _write_page(job, _choose_source(job.data.sources, options.source), options)


# --- the job, from options and config ---


def _of_source(url: str, options: Options) -> _Job:
    if options.source is not None:
        raise UserError("--source is set: it chooses among a config's sources; --name names SOURCE")
    given = {name: getattr(options, name) for name in (*_OF_SOURCE, *_OF_ORDER, *_OF_IMAGES)}
    given = {name: value for name, value in given.items() if value is not None}
    source = {"name": url.rstrip("/").rpartition("/")[2] or "source", "url": url, "index": options.manifest}
    source |= {name: value for name, value in given.items() if name in _OF_SOURCE}
    tree: dict[str, Any] = {"sources": [source]}
    tree |= {name: value for name, value in given.items() if name in ("lanes", "shuffle_block", *_OF_IMAGES)}
    data = validate_section(DataConfig, tree, "command line")
    batch_size = validate_section(
        TrainConfig, {key: value for key, value in given.items() if key == "batch_size"}, "command line"
    ).batch_size
    any_size = options.resolution is None and options.small_images is None and options.order is None
    at = "images of any size" if any_size else _sizes(data)
    return _Job(
        data,
        ANY_SIZE if any_size else image_settings(data),
        f"Judged by the default filters, {at}; --config FILE --stage N applies a run's.",
        options.stage or "stage",
        options.seed or 0,
        batch_size,
        TextConfig().length,
    )


def _of_config(options: Options) -> _Job:
    fixed = [*_OF_SOURCE, "manifest", *_OF_ORDER, *_OF_IMAGES, *(["seed", "source"] if options.order else [])]
    for name in fixed:
        if getattr(options, name) != getattr(Options, name):
            why = "--order reads all of a stage's" if name == "source" else "with --config, the config says it"
            raise UserError(f"--{name} is set: {why}; leave it out")
    assert options.config is not None
    run = load_config(Path(options.config))
    number = _stage_number(run, options.stage)
    config, stage = stage_config(run, number), str(run.stages[number]["name"])
    if not config.data.sources:
        raise ConfigError(f"stage {stage}: data.sources is empty: name at least one source")
    conditions = f"Judged by the filters of stage {stage} of {options.config}, {_sizes(config.data)}."
    seed = config.seed if options.order is not None else options.seed or 0
    images, batch_size = image_settings(config.data), config.train.batch_size
    return _Job(config.data, images, conditions, stage, seed, batch_size, config.text.length)


def _sizes(data: DataConfig) -> str:
    small = {"drop": "dropped", "upscale": "enlarged"}[data.small_images]
    buckets = f" in {len(data.aspect_buckets.sizes)} buckets" if data.aspect_buckets is not None else ""
    return f"at {data.size_text} px{buckets} with smaller images {small}"


def _stage_number(config: RunConfig, wanted: str | None) -> int:
    names = [str(stage["name"]) for stage in config.stages]
    if wanted in names:
        return names.index(wanted)
    if wanted is None and len(names) == 1:
        return 0
    if wanted is not None and wanted.isdecimal() and 1 <= int(wanted) <= len(names):
        return int(wanted) - 1
    listed = ", ".join(f"{number} ({name})" for number, name in enumerate(names, 1))
    said = "stage is not given" if wanted is None else f"stage {wanted!r} is not in the config"
    raise UserError(f"{said}: it should be one of {listed}" if names else "stages: the config names no stage")


def _choose_source(sources: list[SourceConfig], wanted: str | None) -> SourceConfig:
    found = [source for source in sources if wanted in (None, source.name)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(source.name for source in sources)
    said = "source is not given" if wanted is None else f"source {wanted!r} is not in the stage"
    raise UserError(f"{said}: it should be one of {names}")


def _open(data: DataConfig, source: SourceConfig) -> Source:
    options = data.store_options(source)
    store = open_store(source.url, options)
    index = open_index(
        store, source.name, source.index, lambda words: print(words, file=sys.stderr), options, source.class_folders
    )
    return Source(index, source.weight, source.filters)


# --- its output ---


def _write_page(job: _Job, chosen: SourceConfig, options: Options) -> None:
    if options.sheet < 0:
        raise UserError(f"--sheet is {options.sheet}: it should be 0 or more")
    source = _open(job.data, chosen)
    samples = None if options.samples == "all" else options.samples
    total = min(samples or sys.maxsize, int(source.index.counts.sum()))
    with _replacing(options.out) as file:
        with progress_bar(total, "sample", "reading") as bar:
            findings = inspect(
                source.index,
                source.filters,
                job.images,
                samples=samples,
                decodes=None if options.decode == "all" else options.decode,
                sheet=options.sheet,
                seed=job.seed,
                progress=bar.update,
            )
        report = Report(source.index, findings, job.conditions, job.token_limit, list_left_out(source.index))
        file.write(report.page())
    print(f"{report.text()}\n\nthe page is {options.out}")


@contextmanager
def _replacing(out: str) -> Iterator[TextIO]:
    """A file that replaces `out` once it is complete; whether it can be written is known before anything is read."""
    path = Path(out)
    if "://" in out or path.is_dir():
        raise UserError(f"--out is {out}: it should be a local file to write")
    with ExitStack() as stack:
        with name_in_errors(f"--out is {out}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(atomic_path(path))
            file = stack.enter_context(partial.open("w", encoding="utf-8"))
        yield file


def _print_order(job: _Job, batches: int, checkpoint: str | None) -> None:
    state = None
    if checkpoint is not None:
        state = Checkpoint(Path(checkpoint)).state["data"]
    sources = [_open(job.data, source) for source in job.data.sources]
    with progress_bar(batches * job.batch_size, "sample", "reading") as bar:
        coming = preview_batches(
            sources,
            job.images,
            batches,
            batch_size=job.batch_size,
            lanes=job.data.lanes,
            seed=job.seed,
            stage=job.stage,
            shuffle_block=job.data.shuffle_block,
            buffer_bytes=int(job.data.buffer_gib * 2**30),
            state=state,
            workers=len(os.sched_getaffinity(0)),
            progress=bar.update,
        )
    for number, ids in enumerate(coming.ids, coming.first):
        first = number * job.batch_size
        print(f"batch {number}: slots {first} to {first + job.batch_size - 1}")
        print("\n".join(f"{slot}\t{printable(id_)}" for slot, id_ in enumerate(ids, first)))
    if coming.skipped:
        skipped = ", ".join(f"{count(n)} {reason.replace('_', ' ')}" for reason, n in coming.skipped.items())
        print(f"skipped on the way: {skipped}", file=sys.stderr)
    if job.images.buckets is not None:
        sizes = ", ".join(f"{height}x{width}: {count(n)}" for (height, width), n in coming.sizes.items())
        print(f"by height and width: {sizes}; {count(coming.waiting)} wait in buckets for more", file=sys.stderr)


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    torch.set_num_threads(1)  # the threads that decode are the parallel part
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # what is wrong with an image is counted
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return run((inspect_data,), args, __doc__)


if __name__ == "__main__":
    sys.exit(main())
