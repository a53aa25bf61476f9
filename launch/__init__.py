"""The jobs. Importing any of them first watches the launcher and sets the variables that libraries read on import."""

import os

from launch.preemption import preemption, watch_launcher

if "LOCAL_RANK" in os.environ:
    watch_launcher(preemption.launcher_died)

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
