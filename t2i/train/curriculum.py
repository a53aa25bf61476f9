"""A run: its stages in order, each from where it stands.

The run's folder has one writer, by a lock, and says in `outcome.json` what became of the run. Settings, number of ranks
and the sources of every stage still to train are checked before the first one starts; a mistake leaves no trace.

A finished stage is not trained again, so the config may not change what decides its weights: the run's config.yaml
would then describe a training that never ran. The stage's model keeps the settings that it ended with.
"""

from __future__ import annotations

import gc
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from itertools import chain, count
from pathlib import Path
from typing import Any

from data.errors import DONE, shortened
from data.files import atomic_write
from t2i.config.base import ConfigError
from t2i.config.loading import changes, check_world_size, dump_config, fields_of, load_config, stage_config
from t2i.config.run import RunConfig
from t2i.distributed import LOCK, OutcomeFile, RunLock, World, is_done
from t2i.engine.checkpoint import latest_checkpoint, step_of
from t2i.model_folder import check_model
from t2i.train.build import noisy_ema, stand_ins
from t2i.train.checkpointing import mirror_of
from t2i.train.data import Opened, StageData, open_data
from t2i.train.metrics import EventLog
from t2i.train.preflight import check_start
from t2i.train.report import write_report
from t2i.train.run_dir import StageDir, describe_devices, list_stage_dirs, write_environment
from t2i.train.scoring import BuildScorer, Scorer, build_scorers
from t2i.train.step import learning_rate
from t2i.train.trainer import RollbackState, Trainer
from t2i.train.watchdog import Failure, Failures, Watchdog, print_failure

_SECTIONS = {"seed", "model", "text", "data", "objective", "optimizer", "train", "ema", "init"}
_ACCESS = {
    "index",
    "heldout",
    "endpoint",
    "region",
    "profile",
    "anonymous",
    "requester_pays",
    "licence",
    "credit",
    "images",
}
_NOT_DECIDING = {
    # A text encoder at another path may be the same one: the stored null caption tells, once a stage is trained.
    "text": {"model", "cache", "reload_every_step"},
    "train": {"micro_batch_size"},
    "data": {"workers", "buffer_gib", "max_bad_fraction", "connect_timeout_s", "read_timeout_s", "retry_minutes"},
}
"""Fields of those sections that do not decide weights."""
_SHOWN = 4
_EXTENDABLE = ("train.steps", "optimizer.")
"""Fields that may change if a finished stage is trained for longer."""
_SHARED_PATIENCE_S = 30.0
"""How late a network file system may show a file."""


# Finished stages


def check_finished(
    config: RunConfig, stage_dirs: Sequence[StageDir], chosen: Collection[int], extend: int | None
) -> str | None:
    """Refuse a config that contradicts finished stages, or that would train a stage out of order. On rank 0.

    Args:
        chosen: indices of the stages that this command trains; its command line applies to them alone.
        extend: index of the stage that may be trained for longer although it is finished.

    Returns:
        What becomes of the learning rate of a stage that is to be trained for longer, in a sentence, or None.

    Raises:
        UserError: names the stage, the fields with both values, and the way out.
    """
    stages = [stage_config(config, index) for index in range(len(stage_dirs))]
    if extend is not None and not (stage_dirs[extend].done and _is_longer(stages[extend], stage_dirs[extend])):
        extend = None  # the stage is unfinished, and goes on as usual, or is done
    pending = [stage_dir for index, stage_dir in enumerate(stage_dirs) if not stage_dir.done or index == extend]
    before = _stages_before(config)
    for index, (stage, stage_dir) in enumerate(zip(stages, stage_dirs, strict=True)):
        follows = stage_dir.previous if stage.init.source == "previous" else None
        if follows in pending and stage_dir.begun:
            why = "would be stale" if index - 1 == extend else "would be trained out of order"
            raise ConfigError(
                f"stage {follows.name} is to be trained, and stage {stage_dir.name}, which goes on from it, has begun "
                f"in {stage_dir.folder} and {why}: move that folder away, or give this run another name"
            )
        if stage_dir.done:
            _check_stage(stage, stage_dir, any_pending=bool(pending), chosen=index in chosen, extended=index == extend)
        now = follows.name if follows is not None else None
        if stage_dir.begun and stage.init.source == "previous" and before.get(stage_dir.name, now) != now:
            raise ConfigError(
                f"stages: stage {stage_dir.name} was trained after {before[stage_dir.name] or 'no other'}, and the "
                f"config now has {now or 'no other'} before it: list the stages as they were, or give this run another "
                "name"
            )
    return None if extend is None else _extension(stages[extend], stage_dirs[extend])


def _stages_before(config: RunConfig) -> dict[str, str | None]:
    """The stage before each one at the last start, by the run's config.yaml; empty before the first start."""
    path = config.directory / "config.yaml"
    names = [stage["name"] for stage in load_config(path).stages] if path.exists() else []
    return dict(zip(names, [None, *names], strict=False))


def _trained_with(stage_dir: StageDir) -> RunConfig:
    """The settings that a finished stage ended with."""
    return load_config(stage_dir.model / "config.yaml")


def _is_longer(stage: RunConfig, stage_dir: StageDir) -> bool:
    return stage.train.steps > _trained_with(stage_dir).train.steps


def _check_stage(now: RunConfig, stage_dir: StageDir, *, any_pending: bool, chosen: bool, extended: bool) -> None:
    """Compare a finished stage's settings with the config's."""
    old, new = (_deciding(settings, any_pending) for settings in (_trained_with(stage_dir), now))
    changed = [name for name in changes(old, new) if not (extended and name.startswith(_EXTENDABLE))]
    if not changed:
        return
    old, new = fields_of(old), fields_of(new)
    shown = changed[:_SHOWN]
    was = " and ".join(f"{name} {shortened(old.get(name))}" for name in shown)
    says = " and ".join(shortened(new.get(name)) for name in shown)
    more = f" (and {len(changed) - _SHOWN} more fields)" if len(changed) > _SHOWN else ""
    ways = [
        "give this run another name",
        f"set stage {stage_dir.name} back and change the stages after it in `stages`",
    ]
    if not chosen:  # its own command line may have set it
        ways = [f"write that into stage {stage_dir.name} of the config file", ways[0]]
    elif changed == ["train.steps"] and _is_longer(now, stage_dir):
        ways = [f"train it for longer with --extend {stage_dir.name}", "set it back"]
    raise ConfigError(
        f"stage {stage_dir.name} was trained with {was}, and the config now says {says}{more}: {', or '.join(ways)}"
    )


def _deciding(config: RunConfig, any_pending: bool) -> dict[str, Any]:
    """The settings of a stage that decide its weights."""
    tree = config.model_dump(mode="json", include=_SECTIONS)
    for section, names in _NOT_DECIDING.items():
        for name in names:
            if any_pending or name != "model":
                del tree[section][name]
    for source in tree["data"]["sources"]:
        for name in _ACCESS:
            del source[name]
    return tree


def _extension(now: RunConfig, stage_dir: StageDir) -> str:
    """Check that a finished stage has a checkpoint to go on from, and say what becomes of its learning rate."""
    path, faults = latest_checkpoint(stage_dir.checkpoints, mirror_of(now, stage_dir))
    if path is None:
        reasons = "; ".join(faults) or "it is empty"
        raise ConfigError(
            f"--extend {stage_dir.name}: {stage_dir.checkpoints} holds no checkpoint to go on from: {reasons}"
        )
    was, step, steps = _trained_with(stage_dir), step_of(path), now.train.steps
    ended = learning_rate(was.optimizer, step - 1, was.train.steps, peak=1.0)
    begins, ends = (learning_rate(now.optimizer, at, steps, peak=1.0) for at in (step, steps - 1))
    return (
        f"stage {stage_dir.name} goes on from step {step} to {steps}; its learning rate was {ended:.3g} of the peak at "
        f"step {step}, and follows optimizer.schedule {now.optimizer.schedule} over all {steps} steps from here on: "
        f"{begins:.3g} at step {step + 1}, {ends:.3g} at the end"
    )


def reopen(stage_dir: StageDir, step: int) -> None:
    """Make a finished stage unfinished: its model is kept under another name, with its step. On rank 0."""
    names = chain([f"{stage_dir.model}_step_{step}"], (f"{stage_dir.model}_step_{step}_{n}" for n in count(2)))
    stage_dir.model.rename(next(path for path in map(Path, names) if not path.exists()))


# The run


def run(
    config: RunConfig,
    world: World,
    only: int | None,
    should_stop: Callable[[], str | None],
    failures: Failures,
    at_exit: ExitStack,
    build_scorer: BuildScorer,
    extend: str | None = None,
) -> None:
    """Train a run's stages, skipping those that are done.

    Args:
        only: index of the one stage to train; None trains all.
        should_stop: why this process is asked to stop, or None.
        at_exit: closed after the ranks have parted; until then the watchdog bounds how long that takes.
        extend: name of a finished stage to train on, to train.steps.

    Raises:
        UserError: a mistake, before anything is written, or another process holds the run.
        Preempted: a process was asked to stop; the run is saved.
    """
    if not config.stages:
        raise ConfigError("stages: the config names no stage")
    chosen = list(range(len(config.stages))) if only is None else [only]
    settings = {index: stage_config(config, index) for index in chosen}
    stage_dirs = list_stage_dirs(config)
    _check_order(settings, stage_dirs)
    extend_index = _index_of(extend, stage_dirs, chosen)

    def find_pending() -> tuple[str | None, list[int]]:
        extension = check_finished(config, stage_dirs, chosen, extend_index)
        pending = [i for i in chosen if not stage_dirs[i].done or (extension and i == extend_index)]
        for index in pending:
            check_world_size(settings[index], world.size, f"stage {stage_dirs[index].name}")
        return extension, pending

    if world.broadcast_from_rank0(lambda: not find_pending()[1] and is_done(config.directory)):
        _print_done(config, [stage_dirs[i] for i in chosen], world)
        return
    lock: RunLock | None = None
    attempt_id = world.broadcast_from_rank0(lambda: uuid.uuid4().hex[:8])
    outcome = OutcomeFile(config.directory, attempt_id)

    def lock_run() -> tuple[str | None, list[int]]:
        nonlocal lock
        lock = RunLock(config.directory, attempt_id)
        found = find_pending()  # again: the process that held the run may have finished it
        outcome.clear()
        return found

    extension, pending = world.broadcast_from_rank0(lock_run)

    def on_failure(failure: Failure) -> None:
        outcome.write(failure.code, failure.message, failure.rank)
        print_failure(failure)

    def report_error(error: Exception) -> None:
        """Tell all ranks and write the outcome before anything is cleaned up: a launcher may not wait for that."""
        failure = failures.report(error)
        if world.rank in (0, failure.rank):
            outcome.write(failure.code, failure.message, failure.rank)

    try:
        watchdog = Watchdog(failures, config.timeouts, config.directory / "stacks", attempt_id, on_failure)
        at_exit.callback(watchdog.close)
        _check_shared(config.directory, attempt_id, world)
        opened = world.broadcast_from_rank0(lambda: _open_stages(settings, stage_dirs, pending))
        notices = check_start([(settings[i], stage_dirs[i], opened[i]) for i in pending], world) if pending else []
        devices = describe_devices(world)
        if world.is_rank0:
            print("\n".join([f"on {devices}", *notices]))
        scorers = build_scorers({i: settings[i] for i in pending}, build_scorer, world)

        for index in pending:
            _train_stage(
                config,
                settings[index],
                stage_dirs[index],
                opened.pop(index),
                world,
                attempt_id,
                should_stop,
                watchdog,
                report_error,
                devices,
                scorers.get(index),
                extension if index == extend_index else None,
            )

        if world.is_rank0:
            outcome.write(DONE, f"trained {', '.join(stage_dirs[i].name for i in chosen)}", rank=0)
            if pending:
                last, report = stage_dirs[pending[-1]], config.directory / "report.html"
                if report.exists():
                    print(f"curves and pictures are in {report}")
                print(f"done: the last pictures are in {last.samples}, the model in {last.model}")
    except Exception as error:
        report_error(error)
        raise
    finally:
        if lock is not None:
            lock.release()
    if not pending:
        _print_done(config, [stage_dirs[i] for i in chosen], world)


def _index_of(extend: str | None, stage_dirs: list[StageDir], chosen: list[int]) -> int | None:
    names = [stage_dirs[i].name for i in chosen]
    if extend is not None and extend not in names:
        raise ConfigError(f"--extend {extend}: this command trains {', '.join(names)}")
    return None if extend is None else chosen[names.index(extend)]


def _print_done(config: RunConfig, stage_dirs: list[StageDir], world: World) -> None:
    if world.is_rank0:
        names = ", ".join(stage_dir.name for stage_dir in stage_dirs)
        report = config.directory / "report.html"
        if not report.exists():  # the last start ended between the model and the report, or its disk was full
            _write_report(config, stage_dirs[-1].name)
        print(f"{config.directory}: done already: {names}; the report is {report}")


def _write_report(config: RunConfig, stage: str) -> None:
    with EventLog(config.directory, stage).tolerate_disk_errors("report.html"):
        write_report(config.directory)


def _check_order(settings: dict[int, RunConfig], stage_dirs: list[StageDir]) -> None:
    """Refuse stages that cannot follow each other."""
    folders = [stage.init.source for stage in settings.values() if stage.init.source not in ("previous", "scratch")]
    if len(folders) > len(set(folders)):
        raise ConfigError(
            f"init.source {folders[0]} would start more than one stage, each forgetting the one before: "
            "set it in one stage of the file, or train that stage alone"
        )
    for index, stage in settings.items():
        before = settings.get(index - 1)
        follows = before is not None and stage.init.source == "previous" and stage.init.optimizer == "continue"
        if follows and before is not None and before.optimizer.name != stage.optimizer.name:
            raise ConfigError(
                f"stage {stage_dirs[index].name}: optimizer.name changes from {before.optimizer.name} to "
                f"{stage.optimizer.name}, whose moments differ: set init.optimizer to reset"
            )


def _check_shared(directory: Path, attempt_id: str, world: World) -> None:
    """Check that every rank sees the run's folder, perhaps after some seconds."""
    path, deadline = directory / LOCK, time.monotonic() + _SHARED_PATIENCE_S

    def seen() -> bool:
        return path.exists() and attempt_id in path.read_text()

    while not seen() and time.monotonic() < deadline:
        time.sleep(0.5)
    sees = world.gather(seen())
    if not all(sees):
        raise ConfigError(f"root {directory.parent} is not shared: rank {sees.index(False)} does not see {directory}")


def _open_stages(
    settings: dict[int, RunConfig], stage_dirs: list[StageDir], pending: list[int]
) -> dict[int, StageData]:
    """Check that every pending stage has something to start from, and open its data. On rank 0."""
    for index in pending:
        source, stage_dir = settings[index].init.source, stage_dirs[index]
        if source not in ("previous", "scratch"):
            check_model(Path(source), settings[index].init.weights)
        before = stage_dir.previous
        if source == "previous" and before is not None and not before.done and index - 1 not in pending:
            raise ConfigError(
                f"stage {stage_dir.name} goes on from stage {before.name}, which is not done in {before.folder}: "
                "train that first, or set init.source"
            )
    opened: Opened = {}
    return {index: open_data(settings[index], stage_dirs[index].name, opened) for index in pending}


def _train_stage(
    config: RunConfig,
    stage: RunConfig,
    stage_dir: StageDir,
    data: StageData,
    world: World,
    attempt_id: str,
    should_stop: Callable[[], str | None],
    watchdog: Watchdog,
    report_error: Callable[[Exception], None],
    devices: str,
    scorer: Scorer | None,
    extension: str | None,
) -> None:
    """Train one stage, again from an earlier checkpoint after each rollback, and write the report."""
    back: RollbackState | None = None
    for start in count():
        watchdog.start(f"the start of stage {stage_dir.name}")
        trainer = Trainer(stage, stage_dir, data, world, f"{attempt_id}-{start}", watchdog, should_stop, scorer, back)
        try:
            watchdog.start("the first step")
            if world.is_rank0:
                if extension is not None and start == 0:
                    reopen(stage_dir, trainer.step)
                with trainer.observer.events.tolerate_disk_errors("config.yaml and environment.json"):
                    atomic_write(config.directory / "config.yaml", dump_config(config).encode())
                    write_environment(config, stage, data, trainer.parameters, world.size, devices)
            for notice in _notices(stage, stage_dir, data, devices, extension, first=start == 0):
                trainer.observer.event(notice)
            back = trainer.run()
        except Exception as error:
            report_error(error)
            raise
        finally:
            trainer.close()
        del trainer
        gc.collect()  # the engine has reference cycles, and holds the stage's memory
        if back is None:
            break
    if world.is_rank0:
        _write_report(config, stage_dir.name)


def _notices(
    stage: RunConfig, stage_dir: StageDir, data: StageData, devices: str, extension: str | None, *, first: bool
) -> list[str]:
    """Events at a start of a stage; the first start also has those that a rollback does not change."""
    notices = [f"on {devices}", *stand_ins(stage.objective)]
    if first:
        notices = [extension, *notices] if extension is not None else notices
        notices += [f"source {shard.source!r}: {shard.shard}: {shard.detail}" for shard in data.corruption]
    noise = noisy_ema(stage, first=stage_dir.previous is None)
    return [*notices, noise] if noise is not None else notices
