"""A detector's verdicts on a folder's images, kept so that a job that was killed goes on where it stood.

A file a prompt, whole or absent. Each verdict is kept with the hash of the image's file: an image that has changed is
judged again. All are of one detector; a folder with those of another is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data.errors import UserError
from evaluation.geneval.detection import Detector
from evaluation.geneval.folder import Prompted, read_image
from evaluation.geneval.prompts import Metadata
from evaluation.geneval.rules import Verdict, judge
from evaluation.geneval.summary import Result
from evaluation.parts import check_or_write_manifest, write_json
from t2i.engine.checkpoint.format import sha256


@dataclass(frozen=True)
class Judged:
    """An image and what became of it."""

    digest: str
    """SHA-256 of its file."""
    height: int
    width: int
    result: Result
    """Its line of results.jsonl; the file's name as seen from the job's folder."""


class Verdicts:
    """The verdicts of a detector on a folder's images.

    Args:
        out: the job's folder.
        prompted: what is judged.
        detector: who judges.
    """

    def __init__(self, out: Path, prompted: Sequence[Prompted], detector: Detector) -> None:
        self._folder = out / "verdicts"
        self._out, self._prompted, self._detector = out, prompted, detector

    def begin(self) -> list[int]:
        """Make the folder, or see that what is there is of the same detector.

        Returns:
            Numbers of the prompts whose images are not judged yet, or have changed since.

        Raises:
            UserError: it holds verdicts of another detector, or cannot be made.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            settings = {"detector": self._detector.identity, "thresholds": asdict(self._detector.thresholds)}
            differ = check_or_write_manifest(self._folder / "settings.json", settings)
        except OSError as error:
            raise UserError(f"--out {self._out}: cannot be written to: {error.strerror}") from error
        if differ:
            raise UserError(
                f"--out {self._out}: {self._folder} holds verdicts of another detector ({', '.join(differ)}): remove it"
            )
        return [number for number in range(len(self._prompted)) if not self._known(number)]

    def judge(self, mine: Iterable[int], judged: Callable[[], object]) -> None:
        """Judge the images of these prompts, and tell of each prompt.

        Raises:
            UserError: an image that cannot be read.
        """
        for number in mine:
            it = self._prompted[number]
            found = [self._judge(path, it.metadata) for path in it.images]
            write_json(self._path(number), [asdict(image) for image in found])
            judged()

    def read(self) -> list[list[Judged]]:
        """For each prompt the verdicts on its images. All have been judged."""
        return [self._read(number) for number in range(len(self._prompted))]

    def _judge(self, path: Path, metadata: Metadata) -> Judged:
        image = read_image(path)
        verdict = judge(metadata, image, self._detector)
        height, width = image.shape[:2]
        return Judged(sha256(path), height, width, _line(self._name(path), metadata, verdict))

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self._out)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.json"

    def _read(self, number: int) -> list[Judged]:
        return [Judged(**it) for it in json.loads(self._path(number).read_text())]

    def _known(self, number: int) -> bool:
        if not self._path(number).exists():
            return False
        it = self._prompted[number]
        known = [(image.result["filename"], image.result["metadata"], image.digest) for image in self._read(number)]
        return known == [(self._name(path), json.dumps(it.metadata), sha256(path)) for path in it.images]


def _line(filename: str, metadata: Metadata, verdict: Verdict) -> Result:
    """An image's line of results.jsonl; its details are (x0, y0, x1, y1, score) of all that counts, by class."""
    details: dict[str, list[list[float]]] = {}
    for it in verdict.used:
        details.setdefault(it.label, []).append([float(value) for value in (*it.box, it.score)])
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": verdict.correct,
        "reason": verdict.reason,
        "metadata": json.dumps(metadata),
        "details": json.dumps(details),
    }
