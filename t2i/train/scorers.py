"""What judges pictures during training, and which stages of a run share one. `evaluation` has the scorers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from data.errors import UserError
from t2i.config import RunConfig
from t2i.config_scoring import ScoringConfig
from t2i.train.processes import World

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

    return world.together(lambda: {i: scorer_of(it.scoring) for i, it in settings.items() if it.scoring.every})
