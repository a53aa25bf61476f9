"""Checkpoints in one format for all engines and world sizes, written while training goes on.

A checkpoint is a folder `step_N`: one safetensors file a rank with its slices of the fp32 weights, the optimizer's
moments and EMA, each under the parameter's name, and `manifest.json`, which says which slice is where, with the files'
SHA-256 and the trainer's global state. A reader takes the slices it needs, so any number of ranks and any engine can
resume from it.

- `format.py`: names, checks, reading, and which checkpoints are kept.
- `writer.py`: the copy of the state in host memory; writing in the background; committing and pruning.
- `mirror.py`: copies in another place, and resuming from there.
"""

from __future__ import annotations

from t2i.engine.checkpoint.format import (
    Checkpoint,
    CheckpointError,
    checkpoints,
    moments_of,
    newest,
    params_of,
    step_of,
)
from t2i.engine.checkpoint.mirror import Mirror, latest_checkpoint, open_mirror
from t2i.engine.checkpoint.writer import CheckpointWriter, SaveResult

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWriter",
    "Mirror",
    "SaveResult",
    "checkpoints",
    "latest_checkpoint",
    "moments_of",
    "newest",
    "open_mirror",
    "params_of",
    "step_of",
]
