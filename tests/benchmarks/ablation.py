"""The paper's loss taken apart, small but trained: baseline, + LPIPS, + P-DINO, + gating (PixelGen, Table 5).

    python tests/benchmarks/ablation.py [--steps 250] [--seeds 1] [--out .cache/ablation]     # make ablation

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
again, it trains and draws only what is not there, or was drawn of other prompts or with other settings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import vgg16_weights
from demo_colours import colour, prompts
from picture_distances import Comparison
from tiny import ROOT, free_port, write_config

from data.errors import UserError
from data.packing import pack, shapes
from data.preview import ValidationSet, read_validation_set
from launch.process import main
from t2i.config.loading import load_config, merge, stage_config
from t2i.config.run import RunConfig
from t2i.pipeline import Picture, Pipeline
from t2i.train.data import image_settings, open_data
from t2i.train.metrics import JsonLines
from t2i.train.run_dir import list_stage_dirs
from t2i.train.scoring import tile


@dataclass(frozen=True)
class Arm:
    """A loss: what the table calls it, and its settings."""

    title: str
    objective: dict[str, float]


ARMS = {
    "baseline": Arm("baseline", {"lpips_weight": 0.0, "pdino_weight": 0.0}),
    "lpips": Arm("+ LPIPS", {"lpips_weight": 0.1, "pdino_weight": 0.0, "perceptual_t_min": 0.0}),
    "pdino": Arm("+ P-DINO (stand-in)", {"lpips_weight": 0.1, "pdino_weight": 0.01, "perceptual_t_min": 0.0}),
    "gating": Arm("+ gating at 0.3", {"lpips_weight": 0.1, "pdino_weight": 0.01, "perceptual_t_min": 0.3}),
}
RANKS, SIDE, PATCH = 2, 48, 6
PICTURES = 512
"""Held-out captions; as many other held-out pictures are `real`."""
OF_EACH_PROMPT = 4
FEATURE_SIDE = 2 * SIDE
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
            "objective": {"lpips_network": "vgg16", "lpips_path": str(vgg16), **ARMS[name].objective},
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
        """What training took, how many updates its guard skipped, and the last validation loss."""
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
        """Pictures of these captions, one each, and OF_EACH_PROMPT of the prompts of demo_colours.py."""
        of_prompts = [Picture(prompt, n) for prompt, _ in prompts() for n in range(OF_EACH_PROMPT)]
        wanted = [Picture(caption, captions[:i].count(caption)) for i, caption in enumerate(captions)] + of_prompts
        sampling = stage_config(self.config, 0).sampling

        def fresh() -> NDArray[np.uint8]:
            pipeline = Pipeline.load(list_stage_dirs(self.config)[-1].model, "ema", torch.device("cpu"))
            return pipeline.draw(wanted, sampling).numpy()

        request = json.dumps([[asdict(it) for it in wanted], sampling.model_dump(mode="json")])
        drawn = torch.from_numpy(kept(self.config.directory / "pictures.npz", request, fresh))
        return drawn[: len(captions)], drawn[len(captions) :]


def kept(path: Path, request: str, draw: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The pictures of a request from their file; where it is missing or of another request, they are drawn into it."""
    if path.exists():
        with np.load(path) as file:
            if file["request"] == request:
                return file["pictures"]
    pictures = draw()
    partial = path.with_name("partial.npz")
    np.savez(partial, request=request, pictures=pictures)
    partial.rename(path)
    return pictures


def right_colours(drawn: Tensor) -> float:
    """Share of pictures, OF_EACH_PROMPT for each prompt, whose main colour is the one asked for."""
    asked = [name for _, name in prompts() for _ in range(OF_EACH_PROMPT)]
    found = [colour(picture.permute(1, 2, 0).numpy()) for picture in drawn]
    return float(np.mean([a == b for a, b in zip(found, asked, strict=True)]))


def heldout(settings: RunConfig, n: int) -> ValidationSet:
    """The first n held-out scenes; validation measures its loss on the first of them."""
    stage = stage_config(settings, 0)
    return read_validation_set(open_data(stage, "scenes", {}).val_sources, n, image_settings(stage.data))


def kid_cell(it: dict[str, float], form: str) -> str:
    return f"{it['value']:{form}} ({it['low']:{form}} to {it['high']:{form}})"


def distance_cells(it: dict[str, Any]) -> dict[str, str]:
    kids = {f"KID x 1000, {network}": kid_cell(kid, ".2f") for network, kid in it["kid"].items()}
    return kids | {f"Frechet, {network}": f"{value:.3f}" for network, value in it["frechet"].items()}


def run_row(it: dict[str, Any]) -> dict[str, str]:
    return {
        "arm": ARMS[it["arm"]].title,
        "seed": str(it["seed"]),
        "training, s": str(it["seconds"]),
        "s / step": f"{it['step_s']:.2f}",
        "validation loss": f"{it['validation_loss']:.4f}",
        **distance_cells(it),
        "right colours": f"{it['right_colours']:.1%}",
    }


def real_row(it: dict[str, Any]) -> dict[str, str]:
    return {"arm": "real", **distance_cells(it)}


def change_row(it: dict[str, Any]) -> dict[str, str]:
    arms = f"{ARMS[it['after']].title}, against {ARMS[it['before']].title}"
    kids = {network: kid_cell(kid, "+.2f") for network, kid in it["kid"].items()}
    return {"change of KID x 1000": arms, "seed": str(it["seed"]), **kids}


def markdown(rows: list[dict[str, str]]) -> list[str]:
    """Lines of a table with the first row's columns; what another row lacks is left empty."""
    head = list(rows[0])
    cells = [head, ["---"] * len(head), *([row.get(column, "") for column in head] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in cells]


def table(found: dict[str, Any], captions: list[str]) -> str:
    """What was found, as Markdown."""
    titles = ", ".join([*(arm.title for arm in ARMS.values()), "real"])
    lines = [
        f"{found['steps']} steps of {found['batch_size']} at {SIDE} px; {found['note']}",
        "",
        *markdown([*map(run_row, found["runs"]), real_row(found["real"])]),
        "",
        *markdown([change_row(it) for it in found["changes"]]),
        "",
        f"grid.png, from above: {titles}; from the left:",
        "",
        *(f"{i}. {caption}" for i, caption in enumerate(captions, start=1)),
    ]
    return "\n".join(lines) + "\n"


def measure() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250, help="of every arm")
    parser.add_argument("--seeds", type=int, choices=range(1, 10), default=1, help="runs of every arm")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "ablation")
    options = parser.parse_args()
    out = options.out.resolve()
    try:
        vgg16 = vgg16_weights.fetch()
    except vgg16_weights.Unavailable as missing:
        raise UserError(str(missing)) from missing
    pack.pack(shapes.dataset_spec(20000, SIDE, 0.1, 0), out / "scenes")
    runs = []
    for seed in range(options.seeds):
        for arm in ARMS:
            path = out / f"{arm}_{options.steps}_seed{seed}.yaml"
            runs.append(Run(arm, seed, write_config(path, config(arm, seed, options.steps, out, vgg16))))
    for run in runs:
        run.train()

    scenes = heldout(runs[0].config, 2 * PICTURES)
    captions, pictures = scenes.captions[:PICTURES], scenes.pixels[:PICTURES]
    comparison = Comparison(pictures, vgg16, FEATURE_SIDE)
    distances, measured, rows = {}, [], []
    for run in runs:
        drawn, of_prompts = run.draw(captions)
        near = distances[run.arm, run.seed] = comparison.distances(drawn)
        right = right_colours(of_prompts)
        measured.append({"arm": run.arm, "seed": run.seed, **run.cost(), **near.summary(), "right_colours": right})
        if run.seed == 0:
            rows.append(drawn[:COLUMNS])
    changes = [
        {"before": a, "after": b, "seed": seed, "kid": distances[b, seed].kid_change(distances[a, seed])}
        for seed in range(options.seeds)
        for a, b in [*pairwise(ARMS), ("baseline", list(ARMS)[-1])]
    ]
    seeds = "one seed" if options.seeds == 1 else f"{options.seeds} seeds"
    found = {
        "steps": options.steps,
        "batch_size": runs[0].config.train.batch_size,
        "note": f"{seeds}: intervals are over captions, for the trained weights, and say nothing of another seed",
        "pictures": PICTURES,
        "runs": measured,
        "real": comparison.distances(scenes.pixels[PICTURES:]).summary(),
        "changes": changes,
    }
    print(json.dumps(found, indent=1))
    (out / "table.md").write_text(table(found, captions[:COLUMNS]))
    grid = tile(torch.cat([*rows, pictures[:COLUMNS]]).numpy(), COLUMNS)
    Image.fromarray(grid.repeat(ENLARGED, 0).repeat(ENLARGED, 1)).save(out / "grid.png")


if __name__ == "__main__":
    main(measure)
