"""The paper's loss taken apart, small but trained: baseline, + LPIPS, + P-DINO, + gating (PixelGen, Table 5).

    python tests/benchmarks/ablation.py [--steps 400] [--seeds 1] [--out .cache/ablation]     # make ablation

Each arm is a run as a user starts one, `deepspeed launch/stage1.py`, with configs/demo.yaml but for what `config` here
changes: one stage of drawn scenes at 48 px, a patch of 6. All arms of a seed see the same data, times and noise in the
same order, for the same number of steps. LPIPS has ImageNet's VGG16; EfficientNet-Lite0 stands in for DINOv2.

- Validation loss: of flow matching alone, of the EMA weights, on held-out scenes, with the same times and noise.
- Feature distances: 512 pictures drawn of held-out captions against the held-out pictures of the same captions, each
  from noise that is a function of its caption and number, so the same in all arms. KID is times 1000, with the middle
  95 % of a bootstrap over captions, the same resamples for all arms: what it says of a change holds for these weights,
  and nothing of another seed. The Frechet distance of so few pictures is biased, by about as much in all arms.
- No network is wholly unknown to the arms. EfficientNet-Lite0's last features are taken here, its stride-8 ones by
  REPA in all arms and by P-DINO; LPIPS compares VGG16's first to last convolutions, whose last are taken here.
- Right colours: as in demo_colours.py, 4 pictures of each of the 64 prompts.
- `real` is other held-out pictures in place of drawn ones: the least that a distance can be expected to be.

Prints one JSON object; writes table.md and grid.png (rows the arms, then the real pictures; columns captions). Started
again, it trains and draws only what is not there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import vgg16_weights
from demo_colours import colour, prompts
from feature_distance import Array, frechet_distance, kernel_distance, pair_terms, resamples
from pooled_features import efficientnet_lite0, pooled_features, vgg16_conv5
from tiny import ROOT, free_port, write_config

from data.errors import UserError
from data.fixed import FixedSamples, fixed_samples
from data.packing import pack, shapes
from launch.process import main
from t2i.config import RunConfig
from t2i.config_loading import load_config, merge, stage_config
from t2i.pipeline import Picture, Pipeline
from t2i.train.observe import JsonLines
from t2i.train.places import stage_places
from t2i.train.stage_data import image_settings, open_data
from t2i.train.validate import tile

ARMS: dict[str, dict[str, float]] = {
    "baseline": {"lpips_weight": 0.0, "pdino_weight": 0.0},
    "lpips": {"lpips_weight": 0.1, "pdino_weight": 0.0, "gate": 0.0},
    "pdino": {"lpips_weight": 0.1, "pdino_weight": 0.01, "gate": 0.0},
    "gating": {"lpips_weight": 0.1, "pdino_weight": 0.01, "gate": 0.3},
}
TITLES = {"baseline": "baseline", "lpips": "+ LPIPS", "pdino": "+ P-DINO (stand-in)", "gating": "+ gating at 0.3"}
RANKS, SIDE, PATCH = 2, 48, 6
PICTURES = 512
"""Held-out captions; as many other held-out pictures are `real`."""
OF_EACH_PROMPT = 4
FEATURE_SIDE = 2 * SIDE
RESAMPLES = 1000
COLUMNS, ENLARGED = 12, 2
"""Of the grid: captions, and pixels along the side of a drawn one."""


def config(name: str, seed: int, steps: int, out: Path, vgg16: Path) -> dict[str, Any]:
    """The demo's config, with the changes of an arm."""
    tree = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    source = next(it for it in tree["data"]["sources"] if it["name"] == "shapes")
    scenes = out / "scenes"
    return merge(
        tree,
        {
            "name": f"{name}_{steps}_seed{seed}",
            "root": str(out / "runs"),
            "seed": seed,
            "model": {"patch_size": PATCH},
            "data": {
                "resolution": SIDE,
                "sources": [source | {"url": str(scenes / "train"), "heldout": str(scenes / "heldout")}],
            },
            "objective": {"lpips_network": "vgg16", "lpips_path": str(vgg16), **ARMS[name]},
            "optimizer": {"schedule": "linear", "decay_fraction": 0.5, "final_lr_fraction": 0.05},
            "train": {"steps": steps, "batch_size": 32, "micro_batch_size": 32 // RANKS},
            "sampling": {"batch_size": 16},
            "validation": {"every": steps, "samples": PICTURES, "prompts": []},
            "checkpoint": {"every": 100},
            "stages": [{"name": "scenes"}],
        },
    )


@dataclass(frozen=True)
class Run:
    """An arm with a seed."""

    arm: str
    seed: int
    path: Path
    """Its config."""

    @property
    def config(self) -> RunConfig:
        return load_config(self.path)

    def train(self) -> None:
        """Start it as a user does; one that is done says so and ends."""
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--log_level=error", f"--num_gpus={RANKS}"]
        job = [f"--master_port={free_port()}", str(ROOT / "launch" / "stage1.py"), "--config", str(self.path)]
        done = subprocess.run([*launcher, *job], stdout=sys.stderr, check=False)
        if done.returncode:
            raise UserError(f"{self.path}: the run ended with code {done.returncode}, and said why above")

    def cost(self) -> dict[str, Any]:
        """What training took, how many updates its guard vetoed, and the last validation loss."""
        lines = JsonLines(self.config.directory / "metrics.jsonl").lines()
        trained = [line for line in lines if line["kind"] == "train"]
        seconds = [line["step_s"] for line in trained]
        return {
            "seconds": round(sum(seconds)),
            "step_s": float(np.median(seconds)),
            "skipped_updates": trained[-1]["skipped_updates"],
            "validation_loss": [line["loss"] for line in lines if line["kind"] == "validation"][-1],
        }

    def draw(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Pictures of these captions, one each, and OF_EACH_PROMPT of the prompts of demo_colours.py; kept on disk."""
        of_prompts = [Picture(prompt, n) for prompt, _ in prompts() for n in range(OF_EACH_PROMPT)]
        wanted = [Picture(caption, captions[:i].count(caption)) for i, caption in enumerate(captions)] + of_prompts
        path = self.config.directory / "pictures.npy"
        if not path.exists():
            pipeline = Pipeline.load(stage_places(self.config)[-1].model, "ema", torch.device("cpu"))
            partial = path.with_name("partial.npy")
            np.save(partial, pipeline.draw(wanted, pipeline.config.sampling).numpy())
            partial.rename(path)
        drawn = torch.from_numpy(np.load(path))
        return drawn[: len(captions)], drawn[len(captions) :]


class Comparison:
    """Held-out pictures, and how far others of the same captions are from them."""

    def __init__(self, pictures: Tensor, vgg16: Path) -> None:
        self._networks = {"efficientnet_lite0": efficientnet_lite0(), "vgg16": vgg16_conv5(vgg16)}
        self._expected = self._features(pictures)
        self._counts = np.concatenate([np.ones((1, len(pictures))), resamples(len(pictures), RESAMPLES)])
        self.kids: dict[str, dict[str, Array]] = {}
        """By name and network: KID of all pictures, then of each resample."""

    def _features(self, pictures: Tensor) -> dict[str, Array]:
        return {name: pooled_features(network, pictures, FEATURE_SIDE) for name, network in self._networks.items()}

    def distances(self, name: str, pictures: Tensor) -> dict[str, Any]:
        """Of pictures of the same captions, in their order."""
        found = self._features(pictures)
        self.kids[name] = {
            network: 1e3 * kernel_distance(pair_terms(features, self._expected[network]), self._counts)
            for network, features in found.items()
        }
        return {
            "kid": {network: interval(kids) for network, kids in self.kids[name].items()},
            "frechet": {network: frechet_distance(x, self._expected[network]) for network, x in found.items()},
        }

    def change(self, before: str, after: str) -> dict[str, dict[str, float]]:
        """Of KID; below 0 the later one is better."""
        return {network: interval(kids - self.kids[before][network]) for network, kids in self.kids[after].items()}


def interval(values: Array) -> dict[str, float]:
    """The value of all pictures, and the middle 95 % of those of the resamples."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def right_colours(drawn: Tensor) -> float:
    """Share of pictures, OF_EACH_PROMPT for each prompt, whose main colour is the one asked for."""
    asked = [name for _, name in prompts() for _ in range(OF_EACH_PROMPT)]
    found = [colour(picture.permute(1, 2, 0).numpy()) for picture in drawn]
    return float(np.mean([a == b for a, b in zip(found, asked, strict=True)]))


def heldout(settings: RunConfig, n: int) -> FixedSamples:
    """The first n held-out scenes; validation measures its loss on the first of them."""
    stage = stage_config(settings, 0)
    return fixed_samples(open_data(stage, "scenes", {}).heldout, n, image_settings(stage.data))


def table(found: dict[str, Any], captions: list[str]) -> str:
    """What was found, as Markdown."""

    def kid(it: dict[str, float], form: str) -> str:
        return f"{it['value']:{form}} ({it['low']:{form}} to {it['high']:{form}})"

    networks = ("efficientnet_lite0", "vgg16")
    head = [
        "arm", "seed", "training, s", "s / step", "validation loss",
        *(f"KID x 1000, {it}" for it in networks), *(f"Frechet, {it}" for it in networks), "right colours",
    ]  # fmt: skip
    rows = [head, ["---"] * len(head)]
    for it in [*found["runs"], found["real"]]:
        trained = [
            str(it["seed"]), str(it["seconds"]), f"{it['step_s']:.2f}", f"{it['validation_loss']:.4f}",
        ] if "arm" in it else [""] * 4  # fmt: skip
        colours = f"{it['right_colours']:.1%}" if "arm" in it else ""
        kids, frechets = [kid(it["kid"][n], ".2f") for n in networks], [f"{it['frechet'][n]:.3f}" for n in networks]
        rows.append([TITLES[it["arm"]] if "arm" in it else "real", *trained, *kids, *frechets, colours])
    changes = [["change of KID x 1000", "seed", *networks], ["---"] * (2 + len(networks))]
    for it in found["changes"]:
        what = f"{TITLES[it['after']]}, against {TITLES[it['before']]}"
        changes.append([what, str(it["seed"]), *(kid(it["kid"][n], "+.2f") for n in networks)])
    lines = [f"{found['steps']} steps of {found['batch_size']} at {SIDE} px; {found['means']}", ""]
    for part in (rows, changes):
        lines += [*("| " + " | ".join(row) + " |" for row in part), ""]
    lines += ["grid.png, from above: " + ", ".join([*TITLES.values(), "real"]) + "; from the left:", ""]
    return "\n".join([*lines, *(f"{i}. {caption}" for i, caption in enumerate(captions, start=1))]) + "\n"


def measure() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of every arm")
    parser.add_argument("--seeds", type=int, choices=range(1, 10), default=1, help="runs of every arm")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "ablation")
    options = parser.parse_args()
    out = options.out.resolve()
    try:
        vgg16 = vgg16_weights.fetch()
    except vgg16_weights.Unavailable as missing:
        raise UserError(str(missing)) from missing
    pack.pack(shapes.contents(20000, SIDE, 0.1, 0), out / "scenes")
    runs = []
    for seed in range(options.seeds):
        for arm in ARMS:
            path = out / f"{arm}_{options.steps}_seed{seed}.yaml"
            runs.append(Run(arm, seed, write_config(path, config(arm, seed, options.steps, out, vgg16))))
    for run in runs:
        run.train()

    scenes = heldout(runs[0].config, 2 * PICTURES)
    captions, pictures = scenes.captions[:PICTURES], scenes.pixels[:PICTURES]
    comparison = Comparison(pictures, vgg16)
    measured, rows = [], []
    for run in runs:
        drawn, of_prompts = run.draw(captions)
        near = comparison.distances(f"{run.arm} {run.seed}", drawn)
        measured.append(
            {"arm": run.arm, "seed": run.seed, **run.cost(), **near, "right_colours": right_colours(of_prompts)}
        )
        if run.seed == 0:
            rows.append(drawn[:COLUMNS])
    changes = [
        {"before": a, "after": b, "seed": seed, "kid": comparison.change(f"{a} {seed}", f"{b} {seed}")}
        for seed in range(options.seeds)
        for a, b in [*pairwise(ARMS), ("baseline", list(ARMS)[-1])]
    ]
    seeds = "one seed" if options.seeds == 1 else f"{options.seeds} seeds"
    found = {
        "steps": options.steps,
        "batch_size": runs[0].config.train.batch_size,
        "means": f"{seeds}: intervals are over captions, for the trained weights, and say nothing of another seed",
        "pictures": PICTURES,
        "runs": measured,
        "real": comparison.distances("real", scenes.pixels[PICTURES:]),
        "changes": changes,
    }
    print(json.dumps(found, indent=1))
    (out / "table.md").write_text(table(found, captions[:COLUMNS]))
    grid = tile(torch.cat([*rows, pictures[:COLUMNS]]).numpy(), COLUMNS)
    Image.fromarray(grid.repeat(ENLARGED, 0).repeat(ENLARGED, 1)).save(out / "grid.png")


if __name__ == "__main__":
    main(measure)
