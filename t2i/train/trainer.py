"""Training of one stage.

`Trainer.run` is the loop: batch, step, EMA, guard, metrics, score, validation and samples, checkpoint. All ranks take
part in every part; rank 0 alone writes. A rollback ends the trainer: the next one resumes from the earlier checkpoint.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.loader import Batch, merge_states
from t2i.build import build_conditioner, build_network, choose_dtype
from t2i.config.run import RunConfig
from t2i.distributed import Preempted, World
from t2i.engine.checkpoint import CheckpointError, Mirror
from t2i.pipeline import Pipeline
from t2i.train.build import build_ema, build_engine, build_objective, denoiser_training_flops
from t2i.train.checkpointing import (
    Saver,
    build_mirror,
    find_null_caption,
    gather_model,
    load_ema_weights,
    resume,
    store_null_caption,
)
from t2i.train.data import DataIterator, StageData
from t2i.train.guard import Guard, GuardError, Rollback, SkippedFile, Stop, explain, ids_of, is_finite
from t2i.train.metrics import EventLog, Observer, memory_gib, peak_flops
from t2i.train.preflight import dry_run
from t2i.train.profiling import Profiler
from t2i.train.run_dir import StageDir
from t2i.train.scoring import Evaluator, Scorer, Scoring
from t2i.train.step import StepOutput, TrainingStep, build_balance
from t2i.train.watchdog import Watchdog, is_lost_contact, slowest


class RollbackState(NamedTuple):
    """What a trainer leaves to the one that resumes from an earlier checkpoint."""

    guard: Guard
    rollback: Rollback
    mirror: Mirror | None
    """May still be copying a checkpoint."""


class Trainer:
    """Trains one stage from its newest checkpoint, or what the config starts it from, to its end.

    Args:
        attempt_id: the same on all ranks, and new at every start of the run.
        should_stop: why this rank is asked to stop, or None.
        scorer: scores the images of `scoring`, if the stage is scored.
        back: set after a rollback.

    Raises:
        UserError: the stage cannot start from what is there.
    """

    def __init__(
        self,
        config: RunConfig,
        stage_dir: StageDir,
        data: StageData,
        world: World,
        attempt_id: str,
        watchdog: Watchdog,
        should_stop: Callable[[], str | None],
        scorer: Scorer | None = None,
        back: RollbackState | None = None,
    ) -> None:
        self.config, self.stage_dir = config, stage_dir
        self.world, self.watchdog, self.should_stop = world, watchdog, should_stop
        self.steps = config.train.steps
        """Where the stage ends; lowered once its score no longer improves."""
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)

        # Networks, loss and optimizer
        dtype = choose_dtype(config.engine.dtype, world.device)
        self.conditioner = build_conditioner(config, world.device, dtype, config.engine.compile)
        self.null_caption = find_null_caption(config, stage_dir, self.conditioner)
        objective = build_objective(
            config.objective, config.model.prediction, world.device, dtype, config.engine.compile
        )
        network = build_network(config, self.conditioner.width, objective.patch_features)
        self.parameters = sum(p.numel() for p in network.denoiser.parameters())
        ema_denoiser = copy.deepcopy(network.denoiser).to(world.device, dtype).eval().requires_grad_(False)
        pipeline = Pipeline(config, ema_denoiser, self.conditioner, self.null_caption, world.device)
        events, val_samples = EventLog(config.directory, stage_dir.name, world.is_rank0), data.val_samples(config)
        self.evaluator = Evaluator(pipeline, world, val_samples, stage_dir.samples, watchdog.heartbeat, events)
        self.engine = build_engine(config, network, world, dtype)
        self.ema = build_ema(config, self.engine)
        self.balance = build_balance(config, network.denoiser)
        self.train_step = TrainingStep(
            config, stage_dir.name, world, self.conditioner, self.null_caption, objective, self.engine, self.balance
        )
        self._first_update = True
        self._dry_run = dry_run(self.train_step, config, stage_dir.name, world)

        # Resume
        resumed = resume(config, stage_dir, world, self.engine, self.ema, before=back.rollback.first if back else None)
        self.step, self.skipped_updates, self._origin = resumed.step, resumed.skipped_updates, resumed.origin
        self.scoring = Scoring(scorer, pipeline, world, stage_dir, watchdog.heartbeat) if scorer else None
        if self.scoring is not None:
            self.scoring.load_state_dict(resumed.scores)
        self.guard = back.guard if back else Guard(config.spike_guard)
        if back:
            self.guard.rollback(back.rollback, resumed.guard)
        elif resumed.guard is not None:
            self.guard.load_state_dict(resumed.guard)
        if self.balance is not None and resumed.balance is not None:
            self.balance.load_state_dict(resumed.balance)
        self._skipped = SkippedFile(config.directory, stage_dir.name, self.guard.events) if world.is_rank0 else None
        loader = data.loader(config, stage_dir.name, world, resumed.data)
        self.data = DataIterator(loader, world, config, stage_dir.name, self.step, data.corruption)

        # Checkpoints and metrics
        self.saver = Saver(
            config,
            stage_dir,
            world,
            watchdog,
            attempt_id,
            back.mirror if back else build_mirror(config, stage_dir, world),
            self.engine.shards,
            self.ema.params,
            self.guard,
            # A checkpoint that was loaded need not be saved again, except after a rollback: the guard's state is new.
            loaded_step=self.step if back is None else -1,
        )
        self.flops_per_image = denoiser_training_flops(config, self.conditioner.width)
        self.peak_flops = peak_flops(world.device, dtype)
        self.observer = Observer(config, stage_dir.name, self.step, active=world.is_rank0)

    def state_dict(self) -> dict[str, Any]:
        """The trainer's part of a checkpoint, in JSON's types. A collective."""
        self.data.flush()
        return {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "skipped_updates": self.skipped_updates,
            "optimizer_steps": self.engine.optimizer_steps,
            "data": merge_states(self.world.gather(self.data.state_dict())),
            "guard": self.guard.state_dict(),
            "balance": self.balance.state_dict() if self.balance is not None else None,
            "scores": self.scoring.state_dict() if self.scoring is not None else [],
        }

    def run(self) -> RollbackState | None:
        """Train to the end of the stage and write its model, or up to a rollback.

        Raises:
            Preempted: a rank was asked to stop; everything is saved.
            GuardError: too many updates were skipped, and a rollback does not help; everything is saved.
        """
        observer, first_step = self.observer, self.step
        self._begin()
        with Profiler(
            self.config.profiling, self.stage_dir.folder / "profile", self.world.rank, self.world.device, observer.event
        ) as profiler:
            while self.step < self.steps:
                decision: Rollback | Stop | None = None
                metrics: dict[str, Any] | None = None
                with profiler.step(self.step + 1):
                    began = time.perf_counter()
                    batch = self._next_batch()  # a preemption ends the run here, saved

                    if self.guard.skip_batch(self.step + 1):  # left out by a rollback
                        self.step += 1
                    else:
                        output = self.train_step(batch, self.step, self.guard.skip_update)
                        self._explain_first_update(batch, output)
                        self.step += 1
                        self.watchdog.step_done()
                        if output.result.skip_reason is None:
                            self.ema.update()
                        else:
                            self.skipped_updates += 1
                        decision = self.guard.record(
                            self.step, output.means["loss"], output.result.grad_norm, output.result.skip_reason
                        )
                        if self._due(self.config.logging.every):
                            metrics = self._log_metrics(batch, output, time.perf_counter() - began)
                    self._log_guard_events(batch)
                    observer.progress(metrics)

                if isinstance(decision, Rollback):
                    decision = self.saver.should_rollback(decision)  # a Stop if no checkpoint is left for it
                if isinstance(decision, Rollback):
                    self.saver.rollback(decision, observer)
                    return RollbackState(self.guard, decision, self.saver.mirror)
                self._evaluate()  # score, which may end the stage here; validation loss; samples
                self.saver.save_if_due(self.step, self.state_dict, observer, last=self.step == self.steps)
                if isinstance(decision, Stop):
                    saved = self.saver.save_now(self.step, self.state_dict, observer)
                    raise GuardError(f"stopped after step {self.step}, {saved}: {decision.reason}")
        self._finish(first_step)
        return None

    def close(self) -> None:
        """Let a checkpoint under way be finished, and release threads and memory; all of it, whatever fails."""
        with ExitStack() as closing:
            closing.callback(self.engine.close)
            closing.callback(self.observer.close)  # may wait for W&B, which the checkpoint does not
            closing.callback(self.data.close)
            closing.callback(self.saver.close)

    # Around the loop

    def _begin(self) -> None:
        self.observer.event(self._dry_run)
        self.observer.event(self._origin)
        if self.world.is_rank0:
            with self.observer.events.tolerate_disk_errors("the null caption"):
                store_null_caption(self.config, self.stage_dir, self.null_caption)
        self._end_if_score_is_flat()
        if self.step == 0 or self._score_due():  # a preemption may have left out a score that was due here
            self.observer.take_back(self.step, ("score", "validation"))
            self._evaluate()

    def _finish(self, first_step: int) -> None:
        """See that the last checkpoint is there, and write the model."""
        if first_step < self.step != self.saver.wait(self.observer):
            raise CheckpointError(
                f"the last checkpoint of stage {self.stage_dir.name} was not written (events.log says why): remove the "
                "cause and start the run again"
            )
        self.watchdog.heartbeat("writing the model")
        write = self._gather_model()
        self.world.broadcast_from_rank0(lambda: write(self.stage_dir.model))
        self.saver.await_mirror(self.should_stop)

    def _gather_model(self) -> Callable[[Path], None]:
        """A function that writes the model's folder, raw and EMA weights; rank 0 calls it."""
        return gather_model(self.config, self.engine.shards, self.ema.params, self.null_caption, self.world)

    def _due(self, every: int) -> bool:
        """The one cadence rule: every `every` steps, and at the end of the stage; 0: never."""
        return every > 0 and (self.step % every == 0 or self.step == self.steps)

    # Batch and preemption

    def _next_batch(self) -> Batch:
        """The next batch; an error, which is the same on every rank, leaves a checkpoint first."""
        what = f"step {self.step + 1}"
        self.watchdog.heartbeat(what)
        deadline = time.monotonic() + 60 * self.config.data.retry_minutes

        def should_stop() -> str | None:
            if time.monotonic() < deadline:  # retries of the store are no hang; a read that never returns is one
                self.watchdog.heartbeat(what)
            return self.should_stop()

        try:
            return self.data.next(self.step + 1, should_stop)
        except Exception as error:
            self._save_before_exit(error)
            raise

    def _save_before_exit(self, error: Exception) -> None:
        """Save because of an error that all ranks met, if the other ranks can still be reached."""
        lost = is_lost_contact(error)
        saved = "not saved" if lost else self.saver.save_now(self.step, self.state_dict, self.observer)
        self.observer.event(f"stopped after step {self.step}, {saved}: {error}")

    # Guard and metrics

    def _explain_first_update(self, batch: Batch, output: StepOutput) -> None:
        """If the first update after a start is not finite, log why."""
        first, self._first_update = self._first_update, False
        if not first or is_finite(output):
            return
        step = self.step + 1

        def repeat() -> StepOutput:
            self.watchdog.heartbeat(f"step {step}, without compilation")
            return self.train_step(batch, self.step, lambda loss, grad_norm: "repeated without compilation")

        compiled = self.config.engine.compile
        explain(output, repeat if compiled else None, self.world, lambda s: self.observer.event(f"step {step}: {s}"))

    def _log_guard_events(self, batch: Batch) -> None:
        """Write new events of the guard to events.log and, with the batch's ids, to skipped.jsonl."""
        if not (events := self.guard.take_events()):
            return
        ids = ids_of(batch, self.world)
        if self._skipped is not None:
            self._skipped.write(events, ids)
        for event in events:
            prefix = {"skipped_update": "update skipped: ", "skipped_batch": "batch "}.get(event["kind"], "")
            self.observer.event(f"step {event['step']}: {prefix}{event['reason']}")

    def _log_metrics(self, batch: Batch, output: StepOutput, step_s: float) -> dict[str, Any]:
        """Write a line of metrics: means over the global batch of this step, and what it cost."""
        images_per_s = self.config.train.batch_size / step_s
        flops = images_per_s * self.flops_per_image / self.world.size
        metrics = {
            **output.means,
            "total_steps": self.steps,
            "grad_norm": output.result.grad_norm,
            "images_per_s": images_per_s,
            "tflops": flops / 1e12,
            "mfu": flops / self.peak_flops,
            "step_s": step_s,
            "data_wait_s": batch.wait_s,
            "memory_gib": memory_gib(self.world.device),
            "resolution": self.config.data.resolution,
            "batch_size": self.config.train.batch_size,
            "skipped_updates": self.skipped_updates,
            **self.train_step.rates(self.step - 1),
            **slowest(self.world, batch.wait_s + output.own_s),
        }
        self.observer.write("train", self.step, metrics)
        counters, retries = self.data.flush()
        if retries or any(count for name, count in counters.items() if name != "samples"):
            retried = {f"retried_{kind}": count for kind, count in retries.items()}
            self.observer.write("counters", self.step, {**counters, **retried})
        return metrics

    # Evaluation of the EMA weights

    def _score_due(self) -> bool:
        """Whether a score is due that has not been taken."""
        return self.scoring is not None and self._due(self.config.scoring.every) and self.scoring.pending(self.step)

    def _evaluate(self) -> None:
        """Take the score, the validation loss and the samples that are due."""
        began, validation = time.monotonic(), self.config.validation
        if not (self._score_due() or self._due(validation.every)):
            return
        load_ema_weights(self.engine.shards, self.ema.params, self.evaluator.pipeline.denoiser)
        faults: list[str] = []  # an image that is not finite does not end training
        self.evaluator.pipeline.on_fault = faults.append
        if self._score_due():
            self._score(began)
        if self._due(validation.every) and self.evaluator.val_samples is not None:
            self.observer.write("validation", self.step, self.evaluator.loss())
        if self._due(validation.every) and validation.prompts:
            self.evaluator.grid(self.step)
        for fault in chain.from_iterable(self.world.gather(faults)):
            self.observer.event(fault)

    def _score(self, began: float) -> None:
        """Take the score, keep the model if it is the best so far, and decide whether the stage ends here."""
        assert self.scoring is not None
        try:
            score = self.scoring.measure(self.step, began, self.should_stop)
        except Preempted as error:
            self._save_before_exit(error)
            raise
        self.observer.write("score", self.step, score.metrics)
        if self.scoring.improves(score):
            self.watchdog.heartbeat("writing the best model")
            self.observer.event(self.scoring.keep(score, self._gather_model()))
        self._end_if_score_is_flat()

    def _end_if_score_is_flat(self) -> None:
        """Make this step the stage's last if its score, taken before a restart or now, no longer improves."""
        if self.scoring is not None and (reason := self.scoring.reason_to_end(self.step)) is not None:
            self.observer.event(reason)
            self.steps = self.step
