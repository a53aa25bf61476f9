"""One stage of a run.

The loop has one order: batch, step, average, guard, numbers, score, pictures, checkpoint. All ranks take part in every
part; rank 0 alone writes numbers and pictures. Going back to an earlier checkpoint is another start from there.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
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
    load_average,
    restore,
    store_null_caption,
)
from t2i.train.data import Intake, StageData
from t2i.train.guard import Guard, GuardError, Rollback, SkippedFile, Stop, explain, ids_of, is_finite, never
from t2i.train.metrics import EventLog, Observer, memory_gib, peak_flops
from t2i.train.preflight import dry_run
from t2i.train.profiling import Profiler
from t2i.train.run_dir import StageDir
from t2i.train.scoring import Evaluator, Scorer, Scoring
from t2i.train.step import Trained, TrainingStep, build_balance
from t2i.train.watchdog import Watch, is_lost_contact, slowest


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
        scorer: judges the pictures of `scoring`; None: the stage is not scored.
        back: what the trainer before left, if its guard asked to go back.

    Raises:
        UserError: the stage cannot start from what is there.
    """

    def __init__(
        self,
        config: RunConfig,
        place: StageDir,
        data: StageData,
        world: World,
        attempt: str,
        watch: Watch,
        scorer: Scorer | None = None,
        back: Back | None = None,
    ) -> None:
        self.config = config
        self.place = place
        self.world, self.watch = world, watch
        self.steps = config.train.steps
        """At which the stage ends: fewer once its score says so."""
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)
        dtype = choose_dtype(config.engine.dtype, world.device)
        self.conditioner = build_conditioner(config, world.device, dtype, config.engine.compile)
        self.null_caption = find_null_caption(config, place, self.conditioner)
        objective = build_objective(
            config.objective, config.model.prediction, world.device, dtype, config.engine.compile
        )
        network = build_network(config, self.conditioner.width, objective.patch_features)
        self.parameters = sum(p.numel() for p in network.denoiser.parameters())
        averaged = copy.deepcopy(network.denoiser).to(world.device, dtype).eval().requires_grad_(False)
        pipeline = Pipeline(config, averaged, self.conditioner, self.null_caption, world.device)
        events, heldout = EventLog(config.directory, place.name, world.is_rank0), data.heldout_samples(config)
        self.evaluator = Evaluator(pipeline, world, heldout, place.samples, watch.alive, events)
        self.engine = build_engine(config, network, world, dtype)
        self.ema = build_ema(config, self.engine)
        self.balance = build_balance(config, network.denoiser)
        self._train = TrainingStep(
            config, place.name, world, self.conditioner, self.null_caption, objective, self.engine, self.balance
        )
        self._first = True  # update of this start
        self._dry_run = dry_run(self._train, config, place.name, world)
        start = restore(config, place, world, self.engine, self.ema, before=back.rollback.first if back else None)
        self.step, self.skipped_updates, self._origin = start.step, start.skipped_updates, start.origin
        self.scoring = Scoring(scorer, pipeline, world, place, watch.alive, start.scores) if scorer else None
        self.guard = back.guard if back else Guard(config.spike_guard, start.guard)
        if back:
            self.guard.roll_back(back.rollback, start.guard)
        if self.balance is not None and start.balance is not None:
            self.balance.take_up(start.balance)
        self._skipped = SkippedFile(config.directory, place.name, self.guard.events) if world.is_rank0 else None
        loader = data.loader(config, place.name, world, start.data)
        self.intake = Intake(loader, world, config, place.name, self.step, data.damage)
        self.saver = Saver(
            config,
            place,
            world,
            watch,
            attempt,
            back.mirror if back else build_mirror(config, place, world),
            self.engine.shards,
            self.ema.values,
            self.guard,
            # What was loaded need not be saved, but for a guard that knows more by now.
            loaded_step=self.step if back is None else -1,
        )
        self.flops_per_image = denoiser_training_flops(config, self.conditioner.width)
        self.peak_flops = peak_flops(world.device, dtype)

    def _state(self) -> dict[str, Any]:
        """The trainer's part of a checkpoint."""
        self.intake.flush()
        return {
            "config": self.config.model_dump(mode="json"),
            "step": self.step,
            "skipped_updates": self.skipped_updates,
            "optimizer_steps": self.engine.optimizer_steps,
            "data": merge_states(self.world.gather(self.intake.state)),
            "guard": self.guard.state,
            "balance": self.balance.state if self.balance is not None else None,
            "scores": self.scoring.state if self.scoring is not None else [],
        }

    # The loop

    def run(self, observer: Observer, leave: Callable[[], str | None]) -> Back | None:
        """Train to the end of the stage and write its model, or to where the guard wants to go back.

        Args:
            leave: why this rank is asked to leave; None: it is not.

        Raises:
            Preempted: a rank was asked to leave; everything is saved.
            GuardError: too many updates were bad, and going back does not help; everything is saved.
        """
        observer.event(self._dry_run)
        observer.event(self._origin)
        if self.world.is_rank0:
            with observer.events.beside("the null caption"):
                store_null_caption(self.config, self.place, self.null_caption)
        self._end_if_scored_enough(observer)
        if self.step == 0 or self._scores_now():  # a preemption may have left out what was due here
            observer.take_back(self.step, ("score", "validation"))
            self._evaluate(observer, leave)
        begun, folder = self.step, self.place.folder / "profile"
        with Profiler(self.config.profiling, folder, self.world.rank, self.world.device, observer.event) as profiler:
            while self.step < self.steps:
                with profiler.step(self.step + 1):
                    decision = self._advance(observer, leave)
                if isinstance(decision, Rollback):
                    decision = self.saver.leads_back(decision)
                if isinstance(decision, Rollback):
                    self.saver.go_back(decision, observer)
                    return Back(self.guard, decision, self.saver.mirror)
                self._evaluate(observer, leave)
                self.saver.when_due(self.step, self._state, observer, last=self.step == self.steps)
                if isinstance(decision, Stop):
                    saved = self.saver.now(self.step, self._state, observer)
                    raise GuardError(f"stopped after step {self.step}, {saved}: {decision.reason}")
        if begun < self.step != self.saver.wait(observer):
            raise CheckpointError(
                f"the last checkpoint of stage {self.place.name} was not written (events.log says why): mend it and "
                "start the run again"
            )
        self.watch.alive("writing the model")
        write = self._gather_model()
        self.world.broadcast_from_rank0(lambda: write(self.place.model))
        self.saver.await_mirror(leave)
        return None

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
            self._look_at_first(batch, trained, observer)
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

    def _look_at_first(self, batch: Batch, trained: Trained, observer: Observer) -> None:
        """Explain the first update of this start where it is not finite."""
        first, self._first = self._first, False
        if not first or is_finite(trained):
            return

        def repeat() -> Trained:
            self.watch.alive(f"step {self.step + 1}, without compilation")
            return self._train(batch, self.step, never)

        compiled = self.config.engine.compile
        explain(
            trained,
            repeat if compiled else None,
            self.world,
            lambda text: observer.event(f"step {self.step + 1}: {text}"),
        )

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
            self._stop_saved(error, observer)
            raise

    def _stop_saved(self, error: Exception, observer: Observer) -> None:
        """Before an error that all ranks met ends the run: save, if the others can still be reached."""
        saved = "not saved" if is_lost_contact(error) else self.saver.now(self.step, self._state, observer)
        observer.event(f"stopped after step {self.step}, {saved}: {error}")

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

    # The averaged weights

    def _scores_now(self) -> bool:
        """Whether a score is due that has not been taken."""
        return self.scoring is not None and self._due(self.config.scoring.every) and self.scoring.pending(self.step)

    def _evaluate(self, observer: Observer, leave: Callable[[], str | None]) -> None:
        """What is due of a score, which may end the stage here, validation loss and sample grid."""
        began, validation = time.monotonic(), self.config.validation
        if not (self._scores_now() or self._due(validation.every)):
            return
        load_average(self.engine.shards, self.ema.values, self.evaluator.pipeline.denoiser)
        faults: list[str] = []  # pictures that are not finite end no training
        self.evaluator.pipeline.on_fault = faults.append
        if self._scores_now():
            self._score(began, observer, leave)
        if self._due(validation.every) and self.evaluator.heldout is not None:
            observer.write("validation", self.step, self.evaluator.loss())
        if self._due(validation.every) and validation.prompts:
            self.evaluator.grid(self.step)
        for fault in chain.from_iterable(self.world.gather(faults)):
            observer.event(fault)

    def _score(self, began: float, observer: Observer, leave: Callable[[], str | None]) -> None:
        """Take the score, keep the model if it is the best so far, and see whether the stage ends here."""
        assert self.scoring is not None
        try:
            score = self.scoring.measure(self.step, began, leave)
        except Preempted as error:
            self._stop_saved(error, observer)
            raise
        observer.write("score", self.step, score.metrics)
        if self.scoring.improves(score):
            self.watch.alive("writing the best model")
            observer.event(self.scoring.keep(score, self._gather_model()))
        self._end_if_scored_enough(observer)

    def _end_if_scored_enough(self, observer: Observer) -> None:
        """Make this step the stage's last one if the score that was taken here says so, be it before a restart."""
        if self.scoring is not None and (reason := self.scoring.why_go_on(self.step)) is not None:
            observer.event(reason)
            self.steps = self.step

    def _gather_model(self) -> Callable[[Path], None]:
        """What writes the model's folder, raw and averaged weights, on rank 0."""
        return gather_model(self.config, self.engine.shards, self.ema.values, self.null_caption, self.world)

    def close(self) -> None:
        """Let a checkpoint under way be finished; release threads and memory."""
        self.saver.close()
        self.intake.close()
        self.engine.close()
