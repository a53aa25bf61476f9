"""Saving a stage and resuming it.

`resume` loads a stage's newest checkpoint or, if there is none, what `init.source` names: the previous stage, a model's
folder, or nothing. `Saver` says when checkpoints are due and how far a rollback may go. All ranks take part in every
call, but for `store_null_caption`.
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
from t2i.engine.optimizer import OffloadDir
from t2i.model_folder import DENOISER, NULL_CAPTION, PROJECTOR, UNUSED, check_finite, read_model, write_model
from t2i.models.text import Conditioner, check_same_text
from t2i.train.guard import Guard, Rollback, Stop
from t2i.train.metrics import Observer
from t2i.train.run_dir import StageDir
from t2i.train.watchdog import Watchdog


@dataclass(frozen=True)
class ResumeState:
    """The trainer's part of a checkpoint, or its defaults at the start of a stage."""

    origin: str
    """Where it comes from, in a sentence."""
    step: int = 0
    skipped_updates: int = 0
    data: dict[str, Any] | None = None
    """State of the loader, or None at the stage's first batch."""
    guard: dict[str, Any] | None = None
    balance: dict[str, Any] | None = None
    """State of gradient balancing, or None if it starts anew or is off."""
    scores: list[Any] = field(default_factory=list)
    """The stage's scores so far, unless settings that they depend on have changed."""


_DECIDE_LOSS = ("data", "objective", "optimizer", "train")
"""Sections whose changes make earlier losses and norms incomparable with later ones."""
_DECIDE_SCORE = ("sampling", "data.resolution") + tuple(
    f"scoring.{name}" for name in ("scorer", "prompts", "images", "detector_weights", "clip")
)
"""Sections and fields whose changes make earlier scores incomparable with later ones."""


def mirror_of(config: RunConfig, stage_dir: StageDir) -> WritableStore | None:
    """The store that a stage's checkpoints are copied to, if there is one.

    Raises:
        UserError: it cannot be opened, or its folder not made.
    """
    saving = config.checkpoint
    if saving.mirror is None:
        return None
    return open_mirror(saving.mirror, f"{config.name}/{stage_dir.name}", saving.mirror_options)


def resume(
    config: RunConfig, stage_dir: StageDir, world: World, engine: Engine, ema: Ema, before: int | None = None
) -> ResumeState:
    """Load the stage's newest checkpoint, or what the config starts it from, into the engine and the EMA.

    After a rollback, only checkpoints from before step `before` count.

    Raises:
        UserError: there is nothing usable to start from, or it is of another model.
    """
    path, faults = world.broadcast_from_rank0(
        lambda: latest_checkpoint(stage_dir.checkpoints, mirror_of(config, stage_dir), before)
    )
    if path is not None:
        state = _load_checkpoint(path, engine, ema)
        changed = changes(state["config"], config.model_dump(mode="json"))
        faults += [f"settings changed since: {', '.join(changed)}"] if changed else []
        origin = "; ".join([*faults, f"going on from {path.name}"])
        guard = state["guard"]
        if any(name.startswith(_DECIDE_LOSS) for name in changed):
            guard = {**guard, "losses": [], "log_norms": []}
        scores = [] if any(name.startswith(_DECIDE_SCORE) for name in changed) else state.get("scores", [])
        return ResumeState(
            origin, state["step"], state["skipped_updates"], state["data"], guard, state["balance"], scores
        )
    if faults:
        raise CheckpointError(
            f"no checkpoint in {stage_dir.checkpoints} can be used: {'; '.join(faults)}; move them away "
            "to start the stage anew"
        )
    init, previous = config.init, stage_dir.previous
    if init.source == "scratch" or (init.source == "previous" and previous is None):
        ema.reset()
        return ResumeState("starting from scratch")
    if init.source == "previous":
        assert previous is not None
        path, faults = world.broadcast_from_rank0(
            lambda: latest_checkpoint(previous.checkpoints, mirror_of(config, previous))
        )
        if path is None:
            reasons = "; ".join(faults) or "it is empty"
            raise ConfigError(f"{previous.checkpoints} holds nothing to start {stage_dir.name} from: {reasons}")
        _init_from_previous_stage(path, init, engine, ema)
        origin = f"starting from {path}, {init.weights} weights, optimizer: {init.optimizer}, ema: {init.ema}"
        return ResumeState("; ".join([*faults, origin]))
    _init_from_model(Path(init.source), init, engine, ema)
    return ResumeState(
        f"starting from {init.source}, {init.weights} weights, ema: {init.ema}; the optimizer starts anew"
    )


def _load_checkpoint(path: Path, engine: Engine, ema: Ema) -> dict[str, Any]:
    """Load weights, EMA and moments; returns the trainer's part."""
    checkpoint, shards = Checkpoint(path), engine.shards
    checkpoint.read(shards, {"param": params_of(shards), "ema": ema.params, **moments_of(shards)})
    engine.sync_params_from_master()
    engine.optimizer_steps = checkpoint.state["optimizer_steps"]
    return checkpoint.state


def _init_from_previous_stage(path: Path, init: InitConfig, engine: Engine, ema: Ema) -> None:
    """Load the previous stage's last checkpoint; the two stages may differ in the projector.

    A new projector keeps its fresh weights and zero moments, under AdamW's old step count: its first updates are larger
    than at a fresh start.
    """
    checkpoint, shards = Checkpoint(path), engine.shards
    checkpoint.read(shards, {"param" if init.weights == "raw" else "ema": params_of(shards)}, PROJECTOR)
    engine.sync_params_from_master()
    ema.reset()
    if init.ema == "continue":
        checkpoint.read(shards, {"ema": ema.params}, PROJECTOR)
    if init.optimizer == "continue":
        checkpoint.read(shards, moments_of(shards), PROJECTOR)
        engine.optimizer_steps = checkpoint.state["optimizer_steps"]


def _init_from_model(folder: Path, init: InitConfig, engine: Engine, ema: Ema) -> None:
    _fill(engine.shards, params_of(engine.shards), read_model(folder, init.weights).tensors, folder)
    engine.sync_params_from_master()
    ema.reset()
    if init.ema == "continue":
        _fill(engine.shards, ema.params, read_model(folder, "ema").tensors, folder)


def _fill(shards: Shards, targets: dict[str, Tensor], whole: dict[str, Tensor], folder: Path) -> None:
    """Copy this rank's slices of whole tensors.

    A projector that is missing in the model keeps its fresh weights. Unused weights of the model are dropped.
    """
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


def load_ema_weights(shards: Shards, ema: Mapping[str, Tensor], denoiser: nn.Module) -> None:
    """Copy the EMA weights, gathered from all ranks, into a denoiser of any dtype and device."""
    target = dict(denoiser.named_parameters())
    for name, value in gather_full(shards, ema):
        if name.startswith(DENOISER):
            target[name.removeprefix(DENOISER)].data.copy_(value)


def gather_model(
    config: RunConfig, shards: Shards, ema: Mapping[str, Tensor], null_caption: Tensor, world: World
) -> Callable[[Path], None]:
    """Gather raw and EMA weights on rank 0's host; returns a function that writes a model's folder there."""
    raw_weights, ema_weights = (
        {name: whole.cpu() for name, whole in gather_full(shards, slices) if world.is_rank0}
        for slices in (params_of(shards), ema)
    )
    return lambda folder: write_model(folder, config, raw_weights, ema_weights, null_caption)


def find_null_caption(config: RunConfig, stage_dir: StageDir, conditioner: Conditioner) -> Tensor:
    """Text states (L, E) or class (): from the run's file, the model that the stage starts from, or computed.

    Raises:
        ConfigError: they are of another text encoder or other classes, or are not finite.
    """
    path, source = stage_dir.null_caption, config.init.source
    fresh, made_by = conditioner.null_caption(), condition_identity(config)
    check_finite([(NULL_CAPTION, fresh)], f"text.model {config.text.model}")
    if path.exists():
        with safe_open(path, framework="pt") as file:
            metadata, states = file.metadata() or {}, file.get_tensor(NULL_CAPTION)
        stored_by = metadata.get("text")
        if stored_by != made_by:
            raise ConfigError(
                f"{path} was computed with {stored_by}, this run has {made_by}: a run keeps its text "
                "section and its classes; give this one another name"
            )
        if metadata.get("text_model", "") != config.text.model and config.model.condition == "text":
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


def store_null_caption(config: RunConfig, stage_dir: StageDir, states: Tensor) -> None:
    """Write the run's file, unless it exists. On rank 0."""
    if stage_dir.null_caption.exists():
        return
    metadata = {"text": condition_identity(config), "text_model": config.text.model}
    atomic_write(stage_dir.null_caption, save({NULL_CAPTION: states.contiguous().cpu()}, metadata=metadata))


CLOSE_PATIENCE_S = 30.0
MIRROR_PATIENCE_S = 3600.0
"""How long the end of a stage waits for the mirror to copy the last checkpoint."""
MIRROR_ROUND_S = 0.5

StateDict = Callable[[], dict[str, Any]]
"""Makes the trainer's part of a checkpoint, in JSON's types. A collective."""


def build_mirror(config: RunConfig, stage_dir: StageDir, world: World) -> Mirror | None:
    """What copies a stage's checkpoints to `checkpoint.mirror`, on rank 0."""
    saving = config.checkpoint
    store = mirror_of(config, stage_dir) if world.is_rank0 else None
    return Mirror(store, keep=saving.keep, keep_every=saving.keep_every) if store is not None else None


class Saver:
    """Saves one stage. All ranks take part in every call.

    Args:
        attempt_id: the same on all ranks, and new at every start of the stage.
        shards: this rank's slices of weights and moments.
        ema: this rank's slices of the EMA weights.
        guard: says which checkpoints a rollback may need.
        loaded_step: the step that the stage was loaded at, which need not be saved; -1: none.
    """

    def __init__(
        self,
        config: RunConfig,
        stage_dir: StageDir,
        world: World,
        watchdog: Watchdog,
        attempt_id: str,
        mirror: Mirror | None,
        shards: Shards,
        ema: Mapping[str, Tensor],
        guard: Guard,
        loaded_step: int,
    ) -> None:
        self.mirror = mirror
        self._saving = config.checkpoint
        self._stage_dir, self._world, self._watchdog = stage_dir, world, watchdog
        self._open_mirror = lambda: mirror_of(config, stage_dir)
        self._shards, self._ema, self._guard = shards, ema, guard
        self._loaded_step, self._begun_step = loaded_step, -1
        self._writer = CheckpointWriter(
            stage_dir.checkpoints,
            rank=world.rank,
            world_size=world.size,
            attempt_id=attempt_id,
            keep=self._saving.keep,
            keep_every=self._saving.keep_every,
            mirror=mirror,
            gather=world.gather,
            offload_dir=OffloadDir(folder) if (folder := config.engine.offload_dir) else None,
        )
        self._writer.allocate(shards, ema)

    def save_if_due(self, step: int, state_dict: StateDict, observer: Observer, *, last: bool) -> None:
        """Begin a regular checkpoint, or an ephemeral one between two; the `last` of a stage is never skipped."""
        saving = self._saving
        if last or step % saving.every == 0:
            self._begin(step, state_dict, observer, may_skip=not last)
        elif saving.ephemeral_every and step % saving.ephemeral_every == 0:
            self._begin(step, state_dict, observer, may_skip=True, ephemeral=True)
        self._log_events(observer)

    def save_now(self, step: int, state_dict: StateDict, observer: Observer) -> str:
        """Save this step, unless it is saved, and wait for it; returns in words whether that worked."""
        if step == self._loaded_step:
            return "saved" if step else "nothing to save"
        for _ in range(2):
            if self._begun_step != step:
                self._begin(step, state_dict, observer)
            if self.wait(observer) == step:
                return "saved"
            self._begun_step = -1  # try again: the fault may have passed
        return "NOT saved (events.log says why)"

    def _begin(
        self, step: int, state_dict: StateDict, observer: Observer, *, may_skip: bool = False, ephemeral: bool = False
    ) -> None:
        self._watchdog.heartbeat(f"the checkpoint of step {step}")
        saving = self._writer.save(
            step,
            self._shards,
            self._ema,
            state_dict(),
            may_skip=may_skip,
            ephemeral=ephemeral,
            needed_before=self._guard.needed_before(step),
        )
        if saving.started:
            self._begun_step = step
        costs = {"stall_s": saving.stall_s, "skipped_checkpoints": self._writer.skipped}
        observer.write("checkpoint", step, costs)

    def wait(self, observer: Observer) -> int | None:
        """Wait for the checkpoint under way; returns the step of the last one that was committed."""
        self._watchdog.heartbeat(f"the checkpoint of step {self._begun_step}")
        committed = self._writer.wait()
        self._log_events(observer)
        return committed

    def await_mirror(self, should_stop: Callable[[], str | None]) -> None:
        """Wait until the mirror has the stage's last checkpoint, for an hour at most, or a rank is asked to stop."""
        deadline = time.monotonic() + MIRROR_PATIENCE_S
        while True:
            waits = self._writer.mirroring and time.monotonic() < deadline
            waiting, stopping = self._world.sum([waits, should_stop() is not None])
            if stopping or not waiting:
                return
            self._watchdog.heartbeat("waiting for the mirror")
            time.sleep(MIRROR_ROUND_S)

    def should_rollback(self, rollback: Rollback) -> Rollback | Stop:
        """The rollback, if there is a checkpoint to go back to or it is the stage's start; else a Stop."""
        if rollback.first <= (self._saving.ephemeral_every or self._saving.every):
            return rollback
        try:
            found, _ = self._world.broadcast_from_rank0(
                lambda: latest_checkpoint(self._stage_dir.checkpoints, self._open_mirror(), rollback.first)
            )
        except (CheckpointError, StoreError):
            found = None
        if found is not None:
            return rollback
        return Stop(f"{rollback.reason}, but no good checkpoint from before step {rollback.first} is left")

    def rollback(self, rollback: Rollback, observer: Observer) -> None:
        """Remove the checkpoints from step `rollback.first` on."""
        self._watchdog.heartbeat("going back")
        self._writer.discard_after(rollback.first - 1)
        self._log_events(observer)

    def _log_events(self, observer: Observer) -> None:
        for event in self._writer.take_events():
            observer.event(event)

    def close(self) -> None:
        """Wait for a checkpoint under way, for half a minute at most."""
        self._writer.close(CLOSE_PATIENCE_S)
