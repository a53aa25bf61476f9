"""The detectors by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from data.errors import UserError
from evaluation.geneval.detection import Detector
from evaluation.geneval.prompts import Metadata, official

Name = Literal["mask2former", "shapes"]


def build_detector(name: Name, weights: str | None, clip: str | None, device: torch.device) -> Detector:
    """A detector.

    Args:
        name: which.
        weights: of mask2former, as its `build` takes them; None: OpenMMLab's, from the usual caches.
        clip: of CLIP, which tells the colours of mask2former's objects; None: from the usual caches.
        device: where it computes.

    Raises:
        UserError: weights that are missing or not those expected.
    """
    if name == "shapes":
        from evaluation.proving.detector import ShapeDetector

        return ShapeDetector()
    from evaluation.geneval import mask2former

    given = {"weights": weights, "clip": clip}
    return mask2former.build(**{name: value for name, value in given.items() if value}, device=device)


def check_prompts(prompts: Sequence[Metadata], detector: Detector) -> None:
    """See that a detector can find what prompts ask for: what it cannot, every model would score 0 at.

    Raises:
        UserError: a class that it does not know, or more objects of one than it counts; the first is named.
    """
    most = detector.thresholds.most
    for it in prompts:
        for item in (*it.get("include", ()), *it.get("exclude", ())):
            if item["class"] not in detector.classes:
                raise UserError(
                    f"the prompt {it['prompt']!r} asks for the class {item['class']!r}, which the detector "
                    f"{detector.identity['name']} cannot find: choose another --detector, or name it as one of "
                    f"{', '.join(detector.classes[:3])} ... {detector.classes[-1]}"
                )
        for item in it.get("include", ()):
            if item["count"] > most:
                raise UserError(
                    f"the prompt {it['prompt']!r} asks for {item['count']} of {item['class']!r}, and GenEval counts "
                    f"the {most} most confident alone: no image could be right"
                )


def prompts_for(name: Name) -> list[Metadata]:
    """What a detector is asked for unless a file of prompts is given: GenEval's own, or the proving ground's."""
    if name == "shapes":
        from evaluation.proving.prompts import proving_prompts

        return proving_prompts()
    return official()
