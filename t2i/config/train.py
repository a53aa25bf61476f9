"""The config's sections about training: loss, optimizer, checkpoints, spike guard, timeouts, profiling, sampling,
scores."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data.store import StoreOptions
from t2i.config.base import ExpandedPath, Fraction, PathText, Section, Unused


class OptimizerConfig(Section):
    """The optimizer, its gradient clipping and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of attention and MLP, AdamW for everything else."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of AdamW's two moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of AdamW's second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of linear layers' matrices, for both optimizers; biases, norms, embeddings and learned
    positions have none."""
    muon_lr: float = Field(0.02, gt=0)
    """Peak learning rate of Muon, whose updates have a root mean square of about 0.2."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Momentum of Muon (Nesterov's form)."""
    clip_grad_norm: float = Field(1.0, ge=0)
    """Largest global gradient norm; larger gradients are scaled down to it. 0 turns clipping off."""
    schedule: Literal["constant", "linear", "cosine", "step"] = "constant"
    """Learning rate after warm-up: constant; a linear or cosine decay at the end of the stage; or steps down."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from 0."""
    decay_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the stage, at its end, over which a linear or cosine schedule decays."""
    final_lr_fraction: float = Field(0.0, ge=0, le=1)
    """Final learning rate of a linear or cosine schedule, as a share of the peak."""
    step_down_at: list[Fraction] = Field([])
    """Where a step schedule lowers the rate: shares of the stage, in rising order."""
    step_down_factor: float = Field(0.1, gt=0, lt=1)
    """Factor of the rate at each of these."""

    @model_validator(mode="after")
    def _decay(self) -> OptimizerConfig:
        if (self.schedule in ("linear", "cosine")) != (self.decay_fraction > 0):
            raise ValueError(
                f"decay_fraction {self.decay_fraction} does not go with schedule {self.schedule}: "
                "linear and cosine need one above 0, the others have 0"
            )
        if (self.schedule == "step") != bool(self.step_down_at):
            raise ValueError(
                f"step_down_at {self.step_down_at} does not go with schedule {self.schedule}: "
                "step needs shares of the stage, such as [0.6, 0.9], the others have none"
            )
        if any(later <= earlier for earlier, later in pairwise(self.step_down_at)):
            raise ValueError(f"step_down_at {self.step_down_at} must rise")
        return self


class CheckpointConfig(Section):
    """When the state is saved, what is kept, and a copy elsewhere. The disk needs room for one more than is kept."""

    every: int = Field(2000, gt=0)
    """Steps between checkpoints; one is also written at the end of the stage. A checkpoint that comes due while the one
    before is being written is skipped, except the last."""
    keep: int = Field(2, gt=0)
    """Newest checkpoints of a stage that are kept."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints at multiples of this many steps are never deleted; a multiple of every. 0: none."""
    ephemeral_every: int = Field(0, ge=0)
    """Steps between checkpoints of which only the newest is kept, until a regular one is newer: the most that a
    preempted run loses. Below every; 0: none."""
    mirror: PathText | None = None
    """Directory or s3://bucket/prefix to which regular checkpoints are copied in the background, under the run's and
    the stage's name. A run resumes from there if it has a newer checkpoint than the run's folder. none: no copies."""
    mirror_endpoint: str | None = None
    """S3 endpoint URL of the mirror; none takes AWS's."""
    mirror_region: str | None = None
    """S3 region of the mirror; none takes the profile's."""
    mirror_profile: str | None = None
    """Profile of the AWS credentials file for the mirror."""

    @property
    def mirror_options(self) -> StoreOptions:
        return StoreOptions(endpoint=self.mirror_endpoint, region=self.mirror_region, profile=self.mirror_profile)

    @model_validator(mode="after")
    def _cadences(self) -> CheckpointConfig:
        if self.keep_every % self.every:
            raise ValueError(f"keep_every {self.keep_every} must be a multiple of every ({self.every}), or 0")
        if self.ephemeral_every >= self.every:
            raise ValueError(f"ephemeral_every {self.ephemeral_every} must be below every ({self.every}), or 0")
        return self


class SpikeGuardConfig(Section):
    """Which updates are skipped: those that are not finite, always, and spikes of the loss or the gradient norm."""

    threshold: float = Field(8.0, ge=0)
    """Robust z-score (1 is 1.4826 median absolute deviations above the median) of the loss or of the logarithm of the
    gradient norm, above which an update is skipped; 0 skips only those that are not finite."""
    window: int = Field(256, gt=0)
    """Latest applied updates from which median and deviation are computed."""
    min_history: int = Field(128, gt=0)
    """Applied updates in the window before spikes are detected: a stage's first steps are not representative."""
    max_skips: int = Field(10, ge=0)
    """Skipped updates allowed within skip_window steps; one more, and the stage rolls back to an earlier checkpoint."""
    skip_window: int = Field(100, gt=0)
    """Steps over which max_skips counts. If too many updates are skipped again this soon after a rollback's left-out
    batches, the run saves and stops."""
    rollback_margin: int = Field(100, ge=0)
    """Steps before the first skipped one whose batches a rollback also leaves out: their updates led to the spike, and
    without a margin the same weights would come again."""
    max_rollbacks: int = Field(5, ge=0)
    """Rollbacks in a stage; if one more is needed, the run saves and stops."""

    @model_validator(mode="after")
    def _counts(self) -> SpikeGuardConfig:
        if self.min_history > self.window:
            raise ValueError(f"min_history {self.min_history} must be at most window ({self.window})")
        if self.max_skips >= self.skip_window:
            raise ValueError(f"max_skips {self.max_skips} must be below skip_window ({self.skip_window})")
        return self


class TimeoutsConfig(Section):
    """How long a run may make no progress before it ends with every rank's stacks, and how long it may take."""

    start_minutes: float = Field(30.0, gt=0)
    """Limit until a stage's first step is done: opening data, building, compiling, rendezvous."""
    step_minutes: float = Field(10.0, gt=0)
    """Limit without progress after that: in a step, a validation batch, a round of scoring, a save."""
    wall_clock_minutes: float = Field(0.0, ge=0)
    """Minutes after which a run saves and exits, to be started again, for schedulers that end jobs; 0: no limit. It
    must be longer than a start and a score (scoring.minutes): an interrupted score is taken anew."""


class ProfilingConfig(Section):
    """Traces of some steps of a stage, counted from 1 as in metrics.jsonl."""

    trace_step: int = Field(0, ge=0)
    """First step of the trace (Chrome's format, one file a rank); 0: no trace."""
    trace_steps: int = Field(3, gt=0)
    """Steps in the trace; each takes some MiB of memory and disk on every rank."""
    memory_step: int = Field(0, ge=0)
    """Step whose GPU allocations are recorded, one file a rank for pytorch.org/memory_viz; 0: none."""


Unit = Annotated[float, Field(ge=0, le=1)]


class SamplingConfig(Section):
    """How images are sampled."""

    solver: Literal["euler", "heun", "adams", "dpmpp"] = "adams"
    """Integrator of the sampling equation; dpmpp is DPM-Solver++ 2M with its own time grid: the FlowDPM-Solver of Sana
    and PixelDiT's text to image. N steps call the network N times, with heun 2 N - 1 times."""
    order: Annotated[int, Unused(solver=("euler", "heun", "dpmpp"))] = Field(2, ge=1, le=4)
    """Slopes that a step of adams combines, the current and previous ones (PixelGen Table 7: 2). Only solver adams."""
    coefficients: Literal["variable", "fixed"] = "variable"
    """Coefficients of adams at order 2: variable follow the lengths of the steps; fixed are those of even steps on any
    grid, as in PixelDiT's class-conditional code."""
    steps: int = Field(25, gt=0)
    """Steps of the integrator."""
    guidance_scale: float = Field(4.0, ge=0)
    """Classifier-free guidance; 1 is none."""
    cfg_interval: tuple[Unit, Unit] = (0.0, 1.0)
    """Guidance applies to steps that start at low < t <= high (under adams and dpmpp t < high, as in the public codes);
    elsewhere the unguided half is not computed. Both in [0, 1]."""
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    """Share of the guided velocity that is rescaled to the standard deviation of the conditional one (Lin et al. 2023,
    section 3.4, who use 0.7), against overexposure at high guidance scales; 0 is none."""
    clamp: bool = True
    """Clamp 1 - t to objective.t_eps or above in divisions, as in training and in the public code; false divides by 1 -
    t itself, so that the last step ends at the image predicted there."""
    shift: float = Field(3.0, gt=0)
    """Shift of the time grid; above 1 spends more steps at high noise."""
    batch_size: int = Field(16, gt=0)
    """Images sampled at once; every batch is filled up to it."""
    seed: int = 0
    """Seed of the starting noise; an image depends only on it, its prompts and its number."""

    @model_validator(mode="after")
    def _consistent(self) -> SamplingConfig:
        if self.coefficients == "fixed" and (self.solver, self.order) != ("adams", 2):
            raise ValueError(
                f"coefficients fixed goes with solver adams at order 2, not with {self.solver} at order {self.order}"
            )
        low, high = self.cfg_interval
        if low > high:
            raise ValueError(f"cfg_interval [{low}, {high}] must be [low, high]")
        return self


class ScoringConfig(Section):
    """A score of images sampled with the EMA weights, as `sampling` says. It does not change training's numbers."""

    every: int = Field(0, ge=0)
    """Steps between scores (also at the start and end of a stage); 0: none."""
    scorer: Literal["geneval", "shapes"] = "geneval"
    """geneval: GenEval's prompts, with Mask2Former and CLIP. shapes: its tasks and rules on drawn shapes, with a
    detector that needs no weights."""
    prompts: int = Field(120, gt=0)
    """How many of the scorer's prompts, spread evenly over its tasks."""
    images: int = Field(1, gt=0)
    """Images of each prompt."""
    minutes: float = Field(10.0, gt=0)
    """Limit for sampling and judging, during which all ranks wait. No batch starts that would exceed it, judged by the
    longest so far, except the first. A score that is cut short covers what was done and says so; it neither ends a
    stage nor counts as its best."""
    detector_weights: Annotated[PathText | None, Unused(scorer="shapes")] = None
    """Mask2Former's weights, as in launch/geneval.py; none takes those in the usual caches. Only scorer geneval."""
    clip: Annotated[PathText | None, Unused(scorer="shapes")] = None
    """CLIP's weights; none takes those in the usual caches. Only scorer geneval."""
    keep_best: bool = True
    """Keep the model with the stage's highest score in best/: a model folder, with the score in best.json. When the
    score rises, all ranks wait while it is written; the disk needs room for two."""
    min_delta: Annotated[float | None, Unused(every=0)] = Field(None, gt=0)
    """The stage ends, as if at its last step, at a score where the best score has risen by less than this over patience
    steps. None: it has all its steps. Learning rates follow the planned steps: a stage that ends early misses a decay
    at its end."""
    patience: Annotated[int | None, Unused(every=0)] = Field(None, gt=0)
    """Steps over which the score must rise by min_delta; a multiple of every. Longer than scores stay at 0 when
    training begins, or the stage ends there."""

    @model_validator(mode="after")
    def _rule(self) -> ScoringConfig:
        if (self.min_delta is None) != (self.patience is None):
            raise ValueError(
                f"min_delta {self.min_delta} and patience {self.patience} go together: give both or neither"
            )
        if self.patience is not None and self.patience % self.every:
            raise ValueError(f"patience {self.patience} must be a multiple of every ({self.every})")
        return self


STAND_IN = "efficientnet-lite0"


class ObjectiveConfig(Section):
    """The loss (PixelGen eq. 6) and the distribution of t and of the noise. The defaults are the paper's."""

    logit_mean: float = -0.8
    """Mean of logit(t)."""
    logit_std: float = Field(0.8, gt=0)
    """Standard deviation of logit(t)."""
    shift: float = Field(1.0, gt=0)
    """t becomes t / (t + (1 - t) shift); above 1 trains at more noise. PixelGen has 1 in all stages."""
    noise_scale: float = Field(1.0, gt=0)
    """Standard deviation of the noise at t = 0, in training and sampling. PixelGen has 1 at 256 and 512 px; JiT doubles
    it with the resolution, to 2 at 512 px."""
    t_eps: float = Field(0.05, gt=0, lt=1)
    """Lower bound of 1 - t in divisions (JiT, Li and He 2025), in training and sampling."""
    perceptual_t_min: float = Field(0.3, ge=0, le=1)
    """Perceptual terms apply to samples with t at or above it (PixelGen Table 6d)."""
    lpips_weight: float = Field(0.1, ge=0)
    """Weight of LPIPS (Table 6a)."""
    lpips_network: Literal["vgg16", "efficientnet-lite0"] = "vgg16"
    """Network of LPIPS; efficientnet-lite0 is a labelled stand-in."""
    lpips_path: ExpandedPath | None = None
    """File with torchvision's VGG16 weights; none takes torchvision's cache or download."""
    pdino_weight: float = Field(0.01, ge=0)
    """Weight of P-DINO (Table 6b)."""
    pdino_gate: Literal["masked", "none"] = "masked"
    """masked: perceptual_t_min applies to P-DINO, as the paper says. none: P-DINO applies at every t, as in the
    released code, whose mask averages over all samples; LPIPS is gated there too."""
    pdino_layers: list[Annotated[int, Field(gt=0)]] = Field([])
    """Layers of DINOv2 (from 1) that P-DINO compares and averages over (Table 6c: 6, 9, 12 or all three, of 12); an
    empty list: the last, as the paper adopts. REPA always uses the last."""
    repa_weight: float = Field(0.5, ge=0)
    """Weight of representation alignment, at every t: 0.5 as in the released code; eq. 6 shows none, so 1. PixelDiT has
    0.5, and none after its first stage from text."""
    repa_grid: Annotated[int | None, Unused(repa_weight=0)] = Field(None, gt=0)
    """Side of the grid of patches on which alignment compares: the image is resized to this many of the feature
    network's patches, and the model's features, bilinearly, to the same grid. PixelDiT from text has 16. None: the
    model's grid."""
    features_network: Literal["dinov2", "efficientnet-lite0"] = "dinov2"
    """Network of P-DINO and REPA; efficientnet-lite0 is a labelled stand-in."""
    features_path: PathText = "facebook/dinov2-base"
    """Hugging Face name or folder of DINOv2."""
    balance_from_step: int | None = Field(None, ge=0)
    """Step of the stage from which the perceptual terms are balanced with flow matching: they are multiplied by a
    smoothed ratio of the two gradients' norms at the head's weight. None: never. The paper does it only for class to
    image, after 80 of 160 epochs."""
    balance_every: int = Field(50, gt=0)
    """Steps between measurements of that ratio."""
    balance_smoothing: float = Field(0.8, ge=0, lt=1)
    """Share of the old multiplier that a measurement keeps; it starts at 1 in every stage."""
    balance_max: float = Field(100.0, gt=0)
    """Largest ratio that is used."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Probability that a sample trains on the null caption."""

    @model_validator(mode="after")
    def _goes_together(self) -> ObjectiveConfig:
        if len(set(self.pdino_layers)) < len(self.pdino_layers):
            raise ValueError(f"pdino_layers {self.pdino_layers} must name each layer once")
        if self.pdino_layers and self.features_network == STAND_IN:
            raise ValueError(f"pdino_layers {self.pdino_layers} must be empty under {STAND_IN}, which has one layer")
        if self.balance_from_step is not None and self.lpips_weight == self.pdino_weight == 0:
            raise ValueError("balance_from_step needs a perceptual term: lpips_weight or pdino_weight above 0")
        return self
