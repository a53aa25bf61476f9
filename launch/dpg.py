"""Score a model on DPG-Bench: long prompts, four pictures of each, and questions about them.

    deepspeed launch/dpg.py --model runs/demo/sft/model --benchmark ELLA/dpg_bench --out DIR --judge NAME

--benchmark is a copy of the folder dpg_bench of ELLA's repository. The pictures come into DIR/grids in the official
layout and are the same for any number of processes; --images scores grids that others made, --score-only those in DIR.
A judge is a model that transformers knows by name or path. Any other answers a file: --write-questions FILE, have it
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
from evaluation.dpg.judge import PICTURES, Drawing, read_answers, write_questions
from evaluation.sampling_job import begin_scores, count_cut, fingerprint, held, read_speed
from launch.cli import check_memory, drawing_parser, parsed, sampling_of
from launch.process import joined_world, main
from t2i.config.base import PathText
from t2i.distributed import World
from t2i.pipeline import Pipeline


def _parse() -> Namespace:
    parser = drawing_parser(__doc__, "model/ folder of a run, which draws", required=False)
    parser.add_argument("--benchmark", type=Path, required=True, help="folder with prompts/ and dpg_bench.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures, answers and scores")
    parser.add_argument("--images", type=Path, help="grids that others made, one a prompt, named by its id")
    parser.add_argument("--score-only", action="store_true", help="score the grids in --out")
    parser.add_argument("--resolution", type=int, help="side of a picture in pixels; by default the model's")
    parser.add_argument("--pic-num", type=int, help="pictures of a grid of --images to score, 1 to 4 (default)")
    parser.add_argument("--judge", type=PathText, help="model that answers the questions, by name or path")
    parser.add_argument("--answers", type=Path, help="answers of a judge that ran elsewhere")
    parser.add_argument("--write-questions", type=Path, help="write what such a judge has to answer, and stop")
    parser.add_argument("--sample-only", action="store_true", help="draw, and stop")
    parser.add_argument("--parity", action="store_true", help="count as the official code does, faults included")
    options = parsed(parser)
    _check(options)
    return options


def _check(options: Namespace) -> None:
    def one_of(*names: str) -> str:
        given = [name for name in names if getattr(options, name)]
        if len(given) != 1:
            spelled = ["--" + name.replace("_", "-") for name in names]
            raise UserError(f"give one of {', '.join(spelled[:-1])} and {spelled[-1]}")
        return given[0]

    source = one_of("model", "images", "score_only")
    end = one_of("judge", "answers", "write_questions", "sample_only")
    if end == "sample_only" and source != "model":
        raise UserError("--sample-only draws with --model")
    if source == "images" and options.resolution is None:
        raise UserError("--images needs --resolution, the side of one picture of a grid in pixels")
    if source == "score_only" and options.resolution is not None:
        raise UserError("--resolution is known of the grids in --out: leave it out")
    if options.resolution is not None and options.resolution < 1:
        raise UserError(f"--resolution {options.resolution}: at least 1 pixel")
    if source != "images" and options.pic_num is not None:
        raise UserError("--pic-num is for --images: of grids drawn here all four pictures count")
    if options.pic_num is not None and not 1 <= options.pic_num <= PICTURES:
        raise UserError(f"--pic-num {options.pic_num}: 1 to {PICTURES}")


def _draw(world: World, options: Namespace, asked: rules.Benchmark) -> None:
    pipeline = Pipeline.load(options.model, options.weights, world.device, options.text_model)
    config = pipeline.config
    if config.model.condition != "text":
        raise UserError(f"--model {options.model} draws classes, and DPG-Bench's prompts are captions")
    height, width = config.data.size
    resolution = options.resolution or height
    if options.resolution is None and height != width:
        raise UserError(f"--resolution must be given, since the model was trained at {height} x {width} pixels")
    if resolution % config.model.patch_size:
        raise UserError(f"--resolution {resolution} must be a multiple of model.patch_size ({config.model.patch_size})")
    sampling = sampling_of(config, options.sampling)
    check_memory(world, pipeline, (resolution, resolution), sampling, "--resolution")
    drawing = Drawing(options.out, asked.items, resolution, sampling)
    drawn_from = {"which": options.weights, "prompts_sha256": asked.prompts_sha256}
    drawn_from |= fingerprint(pipeline, options.model, options.weights)
    beside = {"model": str(options.model), **count_cut(world, pipeline, [item.prompt for item in asked.items])}
    job.draw(world, pipeline, drawing, drawn_from, beside)


def _read_note(out: Path) -> dict[str, Any]:
    """How the grids in a job's folder were drawn, and how fast."""
    try:
        note: dict[str, Any] = json.loads((out / "grids.json").read_text())
    except OSError as error:
        raise UserError(f"--out {out} holds no grids: draw them with --model") from error
    return note | {"speed": read_speed(out)}


def _score(world: World, options: Namespace, asked: rules.Benchmark) -> None:
    drawn_with = None if options.images else world.broadcast_from_rank0(lambda: _read_note(options.out))
    resolution = drawn_with["resolution"] if drawn_with else options.resolution
    pictures, folder = options.pic_num or PICTURES, options.images or options.out / "grids"
    examined = job.look_over(world, asked, folder, resolution, pictures, options.parity)
    hashes, items = examined.hashes(asked), examined.items
    if options.images:
        world.broadcast_from_rank0(lambda: begin_scores(options.out, "dpg", options.images, resolution=resolution))
    if to := options.write_questions:
        count = world.broadcast_from_rank0(
            lambda: write_questions(to, hashes, items, examined.grids, resolution, pictures)
        )
        if world.is_rank0:
            print(f"{count} questions in {to}")
        return
    if world.is_rank0:
        (options.out / "summary.json").unlink(missing_ok=True)  # of other answers, and this job may be killed
    if options.judge:
        model = judge.load(options.judge, world.device)
        answers = job.ask(world, model, examined, options.out)
        about = {"name": model.name, "weights_blake2b": model.weights_blake2b}
    else:
        name, answers = world.broadcast_from_rank0(lambda: read_answers(options.answers, hashes, items, pictures))
        about = {"name": name, "answers_sha256": sha256(options.answers)}
    summary = world.broadcast_from_rank0(
        lambda: job.sum_up(options.out, asked, examined, about, answers, options.parity, drawn_with)
    )
    if world.is_rank0:
        print(job.table(summary))


def dpg() -> None:
    """Parse the command line, draw and score."""
    options = _parse()
    with joined_world(vars(options)) as world:
        asked = world.broadcast_from_rank0(lambda: rules.read(options.benchmark, options.parity))
        with held(world, options.out):
            if options.model:
                _draw(world, options, asked)
            if not options.sample_only:
                _score(world, options, asked)


if __name__ == "__main__":
    main(dpg)
