"""The typed tree of a run: one YAML file, strict, every field documented.

A run is a list of stages. The sections below hold the settings that stages share; a stage states what differs. The
order of precedence, from weakest: defaults here, the file's sections, the stage, the command line. `base: other.yaml`,
a path relative to the file, loads that file first; lists, `stages` among them, are replaced. Paths may contain `~`,
`$NAME` and `${NAME}`; where a field may be none, null and none mean it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from t2i.config.base import NAME, ExpandedPath, PathText, Section, Unused
from t2i.config.data import DataConfig
from t2i.config.model import ModelConfig
from t2i.config.train import (
    CheckpointConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ProfilingConfig,
    SamplingConfig,
    ScoringConfig,
    SpikeGuardConfig,
    TimeoutsConfig,
)


class TextConfig(Section):
    """The frozen text encoder that reads captions."""

    model: PathText = "Qwen/Qwen3-1.7B"
    """Hugging Face name, local folder, or `package:NAME/FOLDER` for a folder of an installed package. Encoder-decoders
    use their encoder, models of text and images their text tower or language model."""
    length: int = Field(128, gt=0)
    """Tokens a caption is padded or cut to; under model.text_padding mask, the most that it may have. At most the
    model's number of positions."""
    instruction: str = ""
    """Words before every caption, ending in a space, but not before the empty caption and negative prompts. The states
    of its own tokens are dropped. Public weights trained with an instruction need exactly that instruction."""
    cache: int = Field(0, ge=0)
    """Captions whose states each rank caches; for data sets with few captions."""
    reload_every_step: bool = False
    """Load the text encoder for the captions of each step and free it after: for machines whose memory does not hold it
    beside the denoiser; costs its loading time a step."""

    @model_validator(mode="after")
    def _ends_with_a_space(self) -> TextConfig:
        if self.instruction and not self.instruction.endswith(" "):
            raise ValueError("instruction must end with a space, which separates it from the caption")
        return self


class TrainConfig(Section):
    """Length and batch of a stage."""

    steps: int = Field(200_000, gt=0)
    """Global batches in the stage."""
    batch_size: int = Field(1536, gt=0)
    """Samples in a global batch, over all ranks and accumulation steps."""
    micro_batch_size: int = Field(64, gt=0)
    """Samples of one forward and backward pass on a rank; divides batch_size / ranks."""


class EngineConfig(Section):
    """How the training step runs and what is sharded over ranks. All engines compute the same numbers."""

    name: Literal["deepspeed", "fsdp"] = "deepspeed"
    """deepspeed: ZeRO. fsdp: PyTorch's FSDP2, which works block by block."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], Unused(name="fsdp")] = 1
    """What is sharded over ranks: 0 nothing, 1 the optimizer, 2 gradients too, 3 weights too. Only name deepspeed."""
    offload: Annotated[bool, Unused(name="fsdp")] = False
    """Keep gradients, master weights, moments and EMA in host memory, and update there: slow, for GPUs that are too
    small. Only name deepspeed, zero_stage 3, with AdamW."""
    offload_dir: ExpandedPath | None = None
    """Folder for memory-mapped files of the optimizer's moments, the EMA and a checkpoint's copies: for machines whose
    memory does not hold them. The state must be in host memory (a CPU run, or offload), the folder on a local disk: a
    tmpfs such as /dev/shm is memory, too."""
    reshard_after_forward: Annotated[bool, Unused(name="deepspeed")] = True
    """Free a block's gathered weights after its forward pass, and gather them again for the backward pass; false keeps
    them: less traffic, more memory. Only name fsdp."""
    dp_replicate: Annotated[int, Unused(name="deepspeed")] = Field(1, gt=0)
    """Groups of ranks that each hold the whole state (HSDP), for instance one a node; divides the ranks. Only name
    fsdp."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Dtype of weights and arithmetic, also of VGG16 and DINOv2; master weights are fp32. auto: bf16 where it is
    fast."""
    compile: bool = False
    """Compile transformer blocks, text encoder and perceptual networks; costs minutes at the start of a stage. Under
    zero_stage 3 every gather breaks a block's graph: more minutes, and little gain."""
    activation_checkpointing: bool | Literal["pixel"] = False
    """Keep only the input of each transformer block for the backward pass, which recomputes the rest; pixel: only in
    the blocks of PixelDiT's pixel pathway, which keep the most."""

    @model_validator(mode="after")
    def _fits_engine(self) -> EngineConfig:
        if self.offload and self.zero_stage != 3:
            raise ValueError(f"offload goes with zero_stage 3, not {self.zero_stage}")
        return self


class EmaConfig(Section):
    """The exponential moving average of the weights, in fp32, sharded over ranks."""

    decay: float = Field(0.9999, ge=0, lt=1)
    """Share of the old EMA that an applied update keeps."""


class InitConfig(Section):
    """What a stage starts from."""

    source: PathText = "previous"
    """previous (the stage before; scratch in the first stage), scratch, or the path of a model/ folder."""
    weights: Literal["raw", "ema"] = "raw"
    """Which weights of the source become this stage's."""
    optimizer: Literal["continue", "reset"] = "continue"
    """Whether the optimizer's moments continue from the previous stage."""
    ema: Literal["continue", "reset"] = "continue"
    """Whether the EMA continues, or starts at the stage's first weights."""


class ValidationConfig(Section):
    """What is measured and sampled during training, with the EMA weights."""

    every: int = Field(5000, ge=0)
    """Steps between validations and sample grids (also at the start and end of a stage); 0 turns both off."""
    samples: int = Field(1024, ge=0)
    """Held-out samples, over all sources by weight; 0 turns validation off."""
    prompts: list[str] = Field([])
    """Prompts of the sample grid; an empty list turns it off."""
    columns: int = Field(4, gt=0)
    """Images in a row of the grid."""


class LoggingConfig(Section):
    """What is written while training."""

    every: int = Field(10, gt=0)
    """Steps between lines of metrics.jsonl; each line is of one step, not an average."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases; if online cannot start, for instance without a login, it writes offline. A fault there ends no
    run."""
    wandb_project: str = "pixel-t2i"
    """Project name there."""


STAGE_SECTIONS = (
    "data",
    "objective",
    "optimizer",
    "train",
    "engine",
    "ema",
    "init",
    "sampling",
    "validation",
    "scoring",
    "logging",
    "checkpoint",
    "spike_guard",
    "profiling",
)
"""What a stage may override: all but the model and the text encoder."""


class RunConfig(Section):
    """A run: its whole curriculum."""

    name: str = Field("run", pattern=NAME)
    """Name of the run and of its folder."""
    root: ExpandedPath = Path("runs")
    """Folder that holds the run's folder; visible to all ranks."""
    seed: int = 0
    """Seed of everything random in the run."""
    model: ModelConfig = ModelConfig()
    text: TextConfig = TextConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    ema: EmaConfig = EmaConfig()
    init: InitConfig = InitConfig()
    sampling: SamplingConfig = SamplingConfig()
    validation: ValidationConfig = ValidationConfig()
    scoring: ScoringConfig = ScoringConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    spike_guard: SpikeGuardConfig = SpikeGuardConfig()
    profiling: ProfilingConfig = ProfilingConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    stages: list[dict[str, Any]] = Field([])
    """The curriculum, in order. Each stage has a name and, under a section's name, only what differs from it."""

    @property
    def directory(self) -> Path:
        """Where the run writes."""
        return self.root / self.name
