"""Score a model on DPG-Bench: long prompts, four images of each, and questions about them.

    deepspeed launch/dpg.py --model runs/demo/sft/model --benchmark ELLA/dpg_bench --out DIR --judge NAME

--benchmark is a copy of the folder dpg_bench of ELLA's repository. The images go into DIR/grids in the official layout
and are the same for any number of processes; --images scores grids that others made, --score_only those in DIR. A judge
is a model that transformers knows by name or path. Any other judge answers a file: --write_questions FILE, have it
answered, --answers FILE. Only with the answers of mPLUG, the official judge, is the score called DPG-Bench.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
from argparse import Namespace
from typing import Any

from data.errors import UserError
from data.files import sha256
from evaluation.dpg import job, judge, rules
from evaluation.dpg.judge import IMAGES, Grids, read_answers, write_questions
from evaluation.sampling_job import begin_scores, count_cut, fingerprint, lock_output, read_speed
from launch.cli import check_memory, drawing_parser, parsed, sampling_of
from launch.process import joined_world, main
from t2i.config.base import PathText
from t2i.distributed import World
from t2i.pipeline import Pipeline


def _parse() -> Namespace:
    parser = drawing_parser(__doc__, "model/ folder of a run", required=False)
    parser.add_argument("--benchmark", type=Path, required=True, help="folder with prompts/ and dpg_bench.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder for grids, answers and scores")
    parser.add_argument("--images", type=Path, help="grids that others made, one a prompt, named by its id")
    parser.add_argument("--score_only", action="store_true", help="score the grids in --out")
    parser.add_argument("--resolution", type=int, help="side of an image in pixels; by default the model's")
    parser.add_argument("--images_per_prompt", type=int, help="images of a grid of --images to score (default: 4)")
    parser.add_argument("--judge", type=PathText, help="model that answers the questions, by name or path")
    parser.add_argument("--answers", type=Path, help="answers of a judge that ran elsewhere")
    parser.add_argument("--write_questions", type=Path, help="write what such a judge has to answer, and end")
    parser.add_argument("--sample_only", action="store_true", help="generate, and end")
    parser.add_argument("--parity", action="store_true", help="count as the official code does, faults included")
    options = parsed(parser)
    _check(options)
    return options


def _check(options: Namespace) -> None:
    def one_of(*names: str) -> str:
        given = [name for name in names if getattr(options, name)]
        if len(given) != 1:
            raise UserError(f"give one of {', '.join(f'--{name}' for name in names[:-1])} and --{names[-1]}")
        return given[0]

    source = one_of("model", "images", "score_only")
    end = one_of("judge", "answers", "write_questions", "sample_only")
    if end == "sample_only" and source != "model":
        raise UserError("--sample_only generates with --model: give it")
    if source == "images" and options.resolution is None:
        raise UserError("--images needs --resolution, the side of one image of a grid in pixels")
    if source == "score_only" and options.resolution is not None:
        raise UserError("--resolution is known for the grids in --out: leave it out")
    if options.resolution is not None and options.resolution < 1:
        raise UserError(f"--resolution {options.resolution}: must be at least 1 pixel")
    if source != "images" and options.images_per_prompt is not None:
        raise UserError("--images_per_prompt is for --images: of grids made here all four images count")
    if options.images_per_prompt is not None and not 1 <= options.images_per_prompt <= IMAGES:
        raise UserError(f"--images_per_prompt {options.images_per_prompt}: must be 1 to {IMAGES}")


def _generate(world: World, options: Namespace, benchmark: rules.Benchmark) -> None:
    pipeline = Pipeline.load(options.model, options.weights, world.device, options.text_model)
    config = pipeline.config
    if config.model.condition != "text":
        raise UserError(f"--model {options.model} generates from classes, and DPG-Bench's prompts are captions")
    height, width = config.data.size
    resolution = options.resolution or height
    if options.resolution is None and height != width:
        raise UserError(f"--resolution must be given, since the model was trained at {height} x {width} pixels")
    if resolution % config.model.patch_size:
        raise UserError(f"--resolution {resolution} must be a multiple of model.patch_size ({config.model.patch_size})")
    sampling = sampling_of(config, options.sampling)
    check_memory(world, pipeline, (resolution, resolution), sampling, "--resolution")
    made_from = {"which": options.weights, "prompts_sha256": benchmark.prompts_sha256}
    made_from |= fingerprint(pipeline, options.model, options.weights)
    metadata = {"model": str(options.model), **count_cut(world, pipeline, [item.prompt for item in benchmark.items])}
    job.generate(world, pipeline, Grids(options.out, benchmark.items, resolution, sampling), made_from, metadata)


def _read_manifest(out: Path) -> dict[str, Any]:
    """How the grids in a job's folder were generated, and how fast."""
    try:
        manifest: dict[str, Any] = json.loads((out / "grids.json").read_text())
    except OSError as error:
        raise UserError(f"--out {out} holds no grids: generate them with --model") from error
    return manifest | {"speed": read_speed(out)}


def _score(world: World, options: Namespace, benchmark: rules.Benchmark) -> None:
    made = None if options.images else world.broadcast_from_rank0(lambda: _read_manifest(options.out))
    resolution = made["resolution"] if made else options.resolution
    images, folder = options.images_per_prompt or IMAGES, options.images or options.out / "grids"
    valid = job.validate(world, benchmark, folder, resolution, images, options.parity)
    hashes, items = valid.hashes(benchmark), valid.items
    if options.images:
        world.broadcast_from_rank0(lambda: begin_scores(options.out, "dpg", options.images, resolution=resolution))
    if to := options.write_questions:
        count = world.broadcast_from_rank0(lambda: write_questions(to, hashes, items, valid.grids, resolution, images))
        if world.is_rank0:
            print(f"{count} questions in {to}")
        return
    if world.is_rank0:
        (options.out / "summary.json").unlink(missing_ok=True)  # an older one, and this job may be killed
    if options.judge:
        model = judge.load(options.judge, world.device)
        answers = job.ask(world, model, valid, options.out)
        about = {"name": model.name, "weights_blake2b": model.weights_blake2b}
    else:
        name, answers = world.broadcast_from_rank0(lambda: read_answers(options.answers, hashes, items, images))
        about = {"name": name, "answers_sha256": sha256(options.answers)}
    summary = world.broadcast_from_rank0(
        lambda: job.summarize(options.out, benchmark, valid, about, answers, options.parity, made)
    )
    if world.is_rank0:
        print(job.format_summary(summary))


def dpg() -> None:
    """Parse the command line and do the job."""
    options = _parse()
    with joined_world(vars(options)) as world:
        benchmark = world.broadcast_from_rank0(lambda: rules.read(options.benchmark, options.parity))
        with lock_output(world, options.out):
            if options.model:
                _generate(world, options, benchmark)
            if not options.sample_only:
                _score(world, options, benchmark)


if __name__ == "__main__":
    main(dpg)
