"""Scores during training: pictures of the averaged weights, judged by a scorer that is handed in, and what follows.

- A picture is a function of the weights, its prompt and its number: a score is the same for any number of processes,
  and nothing of it reaches training's numbers.
- Ranks draw and judge in rounds of one batch each. Before each round they agree in one small sum whether time is left
  and whether a rank is asked to leave; one without a batch in the last round takes part in that, too.
- The prompts are in an order of which every beginning is spread over the tasks, so that a score that was cut short says
  something; it does not say enough to decide by.
- What the stage has scored is in its checkpoints: started again, it decides alike. A score that a preemption
  interrupts is taken anew from the checkpoint that the stage left.
- The best model is that of the highest complete score among those in the stage's past. A file in its folder says which
  one that is: of a future that was given up, by a kill or a rollback, it counts as none, and the next complete
  score takes its place.

What judges pictures during training, and which stages of a run share one. `evaluation` has the scorers.

What is measured and drawn during training with the averaged weights: validation loss and sample grids.

Noise and times are fixed: sample j of n always gets noise j and the time at a fixed quantile of the training
density, so a curve shows the model alone. Nothing here touches the training step's numbers.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from data.errors import UserError
from data.files import atomic_write, commit
from data.preview import FixedSamples
from data.randomness import key, permutation
from t2i.config.run import RunConfig
from t2i.config.train import ScoringConfig
from t2i.diffusion.flow import flow_matching_loss, interpolate, slot_noise, to_unit_range
from t2i.diffusion.objective import Terms, add_bands, band_names
from t2i.distributed import Preempted, World
from t2i.models.text import stack_conditions
from t2i.pipeline import Picture, Pipeline, batches_of
from t2i.train.metrics import EventLog
from t2i.train.run_dir import StageDir
from t2i.train.step import GlobalMeans, training_times

OVERALL = "overall"
"""The one of a scorer's numbers that decisions go by; higher is better."""


class Scorer(Protocol):
    """Judges pictures of its prompts; the same on every rank."""

    @property
    def prompts(self) -> Sequence[str]:
        """What to draw."""

    @property
    def tasks(self) -> Sequence[str]:
        """The task of each prompt."""

    def judge(self, index: int, image: Tensor) -> Any:
        """What there is to say, in JSON's types, of a picture of prompt `index`, uint8 (3, H, W) on the host."""

    def summary(self, results: Sequence[Any]) -> dict[str, float]:
        """Scores by name, "overall" and the tasks', of what `judge` said of some of the pictures, at least one."""


BuildScorer = Callable[[ScoringConfig, torch.device], Scorer]
"""Makes a stage's scorer, from its settings and the device to work on."""


def build_scorers(settings: dict[int, RunConfig], build: BuildScorer, world: World) -> dict[int, Scorer]:
    """The scorers of those stages that are scored; stages with the same one share it. A collective.

    Args:
        settings: of each stage, by its number.
        build: makes one.

    Raises:
        UserError: on every rank alike, what the first rank that cannot have its scorer met.
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
        lambda: {i: scorer_of(it.scoring) for i, it in settings.items() if it.scoring.every}
    )


@dataclass
class Evaluator:
    """Validation and sample grids of one stage; all ranks take part in every call."""

    pipeline: Pipeline
    """Its denoiser holds the averaged weights."""
    world: World
    heldout: FixedSamples | None
    folder: Path
    """Where the grids go."""
    alive: Callable[[str], None]
    """Told what begins now."""
    events: EventLog
    """Told of a disk that does not take a grid."""

    @torch.no_grad()
    def loss(self) -> dict[str, float]:
        """Flow-matching loss on the held-out samples: `loss`, and `loss_tA-B` by bands of t."""
        assert self.heldout is not None
        config, device, n = self.pipeline.config, self.world.device, len(self.heldout.captions)
        noise_key = key(config.seed, "validation")
        t = training_times(config.objective, (permutation(noise_key, n) + 0.5) / n)
        mine = np.arange(self.world.rank, n, self.world.size)
        terms = Terms()
        # At once: a language model that is released is then loaded once.
        self.alive("reading held-out captions")
        conditions = self.pipeline.conditioner([self.heldout.captions[i] for i in mine])
        for start in range(0, len(mine), config.train.micro_batch_size):
            self.alive("validation")
            index = mine[start : start + config.train.micro_batch_size]
            image = to_unit_range(self.heldout.pixels[index].to(device))
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
        """Draw the config's prompts, each rank its share, and write the grid with its description."""
        validation, sampling = self.pipeline.config.validation, self.pipeline.config.sampling
        pictures = [Picture(prompt) for prompt in validation.prompts]
        batches = self.world.split_for_rank(batches_of(pictures, sampling.batch_size))
        own = [picture for batch in batches for picture in batch]
        drawn = [self.pipeline.draw([], sampling)]
        self.alive("drawing the sample grid")
        for batch in self.pipeline.draw_batches(own, sampling):
            drawn.append(batch)
            self.alive("drawing the sample grid")
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
        with self.events.beside("the sample grid"):
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"step_{step:06d}.png"
            encoded = io.BytesIO()
            Image.fromarray(tile(np.concatenate(shares), validation.columns)).save(encoded, "PNG")
            atomic_write(path, encoded.getvalue())
            atomic_write(path.with_suffix(".json"), json.dumps(description, indent=1).encode())


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 (n, 3, H, W) to one picture (rows H, columns W, 3), row by row, white where none is left."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    cells = np.full((rows * columns, height, width, 3), 255, np.uint8)
    cells[:count] = images.transpose(0, 2, 3, 1)
    return cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, -1, 3)


BEST = "best.json"
"""In the best model's folder: step and score."""

Scores = Sequence[tuple[int, float | None]]
"""Step and overall score of each time that a stage was scored, in order; None: cut short."""


# Pure rules


def spread(tasks: Sequence[str], count: int) -> list[int]:
    """Indices of `count` prompts, spread evenly over the tasks and over each task's prompts.

    They take turns by task, so that of every beginning this is true as well: no two tasks that still have prompts
    differ by more than one.
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


def promotes(scores: Scores, gain: float, steps: int) -> bool:
    """Whether the last score says that the stage has come to its end.

    It does if the best so far is less than `gain` above the best of `steps` steps before, or earlier. One bad score
    among good ones thus ends nothing. A score that was cut short says nothing, nor does one before step `steps`.
    """
    if not scores or scores[-1][1] is None:
        return False
    known = [(step, score) for step, score in scores if score is not None]
    before = [score for step, score in known if step <= scores[-1][0] - steps]
    return bool(before) and max(score for _, score in known) - max(before) < gain


def time_left(spent: float, longest: float, limit: float) -> bool:
    """Whether another round of at most the `longest` so far would end within the limit; all in seconds."""
    return spent + longest <= limit


# A stage's scores


@dataclass(frozen=True)
class Score:
    """A stage's score at a step."""

    step: int
    values: dict[str, float]
    prompts: int
    """How many have pictures."""
    images: int
    """How many pictures there are."""
    complete: bool
    """Whether these are all."""
    held_s: float
    """Seconds for which the ranks did nothing else."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Its line."""
        about = {"prompts": self.prompts, "images": self.images, "complete": self.complete, "held_s": self.held_s}
        return {**self.values, **about}


class Scoring:
    """Scores one stage. All ranks take part in every call.

    Args:
        scorer: judges the pictures.
        pipeline: its denoiser holds the averaged weights.
        world: this process.
        place: where the best model goes.
        alive: told what begins now.
        past: what `state` was at the checkpoint that the stage goes on from.
    """

    def __init__(
        self,
        scorer: Scorer,
        pipeline: Pipeline,
        world: World,
        place: StageDir,
        alive: Callable[[str], None],
        past: Iterable[tuple[int, float | None]] = (),
    ) -> None:
        self.scores: list[tuple[int, float | None]] = [(step, overall) for step, overall in past]
        """The stage's, so far."""
        self._scorer, self._pipeline, self._world, self._alive = scorer, pipeline, world, alive
        self._settings, self._folder = pipeline.config.scoring, place.best
        chosen = spread(scorer.tasks, self._settings.prompts)
        self._pictures = [(index, number) for index in chosen for number in range(self._settings.images)]
        self._best = world.broadcast_from_rank0(lambda: read_best(self._folder, self.scores))

    @property
    def state(self) -> list[tuple[int, float | None]]:
        """A copy of all that a checkpoint needs, in JSON's terms."""
        return list(self.scores)

    def pending(self, step: int) -> bool:
        """Whether the score of this step, at which one is due, has not been taken."""
        return not self.scores or self.scores[-1][0] < step

    def measure(self, step: int, began: float, leave: Callable[[], str | None]) -> Score:
        """Draw and judge within the time, and note the score.

        Args:
            step: steps done.
            began: when this rank turned to it, by time.monotonic.
            leave: why this rank is asked to leave; None: it is not.

        Raises:
            Preempted: on every rank: one was asked to leave, and nothing is noted.
        """
        results, done = self._rounds(began, leave)
        # By a picture's place in the order, so that the summary does not depend on who drew it.
        judged = dict(pair for share in self._world.gather(results) for pair in share)
        values = self._world.broadcast_from_rank0(
            lambda: self._scorer.summary([judged[place] for place in sorted(judged)])
        )
        prompts, complete = -(-done // self._settings.images), done == len(self._pictures)
        score = Score(step, values, prompts, done, complete, time.monotonic() - began)
        self.scores.append((step, score.values[OVERALL] if score.complete else None))
        return score

    def _rounds(self, began: float, leave: Callable[[], str | None]) -> tuple[list[tuple[int, Any]], int]:
        """This rank's results, each with its picture's place in the order, and how many all ranks have."""
        sampling = self._pipeline.config.sampling
        own, whole = sampling.batch_size, sampling.batch_size * self._world.size
        rounds = range(0, len(self._pictures), whole)
        places = [range(start, len(self._pictures))[self._world.rank * own :][:own] for start in rounds]
        mine = [Picture(self._scorer.prompts[i], n) for part in places for i, n in (self._pictures[p] for p in part)]
        drawn = self._pipeline.draw_batches(mine, sampling)
        results: list[tuple[int, Any]] = []
        longest = 0.0
        for start, part in zip(rounds, places, strict=True):
            self._alive("drawing and judging pictures")
            turn = time.monotonic()
            if not self._agree(start == 0 or time_left(turn - began, longest, 60 * self._settings.minutes), leave()):
                return results, start
            if part:
                judge = self._scorer.judge
                results += [(p, judge(self._pictures[p][0], it)) for p, it in zip(part, next(drawn), strict=True)]
            longest = max(longest, time.monotonic() - turn)
        return results, len(self._pictures)

    def _agree(self, in_time: bool, reason: str | None) -> bool:
        """Whether no rank is out of time.

        Raises:
            Preempted: on every rank: one has a reason to leave.
        """
        late, leaving = self._world.sum([not in_time, reason is not None])
        if leaving:
            raise Preempted(next(told for told in self._world.gather(reason) if told is not None))
        return not late

    # What follows

    def why_go_on(self, step: int) -> str | None:
        """Why the stage ends at this step, if its score has just said so."""
        gain, steps = self._settings.min_delta, self._settings.patience
        if gain is None or steps is None or self.pending(step) or not promotes(self.scores, gain, steps):
            return None
        return f"the stage ends at step {step}: over {steps} steps its best score has risen by less than {gain:g}"

    def improves(self, score: Score) -> bool:
        """Whether its model is the best of the stage, and kept."""
        better = self._best is None or score.values[OVERALL] > self._best
        return self._settings.keep_best and score.complete and better

    def keep(self, score: Score, write: Callable[[Path], None]) -> str:
        """Put the model in the place of the best; say in words what became of it.

        A disk that does not take it ends nothing: what is there stays the best.

        Args:
            write: writes the model's folder. Rank 0 calls it.
        """
        fault = self._world.broadcast_from_rank0(lambda: _try_to_replace(self._folder, score, write))
        if fault is not None:
            return f"the model of step {score.step} is the best so far, but cannot be kept: {fault}"
        self._best = score.values[OVERALL]
        return f"the model of step {score.step} is the best so far: {OVERALL} {self._best:.4g}"


def read_best(folder: Path, scores: Scores) -> float | None:
    """The score of the model in the folder for the best, if that is one of `scores`."""
    path = folder / BEST
    if not path.exists():
        return None
    best = json.loads(path.read_text())
    return best[OVERALL] if (best["step"], best[OVERALL]) in scores else None


def _try_to_replace(folder: Path, score: Score, write: Callable[[Path], None]) -> str | None:
    """Write a model and its score aside and rename; why that was not possible, if it was not."""
    room = folder.with_name(f".{folder.name}.new")
    aside = room / folder.name  # what is torn lies in the room too, also where `write` itself writes aside
    try:
        shutil.rmtree(room, ignore_errors=True)  # of a start that was killed
        room.mkdir(parents=True)
        write(aside)
        atomic_write(aside / BEST, json.dumps({"step": score.step, **score.values}).encode())
        commit(aside, folder)
    except (OSError, SafetensorError) as error:
        return str(error)
    finally:
        shutil.rmtree(room, ignore_errors=True)  # a full disk should not stay full
    return None
