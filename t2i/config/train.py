"""The part of the config that says what is minimised, and at which noise.

The part of the config that says how weights follow gradients, and how fast.

The part of the config that says when the state is saved, what is kept of it, and where else it is copied to.

The part of the config that says which updates are not applied, and what follows when there are too many.

The part of the config that says how long things may take.

The part of the config that says which steps are looked into.

The part of the config that says how pictures are drawn.

The part of the config that says how training is scored by the pictures it draws, and what follows from a score.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data.store import StoreOptions
from t2i.config.base import ExpandedPath, Fraction, PathText, Section


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
    """Decoupled weight decay, for both optimizers, of linear layers' matrices: not of biases, norms, embeddings and
    learned positions."""
    muon_lr: float = Field(0.02, gt=0)
    """Peak learning rate of Muon, whose updates have a root mean square of about 0.2."""
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Momentum of Muon (Nesterov's form)."""
    clip_grad_norm: float = Field(1.0, ge=0)
    """Largest global gradient norm; a larger gradient is scaled down to it. 0 turns clipping off."""
    schedule: Literal["constant", "linear", "cosine", "step"] = "constant"
    """How the rate falls after warm-up: never; on a line or a cosine at the end of the stage; or in steps down."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up from 0."""
    decay_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the stage, at its end, over which a linear or cosine schedule decays."""
    final_lr_fraction: float = Field(0.0, ge=0, le=1)
    """Where a linear or cosine schedule ends, as a share of the peak."""
    step_down_at: list[Fraction] = Field([])
    """Where a step schedule lowers the rate: shares of the stage, in rising order."""
    step_down_factor: float = Field(0.1, gt=0, lt=1)
    """What it multiplies the rate by, each time."""

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
    """Steps between checkpoints; one is also written at the end of the stage. One that comes while the one before is
    still being written is skipped, but for the last."""
    keep: int = Field(2, gt=0)
    """Newest checkpoints of a stage that are kept."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints at multiples of so many steps are kept for ever; a multiple of every. 0: none."""
    ephemeral_every: int = Field(0, ge=0)
    """Steps between checkpoints of which only the newest is kept, and only until a regular one is newer: what a
    preempted run loses. Below every; 0: none."""
    mirror: PathText | None = None
    """Directory or s3://bucket/prefix to which regular checkpoints are copied in the background, under the run's and
    the stage's name. A run goes on from there if it finds a newer one there than in its own folder. none: no copies."""
    mirror_endpoint: str | None = None
    """S3 endpoint URL of the mirror; none takes AWS's."""
    mirror_region: str | None = None
    """S3 region of the mirror; none takes the profile's."""
    mirror_profile: str | None = None
    """Profile of the AWS credentials file for the mirror."""

    @property
    def mirror_options(self) -> StoreOptions:
        """How to reach the mirror."""
        return StoreOptions(endpoint=self.mirror_endpoint, region=self.mirror_region, profile=self.mirror_profile)

    @model_validator(mode="after")
    def _cadences(self) -> CheckpointConfig:
        if self.keep_every % self.every:
            raise ValueError(f"keep_every {self.keep_every} must be a multiple of every ({self.every}), or 0")
        if self.ephemeral_every >= self.every:
            raise ValueError(f"ephemeral_every {self.ephemeral_every} must be below every ({self.every}), or 0")
        return self


class SpikeGuardConfig(Section):
    """Which updates are vetoed: those that are not finite, always, and spikes of the loss or of the gradient norm."""

    threshold: float = Field(8.0, ge=0)
    """Robust z-score (1 is 1.4826 median absolute deviations over the median) of the loss or of the logarithm of the
    gradient norm, above which an update is vetoed; 0 vetoes no finite one."""
    window: int = Field(256, gt=0)
    """Latest applied updates over which median and deviation are taken."""
    min_history: int = Field(128, gt=0)
    """Applied updates in the window before which no spike is looked for: the first steps of a stage are no measure."""
    max_skips: int = Field(10, ge=0)
    """Vetoed updates within skip_window steps; one more, and the stage goes back to an earlier checkpoint."""
    skip_window: int = Field(100, gt=0)
    """Steps over which max_skips counts. Should too many be vetoed again this soon after the batches that a rollback
    left out, the run stops, saved."""
    rollback_margin: int = Field(100, ge=0)
    """Steps before the first vetoed one whose batches a rollback leaves out too. Their updates led there; vetoed ones
    changed nothing, so that without a margin the same weights would come again."""
    max_rollbacks: int = Field(5, ge=0)
    """Rollbacks in a stage; where one more would be needed the run stops, saved."""

    @model_validator(mode="after")
    def _counts(self) -> SpikeGuardConfig:
        if self.min_history > self.window:
            raise ValueError(f"min_history {self.min_history} must be at most window ({self.window})")
        if self.max_skips >= self.skip_window:
            raise ValueError(f"max_skips {self.max_skips} must be below skip_window ({self.skip_window})")
        return self


class TimeoutsConfig(Section):
    """How long a run may stand still before it ends with every rank's stacks, and how long it may go on."""

    start_minutes: float = Field(30.0, gt=0)
    """Longest that anything may take until a stage's first step is done: to open data, build, compile, meet."""
    step_minutes: float = Field(10.0, gt=0)
    """Longest that training may stand still after that: in a step, a validation batch, a round of scoring, a save."""
    wall_clock_minutes: float = Field(0.0, ge=0)
    """Minutes after which a run saves and leaves, to be started again, as where a scheduler ends jobs; 0: no limit. A
    start and a score (scoring.minutes) must fit into them: a score that is cut short by leaving is taken anew."""


class ProfilingConfig(Section):
    """Traces of chosen steps of a stage, counted from 1 as in metrics.jsonl."""

    trace_step: int = Field(0, ge=0)
    """First step of the trace (Chrome's format, one file a rank); 0 traces none."""
    trace_steps: int = Field(3, gt=0)
    """Steps in the trace; each takes some MiB of memory and disk on every rank."""
    memory_step: int = Field(0, ge=0)
    """Step whose allocations on the GPU are written down, one file a rank for pytorch.org/memory_viz; 0: none."""


Unit = Annotated[float, Field(ge=0, le=1)]


class SamplingConfig(Section):
    """How pictures are drawn."""

    solver: Literal["euler", "heun", "adams", "dpmpp"] = "adams"
    """Integrator of the sampling equation; dpmpp is DPM-Solver++ 2M, with its own time grid: the FlowDPM-Solver of Sana
    and PixelDiT's text to image. For N steps the network is called N times, 2 N - 1 times by heun."""
    order: int = Field(2, ge=1, le=4)
    """Of adams: slopes that a step combines, the present one and those of the steps before (PixelGen Table 7: 2)."""
    coefficients: Literal["variable", "fixed"] = "variable"
    """Of adams at order 2: variable follow the lengths of the steps, fixed are those of even steps on any grid, as in
    PixelDiT's class-conditional code."""
    steps: int = Field(25, gt=0)
    """Steps of the integrator."""
    guidance_scale: float = Field(4.0, ge=0)
    """Classifier-free guidance; 1 is none."""
    cfg_interval: tuple[Unit, Unit] = (0.0, 1.0)
    """Guidance applies to steps that start at low < t <= high (under adams and dpmpp t < high, as in the public codes);
    elsewhere the unguided half is not computed. Both are within [0, 1]."""
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    """Share of the guided velocity that is scaled to the standard deviation of the prompt's own (Lin et al. 2023,
    section 3.4, who take 0.7): against the glare of high scales; 0 is none."""
    clamp: bool = True
    """Hold 1 - t at objective.t_eps or above where it divides, as in training and in the public code; false divides
    by 1 - t itself, so that the last step ends at the image predicted there."""
    shift: float = Field(3.0, gt=0)
    """Shift of the time grid; above 1 spends more steps at high noise."""
    batch_size: int = Field(16, gt=0)
    """Pictures drawn at once; every batch is filled up to it."""
    seed: int = 0
    """Seed of the starting noise; a picture depends on it, its prompts and its number alone."""

    @model_validator(mode="after")
    def _used(self) -> SamplingConfig:
        default = type(self).model_fields["order"].default
        if self.solver != "adams" and self.order != default:
            raise ValueError(f"order {self.order} does nothing under solver {self.solver}: leave it at {default}")
        if self.coefficients == "fixed" and (self.solver, self.order) != ("adams", 2):
            raise ValueError(
                f"coefficients fixed goes with solver adams at order 2, not with {self.solver} at order {self.order}"
            )
        low, high = self.cfg_interval
        if low > high:
            raise ValueError(f"cfg_interval [{low}, {high}] must be [low, high]")
        return self


_WEIGHTS = ("detector_weights", "clip")
_RULE = ("min_delta", "patience")


class ScoringConfig(Section):
    """A score of pictures that the EMA weights draw, as `sampling` says. Training's numbers do not depend on it."""

    every: int = Field(0, ge=0)
    """Steps between scores (also at the start and end of a stage); 0: none."""
    scorer: Literal["geneval", "shapes"] = "geneval"
    """geneval: GenEval's prompts, with Mask2Former and CLIP. shapes: its tasks and rules over drawn shapes, with a
    detector that needs no weights."""
    prompts: int = Field(120, gt=0)
    """How many of the scorer's prompts, spread evenly over its tasks."""
    images: int = Field(1, gt=0)
    """Pictures drawn of each prompt."""
    minutes: float = Field(10.0, gt=0)
    """Longest that the ranks are held by drawing and judging. No batch is begun that would go past it, going by the
    longest so far, but for the first. A score that is cut short is over what was done and says so; it neither promotes
    a stage nor counts as its best."""
    detector_weights: PathText | None = None
    """Of geneval: Mask2Former's, as of launch/geneval.py's option; none takes those in the usual caches."""
    clip: PathText | None = None
    """Of geneval: CLIP's weights, likewise."""
    keep_best: bool = True
    """Keep the model with the stage's highest score in best/: a model folder, with the score in best.json. Each time
    the score rises, all ranks wait while it is written, and until then the disk needs room for two."""
    min_delta: float | None = Field(None, gt=0)
    """The stage ends, as if at its last step, at a score that leaves the best score so far less than this above what it
    was patience before. None: it has all its steps. Learning rates follow the steps planned: where the stage ends
    sooner, a decay at its end does not come."""
    patience: int | None = Field(None, gt=0)
    """Steps over which the score must rise by min_delta; a multiple of every. Longer than scores stay at 0 when
    training begins, or the stage ends there."""

    @model_validator(mode="after")
    def _used(self) -> ScoringConfig:
        unused = {"scorer shapes": _WEIGHTS if self.scorer == "shapes" else (), "every 0": () if self.every else _RULE}
        for setting, fields in unused.items():
            for field in fields:
                if (value := getattr(self, field)) is not None:
                    raise ValueError(f"{field} {value} does nothing under {setting}: leave it at null")
        return self

    @model_validator(mode="after")
    def _rule(self) -> ScoringConfig:
        if (self.min_delta is None) != (self.patience is None):
            raise ValueError(
                f"min_delta {self.min_delta} and patience {self.patience} make a rule together: give both or neither"
            )
        if self.patience is not None and self.patience % self.every:
            raise ValueError(f"patience {self.patience} must be a multiple of every ({self.every})")
        return self


STAND_IN = "efficientnet-lite0"


class ObjectiveConfig(Section):
    """The loss (PixelGen eq. 6) and the distribution of t and of the noise. The defaults are what the paper adopts."""

    logit_mean: float = -0.8
    """Mean of logit(t)."""
    logit_std: float = Field(0.8, gt=0)
    """Standard deviation of logit(t)."""
    shift: float = Field(1.0, gt=0)
    """t becomes t / (t + (1 - t) shift); above 1 trains at more noise. PixelGen has 1 in all stages."""
    noise_scale: float = Field(1.0, gt=0)
    """Standard deviation of the noise at t = 0, in training and sampling. PixelGen has 1 at 256 and 512 px; JiT
    doubles it with the resolution, to 2 at 512 px."""
    t_eps: float = Field(0.05, gt=0, lt=1)
    """Lower bound of 1 - t where it divides (JiT, Li and He 2025), in training and sampling."""
    perceptual_t_min: float = Field(0.3, ge=0, le=1)
    """Perceptual terms apply to samples with t at or above it (PixelGen Table 6d)."""
    lpips_weight: float = Field(0.1, ge=0)
    """Weight of LPIPS (Table 6a)."""
    lpips_network: Literal["vgg16", "efficientnet-lite0"] = "vgg16"
    """Network of LPIPS; efficientnet-lite0 is a labelled stand-in."""
    lpips_path: ExpandedPath | None = None
    """File with torchvision's VGG16 weights; none takes them from torchvision's cache or site."""
    pdino_weight: float = Field(0.01, ge=0)
    """Weight of P-DINO (Table 6b)."""
    pdino_gate: Literal["masked", "none"] = "masked"
    """masked: P-DINO heeds the gate, as the paper says. none: it applies at every t, as in the released code, whose
    mask comes to the mean over all samples; LPIPS heeds the gate there too."""
    pdino_layers: list[Annotated[int, Field(gt=0)]] = Field([])
    """Layers of DINOv2 (from 1) that P-DINO compares, the mean over them (Table 6c: 6, 9, 12 or all three, of 12); an
    empty list: the last, which the paper adopts. REPA has the last always."""
    repa_weight: float = Field(0.5, ge=0)
    """Weight of representation alignment, at every t: 0.5 as in the released code; eq. 6 shows none, so 1. PixelDiT has
    0.5, and none after its first stage from text."""
    repa_grid: int | None = Field(None, gt=0)
    """Side of the grid of patches on which alignment compares: the image is resized to as many of the feature network's
    patches, and the model's features, bilinearly, to the same grid. PixelDiT from text has 16. None: the model's own
    grid."""
    features_network: Literal["dinov2", "efficientnet-lite0"] = "dinov2"
    """Network of P-DINO and REPA; efficientnet-lite0 is a labelled stand-in."""
    features_path: PathText = "facebook/dinov2-base"
    """Hugging Face name or folder of DINOv2."""
    balance_from_step: int | None = Field(None, ge=0)
    """Step of the stage from which the perceptual terms are balanced with flow matching: they are multiplied by a
    smoothed ratio of the two gradients' norms at the head's weight. None: never. The paper does it for class to image
    alone, after 80 of 160 epochs."""
    balance_every: int = Field(50, gt=0)
    """Steps between measurements of that ratio."""
    balance_smoothing: float = Field(0.8, ge=0, lt=1)
    """Share of the old multiplier that a measurement keeps; it starts at 1 in every stage."""
    balance_max: float = Field(100.0, gt=0)
    """Largest ratio that is taken for true."""
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
        if self.repa_grid is not None and self.repa_weight == 0:
            raise ValueError(f"repa_grid {self.repa_grid} does nothing at repa_weight 0: leave it at null")
        return self
