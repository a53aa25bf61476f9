"""How often the demo's final model draws the colour it was asked for.

    python tests/benchmarks/demo_colours.py [runs/demo/sft/model]

Every pair of the 8 colours and 8 shapes once: "a photo of a red circle". A picture's colour is the palette colour
that most of its pixels outside the background are nearest to. Prints one JSON object: the share that is right,
the same for drawn scenes (what is possible) and for pictures held against another prompt's colour (chance).
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch

from data.packing import shapes
from launch.process import main
from t2i.pipeline import Picture, Pipeline


def colour(pixels: np.ndarray) -> str:
    """Name of the main colour of an (H, W, 3) uint8 picture; "" where hardly anything is drawn."""
    names = ["", *shapes.COLORS]
    palette = np.array([shapes.BACKGROUND, *shapes.PALETTE.values()], np.float32)
    nearest = np.square(pixels[:, :, None].astype(np.float32) - palette).sum(-1).argmin(-1)
    counts = np.bincount(nearest.ravel(), minlength=len(names))
    counts[0] = nearest.size // 100  # less than a hundredth of the picture is nothing
    return names[int(counts.argmax())]


def prompts() -> list[tuple[str, str]]:
    """Every prompt, with the colour that it asks for."""
    article = {name: "an" if name[0] in "aeiou" else "a" for name in shapes.COLORS}
    pairs = itertools.product(shapes.COLORS, shapes.SHAPES)
    return [(f"a photo of {article[name]} {name} {shape}", name) for name, shape in pairs]


def measure() -> None:
    model = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/sft/model")
    pipeline = Pipeline.load(model, "ema", torch.device("cpu"))
    images = pipeline.draw([Picture(prompt) for prompt, _ in prompts()], pipeline.config.sampling)
    drawn = [colour(image.permute(1, 2, 0).numpy()) for image in images]
    asked = [name for _, name in prompts()]
    scenes = [shapes.scene(0, shapes.HELDOUT_START + i) for i in range(2000)]
    single = [scene for scene in scenes if scene.task == "colors"]
    side, _ = pipeline.config.data.size
    possible = [colour(shapes.draw(scene, side)) == scene.objects[0].color for scene in single]
    right = [a == b for a, b in zip(drawn, asked, strict=True)]
    shuffled = [a == b for a, b in zip(drawn, np.random.default_rng(0).permutation(asked), strict=True)]
    print(
        json.dumps(
            {
                "model": str(model),
                "prompts": len(asked),
                "right": float(np.mean(right)),
                "drawn_scenes": float(np.mean(possible)),
                "chance": float(np.mean(shuffled)),
            }
        )
    )


if __name__ == "__main__":
    main(measure)
