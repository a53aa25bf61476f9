"""One stage of a run.

The loop has one order: batch, micro-steps, update, average, numbers, pictures, checkpoint. All ranks take part in
every part; rank 0 alone writes numbers and pictures. Everything random is a function of (seed, stage, slot), so a
step's mathematics knows neither the number of ranks nor the micro-batch.
"""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from data.loader import Batch, merge_states
from data.randomness import key, uniform
from t2i.config import ConfigError, OptimizerConfig, RunConfig, dump
from t2i.diffusion.flow import Array, interpolate, logit_normal, shift_time, to_unit_range
from t2i.diffusion.noise import slot_noise
from t2i.diffusion.objective import TERMS, Terms, band_names
from t2i.engine.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    newest,
    optimizer_kinds,
    save_model,
    value_kinds,
)
from t2i.engine.deepspeed import DeepSpeedEngine, StepResult
from t2i.engine.ema import Ema
from t2i.engine.shards import gather_full
from t2i.pipeline import NULL_CAPTION, model_file
from t2i.train.build import (
    TrainingNetwork,
    build_network,
    build_objective,
    build_text,
    build_train_optimizer,
    choose_dtype,
    training_flops,
)
from t2i.train.observe import Observer, memory_gib, peak_flops
from t2i.train.processes import World
from t2i.train.stage_data import StageData
from t2i.train.validate import Evaluator, global_means


@dataclass(frozen=True)
class StagePlace:
    """Where a stage stands in its run: its name, its folder, and the folder of the stage before it."""

    name: str
    folder: Path
    previous: Path | None

    @property
    def model(self) -> Path:
        """The finished model; it exists once the stage is done."""
        return self.folder / "model"

    @property
    def checkpoints(self) -> Path:
        """The stage's checkpoints."""
        return self.folder / "checkpoints"


def learning_rate(config: OptimizerConfig, step: int, steps: int, peak: float) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, plateau, decay at the end."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = round(config.decay_fraction * steps)
    progress = (step - (steps - decay_steps)) / decay_steps if decay_steps else 0.0
    progress = min(max(progress, 0.0), 1.0)
    if config.schedule == "cosine":
        progress = (1.0 - float(np.cos(np.pi * progress))) / 2.0
    return peak * warm * (1.0 - (1.0 - config.final_lr_fraction) * progress)


class StageTrainer:
    """Trains one stage, from wherever it stands to its end.

    Args:
        config: the stage's settings (`RunConfig.stage`).
        place: where it reads and writes.
        data: its sources, opened.
        world: this process.
        attempt: a word that all ranks share and no other start of the run does.
    """

    def __init__(self, config: RunConfig, place: StagePlace, data: StageData, world: World, attempt: str) -> None:
        self.config = config
        self.place = place
        self.world = world
        self.steps = config.train.steps
        self.step = 0  # batches consumed
        self.skipped = 0
        dtype = choose_dtype(config.engine.dtype, world.device)
        self.text = build_text(config, world.device, dtype)
        self.null_caption = self.text.null_caption()
        self.objective = build_objective(config.objective, world.device)
        network = build_network(config, self.text.width, self.objective.patch_features)
        averaged = copy.deepcopy(network.denoiser).to(world.device, dtype).eval().requires_grad_(False)
        self.engine = self._build_engine(network, dtype)
        self.ema = Ema(self.engine.shards, config.ema.decay)
        self.writer = CheckpointWriter(
            place.checkpoints,
            rank=world.rank,
            world_size=world.size,
            attempt=attempt,
            keep=config.checkpoint.keep,
        )
        data_state, self._origin = self._restore()
        self.loader = data.loader(config, place.name, world, data_state)
        self.evaluator = Evaluator(
            config,
            world,
            averaged,
            self.text,
            self.null_caption,
            data.heldout,
            place.folder / "samples",
        )
        self.flops_per_image = training_flops(config, self.text.width)
        self.peak = peak_flops(world.device, dtype)
        self._keys = {p: key(config.seed, place.name, p) for p in ("time", "noise", "caption")}

    def _build_engine(self, network: TrainingNetwork, dtype: torch.dtype) -> DeepSpeedEngine:
        train = self.config.train
        return DeepSpeedEngine(
            network,
            build_train_optimizer(self.config, network, dtype),
            device=self.world.device,
            dtype=dtype,
            micro_batch_size=train.micro_batch_size,
            accumulation=train.batch_size // self.world.size // train.micro_batch_size,
            clip_grad_norm=self.config.optimizer.clip_grad_norm,
        )

    # Where the stage stands

    def _restore(self) -> tuple[dict[str, Any] | None, str]:
        """Load the stage's newest checkpoint, or what the config says it starts from; data state and a sentence."""
        path, faults = self.world.from_main(lambda: newest(self.place.checkpoints))
        if path is not None:
            state = self._load_checkpoint(path, weights="value", moments=True, average="ema")
            self.step, self.skipped = state["batches"], state["skipped"]
            return state["data"], "; ".join([*faults, f"going on from {path.name}"])
        init = self.config.init
        if init.source == "scratch" or (init.source == "previous" and self.place.previous is None):
            self.ema.reset()
            return None, "starting from scratch"
        if init.source != "previous":
            self._load_model(Path(init.source))
            return None, f"starting from {init.source}, {init.weights} weights"
        assert self.place.previous is not None
        previous = self.place.previous / "checkpoints"
        path, _ = self.world.from_main(lambda: newest(previous))
        if path is None:
            raise ConfigError(f"{previous} holds no usable checkpoint to start stage {self.place.name} from")
        self._load_checkpoint(
            path,
            weights="value" if init.weights == "raw" else "ema",
            moments=init.optimizer == "continue",
            average="ema" if init.ema == "continue" else None,
        )
        return None, f"starting from {path}, {init.weights} weights"

    def _load_checkpoint(self, path: Path, *, weights: str, moments: bool, average: str | None) -> dict[str, Any]:
        """Fill weights, moments and average from a checkpoint; its global state."""
        checkpoint = Checkpoint(path, verify=False)
        shards = self.engine.shards
        values = {weights: value_kinds(shards)["value"]}
        checkpoint.read(shards, values)
        self.engine.load_values(values[weights])
        self.ema.reset()
        if average is not None:
            checkpoint.read(shards, {average: self.ema.values})
        if moments:
            checkpoint.read(shards, optimizer_kinds(shards))
            self.engine.updates = checkpoint.state["updates"]
        return checkpoint.state

    def _load_model(self, folder: Path) -> None:
        """Fill the weights from a model folder; a projector that it lacks keeps its fresh weights."""
        file = model_file(folder, self.config.init.weights)
        tensors = load_file(file)
        values: dict[str, Tensor] = {}
        for name, shard in self.engine.shards.items():
            if name not in tensors and not name.startswith("projector."):
                raise ConfigError(f"init.source {folder}: {file.name} has no {name}: it is another model")
            if name in tensors:
                if tensors[name].shape != shard.shape:
                    raise ConfigError(
                        f"init.source {folder}: {name} has shape {list(tensors[name].shape)}, "
                        f"this model's has {list(shard.shape)}"
                    )
                values[name] = tensors[name].flatten()[shard.start : shard.stop]
        self.engine.load_values(values)
        self.ema.reset()

    def _save_checkpoint(self, batch: Batch) -> None:
        data = merge_states(self.world.gather(batch.state))
        state = {
            "stage": self.place.name,
            "batches": self.step,
            "skipped": self.skipped,
            "updates": self.engine.updates,
            "data": data,
        }
        self.writer.save(self.step, self.engine.shards, self.ema.values, state)

    # The step

    def _times(self, slots: NDArray[np.int64]) -> Array:
        objective = self.config.objective
        t = logit_normal(uniform(self._keys["time"], slots), objective.time_mean, objective.time_std)
        return shift_time(t, objective.timeshift)

    def _train_step(self, batch: Batch) -> tuple[Terms, StepResult]:
        """All micro-steps of one global batch and the update; the sums of this rank's loss terms."""
        config, size = self.config, self.config.train.batch_size
        first = self.step * size
        ungated = int((self._times(np.arange(first, first + size)) >= config.objective.gate).sum())
        t = self._times(batch.slots)
        dropped = uniform(self._keys["caption"], batch.slots) < config.objective.caption_dropout
        terms = Terms()
        micro, patch = config.train.micro_batch_size, config.model.patch_size
        for start in range(0, len(batch.slots), micro):
            part = slice(start, start + micro)
            image = to_unit_range(batch.pixels[part].to(self.world.device, non_blocking=True))
            times = torch.from_numpy(t[part]).float().to(self.world.device)
            noise = slot_noise(self._keys["noise"], batch.slots[part], image.shape[1:], self.world.device)
            text = self.text(batch.captions[part])
            text[torch.from_numpy(dropped[part]).to(text.device)] = self.null_caption
            predicted, projected = self.engine.network(interpolate(image, noise, times), times, text)
            loss, part_terms = self.objective(
                predicted,
                projected,
                image,
                t[part],
                grid=(image.shape[2] // patch, image.shape[3] // patch),
                batch_size=size,
                ungated=ungated,
                micro_batches=size // micro,
            )
            self.engine.micro_step(loss)
            terms.merge(part_terms)
        result = self.engine.step(self._lr, lambda norm: None)
        return terms, result

    def _lr(self, muon: bool) -> float:
        optimizer = self.config.optimizer
        peak = optimizer.muon_lr if muon else optimizer.lr
        return learning_rate(optimizer, self.step, self.steps, peak)

    # The loop

    def run(self, observer: Observer) -> None:
        """Train to the end of the stage and write its model."""
        observer.event(self._origin)
        if self.step == 0:
            self._evaluate(observer)
        batches = iter(self.loader)
        while self.step < self.steps:
            began = time.perf_counter()
            batch = next(batches)
            lr = self._lr(False)
            terms, result = self._train_step(batch)
            self.step += 1
            if result.vetoed is None:
                self.ema.update()
            else:
                self.skipped += 1
                observer.event(f"step {self.step}: update skipped: {result.vetoed}")
            numbers = None
            if self.step % self.config.logging.every == 0 or self.step == self.steps:
                numbers = self._numbers(terms, result, lr, batch.wait_s, time.perf_counter() - began)
                observer.write("train", self.step, numbers)
                self._write_counters(observer)
            observer.progress(numbers)
            if self._due(self.config.validation.every):
                self._evaluate(observer)
            if self._due(self.config.checkpoint.every):
                self._save_checkpoint(batch)
        self.loader.close()
        self.writer.wait()
        self.world.barrier()
        self._write_model()

    def _due(self, every: int) -> bool:
        """The one rule for what happens every so many steps: then, and at the end of the stage."""
        return every > 0 and (self.step % every == 0 or self.step == self.steps)

    def _numbers(self, terms: Terms, result: StepResult, lr: float, wait_s: float, step_s: float) -> dict[str, Any]:
        """One line of metrics: means over the global batch of this step, and what it cost."""
        names = [*TERMS, *band_names("loss_fm")]
        images_per_s = self.config.train.batch_size / step_s
        flops = images_per_s * self.flops_per_image / self.world.size
        return {
            **global_means(terms, names, self.world.device),
            "total_steps": self.steps,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "images_per_s": images_per_s,
            "tflops": flops / 1e12,
            "mfu": flops / self.peak,
            "step_s": step_s,
            "data_wait_s": wait_s,
            "memory_gib": memory_gib(self.world.device),
            "resolution": self.config.data.resolution,
            "batch_size": self.config.train.batch_size,
            "skipped_updates": self.skipped,
        }

    def _write_counters(self, observer: Observer) -> None:
        """Samples used and passed over, by reason, over all ranks."""
        total: dict[str, int] = {}
        for counts in self.world.gather(self.loader.counters()):
            for reason, count in counts.items():
                total[reason] = total.get(reason, 0) + count
        if set(total) - {"samples"}:
            observer.write("counters", self.step, total)

    def _load_average(self) -> None:
        """Put the averaged weights into the evaluator's network."""
        target = dict(self.evaluator.network.named_parameters())
        for name, value in gather_full(self.engine.shards, self.ema.values):
            if name.startswith("denoiser."):
                target[name.removeprefix("denoiser.")].data.copy_(value)

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
        """The stage's model folder, raw and averaged weights, written aside and renamed: the stage is then done."""
        aside = self.place.folder / ".model"
        if self.world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        values = {name: shard.value for name, shard in self.engine.shards.items()}
        for file, slices in (("model", values), ("ema", self.ema.values)):
            whole = gather_full(self.engine.shards, slices)
            tensors = {name: t.cpu() for name, t in whole if self.world.is_main}
            if self.world.is_main:
                save_model(aside / f"{file}.safetensors", {**tensors, NULL_CAPTION: self.null_caption.cpu()})
        if self.world.is_main:
            (aside / "config.yaml").write_text(dump(self.config.model_copy(update={"stages": []})))
            aside.rename(self.place.model)
        self.world.barrier()

    def close(self) -> None:
        """Release threads and memory."""
        self.loader.close()
        self.engine.close()
