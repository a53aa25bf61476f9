"""A run: its stages in order, each from where it stands.

The run's folder is locked by its one writer, and says in `outcome.json` what became of it. Settings, number of ranks
and the sources of every stage still to train are checked before the first starts; a mistake there leaves nothing
behind.

What finished stages were trained with, held against what the config says of them now.

A finished stage is not trained again, so the config may no longer say otherwise of what decides its weights: the run's
config.yaml would tell what never ran. Its model's folder holds the settings that it ended with; its data is not opened.
"""

from __future__ import annotations

import gc
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, closing
from itertools import chain, count
from pathlib import Path
from typing import Any

from data.errors import DONE
from data.files import atomic_write
from t2i.config.base import ConfigError
from t2i.config.loading import changes, check_world_size, dump_config, fields_of, load_config, stage_config
from t2i.config.run import OptimizerConfig, RunConfig
from t2i.distributed import LOCK, OutcomeFile, RunLock, World, is_done
from t2i.engine.checkpoint import latest_checkpoint, step_of
from t2i.model_folder import check_model
from t2i.train.build import noisy_ema, stand_ins
from t2i.train.checkpointing import mirror_of
from t2i.train.data import Opened, StageData, open_data
from t2i.train.metrics import EventLog, Observer
from t2i.train.preflight import check_start
from t2i.train.report import write_report
from t2i.train.run_dir import StageDir, describe_devices, stage_places, write_environment
from t2i.train.scoring import BuildScorer, Scorer, build_scorers
from t2i.train.step import learning_rate
from t2i.train.trainer import Back, StageTrainer
from t2i.train.watchdog import Failure, Failures, Watch, tell

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
_BESIDE = {
    # Whether another text encoder is the same one, moved, is seen in the null caption, once a stage is trained.
    "text": {"model", "cache", "reload_every_step"},
    "train": {"micro_batch_size"},
    "data": {"workers", "buffer_gib", "max_bad_fraction", "connect_timeout_s", "read_timeout_s", "retry_minutes"},
}
"""Fields of those sections that do not decide weights."""
_SHOWN = 4
_EXTENDABLE = ("train.steps", "optimizer.")
"""Fields that may change where a finished stage is trained for longer."""


def check_finished(
    config: RunConfig, places: Sequence[StageDir], chosen: Collection[int], extend: int | None
) -> str | None:
    """Refuse a config that says of finished stages what did not run, or would train a stage out of order. On rank 0.

    Args:
        config: the run.
        places: of every stage.
        chosen: indices of the stages that this command is for; its command line is for them alone.
        extend: index of the stage that may be trained for longer although it is finished; None: none may.

    Returns:
        Where that stage is to be trained for longer, what becomes of its learning rate, in a sentence; else None.

    Raises:
        UserError: naming the stage, the fields with both values, and the way out.
    """
    stages = [stage_config(config, index) for index in range(len(places))]
    if extend is not None and not (places[extend].done and _is_longer(stages[extend], places[extend])):
        extend = None  # it goes on as any stage does, or is done
    pending = [place for index, place in enumerate(places) if not place.done or index == extend]
    before = _stages_before(config)
    for index, (stage, place) in enumerate(zip(stages, places, strict=True)):
        follows = place.previous if stage.init.source == "previous" else None
        if follows in pending and place.begun:
            why = "would be stale" if index - 1 == extend else "would be trained out of order"
            raise ConfigError(
                f"stage {follows.name} is to be trained, and stage {place.name}, which goes on from it, has begun in "
                f"{place.folder} and {why}: move that folder away, or give this run another name"
            )
        if place.done:
            _check_stage(stage, place, bool(pending), index in chosen, index == extend)
        now = follows.name if follows is not None else None
        if place.begun and stage.init.source == "previous" and before.get(place.name, now) != now:
            raise ConfigError(
                f"stages: stage {place.name} was trained after {before[place.name] or 'no other'}, and the config "
                f"now has {now or 'no other'} before it: list the stages as they were, or give this run another name"
            )
    return None if extend is None else _extension(stages[extend], places[extend])


def _stages_before(config: RunConfig) -> dict[str, str | None]:
    """The stage before each, as the run's config.yaml has them of its last start; empty before the first one."""
    path = config.directory / "config.yaml"
    names = [stage["name"] for stage in load_config(path).stages] if path.exists() else []
    return dict(zip(names, [None, *names], strict=False))


def _trained_with(place: StageDir) -> RunConfig:
    """The settings that a finished stage ended with."""
    return load_config(place.model / "config.yaml")


def _is_longer(stage: RunConfig, place: StageDir) -> bool:
    return stage.train.steps > _trained_with(place).train.steps


def _check_stage(now: RunConfig, place: StageDir, any_pending: bool, chosen: bool, extend: bool) -> None:
    """Compare a finished stage's settings with the config's."""
    old, new = (_deciding(settings, any_pending) for settings in (_trained_with(place), now))
    changed = [name for name in changes(old, new) if not (extend and name.startswith(_EXTENDABLE))]
    if not changed:
        return
    old, new = fields_of(old), fields_of(new)
    shown = changed[:_SHOWN]
    told = " and ".join(f"{name} {_short(old.get(name))}" for name in shown)
    says = " and ".join(_short(new.get(name)) for name in shown)
    more = f" (and {len(changed) - _SHOWN} more fields)" if len(changed) > _SHOWN else ""
    ways = ["give this run another name", f"set stage {place.name} back and change the stages after it in `stages`"]
    if not chosen:  # perhaps it was its own command line
        ways = [f"write that into stage {place.name} of the config file", ways[0]]
    elif changed == ["train.steps"] and _is_longer(now, place):
        ways = [f"train it for longer with --extend {place.name}", "set it back"]
    raise ConfigError(
        f"stage {place.name} was trained with {told}, and the config now says {says}{more}: {', or '.join(ways)}"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _deciding(config: RunConfig, any_pending: bool) -> dict[str, Any]:
    """The settings of a stage that decide its weights."""
    tree = config.model_dump(mode="json", include=_SECTIONS)
    for section, names in _BESIDE.items():
        for name in names:
            if any_pending or name != "model":
                del tree[section][name]
    for source in tree["data"]["sources"]:
        for name in _ACCESS:
            del source[name]
    return tree


def _extension(now: RunConfig, place: StageDir) -> str:
    """See that a finished stage has a checkpoint to go on from, and say what becomes of its learning rate."""
    path, faults = latest_checkpoint(place.checkpoints, mirror_of(now, place))
    if path is None:
        reasons = "; ".join(faults) or "it is empty"
        raise ConfigError(f"--extend {place.name}: {place.checkpoints} holds no checkpoint to go on from: {reasons}")
    was, step, steps = _trained_with(place), step_of(path), now.train.steps
    ended = _share(was.optimizer, step - 1, was.train.steps)
    begins, ends = (_share(now.optimizer, at, steps) for at in (step, steps - 1))
    return (
        f"stage {place.name} goes on from step {step} to {steps}; its learning rate was {ended:.3g} of the peak at "
        f"step {step}, and follows optimizer.schedule {now.optimizer.schedule} over all {steps} steps from here on: "
        f"{begins:.3g} at step {step + 1}, {ends:.3g} at the end"
    )


def _share(config: OptimizerConfig, step: int, steps: int) -> float:
    """Of the peak learning rate."""
    return learning_rate(config, step, steps, peak=1.0)


def reopen(place: StageDir, step: int) -> None:
    """Make a finished stage one to be trained: its model stays beside, under the step it is of. On rank 0."""
    names = chain([f"{place.model}_step_{step}"], (f"{place.model}_step_{step}_{n}" for n in count(2)))
    place.model.rename(next(path for path in map(Path, names) if not path.exists()))


_SHARED_PATIENCE_S = 30.0
"""A network file system may show a file so late."""


def run(
    config: RunConfig,
    world: World,
    only: int | None,
    leave: Callable[[], str | None],
    failures: Failures,
    at_exit: ExitStack,
    build_scorer: BuildScorer,
    extend: str | None = None,
) -> None:
    """Train a run's stages, skipping those that are done.

    Args:
        config: the run.
        world: this process.
        only: index of the one stage to train; None trains all.
        leave: why this process is asked to leave; None: it is not.
        failures: told of what ends the run.
        at_exit: closed when the ranks have parted; the watch goes on until then, and bounds how long that may take.
        build_scorer: makes what `scoring` names.
        extend: name of a stage to train on, to train.steps, though it is done.

    Raises:
        UserError: a mistake, before anything is written, or another process that holds the run.
        Preempted: some process was asked to leave; the run is saved.
    """
    if not config.stages:
        raise ConfigError("stages: the config names no stage")
    chosen = list(range(len(config.stages))) if only is None else [only]
    settings = {index: stage_config(config, index) for index in chosen}
    places = stage_places(config)
    _check_starts(settings, places)
    extend_index = _index_of(extend, places, chosen)

    def look() -> tuple[str | None, list[int]]:
        extension = check_finished(config, places, chosen, extend_index)
        pending = [i for i in chosen if not places[i].done or (extension and i == extend_index)]
        for index in pending:
            check_world_size(settings[index], world.size, f"stage {places[index].name}")
        return extension, pending

    if world.broadcast_from_rank0(lambda: not look()[1] and is_done(config.directory)):
        _say_done(config, [places[i] for i in chosen], world)
        return
    lock: RunLock | None = None
    attempt = world.broadcast_from_rank0(lambda: uuid.uuid4().hex[:8])
    outcome = OutcomeFile(config.directory, attempt)

    def claim() -> tuple[str | None, list[int]]:
        nonlocal lock
        lock = RunLock(config.directory, attempt)
        found = look()  # who held the run until now may have finished it
        outcome.clear()
        return found

    extension, pending = world.broadcast_from_rank0(claim)

    def last_words(failure: Failure) -> None:
        outcome.write(failure.code, failure.message, failure.rank)
        tell(failure)

    def end(error: Exception) -> None:
        """Tell all ranks, and say what became of the run, before anything is cleaned up: a launcher may not wait."""
        failure = failures.report(error)
        if world.rank in (0, failure.rank):
            outcome.write(failure.code, failure.message, failure.rank)

    try:
        watch = Watch(failures, config.timeouts, config.directory / "stacks", attempt, last_words)
        at_exit.callback(watch.close)
        _check_shared(config.directory, attempt, world)
        opened = world.broadcast_from_rank0(lambda: _open_stages(settings, places, pending))
        notices = check_start([(settings[i], places[i], opened[i]) for i in pending], world) if pending else []
        devices = describe_devices(world)
        if world.is_rank0:
            for notice in [f"on {devices}", *notices]:
                print(notice)
        scorers = build_scorers({i: settings[i] for i in pending}, build_scorer, world)
        for index in pending:
            scorer, longer = scorers.get(index), extension if index == extend_index else None
            stage, place, data = settings[index], places[index], opened.pop(index)
            _train_stage(config, stage, place, data, world, attempt, leave, watch, end, scorer, longer)
        if world.is_rank0:
            outcome.write(DONE, f"trained {', '.join(places[i].name for i in chosen)}", rank=0)
            if pending:
                last = places[pending[-1]]
                with EventLog(config.directory, last.name).beside("report.html"):
                    print(f"curves and pictures are in {write_report(config.directory)}")
                print(f"done: the last pictures are in {last.samples}, the model in {last.model}")
    except Exception as error:
        end(error)
        raise
    finally:
        if lock is not None:
            lock.release()
    if not pending:
        _say_done(config, [places[i] for i in chosen], world)


def _index_of(extend: str | None, places: list[StageDir], chosen: list[int]) -> int | None:
    """The stage that is to be trained for longer.

    Raises:
        ConfigError: it is none of those that this command trains.
    """
    names = [places[i].name for i in chosen]
    if extend is not None and extend not in names:
        raise ConfigError(f"--extend {extend}: this command trains {', '.join(names)}")
    return None if extend is None else chosen[names.index(extend)]


def _say_done(config: RunConfig, places: list[StageDir], world: World) -> None:
    if world.is_rank0:
        names = ", ".join(place.name for place in places)
        report = config.directory / "report.html"
        if not report.exists():  # the last start was ended between the model and the report, or its disk was full
            with EventLog(config.directory, places[-1].name).beside("report.html"):
                write_report(config.directory)
        print(f"{config.directory}: done already: {names}; the report is {report}")


def _check_starts(settings: dict[int, RunConfig], places: list[StageDir]) -> None:
    """Refuse stages that cannot follow each other.

    Raises:
        ConfigError: naming the stage and the field.
    """
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
                f"stage {places[index].name}: optimizer.name changes from {before.optimizer.name} to "
                f"{stage.optimizer.name}, whose moments differ: set init.optimizer to reset"
            )


def _check_shared(directory: Path, attempt: str, world: World) -> None:
    """See that every rank sees the run's folder, though perhaps not at once.

    Raises:
        ConfigError: naming a rank that does not.
    """
    path, deadline = directory / LOCK, time.monotonic() + _SHARED_PATIENCE_S

    def seen() -> bool:
        return path.exists() and attempt in path.read_text()

    while not seen() and time.monotonic() < deadline:
        time.sleep(0.5)
    sees = world.gather(seen())
    if not all(sees):
        raise ConfigError(f"root {directory.parent} is not shared: rank {sees.index(False)} does not see {directory}")


def _open_stages(settings: dict[int, RunConfig], places: list[StageDir], pending: list[int]) -> dict[int, StageData]:
    """Rank 0: see that every pending stage has something to start from, and open its data."""
    for index in pending:
        source, place = settings[index].init.source, places[index]
        if source not in ("previous", "scratch"):
            check_model(Path(source), settings[index].init.weights)
        before = place.previous
        if source == "previous" and before is not None and not before.done and index - 1 not in pending:
            raise ConfigError(
                f"stage {place.name} goes on from stage {before.name}, which is not done in {before.folder}: "
                "train that first, or set init.source"
            )
    opened: Opened = {}
    return {index: open_data(settings[index], places[index].name, opened) for index in pending}


def _train_stage(
    config: RunConfig,
    stage: RunConfig,
    place: StageDir,
    data: StageData,
    world: World,
    attempt: str,
    leave: Callable[[], str | None],
    watch: Watch,
    end: Callable[[Exception], None],
    scorer: Scorer | None,
    extension: str | None,
) -> None:
    """Train one stage, from an earlier checkpoint again whenever its guard asks for that; then report."""
    devices = describe_devices(world)
    back: Back | None = None
    starts = 0
    while True:
        watch.start(f"the start of stage {place.name}")
        trainer = StageTrainer(stage, place, data, world, f"{attempt}-{starts}", watch, scorer, back)
        try:
            watch.start("the first step")
            if world.is_rank0 and extension is not None and back is None:
                reopen(place, trainer.step)
            told = [extension] if extension is not None and back is None else []
            notices = [f"source {it.source!r}: {it.shard}: {it.detail}" for it in data.damage] if back is None else []
            if (noise := noisy_ema(stage, first=place.previous is None)) is not None:
                notices.append(noise)
            with closing(Observer(stage, place.name, trainer.step, active=world.is_rank0)) as observer:
                if world.is_rank0:
                    with observer.events.beside("config.yaml and environment.json"):
                        atomic_write(config.directory / "config.yaml", dump_config(config).encode())
                        write_environment(config, stage, data, trainer.parameters, world.size, devices)
                for notice in [*told, f"on {devices}", *stand_ins(stage.objective), *notices]:
                    observer.event(notice)
                back = trainer.run(observer, leave)
        except Exception as error:
            end(error)
            raise
        finally:
            trainer.close()
        if back is None:
            break
        starts += 1
        del trainer
        gc.collect()  # an engine is full of cycles, and holds the stage's memory
    gc.collect()
    if world.is_rank0:
        with EventLog(config.directory, place.name).beside("report.html"):
            write_report(config.directory)
