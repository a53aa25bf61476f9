"""Evaluation during training, with the EMA weights: validation loss, sample grids, and scores.

Validation: noise and times are fixed. Sample j of n always gets noise j and the time at a fixed quantile of the
training density, so the curve shows the model alone. Nothing here touches the numbers of a training step.

Scores: images of the EMA weights, scored by a `Scorer` that is passed in (`evaluation` has them).
- An image depends on the weights, its prompt and its number alone: a score is the same for any number of ranks.
- Ranks generate and score in rounds of one batch each. Before each round a small sum tells them whether time is left
  and whether a rank is asked to stop.
- Prompts are ordered so that every beginning of the list covers all tasks: a score that was cut short says something,
  though not enough to decide by.
- Scores are in the checkpoint, so a resumed stage decides alike. A score that a preemption interrupts is taken again.
- The best model has the highest complete score among those in the checkpoint. If its file names another one, of a
  future that a kill or a rollback gave up, it does not count, and the next complete score replaces it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from data.errors import UserError
from data.files import atomic_write, commit, write_json, write_png
from data.preview import ValidationSet
from data.randomness import key, permutation
from t2i.config.run import RunConfig
from t2i.config.train import ScoringConfig
from t2i.diffusion.flow import flow_matching_loss, interpolate, slot_noise, to_unit_range
from t2i.diffusion.objective import LossTerms, add_bands, band_names
from t2i.distributed import Preempted, World
from t2i.models.text import stack_conditions
from t2i.pipeline import Picture, Pipeline, batches_of
from t2i.train.metrics import EventLog
from t2i.train.run_dir import StageDir
from t2i.train.step import GlobalMeans, training_times

OVERALL = "overall"
"""The score that decisions use; higher is better."""


class Scorer(Protocol):
    """Scores images of its prompts; the same on every rank."""

    @property
    def prompts(self) -> Sequence[str]:
        """What to generate."""

    @property
    def tasks(self) -> Sequence[str]:
        """The task of each prompt."""

    def judge(self, index: int, image: Tensor) -> Any:
        """The result, in JSON's types, for an image of prompt `index`, uint8 (3, H, W) on the host."""

    def summary(self, results: Sequence[Any]) -> dict[str, float]:
        """Scores by name, "overall" and the tasks', from the results of at least one image."""


BuildScorer = Callable[[ScoringConfig, torch.device], Scorer]
"""Makes a stage's scorer on a device."""


def build_scorers(settings: dict[int, RunConfig], build: BuildScorer, world: World) -> dict[int, Scorer]:
    """The scorers of those stages that are scored, by index; stages with the same settings share one. A collective.

    Raises:
        UserError: on every rank, if the scorer of one cannot be built.
    """
    made: dict[tuple[str, str | None, str | None], Scorer] = {}

    def scorer_of(asked: ScoringConfig) -> Scorer:
        kind = (asked.scorer, asked.detector_weights, asked.clip)
        try:
            if kind not in made:
                made[kind] = build(asked, world.device)
            known = len(made[kind].prompts)
            if asked.prompts > known:
                raise UserError(f"scoring.prompts {asked.prompts} are asked for, and it has {known}")
        except UserError as error:
            raise UserError(f"scoring.scorer {asked.scorer}: {error}") from error
        return made[kind]

    return world.raise_on_all_ranks(
        lambda: {index: scorer_of(stage.scoring) for index, stage in settings.items() if stage.scoring.every}
    )


@dataclass
class Evaluator:
    """Validation and sample grids of one stage; all ranks take part in every call."""

    pipeline: Pipeline
    """Its denoiser holds the EMA weights."""
    world: World
    val_samples: ValidationSet | None
    folder: Path
    """For the sample grids."""
    heartbeat: Callable[[str], None]
    events: EventLog

    @torch.no_grad()
    def loss(self) -> dict[str, float]:
        """Flow-matching loss on the validation set: `loss`, and `loss_tA-B` by bands of t."""
        assert self.val_samples is not None
        config, device, n = self.pipeline.config, self.world.device, len(self.val_samples.captions)
        noise_key = key(config.seed, "validation")
        t = training_times(config.objective, (permutation(noise_key, n) + 0.5) / n)
        mine = np.arange(self.world.rank, n, self.world.size)
        terms = LossTerms()
        # All at once, so that a text encoder that does not stay loaded is loaded once.
        self.heartbeat("encoding validation captions")
        conditions = self.pipeline.conditioner([self.val_samples.captions[i] for i in mine])
        for start in range(0, len(mine), config.train.micro_batch_size):
            self.heartbeat("validation")
            index = mine[start : start + config.train.micro_batch_size]
            image = to_unit_range(self.val_samples.pixels[index].to(device))
            times = torch.from_numpy(t[index]).float().to(device)
            noise = slot_noise(noise_key, index, image.shape[1:], device, config.objective.noise_scale)
            x_t = interpolate(image, noise, times)
            condition = stack_conditions(conditions[start : start + len(index)])
            output = self.pipeline.denoiser(x_t, times, condition).output
            losses = flow_matching_loss(output, image, noise, times, config.model.prediction, config.objective.t_eps)
            terms.add("loss", losses.sum(), len(index))
            add_bands(terms, "loss", losses, t[index])
        return GlobalMeans(terms, ["loss", *band_names("loss")], device).read()

    def grid(self, step: int) -> None:
        """Generate the config's prompts, each rank its part, and write the grid with its description."""
        validation, sampling = self.pipeline.config.validation, self.pipeline.config.sampling
        pictures = [Picture(prompt) for prompt in validation.prompts]
        batches = self.world.split_for_rank(batches_of(pictures, sampling.batch_size))
        own = [picture for batch in batches for picture in batch]
        drawn = [self.pipeline.draw([], sampling)]
        self.heartbeat("drawing the sample grid")
        for batch in self.pipeline.draw_batches(own, sampling):
            drawn.append(batch)
            self.heartbeat("drawing the sample grid")
        mine = torch.cat(drawn)
        shares = self.world.gather(mine.numpy())
        if not self.world.is_rank0:
            return
        description = {
            "prompts": validation.prompts,
            "columns": validation.columns,
            "rows": -(-len(pictures) // validation.columns),
            "weights": "ema",
            "solver": sampling.solver,
            "order": sampling.order,
            "steps": sampling.steps,
            "guidance_scale": sampling.guidance_scale,
            "seed": sampling.seed,
        }
        with self.events.tolerate_disk_errors("the sample grid"):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"step_{step:06d}.png"
            write_png(path, tile(np.concatenate(shares), validation.columns))
            write_json(path.with_suffix(".json"), description)


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 (n, 3, H, W) to one image (rows H, columns W, 3), row by row; empty cells are white."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    cells = np.full((rows * columns, height, width, 3), 255, np.uint8)
    cells[:count] = images.transpose(0, 2, 3, 1)
    return cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, -1, 3)


BEST = "best.json"
"""File in the best model's folder with its step and score."""

Scores = Sequence[tuple[int, float | None]]
"""Step and overall score, in order; the score is None if it was cut short."""


def spread(tasks: Sequence[str], count: int) -> list[int]:
    """Indices of `count` prompts, spread evenly over the tasks and over each task's prompts.

    The tasks take turns, so every beginning of the list is spread too: until their prompts run out, the counts of two
    tasks differ by one at most.
    """
    assert count <= len(tasks)
    found: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        found.setdefault(task, []).append(index)
    turns = [task for turn in range(count) for task, own in found.items() if turn < len(own)][:count]
    shares = Counter(turns)
    chosen = {
        task: iter([found[task][turn * len(found[task]) // share] for turn in range(share)])
        for task, share in shares.items()
    }
    return [next(chosen[task]) for task in turns]


def promotes(scores: Scores, min_delta: float, patience: int) -> bool:
    """Whether the stage ends, since its score no longer improves.

    It ends if the best score so far is less than `min_delta` above the best one of `patience` steps ago or earlier, so
    a single bad score ends nothing. A score that was cut short never ends a stage, nor does one before step `patience`.
    """
    if not scores or scores[-1][1] is None:
        return False
    known = [(step, score) for step, score in scores if score is not None]
    before = [score for step, score in known if step <= scores[-1][0] - patience]
    return bool(before) and max(score for _, score in known) - max(before) < min_delta


def time_left(spent: float, longest: float, limit: float) -> bool:
    """Whether a round as long as the longest so far would end within the limit; all in seconds."""
    return spent + longest <= limit


@dataclass(frozen=True)
class Score:
    """A stage's score at a step."""

    step: int
    values: dict[str, float]
    prompts: int
    """Number of prompts with images."""
    images: int
    """Number of images."""
    complete: bool
    """Whether these are all images."""
    held_s: float
    """Seconds for which training waited."""

    @property
    def metrics(self) -> dict[str, Any]:
        counts = {"prompts": self.prompts, "images": self.images, "complete": self.complete, "held_s": self.held_s}
        return {**self.values, **counts}


class Scoring:
    """Scores one stage. All ranks take part in every call.

    The denoiser of `pipeline` holds the EMA weights.
    """

    def __init__(
        self,
        scorer: Scorer,
        pipeline: Pipeline,
        world: World,
        stage_dir: StageDir,
        heartbeat: Callable[[str], None],
    ) -> None:
        self.scores: list[tuple[int, float | None]] = []
        """The stage's scores so far."""
        self._scorer, self._pipeline, self._world, self._heartbeat = scorer, pipeline, world, heartbeat
        self._settings, self._folder = pipeline.config.scoring, stage_dir.best
        chosen = spread(scorer.tasks, self._settings.prompts)
        self._images = [(index, number) for index in chosen for number in range(self._settings.images)]
        self._best: float | None = None

    def state_dict(self) -> list[tuple[int, float | None]]:
        """A copy of the scores."""
        return list(self.scores)

    def load_state_dict(self, scores: Scores) -> None:
        """Resume with the scores of a checkpoint, and the best model if it is of one of them."""
        self.scores = [(step, overall) for step, overall in scores]
        self._best = self._world.broadcast_from_rank0(lambda: read_best(self._folder, self.scores))

    def pending(self, step: int) -> bool:
        """Whether the score of this step, at which one is due, has not been taken."""
        return not self.scores or self.scores[-1][0] < step

    def measure(self, step: int, began: float, should_stop: Callable[[], str | None]) -> Score:
        """Generate and score images until the time is over, and keep the score.

        `began` is when this rank began with the evaluation, by `time.monotonic`.

        Raises:
            Preempted: on every rank, if one was asked to stop; the score is not kept.
        """
        results, done = self._rounds(began, should_stop)
        # In the order of the images, so that the summary does not depend on which rank generated which.
        judged = dict(pair for share in self._world.gather(results) for pair in share)
        values = self._world.broadcast_from_rank0(
            lambda: self._scorer.summary([judged[place] for place in sorted(judged)])
        )
        prompts, complete = -(-done // self._settings.images), done == len(self._images)
        score = Score(step, values, prompts, done, complete, time.monotonic() - began)
        self.scores.append((step, score.values[OVERALL] if score.complete else None))
        return score

    def _rounds(self, began: float, should_stop: Callable[[], str | None]) -> tuple[list[tuple[int, Any]], int]:
        """This rank's results, each with its image's place in the order, and the number of images of all ranks."""
        sampling = self._pipeline.config.sampling
        own, whole = sampling.batch_size, sampling.batch_size * self._world.size
        rounds = range(0, len(self._images), whole)
        places = [range(start, len(self._images))[self._world.rank * own :][:own] for start in rounds]
        mine = [Picture(self._scorer.prompts[i], n) for part in places for i, n in (self._images[p] for p in part)]
        drawn = self._pipeline.draw_batches(mine, sampling)
        results: list[tuple[int, Any]] = []
        longest = 0.0
        for start, part in zip(rounds, places, strict=True):
            self._heartbeat("generating and scoring images")
            turn = time.monotonic()
            in_time = start == 0 or time_left(turn - began, longest, 60 * self._settings.minutes)
            reason = should_stop()
            late, stopping = self._world.sum([not in_time, reason is not None])
            if stopping:
                raise Preempted(next(other for other in self._world.gather(reason) if other is not None))
            if late:
                return results, start
            if part:
                for place, image in zip(part, next(drawn), strict=True):
                    results.append((place, self._scorer.judge(self._images[place][0], image)))
            longest = max(longest, time.monotonic() - turn)
        return results, len(self._images)

    def reason_to_end(self, step: int) -> str | None:
        """Why the stage ends at this step, if the score of this step says so."""
        min_delta, patience = self._settings.min_delta, self._settings.patience
        if (
            min_delta is None
            or patience is None
            or self.pending(step)
            or not promotes(self.scores, min_delta, patience)
        ):
            return None
        return (
            f"the stage ends at step {step}: over {patience} steps its best score has risen by less than {min_delta:g}"
        )

    def improves(self, score: Score) -> bool:
        """Whether the model of this score is the stage's best, and is to be kept."""
        better = self._best is None or score.values[OVERALL] > self._best
        return self._settings.keep_best and score.complete and better

    def keep(self, score: Score, write: Callable[[Path], None]) -> str:
        """Replace the best model; returns an event in words. If the disk does not take it, the old one stays.

        Rank 0 calls `write` with the folder to write the model to.
        """
        fault = self._world.broadcast_from_rank0(lambda: _try_to_replace(self._folder, score, write))
        if fault is not None:
            return f"the model of step {score.step} is the best so far, but cannot be kept: {fault}"
        self._best = score.values[OVERALL]
        return f"the model of step {score.step} is the best so far: {OVERALL} {self._best:.4g}"


def read_best(folder: Path, scores: Scores) -> float | None:
    """The score of the model in the best model's folder, if it is one of `scores`."""
    path = folder / BEST
    if not path.exists():
        return None
    best = json.loads(path.read_text())
    return best[OVERALL] if (best["step"], best[OVERALL]) in scores else None


def _try_to_replace(folder: Path, score: Score, write: Callable[[Path], None]) -> str | None:
    """Write a model and its score to a temporary folder and rename it; why that failed, or None."""
    temporary = folder.with_name(f".{folder.name}.new")
    model = temporary / folder.name  # a level below, so that temporary files of `write` are removed too
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a start that was killed
        temporary.mkdir(parents=True)
        write(model)
        atomic_write(model / BEST, json.dumps({"step": score.step, **score.values}).encode())
        commit(model, folder)
    except (OSError, SafetensorError) as error:
        return str(error)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # free a full disk
    return None
