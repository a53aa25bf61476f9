"""A stage's checkpoints: when they are due, whether the stage is saved, and how far back it may go.

All ranks take part in every call; rank 0's observer hears what the writing threads have to say.

Where a stage starts from: its own newest checkpoint, the stage before, a model folder, or nothing.

Whole weights out of what the ranks hold of them: for drawing, and for a model's folder. All ranks take part.

The null caption's states: computed once in a run, and kept with the run and its models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from data.errors import StoreError
from data.files import atomic_write
from data.store import WritableStore
from t2i.build import condition_identity
from t2i.config.base import ConfigError
from t2i.config.loading import changes
from t2i.config.run import InitConfig, RunConfig
from t2i.distributed import World
from t2i.engine.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    Mirror,
    latest_checkpoint,
    moments_of,
    open_mirror,
    params_of,
)
from t2i.engine.ema import Ema
from t2i.engine.engine import Engine, Shards, gather_full
from t2i.engine.optimizer import StateFolder
from t2i.model_folder import DENOISER, NULL_CAPTION, PROJECTOR, UNUSED, check_finite, read_model, write_model
from t2i.models.text import Conditioner, check_same_text
from t2i.train.guard import Guard, Rollback, Stop
from t2i.train.metrics import Observer
from t2i.train.run_dir import StageDir
from t2i.train.watchdog import Watch


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


def mirror_of(config: RunConfig, place: StageDir) -> WritableStore | None:
    """Where a stage's checkpoints are copied to, if anywhere.

    Raises:
        DataError: it cannot be opened.
    """
    saving = config.checkpoint
    if saving.mirror is None:
        return None
    return open_mirror(saving.mirror, f"{config.name}/{place.name}", saving.mirror_options)


def restore(
    config: RunConfig, place: StageDir, world: World, engine: Engine, ema: Ema, before: int | None = None
) -> Start:
    """Load the stage's newest checkpoint, or what the config starts it from, into the engine and the average.

    Args:
        before: only checkpoints from before this step count; None: all.

    Raises:
        UserError: there is nothing usable to start from, or it is of another model.
    """
    path, faults = world.broadcast_from_rank0(
        lambda: latest_checkpoint(place.checkpoints, mirror_of(config, place), before)
    )
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
        path, faults = world.broadcast_from_rank0(
            lambda: latest_checkpoint(previous.checkpoints, mirror_of(config, previous))
        )
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
    checkpoint.read(shards, {"param": params_of(shards), "ema": ema.values, **moments_of(shards)})
    engine.refresh()
    engine.optimizer_steps = checkpoint.state["optimizer_steps"]
    return checkpoint.state


def _hand_over(path: Path, init: InitConfig, engine: Engine, ema: Ema) -> None:
    """Start from the last checkpoint of the stage before; the two may align with other features.

    A projector that is new then has fresh weights and zero moments under AdamW's old step count, so that its
    first updates are larger than at a fresh start.
    """
    checkpoint, shards = Checkpoint(path), engine.shards
    checkpoint.read(shards, {"param" if init.weights == "raw" else "ema": params_of(shards)}, PROJECTOR)
    engine.refresh()
    ema.reset()
    if init.ema == "continue":
        checkpoint.read(shards, {"ema": ema.values}, PROJECTOR)
    if init.optimizer == "continue":
        checkpoint.read(shards, moments_of(shards), PROJECTOR)
        engine.optimizer_steps = checkpoint.state["optimizer_steps"]


def _load_model(folder: Path, init: InitConfig, engine: Engine, ema: Ema) -> None:
    """Start from a model folder."""
    _fill(engine.shards, params_of(engine.shards), read_model(folder, init.weights).tensors, folder)
    engine.refresh()
    ema.reset()
    if init.ema == "continue":
        _fill(engine.shards, ema.values, read_model(folder, "ema").tensors, folder)


def _fill(shards: Shards, targets: dict[str, Tensor], whole: dict[str, Tensor], folder: Path) -> None:
    """Copy this rank's slices of whole tensors; a projector that is missing there keeps its fresh weights. What is not
    read here is not trained, and gone from what this run writes."""
    for name in whole.keys() - shards.keys():
        if not name.startswith((PROJECTOR, UNUSED)):
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


def load_average(shards: Shards, average: Mapping[str, Tensor], denoiser: nn.Module) -> None:
    """Put the averaged weights into a denoiser, of whatever type and on whatever device its own are."""
    target = dict(denoiser.named_parameters())
    for name, value in gather_full(shards, average):
        if name.startswith(DENOISER):
            target[name.removeprefix(DENOISER)].data.copy_(value)


def gather_model(
    config: RunConfig, shards: Shards, average: Mapping[str, Tensor], null_caption: Tensor, world: World
) -> Callable[[Path], None]:
    """Gather the raw and the averaged weights on rank 0's host, and return what writes a model's folder there."""
    raw, ema = (
        {name: whole.cpu() for name, whole in gather_full(shards, slices) if world.is_rank0}
        for slices in (params_of(shards), average)
    )
    return lambda folder: write_model(folder, config, raw, ema, null_caption)


def find_null_caption(config: RunConfig, place: StageDir, conditioner: Conditioner) -> Tensor:
    """The states (L, E) or class () of the run, else of the model that the stage starts from, else computed.

    Raises:
        ConfigError: the run's or the model's were made with another text encoder or other classes, or are not finite.
    """
    path, source = place.null_caption, config.init.source
    fresh, made_by = conditioner.null_caption(), condition_identity(config)
    check_finite([(NULL_CAPTION, fresh)], f"text.model {config.text.model}")
    if path.exists():
        with safe_open(path, framework="pt") as file:
            about, states = file.metadata() or {}, file.get_tensor(NULL_CAPTION)
        stored_by = about.get("text")
        if stored_by != made_by:
            raise ConfigError(
                f"{path} was computed with {stored_by}, this run has {made_by}: a run keeps its text "
                "section and its classes; give this one another name"
            )
        if about.get("text_model", "") != config.text.model and config.model.condition == "text":  # it may have moved
            check_same_text(states, fresh, f"text.model {config.text.model}", str(path))
        return states.to(fresh)
    if source not in ("previous", "scratch"):
        saved = read_model(Path(source), config.init.weights)
        if saved.config.model.text_padding != config.model.text_padding or saved.null_caption.shape != fresh.shape:
            raise ConfigError(
                f"init.source {source} has another text encoder, text.length, model.text_padding or model.condition "
                "than this run"
            )
        return saved.null_caption.to(fresh)
    return fresh


def store_null_caption(config: RunConfig, place: StageDir, states: Tensor) -> None:
    """Keep it with the run, unless it is there. On rank 0."""
    if place.null_caption.exists():
        return
    about = {"text": condition_identity(config), "text_model": config.text.model}
    atomic_write(place.null_caption, save({NULL_CAPTION: states.contiguous().cpu()}, metadata=about))


CLOSE_PATIENCE_S = 30.0
MIRROR_PATIENCE_S = 3600.0
"""At the end of a stage the mirror may still be copying its last checkpoint."""
MIRROR_ROUND_S = 0.5

State = Callable[[], dict[str, Any]]
"""Makes the trainer's part of a checkpoint, in JSON's terms. A collective."""


def build_mirror(config: RunConfig, place: StageDir, world: World) -> Mirror | None:
    """What copies a stage's checkpoints to `checkpoint.mirror`; rank 0 alone has one."""
    saving = config.checkpoint
    store = mirror_of(config, place) if world.is_rank0 else None
    return Mirror(store, keep=saving.keep, keep_every=saving.keep_every) if store is not None else None


class Saver:
    """Saves one stage.

    Args:
        config: the stage's settings.
        place: where its checkpoints are.
        world: this process.
        watch: told that this rank gets on.
        attempt: a word that all ranks share and no other start of the stage does.
        mirror: rank 0's copier, if any.
        shards: this rank's slices of weights and moments.
        average: its slices of the average.
        guard: says which checkpoints a rollback may ask for.
        loaded_step: the step that need not be saved, since the stage was loaded there; -1: none.
    """

    def __init__(
        self,
        config: RunConfig,
        place: StageDir,
        world: World,
        watch: Watch,
        attempt: str,
        mirror: Mirror | None,
        shards: Shards,
        average: Mapping[str, Tensor],
        guard: Guard,
        loaded_step: int,
    ) -> None:
        self.mirror = mirror
        self._saving = config.checkpoint
        self._place, self._world, self._watch = place, world, watch
        self._open_mirror = lambda: mirror_of(config, place)
        self._shards, self._average, self._guard = shards, average, guard
        self._loaded_step, self._begun_step = loaded_step, -1
        self._writer = CheckpointWriter(
            place.checkpoints,
            rank=world.rank,
            world_size=world.size,
            attempt=attempt,
            keep=self._saving.keep,
            keep_every=self._saving.keep_every,
            mirror=mirror,
            gather=world.gather,
            offload_dir=StateFolder(folder) if (folder := config.engine.offload_dir) else None,
        )
        self._writer.reserve(shards, average)

    def when_due(self, step: int, state: State, observer: Observer, *, last: bool) -> None:
        """Begin a regular checkpoint, or an ephemeral one between them; the `last` of a stage is never skipped."""
        saving = self._saving
        if last or step % saving.every == 0:
            self._begin(step, state, observer, may_skip=not last)
        elif saving.ephemeral_every and step % saving.ephemeral_every == 0:
            self._begin(step, state, observer, may_skip=True, ephemeral=True)
        self._tell(observer)

    def now(self, step: int, state: State, observer: Observer) -> str:
        """See that a checkpoint of where the stage stands is there when this returns; say in words whether it is."""
        if step == self._loaded_step:
            return "saved" if step else "nothing to save"
        for _ in range(2):
            if self._begun_step != step:
                self._begin(step, state, observer)
            if self.wait(observer) == step:
                return "saved"
            self._begun_step = -1  # a fault that may have passed
        return "NOT saved (events.log says why)"

    def _begin(
        self, step: int, state: State, observer: Observer, *, may_skip: bool = False, ephemeral: bool = False
    ) -> None:
        self._watch.alive(f"the checkpoint of step {step}")
        saving = self._writer.save(
            step,
            self._shards,
            self._average,
            state(),
            may_skip=may_skip,
            ephemeral=ephemeral,
            needed_before=self._guard.needed_before(step),
        )
        if saving.begun:
            self._begun_step = step
        costs = {"stall_s": saving.stall_s, "skipped_checkpoints": self._writer.skipped}
        observer.write("checkpoint", step, costs)

    def wait(self, observer: Observer) -> int | None:
        """Wait for the checkpoint under way; return the step of the last one that was committed."""
        self._watch.alive(f"the checkpoint of step {self._begun_step}")
        committed = self._writer.wait()
        self._tell(observer)
        return committed

    def await_mirror(self, leave: Callable[[], str | None]) -> None:
        """Let the mirror have the stage's last checkpoint, within bounds, unless a rank is asked to leave."""
        deadline = time.monotonic() + MIRROR_PATIENCE_S
        while True:
            waits = self._writer.mirroring and time.monotonic() < deadline
            waiting, leaving = self._world.sum([waits, leave() is not None])
            if leaving or not waiting:
                return
            self._watch.alive("waiting for the mirror")
            time.sleep(MIRROR_ROUND_S)

    def leads_back(self, rollback: Rollback) -> Rollback | Stop:
        """See that there is a checkpoint to go back to, or the stage's start, before later ones are given up."""
        if rollback.first <= (self._saving.ephemeral_every or self._saving.every):
            return rollback
        try:
            found, _ = self._world.broadcast_from_rank0(
                lambda: latest_checkpoint(self._place.checkpoints, self._open_mirror(), rollback.first)
            )
        except (CheckpointError, StoreError):
            found = None
        lost = f"{rollback.reason}, but no good checkpoint from before step {rollback.first} is left"
        return rollback if found is not None else Stop(lost)

    def go_back(self, rollback: Rollback, observer: Observer) -> None:
        """Take away the checkpoints from `rollback.first` on."""
        self._watch.alive("going back")
        self._writer.discard_after(rollback.first - 1)
        self._tell(observer)

    def _tell(self, observer: Observer) -> None:
        for event in self._writer.take_events():
            observer.event(event)

    def close(self) -> None:
        """Let a checkpoint under way be finished, within bounds."""
        self._writer.close(CLOSE_PATIENCE_S)
