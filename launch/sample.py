"""Generate images from prompts with a trained model.

    python launch/sample.py --model runs/demo/sft/model --prompts prompts.txt --out DIR [--size 32x48]

One prompt a line; image n of prompt i is DIR/iiiii_n.png, and DIR/prompts.json says what they are made from. Under
`deepspeed` or `torchrun` the processes share the work; the images are the same for any number of them. A job that was
killed resumes where it stood; a folder that holds anything else is refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.files import read_lines
from evaluation.sampling_job import SamplingJob, count_cut, fingerprint, from_pipeline, lock_output
from launch.cli import add_size, check_memory, drawing_parser, parsed, sampling_of, size_of
from launch.process import joined_world, main
from t2i.config.base import ConfigError
from t2i.pipeline import Pipeline, pictures_of


def sample() -> None:
    """Parse the command line and do the job."""
    parser = drawing_parser(__doc__)
    add_size(parser)
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    parser.add_argument("--images_per_prompt", type=int, default=1, help="images per prompt")
    parser.add_argument("--negative", default="", help="prompt that guidance leads away from, for all images")
    options = parsed(parser)
    lines = read_lines(options.prompts, f"--prompts {options.prompts}")
    prompts, each = [line.strip() for line in lines if line.strip()], options.images_per_prompt
    if not prompts:
        raise ConfigError(f"--prompts {options.prompts}: holds no prompt")
    if each < 1:
        raise ConfigError(f"--images_per_prompt {each}: must be at least 1")
    with joined_world(vars(options)) as world:
        pipeline = Pipeline.load(options.model, options.weights, world.device, options.text_model)
        sampling = sampling_of(pipeline.config, options.sampling)
        if options.negative and sampling.guidance_scale == 1.0:
            raise ConfigError("--negative does nothing at guidance_scale 1: leave it out or raise the scale")
        size = size_of(pipeline.config, options.size)
        check_memory(world, pipeline, size, sampling)
        about = {"which": options.weights, **fingerprint(pipeline, options.model, options.weights)}
        about |= {"prompts": prompts, "images_per_prompt": each, "negative": options.negative}
        about |= {"size": size, "sampling": sampling.model_dump(mode="json")}
        metadata = {"model": str(options.model), **count_cut(world, pipeline, prompts)}
        if world.is_rank0 and pipeline.conditioner.cut([options.negative], plain=True):
            limit = f"text.length {pipeline.config.text.length} tokens"
            print(f"--negative is longer than {limit} and is cut", file=sys.stderr)
        samples = pictures_of(prompts, each, options.negative)
        paths = [options.out / f"{i // each:05d}_{i % each}.png" for i in range(len(samples))]
        generate = from_pipeline(pipeline, samples, sampling, size)
        job = SamplingJob(options.out / "prompts.json", about, metadata, paths, sampling.batch_size, generate)
        with lock_output(world, options.out):
            job.run(world)
        if world.is_rank0:
            print(f"{len(samples)} images in {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main(sample)
