"""The typed tree of a run: one YAML file, strict, every field documented.

A run is a list of stages. The sections below hold the settings that stages share; a stage names what differs.
What counts, from weakest to strongest: the defaults here, the file's sections, the stage, the command line. A file
with `base: other.yaml`, a path seen from itself, changes what that one says; lists, `stages` among them, are replaced.
In paths `~`, `$NAME` and `${NAME}` are filled in; where a field may be none, null and none say so.
`t2i/config/loading.py` reads, checks and merges them; `t2i/config/data.py` is the part about data,
`t2i/config/model.py` that about the network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from t2i.config.base import NAME, ExpandedPath, PathText, Section
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
    """The frozen language model that reads captions."""

    model: PathText = "Qwen/Qwen3-1.7B"
    """Hugging Face name, local folder, or `package:NAME/FOLDER` for a folder of an installed package. Of an
    encoder-decoder the encoder reads captions, of a model of text and images its text tower or language model."""
    length: int = Field(128, gt=0)
    """Tokens a caption is padded or cut to; under model.text_padding mask, the most that it may have. At most what the
    language model has positions for."""
    instruction: str = ""
    """Words put before every caption, but not before the empty one and negative prompts; they end with a space. Their
    tokens are not kept, but a decoder's states of the caption have seen them. Public weights that were trained under an
    instruction are reproduced under that model's own alone, to the letter."""
    cache: int = Field(0, ge=0)
    """Captions whose states stay in memory on each rank; for data sets with few captions."""
    reload_every_step: bool = False
    """Load the language model for the captions of each step and let it go after: for machines whose memory does not
    hold it beside the denoiser; costs its loading time a step."""

    @model_validator(mode="after")
    def _ends_with_a_space(self) -> TextConfig:
        if self.instruction and not self.instruction.endswith(" "):
            raise ValueError("instruction must end with a space, which stands between it and the caption")
        return self


class TrainConfig(Section):
    """Length and batch of a stage."""

    steps: int = Field(200_000, gt=0)
    """Global batches in the stage."""
    batch_size: int = Field(1536, gt=0)
    """Samples in a global batch, over all ranks and accumulation steps."""
    micro_batch_size: int = Field(64, gt=0)
    """Samples a rank takes through the network at a time; divides batch_size / ranks."""


class EngineConfig(Section):
    """How the training step runs and what the ranks share out. All engines compute the same numbers."""

    name: Literal["deepspeed", "fsdp"] = "deepspeed"
    """deepspeed: ZeRO. fsdp: PyTorch's FSDP2, which works block by block."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """Of deepspeed, what is shared out over ranks: 0 nothing, 1 the optimizer, 2 gradients too, 3 weights too."""
    offload: bool = False
    """Of deepspeed at zero_stage 3, with AdamW: keep gradients, masters, moments and average in host memory, and update
    there: slow, for GPUs that are too small."""
    offload_dir: ExpandedPath | None = None
    """Folder for files in which the optimizer's moments, the average and what a checkpoint copies live, mapped into
    memory: for machines whose memory does not hold them. The state must lie in host memory (a CPU run, or offload), the
    folder on a local disk: a tmpfs such as /dev/shm is memory, too."""
    reshard_after_forward: bool = True
    """Of fsdp: drop a block's gathered weights after its forward pass, and gather them again for the backward pass;
    false keeps them in between: less traffic, more memory."""
    dp_replicate: int = Field(1, gt=0)
    """Of fsdp: groups of ranks that each hold the whole state (HSDP), as one group per node; divides the ranks."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of weights and arithmetic, VGG16's and DINOv2's too; masters are fp32. auto: bf16 where it is fast."""
    compile: bool = False
    """Compile transformer blocks, text encoder and perceptual networks; costs minutes at the start of a stage.
    Under zero_stage 3 every gather breaks a block into pieces: more minutes, and little gain."""
    activation_checkpointing: bool | Literal["pixel"] = False
    """Keep only the input of each transformer block for the backward pass, which computes the rest again; pixel: of the
    blocks of PixelDiT's pixel pathway alone, which keep the most."""

    @model_validator(mode="after")
    def _fits_engine(self) -> EngineConfig:
        fields = {"deepspeed": ("reshard_after_forward", "dp_replicate"), "fsdp": ("zero_stage", "offload")}[self.name]
        for field in fields:
            value, default = getattr(self, field), type(self).model_fields[field].default
            if value != default:
                raise ValueError(f"{field} {value} does nothing under name {self.name}: leave it at {default}")
        if self.offload and self.zero_stage != 3:
            raise ValueError(f"offload goes with zero_stage 3, not {self.zero_stage}")
        return self


class EmaConfig(Section):
    """The exponential moving average of the weights, in fp32, sharded over ranks."""

    decay: float = Field(0.9999, ge=0, lt=1)
    """Share of the old average that an applied update keeps."""


class InitConfig(Section):
    """What a stage starts from."""

    source: PathText = "previous"
    """previous (the stage before; scratch in the first), scratch, or the path of a model/ folder."""
    weights: Literal["raw", "ema"] = "raw"
    """Which weights of the source become this stage's."""
    optimizer: Literal["continue", "reset"] = "continue"
    """Whether the optimizer's moments go on from the previous stage."""
    ema: Literal["continue", "reset"] = "continue"
    """Whether the average goes on, or starts at the stage's first weights."""


class ValidationConfig(Section):
    """What is measured and drawn during training, with the EMA weights."""

    every: int = Field(5000, ge=0)
    """Steps between validations and sample grids (also at the start and end of a stage); 0 turns both off."""
    samples: int = Field(1024, ge=0)
    """Held-out samples, over all sources by weight; 0 turns validation off."""
    prompts: list[str] = Field([])
    """Prompts of the sample grid; an empty list turns it off."""
    columns: int = Field(4, gt=0)
    """Pictures in a row of the grid."""


class LoggingConfig(Section):
    """What is written while training."""

    every: int = Field(10, gt=0)
    """Steps between lines of metrics.jsonl; each line is of one step, not an average."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases; where online cannot begin, as without a login, it writes offline. A fault there ends no run."""
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
"""What a stage may override. Not the model and the text encoder: they are the run's."""


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
