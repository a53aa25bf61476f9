"""Score a model by GenEval: draw four images for each prompt, find what is in them, and judge.

    deepspeed launch/geneval.py --model runs/demo/sft/model --out DIR             # any number of processes; or python
    python launch/geneval.py --images FOLDER --out DIR                            # images that others drew
    python launch/geneval.py --model runs/prove/low/model --out DIR --detector shapes    # drawn shapes: no weights
    python launch/geneval.py --write-prompts evaluation_metadata.jsonl            # the 553 official prompts

DIR holds the images in GenEval's layout, results.jsonl, summary.json and report.html. A job that is killed goes on
where it stood, on any number of processes, to the same images.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from argparse import Namespace
from typing import Any, Literal

from data.errors import UserError
from data.files import atomic_write
from data.progress import progress_bar
from evaluation.geneval.detectors import Name, build_detector, check_prompts, prompts_for, self_check
from evaluation.geneval.job import EACH, Samples, choose, compare, complete_grids, drawn_images, finish, kind_of, table
from evaluation.geneval.prompts import TASKS, digest, official, read, to_lines
from evaluation.geneval.rules import Detector
from evaluation.geneval.summary import Prompted, Verdicts, read_folder
from evaluation.proving.prompts import bounds
from evaluation.sampling_job import begin_scores, count_cut, draw_together, fingerprint, held
from launch.cli import Parser, add_size, check_memory, drawing_parser, parsed, sampling_of, size_of
from launch.process import joined_world, main
from t2i.config.base import ConfigError, PathText
from t2i.distributed import World
from t2i.pipeline import Pipeline

_OF_DRAWING = ("model", "weights", "text_model", "sampling", "size", "images_per_prompt", "sample_only")
_OF_PROMPTS = ("prompts", "tasks", "limit")
_LEFT_OUT: tuple[Any, ...] = (None, False, {}, "ema")
"""What options are that were not given."""


def _parser() -> Parser:
    parser = drawing_parser(__doc__, required=False)
    add_size(parser)
    parser.add_argument("--out", type=Path, help="folder for everything")
    parser.add_argument("--images", type=Path, help="score this folder of images, in GenEval's layout, and draw none")
    parser.add_argument("--score-only", action="store_true", help="score what was drawn in --out, and draw none")
    parser.add_argument("--sample-only", action="store_true", help="draw, and score nothing")
    parser.add_argument("--images-per-prompt", type=int, help=f"images drawn for each prompt (default: {EACH})")
    parser.add_argument("--prompts", type=Path, help="file of prompts; by default the detector's")
    parser.add_argument("--tasks", nargs="+", type=Literal[TASKS], help="leave out the prompts of other tasks")
    parser.add_argument("--limit", type=int, help="take the first so many prompts of each task")
    names = "mask2former, or shapes for drawn shapes and their prompts"
    parser.add_argument("--detector", type=Name, default="mask2former", help=names)
    parser.add_argument(
        "--detector-weights",
        type=PathText,
        help="mask2former's: file, folder or name; by default OpenMMLab's, cached",
    )
    parser.add_argument(
        "--clip", type=PathText, help="CLIP's, which tells colours: folder or name; by default the cached ones"
    )
    parser.add_argument("--self-check", action="store_true", help="see that mask2former finds what it should, and end")
    parser.add_argument("--write-prompts", type=Path, help="write the official prompts to this file, and end")
    return parser


def geneval() -> None:
    """Parse the command line and do the job."""
    options = parsed(_parser())
    if options.write_prompts is not None:
        _write_prompts(options.write_prompts)
        return
    _check(options)
    with joined_world(vars(options)) as world:
        detector = None
        if options.self_check or not options.sample_only:
            # First, since weights that are missing should be said before hours of drawing.
            detector = build_detector(options.detector, options.detector_weights, options.clip, world.device)
        if options.self_check and detector is not None:
            print(self_check(detector))
            return
        with held(world, options.out):
            if options.images is None and not options.score_only:
                _draw(world, options, detector)
            if detector is not None:
                _score(world, options, detector)


def _write_prompts(path: Path) -> None:
    prompts = official()
    try:
        atomic_write(path, to_lines(prompts))
    except OSError as error:
        raise UserError(f"--write-prompts {path}: cannot be written: {error.strerror}") from error
    print(f"{len(prompts)} prompts in {path}, md5 {digest(prompts)}")


def _check(options: Namespace) -> None:
    """Refuse options that are missing, wrong, or would do nothing."""
    if options.detector == "shapes":
        for name in ("detector_weights", "clip", "self_check"):
            _refuse(options, name, "is of --detector mask2former")
    if options.self_check:
        return
    if options.out is None:
        raise ConfigError("--out is missing: give the folder for images, results.jsonl and report.html")
    for name in ("images_per_prompt", "limit"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ConfigError(f"{_option(name)} {number}: must be at least 1")
    if options.images is not None or options.score_only:
        for name in _OF_DRAWING:
            _refuse(options, name, f"is of drawing: leave out {'--score-only' if options.score_only else '--images'}")
        if options.score_only:
            for name in ("images", *_OF_PROMPTS):
                _refuse(options, name, "was chosen when the images were drawn, which --score-only takes as they are")
    elif options.model is None:
        raise ConfigError("--model is missing: give the model/ folder of a run, or --images FOLDER to score others'")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse(options: Namespace, name: str, why: str) -> None:
    if getattr(options, name) not in _LEFT_OUT:
        raise ConfigError(f"{_option(name)} {why}")


def _draw(world: World, options: Namespace, detector: Detector | None) -> None:
    """Draw what is missing; a detector that is to judge it is asked first whether it can."""
    prompts = read(options.prompts) if options.prompts else prompts_for(options.detector)
    kind, part = kind_of(prompts)
    kept, choice = choose(prompts, options.tasks or (), options.limit)
    chosen = [prompts[number] for number in kept]
    if detector is not None:
        check_prompts(chosen, detector)
    file = options.prompts or ("proving ground" if options.detector == "shapes" else "GenEval")
    choice = ", ".join(filter(None, [part, choice]))
    beside: dict[str, Any] = {"model": str(options.model), "file": str(file), "kind": kind, "choice": choice}
    pipeline = Pipeline.load(options.model, options.weights, world.device, options.text_model)
    if pipeline.config.model.condition == "class":
        raise ConfigError(f"--model {options.model} draws from classes: GenEval needs one that draws from captions")
    settings = sampling_of(pipeline.config, options.sampling)
    size, each = size_of(pipeline.config, options.size), options.images_per_prompt or EACH
    check_memory(world, pipeline, size, settings)
    samples = Samples(options.out, chosen, each, size, settings)
    about = {"which": options.weights, **fingerprint(pipeline, options.model, options.weights)}
    beside |= count_cut(world, pipeline, [it["prompt"] for it in chosen])
    batches = world.broadcast_from_rank0(lambda: samples.begin(about, beside))
    draw_together(world, options.out, batches, lambda mine, drawn: samples.draw(pipeline, mine, drawn))
    complete_grids(world.broadcast_from_rank0(samples.prompted)[world.rank :: world.size])
    world.barrier()


def _to_score(options: Namespace) -> tuple[list[Prompted], dict[str, Any]]:
    """What is scored, and what is known of it."""
    if options.images is None:
        return drawn_images(options.out)
    prompted = read_folder(options.images)
    prompts = [it.metadata for it in prompted]
    if options.prompts:
        compare(prompted, read(options.prompts), f"--prompts {options.prompts}")
    kind, part = kind_of(prompts)
    kept, choice = choose(prompts, options.tasks or (), options.limit)
    file = str(options.prompts or f"metadata.jsonl of {options.images}")
    choice = ", ".join(filter(None, [part, choice]))
    about = {"file": file, "md5": digest(prompts), "kind": kind, "choice": choice}
    return [prompted[number] for number in kept], {"prompts": about, "drawn": {"images": str(options.images)}}


def _score(world: World, options: Namespace, detector: Detector) -> None:
    prompted, about = world.broadcast_from_rank0(lambda: _to_score(options))
    check_prompts([it.metadata for it in prompted], detector)
    if options.images is not None:
        world.broadcast_from_rank0(lambda: begin_scores(options.out, "geneval", options.images))
    verdicts = Verdicts(options.out, prompted, detector)
    missing = world.broadcast_from_rank0(verdicts.begin)
    if world.is_rank0:
        (options.out / "summary.json").unlink(missing_ok=True)  # of what was there before, and this job may be killed
    mine = missing[world.rank :: world.size]
    with progress_bar(len(mine), "prompt", "judging", shown=world.is_rank0) as bar:
        world.raise_on_all_ranks(lambda: verdicts.judge(mine, bar.update))
    if options.detector == "shapes":
        about["bounds"] = world.broadcast_from_rank0(lambda: bounds(prompted, detector))
    summary = world.broadcast_from_rank0(lambda: finish(options.out, verdicts.read(), detector, about))
    if world.is_rank0:
        print(table(summary))
        print(f"{options.out / 'report.html'} shows every image", file=sys.stderr)


if __name__ == "__main__":
    main(geneval)
