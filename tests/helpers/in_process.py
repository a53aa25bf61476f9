"""Jobs run inside the test's process, as the only rank."""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType

import pytest
import torch

from t2i.distributed import World


def run_in_process(module: ModuleType, *words: object) -> None:
    """Run a job of `launch`, the function with its module's name, with these words as its command line."""
    name = module.__name__.rpartition(".")[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "joined_world", lambda *_: nullcontext(World(0, 1, torch.device("cpu"))))
        patch.setattr("sys.argv", [f"{name}.py", *map(str, words)])
        getattr(module, name)()
