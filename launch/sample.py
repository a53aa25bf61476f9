"""Draw pictures from a trained model.

    python launch/sample.py --model runs/demo/sft/model --prompts prompts.txt --out DIR [--size 32x48]

One prompt a line; picture n of prompt i is DIR/iiiii_n.png, with DIR/prompts.json beside. Under `deepspeed` or
`torchrun` the processes share the work; the pictures are the same for any number of them. A job that is killed goes on
where it stood; a folder that holds anything else is refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from collections.abc import Callable, Sequence
from itertools import chain

from data.files import read_lines
from evaluation.sampling_job import (
    begin_or_go_on,
    count_cut,
    draw_together,
    fingerprint,
    held,
    unfinished_batches,
    write_png,
)
from launch.cli import add_size, check_memory, drawing_parser, parsed, sampling_of, size_of
from launch.process import joined_world, main
from t2i.config.base import ConfigError
from t2i.pipeline import Pipeline, pictures_of


def _read_prompts(path: Path) -> list[str]:
    prompts = [line.strip() for line in read_lines(path, f"--prompts {path}") if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts {path}: holds no prompt")
    return prompts


def sample() -> None:
    """Parse the command line and draw."""
    parser = drawing_parser(__doc__)
    add_size(parser)
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--pictures", type=int, default=1, help="pictures a prompt")
    parser.add_argument("--negative", default="", help="prompt that guidance leads away from, for all pictures")
    options = parsed(parser)
    prompts = _read_prompts(options.prompts)
    if options.pictures < 1:
        raise ConfigError(f"--pictures {options.pictures}: at least one picture a prompt")
    with joined_world(vars(options)) as world:
        pipeline = Pipeline.load(options.model, options.weights, world.device, options.text_model)
        settings = sampling_of(pipeline.config, options.sampling)
        if options.negative and settings.guidance_scale == 1.0:
            raise ConfigError("--negative does nothing at guidance_scale 1: leave it out or raise the scale")
        size = size_of(pipeline.config, options.size)
        check_memory(world, pipeline, size, settings)
        pictures = pictures_of(prompts, options.pictures, options.negative)
        paths = [options.out / f"{i // options.pictures:05d}_{i % options.pictures}.png" for i in range(len(pictures))]
        about = {"which": options.weights, **fingerprint(pipeline, options.model, options.weights)}
        about |= {"prompts": prompts, "pictures": options.pictures, "negative": options.negative}
        about |= {"size": size, "sampling": settings.model_dump(mode="json")}
        beside = {"model": str(options.model), **count_cut(world, pipeline, prompts)}
        if world.is_rank0 and pipeline.conditioner.cut([options.negative], plain=True):
            print(
                f"--negative is longer than text.length {pipeline.config.text.length} tokens and is cut",
                file=sys.stderr,
            )

        def begin() -> list[Sequence[int]]:
            begin_or_go_on(options.out / "prompts.json", about, beside)
            return unfinished_batches(range(len(paths)), settings.batch_size, lambda i: not paths[i].exists())

        def draw(mine: Sequence[int], drawn: Callable[[int], object]) -> None:
            images = chain.from_iterable(pipeline.draw_batches([pictures[i] for i in mine], settings, size))
            for i, image in zip(mine, images, strict=True):
                if not paths[i].exists():
                    write_png(paths[i], image.permute(1, 2, 0).numpy())
                drawn(1)

        with held(world, options.out):
            draw_together(world, options.out, world.broadcast_from_rank0(begin), draw)
        if world.is_rank0:
            print(f"{len(pictures)} pictures in {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main(sample)
