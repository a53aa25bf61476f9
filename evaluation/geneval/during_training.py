"""GenEval as a scorer of training (t2i/train/scorers.py): its rules over a detector, without files and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from evaluation.geneval.detection import Detector
from evaluation.geneval.prompts import Metadata
from evaluation.geneval.rules import judge
from evaluation.geneval.summary import counted, summarise


class GenEvalScorer:
    """Judges pictures by GenEval's rules.

    Args:
        metadata: the prompts.
        detector: finds what they ask for.
    """

    def __init__(self, metadata: Sequence[Metadata], detector: Detector) -> None:
        self._metadata, self._detector = metadata, detector
        self.prompts: Sequence[str] = [it["prompt"] for it in metadata]
        self.tasks: Sequence[str] = [it["tag"] for it in metadata]

    def judge(self, index: int, image: Tensor) -> dict[str, Any]:
        """Of a picture of prompt `index`, uint8 (3, H, W), what a summary reads of a line of results.jsonl."""
        metadata = self._metadata[index]
        verdict = judge(metadata, image.permute(1, 2, 0).contiguous().numpy(), self._detector)
        return counted(metadata, verdict.correct)

    def summary(self, results: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The score of each task that there is, and "overall"."""
        found = summarise(results)
        return {"overall": found["overall"], **{task: it["score"] for task, it in found["tasks"].items()}}
