"""One stage of a run.

The loop has one order: batch, step, average, guard, numbers, pictures, checkpoint. All ranks take part in every part;
rank 0 alone writes numbers and pictures. Going back to an earlier checkpoint is another start from there.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.errors import StoreError
from data.loader import Batch, merge_states
from t2i.build import build_conditioner, choose_dtype, condition_identity
from t2i.config import RunConfig
from t2i.config_base import ConfigError
from t2i.engine.checkpoint import CheckpointError, CheckpointWriter, Mirror, newest_anywhere, sync, values_of
from t2i.engine.ema import Ema
from t2i.engine.shards import gather_full
from t2i.model_folder import DENOISER, NULL_CAPTION, read_model, write_model
from t2i.pipeline import Pipeline
from t2i.train.balance import build_balance
from t2i.train.build import build_engine, build_network, build_objective, denoiser_training_flops
from t2i.train.dry_run import dry_run
from t2i.train.failures import is_lost_contact
from t2i.train.guard import Guard, GuardError, Rollback, SkippedFile, Stop, ids_of
from t2i.train.intake import Intake
from t2i.train.observe import Observer, memory_gib, peak_flops
from t2i.train.places import StagePlace
from t2i.train.processes import World
from t2i.train.profiling import Profiler
from t2i.train.stage_data import StageData
from t2i.train.start import mirror_of, restore
from t2i.train.step import Trained, TrainingStep
from t2i.train.validate import Evaluator
from t2i.train.watch import Watch, slowest

SAVE_PATIENCE_S = 30.0
MIRROR_PATIENCE_S = 3600.0
"""At the end of a stage the mirror may still be copying its last checkpoint."""
MIRROR_ROUND_S = 0.5


class Back(NamedTuple):
    """What a trainer that goes back to an earlier checkpoint leaves to the next one."""

    guard: Guard
    rollback: Rollback
    mirror: Mirror | None
    """May still be busy with what was."""


class StageTrainer:
    """Trains one stage, from wherever it stands to its end.

    Args:
        config: the stage's settings (`stage_config`).
        place: where it reads and writes.
        data: its sources, opened.
        world: this process.
        attempt: a word that all ranks share and no other start of the run does.
        watch: told that this rank gets on.
        back: what the trainer before left, if its guard asked to go back.

    Raises:
        UserError: the stage cannot start from what is there.
    """

    def __init__(
        self,
        config: RunConfig,
        place: StagePlace,
        data: StageData,
        world: World,
        attempt: str,
        watch: Watch,
        back: Back | None = None,
    ) -> None:
        self.config = config
        self.place = place
        self.world, self.watch = world, watch
        self.steps = config.train.steps
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)
        dtype = choose_dtype(config.engine.dtype, world.device)
        self.conditioner = build_conditioner(config, world.device, dtype)
        self.null_caption = self._stored_null_caption()
        objective = build_objective(config.objective, world.device)
        network = build_network(config, self.conditioner.width, objective.patch_features)
        self.parameters = sum(p.numel() for p in network.denoiser.parameters())
        averaged = copy.deepcopy(network.denoiser).to(world.device, dtype).eval().requires_grad_(False)
        pipeline = Pipeline(config, averaged, self.conditioner, self.null_caption, world.device)
        self.evaluator = Evaluator(pipeline, world, data.heldout_samples(config), place.samples, watch.alive)
        self.engine = build_engine(config, network, world, dtype)
        self.ema = Ema(self.engine.shards, config.ema.decay)
        self.balance = build_balance(config, network.denoiser.head)
        self._train = TrainingStep(
            config, place.name, world, self.conditioner, self.null_caption, objective, self.engine, self.balance
        )
        self._dry_run = dry_run(self._train, config, place.name, world)
        start = restore(config, place, world, self.engine, self.ema, before=back.rollback.first if back else None)
        self.step, self.skipped_updates, self._origin = start.step, start.skipped_updates, start.origin
        self._begun_step = -1  # of the last checkpoint begun
        # What was loaded need not be saved, but for a guard that knows more by now.
        self._loaded_step = self.step if back is None else -1
        self.guard = back.guard if back else Guard(config.guard, start.guard)
        if back:
            self.guard.roll_back(back.rollback, start.guard)
        if self.balance is not None and start.balance is not None:
            self.balance.take_up(start.balance)
        self._skipped = SkippedFile(config.directory, place.name, self.guard.events) if world.is_main else None
        loader = data.loader(config, place.name, world, start.data)
        self.intake = Intake(loader, world, config, place.name, self.step, data.damage)
        self.mirror = back.mirror if back else self._build_mirror()
        self.writer = self._build_writer(attempt)
        self.flops_per_image = denoiser_training_flops(config, self.conditioner.width)
        self.peak_flops = peak_flops(world.device, dtype)

    def _build_mirror(self) -> Mirror | None:
        saving = self.config.checkpoint
        store = mirror_of(self.config, self.place) if self.world.is_main else None
        return Mirror(store, keep=saving.keep, keep_every=saving.keep_every) if store is not None else None

    def _build_writer(self, attempt: str) -> CheckpointWriter:
        saving = self.config.checkpoint
        writer = CheckpointWriter(
            self.place.checkpoints,
            rank=self.world.rank,
            world_size=self.world.size,
            attempt=attempt,
            keep=saving.keep,
            keep_every=saving.keep_every,
            mirror=self.mirror,
            gather=self.world.gather,
        )
        writer.reserve(self.engine.shards, self.ema.values)
        return writer

    # Where the stage stands

    def _stored_null_caption(self) -> Tensor:
        """The null caption's states (L, E) or class (): computed once, and kept with the run and its models."""
        path, source = self.place.null_caption, self.config.init.source
        fresh, made_by = self.conditioner.null_caption(), condition_identity(self.config)
        if path.exists():
            with safe_open(path, framework="pt") as file:
                stored_by, states = (file.metadata() or {}).get("text"), file.get_tensor(NULL_CAPTION)
            if stored_by != made_by:
                raise ConfigError(
                    f"{path} was computed with {stored_by}, this run has {made_by}: a run keeps its text "
                    "section and its classes; give this one another name"
                )
            return states.to(fresh)
        if source not in ("previous", "scratch"):
            states = read_model(Path(source), self.config.init.weights).null_caption
            if states.shape != fresh.shape:
                raise ConfigError(
                    f"init.source {source} has another text encoder, text.length or model.condition than this run"
                )
            return states.to(fresh)
        return fresh

    def _save_checkpoint(self, observer: Observer, *, may_skip: bool = False, ephemeral: bool = False) -> None:
        self.watch.alive(f"the checkpoint of step {self.step}")
        self.intake.flush()
        data = merge_states(self.world.gather(self.intake.state))
        state = {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "skipped_updates": self.skipped_updates,
            "updates": self.engine.updates,
            "data": data,
            "guard": self.guard.state,
            "balance": self.balance.state if self.balance is not None else None,
        }
        saving = self.writer.save(
            self.step,
            self.engine.shards,
            self.ema.values,
            state,
            may_skip=may_skip,
            ephemeral=ephemeral,
            needed_before=self.guard.needed_before(self.step),
        )
        if saving.begun:
            self._begun_step = self.step
        costs = {"stall_s": saving.stall_s, "skipped_checkpoints": self.writer.skipped}
        observer.write("checkpoint", self.step, costs)

    # The loop

    def run(self, observer: Observer, leave: Callable[[], str | None]) -> Back | None:
        """Train to the end of the stage and write its model, or to where the guard wants to go back.

        Args:
            leave: why this rank is asked to leave; None: it is not.

        Raises:
            Departed: a rank was asked to leave; everything is saved.
            GuardError: too many updates were bad, and going back does not help; everything is saved.
        """
        observer.event(self._dry_run)
        observer.event(self._origin)
        if self.world.is_main and not self.place.null_caption.exists():
            aside = self.place.null_caption.with_suffix(".partial")
            states = self.null_caption.contiguous().cpu()
            save_file({NULL_CAPTION: states}, aside, metadata={"text": condition_identity(self.config)})
            sync(aside)
            aside.rename(self.place.null_caption)
        if self.step == 0:
            self._evaluate(observer)
        begun, folder = self.step, self.place.folder / "profile"
        with Profiler(self.config.profiling, folder, self.world.rank, self.world.device, observer.event) as profiler:
            while self.step < self.steps:
                with profiler.step(self.step + 1):
                    decision = self._advance(observer, leave)
                if isinstance(decision, Rollback):
                    decision = self._leads_back(decision)
                if isinstance(decision, Rollback):
                    self.watch.alive("going back")
                    self.writer.discard_after(decision.first - 1)
                    self._tell(observer)
                    return Back(self.guard, decision, self.mirror)
                if self._due(self.config.validation.every):
                    self._evaluate(observer)
                self._save_when_due(observer)
                if isinstance(decision, Stop):
                    saved = self._save_now(observer)
                    raise GuardError(f"stopped after step {self.step}, {saved}: {decision.reason}")
        self.watch.alive("the last checkpoint")
        committed = self.writer.wait()
        self._tell(observer)
        if begun < self.steps != committed:
            raise CheckpointError(
                f"the last checkpoint of stage {self.place.name} was not written (events.log says why): mend it and "
                "start the run again"
            )
        self.watch.alive("writing the model")
        self._write_model()
        self._await_mirror(leave)
        return None

    def _await_mirror(self, leave: Callable[[], str | None]) -> None:
        """Let the mirror have the stage's last checkpoint, within bounds; all ranks wait, and are seen to."""
        deadline = time.monotonic() + MIRROR_PATIENCE_S
        while True:
            waits = self.writer.mirroring and time.monotonic() < deadline
            waiting, leaving = self.world.sum([waits, leave() is not None])
            if leaving or not waiting:
                return
            self.watch.alive("waiting for the mirror")
            time.sleep(MIRROR_ROUND_S)

    def _leads_back(self, rollback: Rollback) -> Rollback | Stop:
        """See that there is a checkpoint to go back to, or the stage's start, before later ones are given up."""
        saving = self.config.checkpoint
        if rollback.first <= (saving.ephemeral_every or saving.every):
            return rollback
        store = mirror_of(self.config, self.place) if self.world.is_main else None
        try:
            found, _ = self.world.from_main(lambda: newest_anywhere(self.place.checkpoints, store, rollback.first))
        except (CheckpointError, StoreError):
            found = None
        lost = f"{rollback.reason}, but no good checkpoint from before step {rollback.first} is left"
        return rollback if found is not None else Stop(lost)

    def _advance(self, observer: Observer, leave: Callable[[], str | None]) -> Rollback | Stop | None:
        """Take the next batch, and train on it unless a rollback left it out."""
        began = time.perf_counter()
        batch = self._next_batch(observer, leave)
        decision: Rollback | Stop | None = None
        numbers: dict[str, Any] | None = None
        if self.guard.skip(self.step + 1):
            self.step += 1
        else:
            trained = self._train(batch, self.step, self.guard.veto)
            self.step += 1
            self.watch.step_done()
            loss, result = trained.means["loss"], trained.result
            if result.vetoed is None:
                self.ema.update()
            else:
                self.skipped_updates += 1
            decision = self.guard.record(self.step, loss, result.grad_norm, result.vetoed)
            if self.step % self.config.logging.every == 0 or self.step == self.steps:
                numbers = self._numbers(trained, batch.wait_s, time.perf_counter() - began)
                numbers |= self._train.rates(self.step - 1) | slowest(self.world, batch.wait_s + trained.own_s)
                observer.write("train", self.step, numbers)
                self._write_counters(observer)
        self._tell_guard(observer, batch)
        observer.progress(numbers)
        return decision

    def _tell_guard(self, observer: Observer, batch: Batch) -> None:
        """What the guard has to say of this batch, in events.log and, with the batch's ids, in skipped.jsonl."""
        if not (events := self.guard.take_events()):
            return
        ids = ids_of(batch, self.world)
        if self._skipped is not None:
            self._skipped.write(events, ids)
        for event in events:
            did = {"veto": "update skipped: ", "skip": "batch "}.get(event["kind"], "")
            observer.event(f"step {event['step']}: {did}{event['reason']}")

    def _save_when_due(self, observer: Observer) -> None:
        """Regular checkpoints and ephemeral ones between them; the last of a stage is never skipped."""
        saving = self.config.checkpoint
        if self._due(saving.every):
            self._save_checkpoint(observer, may_skip=self.step < self.steps)
        elif saving.ephemeral_every and self.step % saving.ephemeral_every == 0:
            self._save_checkpoint(observer, may_skip=True, ephemeral=True)
        self._tell(observer)

    def _tell(self, observer: Observer) -> None:
        """What the checkpoints' threads have to say."""
        for event in self.writer.take_events():
            observer.event(event)

    def _next_batch(self, observer: Observer, leave: Callable[[], str | None]) -> Batch:
        """The next batch, or an end that can be resumed: saved, and the same error on every rank."""
        what = f"step {self.step + 1}"
        self.watch.alive(what)
        patience = time.monotonic() + 60 * self.config.data.retry_minutes

        def reason_to_leave() -> str | None:
            if time.monotonic() < patience:  # a store's patience counts, a read that never returns does not
                self.watch.alive(what)
            return leave()

        try:
            return self.intake.next(self.step + 1, reason_to_leave)
        except Exception as error:
            saved = "not saved" if is_lost_contact(error) else self._save_now(observer)
            observer.event(f"stopped after step {self.step}, {saved}: {error}")
            raise

    def _save_now(self, observer: Observer) -> str:
        """See that a checkpoint of where the stage stands is there when this returns; say in words whether it is."""
        if self.step == self._loaded_step:
            return "saved" if self.step else "nothing to save"
        for _ in range(2):
            if self._begun_step != self.step:
                self._save_checkpoint(observer)
            self.watch.alive(f"the checkpoint of step {self.step}")
            committed = self.writer.wait()
            self._tell(observer)
            if committed == self.step:
                return "saved"
            self._begun_step = -1  # a fault that may have passed
        return "NOT saved (events.log says why)"

    def _due(self, every: int) -> bool:
        """The one rule for what happens every so many steps: then, and at the end of the stage."""
        return every > 0 and (self.step % every == 0 or self.step == self.steps)

    def _numbers(self, trained: Trained, wait_s: float, step_s: float) -> dict[str, Any]:
        """One line of metrics: means over the global batch of this step, and what it cost."""
        images_per_s = self.config.train.batch_size / step_s
        flops = images_per_s * self.flops_per_image / self.world.size
        return {
            **trained.means,
            "total_steps": self.steps,
            "grad_norm": trained.result.grad_norm,
            "images_per_s": images_per_s,
            "tflops": flops / 1e12,
            "mfu": flops / self.peak_flops,
            "step_s": step_s,
            "data_wait_s": wait_s,
            "memory_gib": memory_gib(self.world.device),
            "resolution": self.config.data.resolution,
            "batch_size": self.config.train.batch_size,
            "skipped_updates": self.skipped_updates,
        }

    def _write_counters(self, observer: Observer) -> None:
        """Samples used and passed over, by reason, and requests that were retried, over all ranks."""
        counters, retries = self.intake.flush()
        passed_over = any(count for name, count in counters.items() if name != "samples")
        if passed_over or retries:
            retried = {f"retried_{kind}": count for kind, count in retries.items()}
            observer.write("counters", self.step, {**counters, **retried})

    def _load_average(self) -> None:
        """Put the averaged weights into the evaluator's network."""
        target = dict(self.evaluator.pipeline.denoiser.named_parameters())
        for name, value in gather_full(self.engine.shards, self.ema.values):
            if name.startswith(DENOISER):
                target[name.removeprefix(DENOISER)].data.copy_(value)

    def _evaluate(self, observer: Observer) -> None:
        """Validation loss and sample grid with the averaged weights."""
        validation = self.config.validation
        if not validation.every:
            return
        self._load_average()
        if self.evaluator.heldout is not None:
            observer.write("validation", self.step, self.evaluator.loss())
        if validation.prompts:
            self.evaluator.grid(self.step)

    def _write_model(self) -> None:
        """The stage's model folder, raw and averaged weights: the stage is then done."""
        raw, ema = (
            {name: whole.cpu() for name, whole in gather_full(self.engine.shards, slices) if self.world.is_main}
            for slices in (values_of(self.engine.shards), self.ema.values)
        )
        self.world.from_main(lambda: write_model(self.place.model, self.config, raw, ema, self.null_caption))

    def close(self) -> None:
        """Let a checkpoint under way be finished; release threads and memory."""
        self.writer.close(SAVE_PATIENCE_S)
        self.intake.close()
        self.engine.close()
