"""The detectors by name."""

from __future__ import annotations

from pathlib import Path

import torch

from evaluation.geneval.detection import Detector
from evaluation.geneval.prompts import Metadata, official

NAMES = ("mask2former", "shapes")


def build_detector(name: str, weights: Path | None, clip: Path | None, device: torch.device) -> Detector:
    """A detector.

    Args:
        name: one of `NAMES`.
        weights: of mask2former; None: from the usual caches.
        clip: weights of CLIP, which tells mask2former's objects' colours; None: from the usual caches.
        device: where it computes.

    Raises:
        UserError: weights that are missing or not those expected.
    """
    if name == "shapes":
        from evaluation.proving.detector import ShapeDetector

        return ShapeDetector()
    from evaluation.geneval import mask2former

    return mask2former.build(weights, clip, device)


def prompts_for(name: str) -> list[Metadata]:
    """What a detector is asked for unless a file of prompts is given: GenEval's own, or the proving ground's."""
    if name == "shapes":
        from evaluation.proving.prompts import proving_prompts

        return proving_prompts()
    return official()
