"""Edit images by words: what an image shows, and what it is to show.

    python launch/edit.py --model MODEL --image cat.png --source "a cat" --target "a dog" --out dog.png
    deepspeed launch/edit.py --model MODEL --edits flowedit.yaml --out DIR      # any number of processes; or python

FlowEdit (Kulikov et al. 2025), in pixels: --n-max says how far an edit may go from its image. Of images whose sides are
no multiples of the model's patch the middle is edited; images that the memory cannot hold are refused. A file of edits
has the layout of FlowEdit's data set (evaluation/editing/edit_list.py); DIR holds the edits, results.jsonl,
summary.json and edits.html, with MSE and SSIM of the background where the file says what was to be edited. A job that
is killed goes on where it stood.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from argparse import Namespace
from typing import Any, Literal

import torch
from torch import Tensor

from data.decode import decode_file
from data.errors import UserError
from data.progress import progress_bar
from evaluation.editing.edit_list import read_edits
from evaluation.editing.job import SCALE_DOWN, EditJob, as_text
from evaluation.geneval.detectors import Name, build_detector
from evaluation.sampling_job import count_cut, fingerprint, write_png
from launch.cli import Parser, add_text_model, job_parser, parsed
from launch.process import joined_world, main
from t2i.config.base import ConfigError, PathText
from t2i.distributed import World
from t2i.pipeline import EditSettings, Pipeline, edit_image, edit_settings, patch_window
from t2i.size_limits import check_fits

_OF_ONE = ("image", "source", "target")
_OF_MANY = ("detector", "detector_weights", "clip")


def _parser() -> Parser:
    parser = job_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model/ folder of a run that draws captions")
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="which weights edit")
    add_text_model(parser)
    parser.add_argument("--out", type=Path, required=True, help="the .png; of --edits the folder for everything")
    parser.add_argument("--image", type=Path, help="the image to edit")
    parser.add_argument("--source", help="what it shows")
    parser.add_argument("--target", help="what it is to show")
    parser.add_argument("--edits", type=Path, help="YAML file of many edits, in place of these three")
    for name, field in EditSettings.model_fields.items():
        default = "the model's sampling.shift" if field.is_required() else field.default
        parser.add_argument(_option(name), type=field.annotation, help=f"{field.description} (default: {default})")
    names = "finds what entries of --edits name under detect: mask2former, or shapes in drawn shapes"
    parser.add_argument("--detector", type=Name, help=names)
    parser.add_argument(
        "--detector-weights", type=PathText, help="mask2former's: file, folder or name; by default the cached ones"
    )
    parser.add_argument(
        "--clip", type=PathText, help="CLIP's, which mask2former comes with; by default the cached ones"
    )
    return parser


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check(options: Namespace) -> None:
    """Refuse options that are missing, wrong, or would do nothing."""
    if options.edits is not None:
        if given := [name for name in _OF_ONE if getattr(options, name) is not None]:
            raise ConfigError(f"{_option(given[0])} is of a single edit: leave out --edits, or enter it there")
        if options.detector != "mask2former":
            for name in ("detector_weights", "clip"):
                if getattr(options, name) is not None:
                    raise ConfigError(f"{_option(name)} is of --detector mask2former")
        return
    for name in _OF_ONE:
        if getattr(options, name) is None:
            raise ConfigError(f"{_option(name)} is missing: give --image, --source and --target, or a file --edits")
    for name in _OF_MANY:
        if getattr(options, name) is not None:
            raise ConfigError(f"{_option(name)} measures edits of a file: give --edits")
    if options.out.suffix != ".png":
        raise ConfigError(f"--out {options.out}: the name ends in .png")
    if not options.out.parent.is_dir():
        raise ConfigError(f"--out {options.out}: there is no folder {options.out.parent}")
    if options.out.exists():
        raise ConfigError(f"--out {options.out}: it should not exist yet")


def edit() -> None:
    """Parse the command line and do the job."""
    options = parsed(_parser())
    _check(options)
    given = {name: value for name in EditSettings.model_fields if (value := getattr(options, name)) is not None}
    with joined_world(vars(options)) as world:
        pipeline = Pipeline.load(options.model, options.weights, world.device, options.text_model)
        if pipeline.config.model.condition == "class":
            raise ConfigError(f"--model {options.model} draws classes: editing needs one that draws captions")
        settings = edit_settings(pipeline.config, given, "command line")
        if options.edits is not None:
            _edit_many(world, pipeline, options, settings)
        elif world.is_rank0:
            _edit_one(world, pipeline, options, settings)


def _edit_one(world: World, pipeline: Pipeline, options: Namespace, settings: EditSettings) -> None:
    count_cut(world, pipeline, [options.source, options.target])
    image = torch.from_numpy(decode_file(options.image))
    window = patch_window(image.shape[1], image.shape[2], pipeline.denoiser.patch_size, f"--image {options.image}")
    pixels = image[:, *window]
    _, height, width = pixels.shape
    where = f"--image {options.image}, {height} x {width} pixels"
    check_fits(pipeline, (height, width), 1, where, SCALE_DOWN, world.local_size)
    calls = (settings.n_max - settings.n_min) * settings.n_avg + settings.n_min
    with progress_bar(calls, "step", "editing") as bar:

        def step_done(images: Tensor, t: float) -> None:
            bar.update()

        result = edit_image(pipeline, pixels, options.source, options.target, settings, step_done)
    try:
        write_png(options.out, result.permute(1, 2, 0).numpy())
    except OSError as error:
        raise UserError(f"--out {options.out}: cannot be written: {error.strerror}") from error
    print(f"{options.out}: {result.shape[1]} x {result.shape[2]} pixels", file=sys.stderr)


def _edit_many(world: World, pipeline: Pipeline, options: Namespace, settings: EditSettings) -> None:
    detector = None
    if options.detector is not None:
        detector = build_detector(options.detector, options.detector_weights, options.clip, world.device)
    edits = world.broadcast_from_rank0(lambda: read_edits(options.edits))
    patch, sampling = pipeline.denoiser.patch_size, pipeline.config.sampling
    job = EditJob(options.out, options.edits.parent, edits, patch, settings, detector)
    made = {"which": options.weights, **fingerprint(pipeline, options.model, options.weights)}
    made |= {"clamp": sampling.clamp, "guidance_rescale": sampling.guidance_rescale}
    beside: dict[str, Any] = {"model": str(options.model), "file": str(options.edits)}
    beside |= count_cut(world, pipeline, [words for it in edits for words in (it.source, it.target)])
    summary = job.run(world, pipeline, made, beside)
    if world.is_rank0:
        print(as_text(summary))
        print(f"{options.out / 'edits.html'} shows every edit", file=sys.stderr)


if __name__ == "__main__":
    main(edit)
