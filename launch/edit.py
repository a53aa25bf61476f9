"""Edit images by two captions: what an image shows, and what it is to show.

    python launch/edit.py --model MODEL --image cat.png --source "a cat" --target "a dog" --out dog.png
    deepspeed launch/edit.py --model MODEL --edits flowedit.yaml --out DIR      # any number of processes; or python

FlowEdit (Kulikov et al. 2025), in pixels: --n_max says how far an edit may go from its image. Images are cropped to
whole patches of the model around their middle; those that do not fit in memory are refused. A file of edits has the
layout of FlowEdit's data set (evaluation/editing/edit_list.py); DIR holds the edits, results.jsonl, summary.json and
edits.html, with MSE and SSIM of the background where the file says which region was to be edited. A job that was
killed resumes where it stood.
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
from data.files import name_in_errors, refuse_existing, write_png
from data.progress import progress_bar
from evaluation.editing.edit_list import read_edits
from evaluation.editing.job import SCALE_DOWN, EditJob, format_summary
from evaluation.geneval.detectors import Name, build_detector
from evaluation.sampling_job import count_cut, fingerprint
from launch.cli import Parser, add_text_model, job_parser, parsed
from launch.process import joined_world, main
from t2i.config.base import ConfigError, PathText
from t2i.distributed import World
from t2i.pipeline import EditSettings, Pipeline, edit_image, edit_settings, patch_window
from t2i.size_limits import check_fits

_OF_ONE_EDIT = ("image", "source", "target")
_OF_A_FILE = ("detector", "detector_weights", "clip")


def _parser() -> Parser:
    parser = job_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model/ folder of a run with captions")
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="which weights to use")
    add_text_model(parser)
    parser.add_argument("--out", type=Path, required=True, help="the .png; of --edits the folder for everything")
    parser.add_argument("--image", type=Path, help="the image to edit")
    parser.add_argument("--source", help="caption of that image")
    parser.add_argument("--target", help="caption of the edited image")
    parser.add_argument("--edits", type=Path, help="YAML file of many edits, in place of these three")
    for name, field in EditSettings.model_fields.items():
        default = "the model's sampling.shift" if field.is_required() else field.default
        parser.add_argument(f"--{name}", type=field.annotation, help=f"{field.description} (default: {default})")
    detectors = "finds what entries of --edits name under detect: mask2former, or shapes for drawn shapes"
    parser.add_argument("--detector", type=Name, help=detectors)
    weights = "mask2former's: file, folder or name; by default the cached ones"
    parser.add_argument("--detector_weights", type=PathText, help=weights)
    clip = "CLIP's, which comes with mask2former; by default the cached ones"
    parser.add_argument("--clip", type=PathText, help=clip)
    return parser


def _check(options: Namespace) -> None:
    """Refuse options that are missing, wrong, or would do nothing."""
    if options.edits is not None:
        if given := [name for name in _OF_ONE_EDIT if getattr(options, name) is not None]:
            raise ConfigError(f"--{given[0]} is for a single edit: leave out --edits, or write it there")
        if options.detector != "mask2former":
            for name in ("detector_weights", "clip"):
                if getattr(options, name) is not None:
                    raise ConfigError(f"--{name} does nothing without --detector mask2former: leave it out")
        return
    for name in _OF_ONE_EDIT:
        if getattr(options, name) is None:
            raise ConfigError(f"--{name} is missing: give --image, --source and --target, or a file --edits")
    for name in _OF_A_FILE:
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} does nothing without --edits: leave it out, or give a file of edits")
    if options.out.suffix != ".png":
        raise ConfigError(f"--out {options.out}: the name must end in .png")
    if not options.out.parent.is_dir():
        raise ConfigError(f"--out {options.out}: there is no folder {options.out.parent}")
    refuse_existing(options.out, "--out")


def edit() -> None:
    """Parse the command line and do the job."""
    options = parsed(_parser())
    _check(options)
    given = {name: value for name in EditSettings.model_fields if (value := getattr(options, name)) is not None}
    with joined_world(vars(options)) as world:
        pipeline = Pipeline.load(options.model, options.weights, world.device, options.text_model)
        if pipeline.config.model.condition == "class":
            raise ConfigError(f"--model {options.model} generates from classes: editing needs one that takes captions")
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
    with name_in_errors(f"--out {options.out}"):
        write_png(options.out, result.permute(1, 2, 0).numpy())
    print(f"{options.out}: {result.shape[1]} x {result.shape[2]} pixels", file=sys.stderr)


def _edit_many(world: World, pipeline: Pipeline, options: Namespace, settings: EditSettings) -> None:
    detector = None
    if options.detector is not None:
        detector = build_detector(options.detector, options.detector_weights, options.clip, world.device)
    edits = world.broadcast_from_rank0(lambda: read_edits(options.edits))
    patch, sampling = pipeline.denoiser.patch_size, pipeline.config.sampling
    job = EditJob(options.out, options.edits.parent, edits, patch, settings, detector)
    made_from = {"which": options.weights, **fingerprint(pipeline, options.model, options.weights)}
    made_from |= {"clamp": sampling.clamp, "guidance_rescale": sampling.guidance_rescale}
    metadata: dict[str, Any] = {"model": str(options.model), "file": str(options.edits)}
    metadata |= count_cut(world, pipeline, [caption for edit in edits for caption in (edit.source, edit.target)])
    summary = job.run(world, pipeline, made_from, metadata)
    if world.is_rank0:
        print(format_summary(summary))
        print(f"{options.out / 'edits.html'} shows every edit", file=sys.stderr)


if __name__ == "__main__":
    main(edit)
