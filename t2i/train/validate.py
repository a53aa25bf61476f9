"""What is measured and drawn during training with the averaged weights: validation loss and sample grids.

Noise and times are fixed: sample j of n always gets noise j and the time at a fixed quantile of the training
density, so a curve shows the model alone. Nothing here touches the training step's numbers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.files import atomic_write
from data.fixed import FixedSamples
from data.randomness import key, permutation
from t2i.diffusion.flow import flow_matching_loss, interpolate, to_unit_range
from t2i.diffusion.noise import slot_noise
from t2i.diffusion.objective import Terms, add_bands, band_names
from t2i.models.conditions import stack_conditions
from t2i.pipeline import Picture, Pipeline, batches_of
from t2i.train.events import EventLog
from t2i.train.means import GlobalMeans
from t2i.train.processes import World
from t2i.train.schedule import training_times


@dataclass
class Evaluator:
    """Validation and sample grids of one stage; all ranks take part in every call."""

    pipeline: Pipeline
    """Its denoiser holds the averaged weights."""
    world: World
    heldout: FixedSamples | None
    folder: Path
    """Where the grids go."""
    alive: Callable[[str], None]
    """Told what begins now."""
    events: EventLog
    """Told of a disk that does not take a grid."""

    @torch.no_grad()
    def loss(self) -> dict[str, float]:
        """Flow-matching loss on the held-out samples: `loss`, and `loss_tA-B` by bands of t."""
        assert self.heldout is not None
        config, device, n = self.pipeline.config, self.world.device, len(self.heldout.captions)
        noise_key = key(config.seed, "validation")
        t = training_times(config.objective, (permutation(noise_key, n) + 0.5) / n)
        mine = np.arange(self.world.rank, n, self.world.size)
        terms = Terms()
        # At once: a language model that is released is then loaded once.
        self.alive("reading held-out captions")
        conditions = self.pipeline.conditioner([self.heldout.captions[i] for i in mine])
        for start in range(0, len(mine), config.train.micro_batch_size):
            self.alive("validation")
            index = mine[start : start + config.train.micro_batch_size]
            image = to_unit_range(self.heldout.pixels[index].to(device))
            times = torch.from_numpy(t[index]).float().to(device)
            noise = slot_noise(noise_key, index, image.shape[1:], device, config.objective.noise_scale)
            x_t = interpolate(image, noise, times)
            condition = stack_conditions(conditions[start : start + len(index)])
            output = self.pipeline.denoiser(x_t, times, condition).output
            losses = flow_matching_loss(
                output, image, noise, times, config.model.prediction, config.objective.min_noise
            )
            terms.add("loss", losses.sum(), len(index))
            add_bands(terms, "loss", losses, t[index])
        return GlobalMeans(terms, ["loss", *band_names("loss")], device).read()

    def grid(self, step: int) -> None:
        """Draw the config's prompts, each rank its share, and write the grid with its description."""
        validation, sampling = self.pipeline.config.validation, self.pipeline.config.sampling
        pictures = [Picture(prompt) for prompt in validation.prompts]
        batches = self.world.share(batches_of(pictures, sampling.batch_size))
        own = [picture for batch in batches for picture in batch]
        drawn = [self.pipeline.draw([], sampling)]
        self.alive("drawing the sample grid")
        for batch in self.pipeline.draw_batches(own, sampling):
            drawn.append(batch)
            self.alive("drawing the sample grid")
        mine = torch.cat(drawn)
        shares = self.world.gather(mine.numpy())
        if not self.world.is_main:
            return
        description = {
            "prompts": validation.prompts,
            "columns": validation.columns,
            "rows": -(-len(pictures) // validation.columns),
            "weights": "ema",
            "solver": sampling.solver,
            "order": sampling.order,
            "steps": sampling.steps,
            "guidance_scale": sampling.guidance_scale,
            "seed": sampling.seed,
        }
        with self.events.beside("the sample grid"):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"step_{step:06d}.png"
            encoded = io.BytesIO()
            Image.fromarray(tile(np.concatenate(shares), validation.columns)).save(encoded, "PNG")
            atomic_write(path, encoded.getvalue())
            atomic_write(path.with_suffix(".json"), json.dumps(description, indent=1).encode())


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 (n, 3, H, W) to one picture (rows H, columns W, 3), row by row, white where none is left."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    cells = np.full((rows * columns, height, width, 3), 255, np.uint8)
    cells[:count] = images.transpose(0, 2, 3, 1)
    return cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, -1, 3)
