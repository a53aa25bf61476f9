"""Draw pictures from a trained model.

    python launch/sample.py --model runs/demo/sft/model --prompts prompts.txt --out DIR [--size 32x48]

One prompt a line; picture n of prompt i is DIR/iiiii_n.png, with DIR/prompts.json beside. Under `deepspeed` or
`torchrun` the processes share the work; the pictures are the same for any number of them.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path: with the code beside it, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
from itertools import chain

from PIL import Image

from data.files import read_lines
from data.progress import followed
from launch.drawing import add_size, check_memory, drawing_parser, parsed, sampling_of, size_of
from launch.process import joined_world, main
from t2i.config_base import ConfigError
from t2i.pipeline import Picture, Pipeline, batches_of


def _read_prompts(path: Path) -> list[str]:
    prompts = [line.strip() for line in read_lines(path, f"--prompts {path}") if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts {path}: holds no prompt")
    return prompts


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be made: {error.strerror}") from error


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
        pictures = [Picture(prompt, n, options.negative) for prompt in prompts for n in range(options.pictures)]
        # Whole batches, so that a picture has its place in one for any number of processes.
        batches = batches_of(range(len(pictures)), settings.batch_size)
        mine = [i for batch in world.share(batches) for i in batch]
        world.from_main(lambda: _make_folder(options.out))
        images = chain.from_iterable(pipeline.draw_batches([pictures[i] for i in mine], settings, size))
        drawn = followed(images, len(mine), "picture", "drawing", shown=world.is_main)
        for i, image in zip(mine, drawn, strict=True):
            prompt, number = divmod(i, options.pictures)
            path = options.out / f"{prompt:05d}_{number}.png"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        world.barrier()
        if world.is_main:
            described = {"model": str(options.model), "weights": options.weights, "prompts": prompts}
            described |= {"negative": options.negative, "size": size, "sampling": settings.model_dump()}
            (options.out / "prompts.json").write_text(json.dumps(described, indent=1))
            print(f"{len(pictures)} pictures in {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main(sample)
