"""A run: its stages in order, each from where it stands.

The run's folder is locked by its one writer, and says in `outcome.json` what became of it. Settings, number of ranks
and the sources of every stage still to train are checked before the first starts; a mistake there leaves nothing
behind.
"""

from __future__ import annotations

import gc
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from data.files import atomic_write
from t2i.config import RunConfig
from t2i.config_base import ConfigError
from t2i.config_loading import check_world_size, dump_config, stage_config
from t2i.exit_codes import DONE
from t2i.model_folder import check_model
from t2i.train.build import noisy_ema, stand_ins
from t2i.train.devices import describe_devices
from t2i.train.environment import write_environment
from t2i.train.events import EventLog
from t2i.train.failures import Failure, Failures
from t2i.train.finished import check_finished, reopen
from t2i.train.observe import Observer
from t2i.train.outcome import OutcomeFile, is_done
from t2i.train.places import StagePlace, stage_places
from t2i.train.preflight import check_start
from t2i.train.processes import LOCK, RunLock, World
from t2i.train.report import write_report
from t2i.train.scorers import BuildScorer, Scorer, build_scorers
from t2i.train.stage_data import Opened, StageData, open_data
from t2i.train.trainer import Back, StageTrainer
from t2i.train.watch import Watch, tell

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
        Departed: some process was asked to leave; the run is saved.
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

    if world.from_main(lambda: not look()[1] and is_done(config.directory)):
        _say_done(config, [places[i] for i in chosen], world)
        return
    lock: RunLock | None = None
    attempt = world.from_main(lambda: uuid.uuid4().hex[:8])
    outcome = OutcomeFile(config.directory, attempt)

    def claim() -> tuple[str | None, list[int]]:
        nonlocal lock
        lock = RunLock(config.directory, attempt)
        found = look()  # who held the run until now may have finished it
        outcome.clear()
        return found

    extension, pending = world.from_main(claim)

    def last_words(failure: Failure) -> None:
        outcome.write(failure.code, failure.message, failure.rank)
        tell(failure)

    def end(error: Exception) -> None:
        """Tell all ranks, and say what became of the run, before anything is cleaned up: a launcher may not wait."""
        failure = failures.report(error)
        if world.rank in (0, failure.rank):
            outcome.write(failure.code, failure.message, failure.rank)

    try:
        watch = Watch(failures, config.limits, config.directory / "stacks", attempt, last_words)
        at_exit.callback(watch.close)
        _check_shared(config.directory, attempt, world)
        opened = world.from_main(lambda: _open_stages(settings, places, pending))
        notices = check_start([(settings[i], places[i], opened[i]) for i in pending], world) if pending else []
        devices = describe_devices(world)
        if world.is_main:
            for notice in [f"on {devices}", *notices]:
                print(notice)
        scorers = build_scorers({i: settings[i] for i in pending}, build_scorer, world)
        for index in pending:
            scorer, longer = scorers.get(index), extension if index == extend_index else None
            stage, place, data = settings[index], places[index], opened.pop(index)
            _train_stage(config, stage, place, data, world, attempt, leave, watch, end, scorer, longer)
        if world.is_main:
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


def _index_of(extend: str | None, places: list[StagePlace], chosen: list[int]) -> int | None:
    """The stage that is to be trained for longer.

    Raises:
        ConfigError: it is none of those that this command trains.
    """
    names = [places[i].name for i in chosen]
    if extend is not None and extend not in names:
        raise ConfigError(f"--extend {extend}: this command trains {', '.join(names)}")
    return None if extend is None else chosen[names.index(extend)]


def _say_done(config: RunConfig, places: list[StagePlace], world: World) -> None:
    if world.is_main:
        names = ", ".join(place.name for place in places)
        report = config.directory / "report.html"
        if not report.exists():  # the last start was ended between the model and the report, or its disk was full
            with EventLog(config.directory, places[-1].name).beside("report.html"):
                write_report(config.directory)
        print(f"{config.directory}: done already: {names}; the report is {report}")


def _check_starts(settings: dict[int, RunConfig], places: list[StagePlace]) -> None:
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


def _open_stages(settings: dict[int, RunConfig], places: list[StagePlace], pending: list[int]) -> dict[int, StageData]:
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
    place: StagePlace,
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
            if world.is_main and extension is not None and back is None:
                reopen(place, trainer.step)
            told = [extension] if extension is not None and back is None else []
            notices = [f"source {it.source!r}: {it.shard}: {it.detail}" for it in data.damage] if back is None else []
            if (noise := noisy_ema(stage, first=place.previous is None)) is not None:
                notices.append(noise)
            with closing(Observer(stage, place.name, trainer.step, active=world.is_main)) as observer:
                if world.is_main:
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
    if world.is_main:
        with EventLog(config.directory, place.name).beside("report.html"):
            write_report(config.directory)
