"""Draw class-conditional samples into an `.npz` for ADM's evaluation.

    deepspeed launch/sample_classes.py --model runs/pixelgen_xl/imagenet256/model --out samples.npz

50,000 images, `arr_0` uint8 (N, H, W, 3), and their classes, `arr_1`; image i is of class i modulo the number of
classes and the same for any number of processes. A job that is killed goes on where it stood; what it has drawn lies
beside the `.npz`, in a folder that all processes see. What they were drawn with, and how fast, is in samples.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.files import lock_beside
from evaluation.npz import Samples
from evaluation.sampling_job import draw_together, fingerprint, held
from launch.cli import check_memory, drawing_parser, parsed, sampling_of
from launch.process import joined_world, main
from t2i.config.base import ConfigError
from t2i.pipeline import Pipeline


def sample_classes() -> None:
    """Parse the command line and draw."""
    parser = drawing_parser(__doc__, "model/ folder of a class-conditional run")
    parser.add_argument("--out", type=Path, required=True, help="the .npz")
    parser.add_argument("--samples", type=int, default=50_000, help="how many images")
    options = parsed(parser)
    if options.samples < 1:
        raise ConfigError(f"--samples {options.samples}: at least one image")
    if options.out.suffix != ".npz":
        raise ConfigError(f"--out {options.out}: the name ends in .npz")
    with joined_world(vars(options)) as world:
        pipeline = Pipeline.load(options.model, options.weights, world.device, options.text_model)
        config = pipeline.config
        if config.model.condition != "class":
            raise ConfigError(f"--model {options.model} draws from captions: use launch/sample.py")
        settings = sampling_of(config, options.sampling)
        check_memory(world, pipeline, config.data.size, settings)
        samples = Samples(options.out, options.samples, config.model.classes, config.data.size, settings)

        def begin() -> list[range]:
            samples.begin(fingerprint(pipeline, options.model, options.weights))
            return samples.missing()

        with held(world, options.out, lock_beside(options.out)):
            missing = world.broadcast_from_rank0(begin)
            draw_together(world, samples.folder, missing, lambda mine, drawn: samples.draw(pipeline, mine, drawn))
            world.broadcast_from_rank0(samples.assemble)
        if world.is_rank0:
            print(f"{options.samples} images in {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main(sample_classes)
