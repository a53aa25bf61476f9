"""Folders of runs and of GenEval scores, made by hand: made-up numbers and flat colours, no training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

CONFIG: dict[str, Any] = {
    "root": "runs",
    "seed": 0,
    "data": {"resolution": 32, "sources": [{"name": "shapes", "url": "s3://bucket/shapes", "weight": 1.0}]},
    "optimizer": {"lr": 1e-3, "schedule": "constant"},
    "train": {"steps": 40, "batch_size": 8},
    "stages": [{"name": "low"}, {"name": "high", "data": {"resolution": 64}, "train": {"steps": 20}}],
}


def train(stage: str, step: int, steps: int = 40, **values: Any) -> dict[str, Any]:
    """A line of metrics from training, at one second a step."""
    line = {"kind": "train", "stage": stage, "step": step, "time": 1e9 + step, "loss": 2 / step, "loss_fm": 1 / step}
    line |= {"loss_fm_t0.0-0.5": 2.5, "total_steps": steps, "images_per_s": 12.5, "mfu": 0.25, "step_s": 1.0}
    return line | {"memory_gib": 1.5, "resolution": 32, "batch_size": 8, "skipped_updates": 0} | values


def validation(stage: str, step: int, loss: float, **values: Any) -> dict[str, Any]:
    """A line of metrics from validation, with one band of t."""
    line = {"kind": "validation", "stage": stage, "step": step, "time": 1e9 + step, "loss": loss}
    return line | {"loss_t0.0-0.5": loss / 2} | values


def score(stage: str, step: int, **scores: float) -> dict[str, Any]:
    """A line of metrics from scoring."""
    return {"kind": "score", "stage": stage, "step": step, "time": 1e9 + step, **scores}


def write_run(folder: Path, lines: Sequence[dict[str, Any]], git: str = "c0ffee", **config: Any) -> Path:
    """A run's folder; `config` is entered into `CONFIG`, section by section."""
    folder.mkdir(parents=True)
    tree = {"name": folder.name, **CONFIG}
    tree |= {k: tree.get(k, {}) | v if isinstance(v, dict) else v for k, v in config.items()}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {"versions": {"torch": "2"}, "device": "CPU", "git": git, "stand_ins": [], "data": []}
    (folder / "environment.json").write_text(json.dumps(about))
    return folder


def draw_grid(run: Path, stage: str, step: int, pictures: dict[str, str]) -> None:
    """A sample grid in one row: colours by prompt."""
    grid = Image.new("RGB", (32 * len(pictures), 32))
    for i, colour in enumerate(pictures.values()):
        grid.paste(colour, (32 * i, 0, 32 * i + 32, 32))
    path = run / stage / "samples" / f"step_{step:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    about = {"prompts": list(pictures), "columns": len(pictures), "rows": 1, "solver": "heun", "steps": 25}
    path.with_suffix(".json").write_text(json.dumps(about | {"guidance_scale": 3.0, "weights": "ema"}))


def results(task: str, correct: Sequence[Sequence[bool]]) -> list[dict[str, Any]]:
    """Lines of results.jsonl: for each prompt of a task whether its images are correct."""
    return [
        {"filename": f"{i:05d}/samples/{j:04d}.png", "tag": task, "prompt": f"{task} {i}", "correct": is_correct}
        for i, images in enumerate(correct)
        for j, is_correct in enumerate(images)
    ]


def write_scores(folder: Path, lines: Sequence[dict[str, Any]], **about: Any) -> Path:
    """summary.json and results.jsonl of a GenEval job."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {}
    for task in dict.fromkeys(line["tag"] for line in lines):
        its = [line for line in lines if line["tag"] == task]
        mean = sum(line["correct"] for line in its) / len(its)
        interval = [max(mean - 0.05, 0), min(mean + 0.05, 1)]
        tasks[task] = {"score": mean, "interval": interval, "prompts": len({line["prompt"] for line in its})}
        tasks[task]["images"] = len(its)
    overall = sum(task["score"] for task in tasks.values()) / len(tasks)
    summary = {"overall": overall, "overall_interval": [overall - 0.04, overall + 0.04], "tasks": tasks, **about}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
