"""Where a stage starts from: its own newest checkpoint, the stage before, a model folder, or nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from data.store import WritableStore
from t2i.config import InitConfig, RunConfig
from t2i.config_base import ConfigError
from t2i.config_loading import changes
from t2i.engine.checkpoint import Checkpoint, CheckpointError, moments_of, newest_anywhere, open_mirror, values_of
from t2i.engine.ema import Ema
from t2i.engine.interface import Engine
from t2i.engine.shards import Shards
from t2i.model_folder import PROJECTOR, UNREAD, read_model
from t2i.train.places import StagePlace
from t2i.train.processes import World


@dataclass(frozen=True)
class Start:
    """The trainer's state at the start; `origin` says in a sentence where it comes from."""

    origin: str
    step: int = 0
    skipped_updates: int = 0
    data: dict[str, Any] | None = None
    """The loader's state; None: the stage's first batch."""
    guard: dict[str, Any] | None = None
    """The guard's state; None: no step has been judged."""
    balance: dict[str, Any] | None = None
    """The state of gradient balancing; None: it starts anew, or there is none."""
    scores: list[Any] = field(default_factory=list)
    """The stage's scores so far; none of those that were taken otherwise."""


_JUDGED_BY = ("data", "objective", "optimizer", "train")
"""Sections whose changes make earlier losses and norms no measure of later ones."""
_SCORED_BY = ("sampling", "data.resolution") + tuple(
    f"scoring.{name}" for name in ("scorer", "prompts", "images", "detector_weights", "clip")
)
"""Sections and fields whose changes make earlier scores no measure of later ones."""


def mirror_of(config: RunConfig, place: StagePlace) -> WritableStore | None:
    """Where a stage's checkpoints are copied to, if anywhere.

    Raises:
        DataError: it cannot be opened.
    """
    saving = config.checkpoint
    if saving.mirror is None:
        return None
    return open_mirror(saving.mirror, f"{config.name}/{place.name}", saving.mirror_options)


def restore(
    config: RunConfig, place: StagePlace, world: World, engine: Engine, ema: Ema, before: int | None = None
) -> Start:
    """Load the stage's newest checkpoint, or what the config starts it from, into the engine and the average.

    Args:
        before: only checkpoints from before this step count; None: all.

    Raises:
        UserError: there is nothing usable to start from, or it is of another model.
    """
    path, faults = world.from_main(lambda: newest_anywhere(place.checkpoints, mirror_of(config, place), before))
    if path is not None:
        state = _load_checkpoint(path, engine, ema)
        changed = changes(state["config"], config.model_dump(mode="json"))
        faults += [f"settings changed since: {', '.join(changed)}"] if changed else []
        origin = "; ".join([*faults, f"going on from {path.name}"])
        guard = state["guard"]
        if any(name.startswith(_JUDGED_BY) for name in changed):
            guard = {**guard, "losses": [], "log_norms": []}
        scores = [] if any(name.startswith(_SCORED_BY) for name in changed) else state.get("scores", [])
        return Start(origin, state["step"], state["skipped_updates"], state["data"], guard, state["balance"], scores)
    if faults:
        raise CheckpointError(
            f"no checkpoint in {place.checkpoints} can be used: {'; '.join(faults)}; remove them to start "
            "the stage anew"
        )
    init, previous = config.init, place.previous
    if init.source == "scratch" or (init.source == "previous" and previous is None):
        ema.reset()
        return Start("starting from scratch")
    if init.source == "previous":
        assert previous is not None
        path, faults = world.from_main(lambda: newest_anywhere(previous.checkpoints, mirror_of(config, previous)))
        if path is None:
            reasons = "; ".join(faults) or "it is empty"
            raise ConfigError(f"{previous.checkpoints} holds nothing to start {place.name} from: {reasons}")
        _hand_over(path, init, engine, ema)
        begun = f"starting from {path}, {init.weights} weights, optimizer: {init.optimizer}, ema: {init.ema}"
        return Start("; ".join([*faults, begun]))
    _load_model(Path(init.source), init, engine, ema)
    return Start(f"starting from {init.source}, {init.weights} weights, ema: {init.ema}; the optimizer starts anew")


def _load_checkpoint(path: Path, engine: Engine, ema: Ema) -> dict[str, Any]:
    """Take up the stage's own state; the trainer's part of it."""
    checkpoint, shards = Checkpoint(path), engine.shards
    checkpoint.read(shards, {"value": values_of(shards), "ema": ema.values, **moments_of(shards)})
    engine.refresh()
    engine.updates = checkpoint.state["updates"]
    return checkpoint.state


def _hand_over(path: Path, init: InitConfig, engine: Engine, ema: Ema) -> None:
    """Start from the last checkpoint of the stage before; the two may align with other features.

    A projector that is new then has fresh weights and zero moments under AdamW's old step count, so that its
    first updates are larger than at a fresh start.
    """
    checkpoint, shards = Checkpoint(path), engine.shards
    checkpoint.read(shards, {"value" if init.weights == "raw" else "ema": values_of(shards)}, PROJECTOR)
    engine.refresh()
    ema.reset()
    if init.ema == "continue":
        checkpoint.read(shards, {"ema": ema.values}, PROJECTOR)
    if init.optimizer == "continue":
        checkpoint.read(shards, moments_of(shards), PROJECTOR)
        engine.updates = checkpoint.state["updates"]


def _load_model(folder: Path, init: InitConfig, engine: Engine, ema: Ema) -> None:
    """Start from a model folder."""
    _fill(engine.shards, values_of(engine.shards), read_model(folder, init.weights).tensors, folder)
    engine.refresh()
    ema.reset()
    if init.ema == "continue":
        _fill(engine.shards, ema.values, read_model(folder, "ema").tensors, folder)


def _fill(shards: Shards, targets: dict[str, Tensor], whole: dict[str, Tensor], folder: Path) -> None:
    """Copy this rank's slices of whole tensors; a projector that is missing there keeps its fresh weights. What is not
    read here is not trained, and gone from what this run writes."""
    for name in whole.keys() - shards.keys():
        if not name.startswith((PROJECTOR, UNREAD)):
            raise ConfigError(f"init.source {folder} is of another model: it has {name}, this model does not")
    for name, shard in shards.items():
        found = whole[name].shape if name in whole else None
        if found == shard.shape:
            targets[name].copy_(whole[name].flatten()[shard.start : shard.stop])
        elif not name.startswith(PROJECTOR):
            raise ConfigError(
                f"init.source {folder} is of another model: {name} is {found and list(found)} there, "
                f"{list(shard.shape)} here"
            )
