"""Score a model by GenEval: generate four images for each prompt, find what is in them, and judge.

    deepspeed launch/geneval.py --model runs/demo/sft/model --out DIR             # any number of processes; or python
    python launch/geneval.py --images FOLDER --out DIR                            # images that others made
    python launch/geneval.py --model runs/prove/low/model --out DIR --detector shapes    # drawn shapes: no weights
    python launch/geneval.py --write_prompts evaluation_metadata.jsonl            # the 553 official prompts

DIR holds the images in GenEval's layout, results.jsonl, summary.json and report.html. A job that was killed resumes
where it stood, on any number of processes, to the same images.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from argparse import Namespace
from typing import Any, Literal

from data.files import atomic_write, name_in_errors
from data.progress import progress_bar
from evaluation.geneval.detectors import Name, build_detector, check_prompts, prompts_for, self_check
from evaluation.geneval.job import (
    EACH,
    check_prompts_of,
    choose,
    finish,
    format_summary,
    generated_images,
    kind_of,
    sampling_job,
)
from evaluation.geneval.prompts import TASKS, Metadata, digest, official, read, to_lines
from evaluation.geneval.rules import Detector
from evaluation.geneval.summary import PromptImages, Verdicts, read_folder, write_grid
from evaluation.proving.prompts import bounds
from evaluation.sampling_job import begin_scores, count_cut, fingerprint, lock_output
from launch.cli import Parser, add_size, check_memory, drawing_parser, parsed, sampling_of, size_of
from launch.process import joined_world, main
from t2i.config.base import ConfigError, PathText
from t2i.distributed import World
from t2i.pipeline import Pipeline

_OF_GENERATING = ("model", "weights", "text_model", "sampling", "size", "images_per_prompt", "sample_only")
_OF_PROMPTS = ("prompts", "tasks", "limit")
_NOT_GIVEN: tuple[Any, ...] = (None, False, {}, "ema")


def _parser() -> Parser:
    parser = drawing_parser(__doc__, required=False)
    add_size(parser)
    parser.add_argument("--out", type=Path, help="folder for everything")
    parser.add_argument("--images", type=Path, help="score this folder of images, in GenEval's layout")
    parser.add_argument("--score_only", action="store_true", help="score the images in --out, and generate none")
    parser.add_argument("--sample_only", action="store_true", help="generate, and score nothing")
    parser.add_argument("--images_per_prompt", type=int, help=f"images generated for each prompt (default: {EACH})")
    parser.add_argument("--prompts", type=Path, help="file of prompts; by default the detector's")
    parser.add_argument("--tasks", nargs="+", type=Literal[TASKS], help="leave out the prompts of other tasks")
    parser.add_argument("--limit", type=int, help="take only the first prompts of each task, this many")
    detectors = "mask2former, or shapes for drawn shapes and their prompts"
    parser.add_argument("--detector", type=Name, default="mask2former", help=detectors)
    weights = "mask2former's: file, folder or name; by default OpenMMLab's, cached"
    parser.add_argument("--detector_weights", type=PathText, help=weights)
    clip = "CLIP's, which names colours: folder or name; by default the cached ones"
    parser.add_argument("--clip", type=PathText, help=clip)
    parser.add_argument("--self_check", action="store_true", help="check that mask2former finds known objects, and end")
    parser.add_argument("--write_prompts", type=Path, help="write the official prompts to this file, and end")
    return parser


def geneval() -> None:
    """Parse the command line and do the job."""
    options = parsed(_parser())
    if options.write_prompts is not None:
        prompts = official()
        with name_in_errors(f"--write_prompts {options.write_prompts}"):
            atomic_write(options.write_prompts, to_lines(prompts))
        print(f"{len(prompts)} prompts in {options.write_prompts}, md5 {digest(prompts)}")
        return
    _check(options)
    with joined_world(vars(options)) as world:
        detector = None
        if options.self_check or not options.sample_only:
            # First, so that missing weights are reported before hours of generating.
            detector = build_detector(options.detector, options.detector_weights, options.clip, world.device)
        if options.self_check and detector is not None:
            print(self_check(detector))
            return
        with lock_output(world, options.out):
            if options.images is None and not options.score_only:
                _generate(world, options, detector)
            if detector is not None:
                _score(world, options, detector)


def _check(options: Namespace) -> None:
    """Refuse options that are missing, wrong, or would do nothing."""

    def refuse(name: str, why: str) -> None:
        if getattr(options, name) not in _NOT_GIVEN:
            raise ConfigError(f"--{name} {why}")

    if options.detector == "shapes":
        for name in ("detector_weights", "clip", "self_check"):
            refuse(name, "does nothing with --detector shapes: leave it out")
    if options.self_check:
        return
    if options.out is None:
        raise ConfigError("--out is missing: give the folder for images, results.jsonl and report.html")
    for name in ("images_per_prompt", "limit"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ConfigError(f"--{name} {number}: must be at least 1")
    if options.images is not None or options.score_only:
        for name in _OF_GENERATING:
            refuse(name, f"does nothing with {'--score_only' if options.score_only else '--images'}: leave it out")
        if options.score_only:
            for name in ("images", *_OF_PROMPTS):
                refuse(name, "was chosen when the images were generated, which --score_only takes as they are")
    elif options.model is None:
        raise ConfigError("--model is missing: give the model/ folder of a run, or --images FOLDER to score others'")


def _chosen(options: Namespace, prompts: list[Metadata]) -> tuple[list[int], dict[str, str]]:
    """The numbers of the prompts that options choose, and in words what they are."""
    kind, part = kind_of(prompts)
    kept, choice = choose(prompts, options.tasks or (), options.limit)
    return kept, {"kind": kind, "choice": ", ".join(filter(None, [part, choice]))}


def _generate(world: World, options: Namespace, detector: Detector | None) -> None:
    """Generate what is missing, after checking that the detector that is to judge it can."""
    prompts = read(options.prompts) if options.prompts else prompts_for(options.detector)
    kept, about = _chosen(options, prompts)
    chosen = [prompts[number] for number in kept]
    if detector is not None:
        check_prompts(chosen, detector)
    file = options.prompts or ("proving ground" if options.detector == "shapes" else "GenEval")
    pipeline = Pipeline.load(options.model, options.weights, world.device, options.text_model)
    if pipeline.config.model.condition == "class":
        raise ConfigError(f"--model {options.model} generates from classes: GenEval needs one that takes captions")
    sampling = sampling_of(pipeline.config, options.sampling)
    size, each = size_of(pipeline.config, options.size), options.images_per_prompt or EACH
    check_memory(world, pipeline, size, sampling)
    made_from = {"which": options.weights, **fingerprint(pipeline, options.model, options.weights)}
    metadata: dict[str, Any] = {"model": str(options.model), "file": str(file), **about}
    metadata |= count_cut(world, pipeline, [prompt["prompt"] for prompt in chosen])
    sampling_job(options.out, chosen, each, size, sampling, pipeline, made_from, metadata).run(world)
    found = world.broadcast_from_rank0(lambda: read_folder(options.out / "images"))
    for prompt in found[world.rank :: world.size]:
        if not (prompt.folder / "grid.png").exists():
            write_grid(prompt)
    world.barrier()


def _to_score(options: Namespace) -> tuple[list[PromptImages], dict[str, Any]]:
    """What is scored, and what is known of it."""
    if options.images is None:
        return generated_images(options.out)
    found = read_folder(options.images)
    prompts = [prompt.metadata for prompt in found]
    if options.prompts:
        check_prompts_of(found, read(options.prompts), f"--prompts {options.prompts}")
    kept, about = _chosen(options, prompts)
    about |= {"file": str(options.prompts or f"metadata.jsonl of {options.images}"), "md5": digest(prompts)}
    made = {"images": str(options.images)}
    return [found[number] for number in kept], {"prompts": about, "generated_with": made}


def _score(world: World, options: Namespace, detector: Detector) -> None:
    prompts, about = world.broadcast_from_rank0(lambda: _to_score(options))
    check_prompts([prompt.metadata for prompt in prompts], detector)
    if options.images is not None:
        world.broadcast_from_rank0(lambda: begin_scores(options.out, "geneval", options.images))
    verdicts = Verdicts(options.out, prompts, detector)
    missing = world.broadcast_from_rank0(verdicts.begin)
    if world.is_rank0:
        (options.out / "summary.json").unlink(missing_ok=True)  # an older one, and this job may be killed
    mine = missing[world.rank :: world.size]
    with progress_bar(len(mine), "prompt", "judging", shown=world.is_rank0) as bar:
        world.raise_on_all_ranks(lambda: verdicts.judge(mine, bar.update))
    if options.detector == "shapes":
        about["bounds"] = world.broadcast_from_rank0(lambda: bounds(prompts, detector))
    summary = world.broadcast_from_rank0(lambda: finish(options.out, verdicts.read(), detector, about))
    if world.is_rank0:
        print(format_summary(summary))
        print(f"{options.out / 'report.html'} shows every image", file=sys.stderr)


if __name__ == "__main__":
    main(geneval)
