"""A run: its stages in order, each from where it stands.

Everything that can be wrong is looked for before anything is written: the stages' settings, the number of ranks,
the sources. Then the run's folder is locked, and stages that are not done are trained.
"""

from __future__ import annotations

import gc
import json
import platform
import subprocess
import sys
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

from t2i.config import ConfigError, RunConfig, check_world_size, dump
from t2i.pipeline import model_file
from t2i.train.build import stand_ins
from t2i.train.observe import Observer
from t2i.train.processes import RunLock, World
from t2i.train.report import write_report
from t2i.train.stage_data import StageData, open_data
from t2i.train.trainer import StagePlace, StageTrainer

PACKAGES = ("torch", "deepspeed", "transformers", "webdataset", "lpips", "safetensors", "numpy")


def stage_places(config: RunConfig) -> list[StagePlace]:
    """Name and folders of every stage of a run."""
    folders = [config.directory / stage.name for stage in config.stages]
    before = [None, *folders[:-1]]
    return [
        StagePlace(stage.name, folder, previous)
        for stage, folder, previous in zip(config.stages, folders, before, strict=True)
    ]


def run(config: RunConfig, overrides: dict[str, Any], world: World, only: int | None = None) -> None:
    """Train a run's stages, skipping those that are done.

    Args:
        config: the run.
        overrides: settings from the command line, which go before a stage's own.
        world: this process.
        only: index of the one stage to train; None trains all.

    Raises:
        ConfigError, DataError: a mistake, before anything is written.
        TimeoutError: another process holds the run.
    """
    if not config.stages:
        raise ConfigError("stages: the config names no stage")
    chosen = range(len(config.stages)) if only is None else [only]
    settings = {index: config.stage(index, overrides) for index in chosen}
    places = stage_places(config)
    for index, stage in settings.items():
        check_world_size(stage, world.size, f"stage {places[index].name}")
    pending = world.from_main(lambda: [i for i in chosen if not places[i].model.exists()])
    if not pending:
        if world.is_main:
            names = ", ".join(places[i].name for i in chosen)
            print(f"{config.directory}: done already: {names}; the report is {config.directory / 'report.html'}")
        return
    _check_predecessor(pending[0], settings[pending[0]], places)
    opened = {index: open_data(settings[index], world, places[index].name) for index in pending}

    lock: RunLock | None = None

    def claim() -> str:
        nonlocal lock
        lock = RunLock(config.directory)
        return uuid.uuid4().hex[:8]

    attempt = world.from_main(claim)
    try:
        for index in pending:
            _train_stage(config, settings[index], places[index], opened.pop(index), world, attempt)
            gc.collect()  # an engine is full of cycles, and holds the stage's memory
        if world.is_main:
            print(f"done: pictures and curves are in {write_report(config.directory)}")
    finally:
        if lock is not None:
            lock.release()


def _check_predecessor(index: int, stage: RunConfig, places: list[StagePlace]) -> None:
    """Refuse a stage that goes on from one that is not done, or from a folder that is no model."""
    if stage.init.source not in ("previous", "scratch"):
        model_file(Path(stage.init.source), stage.init.weights)
    if stage.init.source == "previous" and index > 0 and not places[index - 1].model.exists():
        raise ConfigError(
            f"stage {places[index].name} goes on from stage {places[index - 1].name}, which is not done in "
            f"{places[index - 1].folder}: train that first, or set init.source"
        )


def _train_stage(
    config: RunConfig, stage: RunConfig, place: StagePlace, data: StageData, world: World, attempt: str
) -> None:
    """Train one stage and bring the report up to date."""
    trainer = StageTrainer(stage, place, data, world, attempt)
    if world.is_main:
        (config.directory / "config.yaml").write_text(dump(config))
        _write_environment(config, stage, data, trainer, world)
    observer = Observer(
        config.directory,
        active=world.is_main,
        run=config.name,
        stage=place.name,
        total_steps=trainer.steps,
        step=trainer.step,
        wandb_mode=stage.logging.wandb,
        wandb_project=stage.logging.wandb_project,
        config=stage.model_dump(mode="json"),
    )
    for notice in [*stand_ins(stage.objective), *data.notices]:
        observer.event(notice)
    try:
        trainer.run(observer)
    finally:
        observer.close()
        trainer.close()
    if world.is_main:
        write_report(config.directory)


def _write_environment(
    config: RunConfig, stage: RunConfig, data: StageData, trainer: StageTrainer, world: World
) -> None:
    """environment.json: versions, machine, stand-ins, and the data's licences, of all stages so far."""
    path = config.directory / "environment.json"
    before = json.loads(path.read_text()) if path.exists() else {"notices": [], "data": []}
    known = {entry["name"]: entry for entry in before["data"]}
    for source, index in zip(stage.data.sources, data.indices, strict=True):
        known[source.name] = {
            "name": source.name,
            "url": source.url,
            "licence": source.licence,
            "credit": source.credit,
            "samples": int(index.counts.sum()),
        }
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    environment = {
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
        "device": f"{world.device.type}, {platform.processor() or platform.machine()}",
        "world_size": world.size,
        "parameters": sum(p.numel() for p in trainer.evaluator.network.parameters()),
        "notices": list(dict.fromkeys([*before["notices"], *stand_ins(stage.objective)])),
        "data": list(known.values()),
        "git": git.stdout.strip() or None,
    }
    path.write_text(json.dumps(environment, indent=1))
