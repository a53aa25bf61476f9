"""Which scorer a training job gets: `evaluation` has it, and `t2i` knows only what it does."""

from __future__ import annotations

import torch

from evaluation.geneval.detectors import Name, build_detector, prompts_for
from evaluation.geneval.during_training import GenEvalScorer
from t2i.config_scoring import ScoringConfig
from t2i.train.scorers import Scorer


def build_scorer(config: ScoringConfig, device: torch.device) -> Scorer:
    """The scorer that a stage names, its networks on this device.

    Raises:
        UserError: weights that it needs are not there, or not what they should be.
    """
    name: Name = "shapes" if config.scorer == "shapes" else "mask2former"
    return GenEvalScorer(prompts_for(name), build_detector(name, config.detector_weights, config.clip, device))
