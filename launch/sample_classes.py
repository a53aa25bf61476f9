"""Generate class-conditional samples into an `.npz` for ADM's evaluation.

    deepspeed launch/sample_classes.py --model runs/pixelgen_xl/imagenet256/model --out samples.npz

50,000 images, `arr_0` uint8 (N, H, W, 3), and their classes, `arr_1`; image i is of class i modulo the number of
classes and the same for any number of processes. A job that was killed resumes where it stood: until the `.npz` is
written, parts of it are in a folder beside it. samples.json says what the images were generated with, and how fast.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.npz import ClassSamples
from evaluation.sampling_job import fingerprint, lock_output
from launch.cli import check_memory, drawing_parser, parsed, sampling_of
from launch.process import joined_world, main
from t2i.config.base import ConfigError
from t2i.pipeline import Pipeline


def sample_classes() -> None:
    """Parse the command line and do the job."""
    parser = drawing_parser(__doc__, "model/ folder of a class-conditional run")
    parser.add_argument("--out", type=Path, required=True, help="the .npz")
    parser.add_argument("--samples", type=int, default=50_000, help="number of images")
    options = parsed(parser)
    if options.samples < 1:
        raise ConfigError(f"--samples {options.samples}: must be at least 1")
    if options.out.suffix != ".npz":
        raise ConfigError(f"--out {options.out}: the name must end in .npz")
    with joined_world(vars(options)) as world:
        pipeline = Pipeline.load(options.model, options.weights, world.device, options.text_model)
        config = pipeline.config
        if config.model.condition != "class":
            raise ConfigError(f"--model {options.model} generates from captions: use launch/sample.py")
        sampling = sampling_of(config, options.sampling)
        check_memory(world, pipeline, config.data.size, sampling)
        samples = ClassSamples(options.out, options.samples, config.model.classes, config.data.size, sampling)
        with lock_output(world, options.out, is_file=True):
            world.broadcast_from_rank0(samples.begin)
            samples.job(pipeline, fingerprint(pipeline, options.model, options.weights)).run(world)
            world.broadcast_from_rank0(samples.assemble)
        if world.is_rank0:
            print(f"{options.samples} images in {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main(sample_classes)
