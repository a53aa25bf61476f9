"""Detectors by name, the check that one can be trusted, and GenEval as a scorer of training (t2i/train/scoring.py).

The self-check is for what no exception reports: wrong weights, a wrong library, a GPU that computes wrong values.
GenEval's own detector has been seen to give only low scores on one kind of GPU. Its images are ten of OpenMoji's
drawings on white (extra `demo`), and ten balls in the ten colours. They are no photographs, and a good detector misses
some, so few need be found: random answers find 3 of the 10 drawings as the most confident object once in 4,000 times,
and 7 of the 10 colours once in 100,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data.errors import UserError
from data.packing.openmoji import drawings, rasterise
from evaluation.geneval.prompts import Metadata, official
from evaluation.geneval.rules import Detection, Detector, Image, judge
from evaluation.geneval.summary import counted, summarize


class GenEvalScorer:
    """Judges images by GenEval's rules, without files and intervals."""

    def __init__(self, metadata: Sequence[Metadata], detector: Detector) -> None:
        self._metadata, self._detector = metadata, detector
        self.prompts: Sequence[str] = [prompt["prompt"] for prompt in metadata]
        self.tasks: Sequence[str] = [prompt["tag"] for prompt in metadata]

    def judge(self, index: int, image: Tensor) -> dict[str, Any]:
        """Judge an image of prompt `index`, uint8 (3, H, W); those fields of results.jsonl that a summary reads."""
        metadata = self._metadata[index]
        verdict = judge(metadata, image.permute(1, 2, 0).contiguous().numpy(), self._detector)
        return counted(metadata, verdict.correct)

    def summary(self, results: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The score of each task with images, and "overall"."""
        found = summarize(results)
        return {"overall": found["overall"], **{task: scores["score"] for task, scores in found["tasks"].items()}}


ENOUGH_OBJECTS = 3
ENOUGH_COLORS = 7
_SIZE = 512
_DRAWINGS = {
    "airplane": "2708",
    "apple": "1F34E",
    "banana": "1F34C",
    "bus": "1F68C",
    "car": "1F697",
    "cat": "1F408",
    "dog": "1F415",
    "elephant": "1F418",
    "giraffe": "1F992",
    "pizza": "1F355",
}
_PAINTS = {
    "red": (220, 20, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 30),
    "green": (30, 150, 50),
    "blue": (30, 70, 220),
    "purple": (125, 30, 160),
    "pink": (250, 150, 200),
    "brown": (110, 65, 25),
    "black": (10, 10, 10),
    "white": (250, 250, 250),
}


def known_images() -> dict[str, Image]:
    """Drawings, (512, 512, 3), by the class that they show.

    Raises:
        UserError: a package of the extra 'demo' is not installed.
    """
    paths = {drawing.code: drawing.path for drawing in drawings()[0]}
    return {label: rasterise(paths[code], _SIZE) for label, code in _DRAWINGS.items()}


def painted_balls() -> tuple[Image, dict[str, Detection]]:
    """An image with a ball of each colour, and the balls by colour."""
    image = np.full((_SIZE, _SIZE, 3), 200, np.uint8)
    y, x = np.mgrid[:_SIZE, :_SIZE] + 0.5
    step = _SIZE // 4
    balls = {}
    for place, (color, paint) in enumerate(_PAINTS.items()):
        row, column = divmod(place, 4)
        left, top = column * step, row * step
        radius = np.hypot(x - left - step / 2, y - top - step / 2) / (step / 2 - 8)
        mask = radius < 1
        image[mask] = (np.array(paint) * (1 - 0.3 * radius[mask, None] ** 2)).astype(np.uint8)  # darker to the rim
        box = (left + 8.0, top + 8.0, left + step - 8.0, top + step - 8.0)
        balls[color] = Detection("sports ball", 1.0, box, mask)
    return image, balls


def self_check(detector: Detector) -> str:
    """Show a detector known images; one sentence says what it found.

    Raises:
        UserError: it found too little to be trusted, or a package of the extra 'demo' is not installed.
    """
    answers = {label: _most_confident(detector.detect(image)) for label, image in known_images().items()}
    least = detector.thresholds.score
    missed = [label for label, (name, score) in answers.items() if name != label or score <= least]
    image, balls = painted_balls()
    named = dict(zip(balls, detector.colors(image, list(balls.values())), strict=True))
    wrong = [color for color, name in named.items() if name != color]
    objects, colors = len(answers) - len(missed), len(named) - len(wrong)
    said = (
        f"the detector finds {objects} of {len(answers)} known objects with a score above {least}{_but(missed)}, its "
        f"most confident answer has {max(score for _, score in answers.values()):.2f}, and it names {colors} of "
        f"{len(named)} known colours{_but(wrong)}"
    )
    if objects < ENOUGH_OBJECTS or colors < ENOUGH_COLORS:
        raise UserError(
            f"{said}: with less than {ENOUGH_OBJECTS} objects or {ENOUGH_COLORS} colours its weights, a library or the "
            "device is at fault, and its scores mean nothing"
        )
    return said


def _most_confident(found: Sequence[Detection]) -> tuple[str, float]:
    return max(((one.label, one.score) for one in found), key=lambda answer: answer[1], default=("nothing", 0.0))


def _but(missed: Sequence[str]) -> str:
    return f" (not {', '.join(missed)})" if missed else ""


Name = Literal["mask2former", "shapes"]


def build_detector(name: Name, weights: str | None, clip: str | None, device: torch.device) -> Detector:
    """Build a detector; `weights` and `clip` are mask2former's, see its `build`, and by default in the usual caches.

    Raises:
        UserError: weights are missing or not those expected.
    """
    if name == "shapes":
        from evaluation.proving.detector import ShapeDetector

        return ShapeDetector()
    from evaluation.geneval import mask2former

    given = {"weights": weights, "clip": clip}
    return mask2former.build(**{name: value for name, value in given.items() if value}, device=device)


def check_prompts(prompts: Sequence[Metadata], detector: Detector) -> None:
    """Check that a detector can find what prompts ask for: every model would score 0 at what it cannot.

    Raises:
        UserError: the first prompt with a class that it does not know, or with more objects of one than it counts.
    """
    most = detector.thresholds.most
    for prompt in prompts:
        for item in (*prompt.get("include", ()), *prompt.get("exclude", ())):
            if item["class"] not in detector.classes:
                raise UserError(
                    f"the prompt {prompt['prompt']!r} asks for the class {item['class']!r}, which the detector "
                    f"{detector.identity['name']} cannot find: choose another --detector, or name it as one of "
                    f"{', '.join(detector.classes[:3])} ... {detector.classes[-1]}"
                )
        for item in prompt.get("include", ()):
            if item["count"] > most:
                raise UserError(
                    f"the prompt {prompt['prompt']!r} asks for {item['count']} of {item['class']!r}, and GenEval "
                    f"counts the {most} most confident alone: no image could be right"
                )


def prompts_for(name: Name) -> list[Metadata]:
    """The default prompts for a detector: GenEval's own, or the proving ground's."""
    if name == "shapes":
        from evaluation.proving.prompts import proving_prompts

        return proving_prompts()
    return official()
