"""Which scorer a training job gets: the config names it, `evaluation` has it, and `t2i` knows what it does alone."""

from __future__ import annotations

import torch

from evaluation.geneval.during_training import GenEvalScorer
from t2i.config_scoring import ScoringConfig
from t2i.train.scoring import Scorer


def build_scorer(config: ScoringConfig, device: torch.device) -> Scorer:
    """The scorer that `scoring` names, its networks on this device.

    Raises:
        UserError: weights that it needs are not there, or not what they should be.
    """
    raise NotImplementedError
