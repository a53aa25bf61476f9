"""Edits as a job that may be killed at any moment, on any number of processes: edit, measure, summarize.

The job's folder holds

    edits.json       what the edits are made from
    images/          for each entry the image as it was edited, 00003.png, and its edits, 00003_0.png
    results.jsonl    a line an edit, with what it did to the background
    summary.json     the means, and everything that they depend on
    edits.html       every image beside its edits

The edited regions are no part of what edits.json compares: they may be given later. The intervals are of the bootstrap
over images, each with all its edits, since edits of one image share its background.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decode import Pixels, decode_file
from data.errors import UserError
from data.files import atomic_write, write_json, write_png
from data.pages import cards, figure, number, table, write_page
from data.randomness import key
from evaluation.editing.edit_list import METRICS, Box, Edit, Inside, background_scores, given_region, in_boxes
from evaluation.geneval.rules import Detector
from evaluation.sampling_job import SamplingJob, lock_output, read_speed
from evaluation.stats import RESAMPLES, bootstrap, interval
from t2i.distributed import World
from t2i.pipeline import EditSettings, Pipeline, edit_image, patch_window
from t2i.size_limits import check_fits

Line = dict[str, Any]
"""A line of results.jsonl, see `EditJob`."""

_TITLES = {"mse": "MSE", "ssim": "SSIM", "ssim_replaced": "SSIM, inside replaced"}
_SIDE = 320
"""Largest side of an image on the page, in pixels."""


def summarize(lines: Sequence[Line], seed: int = 0) -> dict[str, Any]:
    """The means over all edits that were measured.

    Returns:
        "edits", "images", "measured": how many; "not_measured": how many by reason; "background": for each metric
        "mean" and "interval", empty if nothing was measured; "bootstrap": how the intervals were made. In JSON's types.
    """
    by_image: dict[int, list[dict[str, float]]] = defaultdict(list)
    for line in lines:
        if line["background"] is not None:
            by_image[line["entry"]].append(line["background"])
    measured = [scores for of_image in by_image.values() for scores in of_image]
    background = {}
    for metric in METRICS if measured else ():
        of_images = [[scores[metric] for scores in of_image] for of_image in by_image.values()]
        resampled = bootstrap(of_images, key(seed, "editing", "bootstrap"))
        mean = float(np.mean([scores[metric] for scores in measured]))
        background[metric] = {"mean": mean, "interval": list(interval(resampled))}
    return {
        "edits": len(lines),
        "images": len({line["entry"] for line in lines}),
        "measured": len(measured),
        "not_measured": dict(Counter(line["not_measured"] for line in lines if line["not_measured"])),
        "background": background,
        "bootstrap": {"resamples": RESAMPLES, "seed": seed, "unit": "images with their edits"},
    }


def format_summary(summary: Mapping[str, Any]) -> str:
    """The means as lines for a terminal."""
    lines = [f"{summary['edits']} edits of {summary['images']} images, {summary['measured']} with a region"]
    for metric, scores in summary["background"].items():
        low, high = scores["interval"]
        lines.append(f"background {_TITLES[metric]:22} {scores['mean']:.6f}   95 %: {low:.6f} to {high:.6f}")
    return "\n".join([*lines, *(f"{count} not measured: {why}" for why, count in summary["not_measured"].items())])


def _write_page(out: Path, lines: Sequence[Line], summary: Mapping[str, Any]) -> None:
    rows = [("edits", str(summary["edits"]), f"of {summary['images']} images")]
    for metric, scores in summary["background"].items():
        low, high = scores["interval"]
        rows.append((f"background {_TITLES[metric]}", number(scores["mean"]), f"95 %: {number(low)} to {number(high)}"))
    about = {**summary["settings"], **summary["fingerprint"], "detector": summary["detector"]}
    settings = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in about.items()]
    write_page(
        out / "edits.html",
        title="Edits",
        kind="editing",
        subtitle=f"{summary['fingerprint']['model']}, {summary['fingerprint']['which']} weights",
        cards=cards(rows),
        notes=[f"<span>{count} not measured: {escape(why)}.</span>" for why, count in summary["not_measured"].items()],
        sections={
            "Images": f'<div class="charts">{"".join(_pair(out, line) for line in lines)}</div>',
            "Made with": table(["", ""], settings, text_columns=2),
        },
    )


def _pair(out: Path, line: Line) -> str:
    """An image beside its edit."""
    scores = line["background"]
    words = [f"{_TITLES[name]} {number(scores[name])}" for name in METRICS] if scores else [line["not_measured"]]
    before, after = (_enlarged(out / line[name]) for name in ("source_file", "file"))
    figures = figure(before, _SIDE, line["source_prompt"]) + figure(after, _SIDE, line["target_prompt"])
    name = " ".join([Path(line["file"]).stem, line["target_code"]]).strip()
    about = escape(" · ".join(words))
    return f'<div><h3>{escape(name)}</h3><div class="beside">{figures}</div><small>{about}</small></div>'


def _enlarged(path: Path) -> Image.Image:
    """A small image with each pixel as a square."""
    image = Image.fromarray(decode_file(path).transpose(1, 2, 0))
    times = max(1, _SIDE // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


SCALE_DOWN = "scale the image down"
"""What to do with one that is too large to be edited."""


@dataclass(frozen=True)
class EditJob:
    """The edits of a file.

    Attributes:
        out: the job's folder.
        folder: that of the file of edits.
        patch: side of the model's patches in pixels: images are cropped to whole ones.
        detector: finds the regions of entries that name classes; without one these have no region.
    """

    out: Path
    folder: Path
    edits: Sequence[Edit]
    patch: int
    settings: EditSettings
    detector: Detector | None

    def run(
        self, world: World, pipeline: Pipeline, fingerprint: Mapping[str, Any], metadata: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Edit what is missing, measure everything, write the results, and return the summary. A collective.

        Args:
            fingerprint, metadata: what else the edits depend on, and what else their manifest says.

        Raises:
            UserError: an image, box or mask is wrong, or the folder holds other edits.
        """
        with lock_output(world, self.out):
            contents = world.broadcast_from_rank0(lambda: self._check(pipeline, world.local_size))
            edits = hashlib.sha256(json.dumps(contents).encode()).hexdigest()

            def generate(numbers: Sequence[int]) -> Iterator[Tensor]:
                for edit in (self.edits[number] for number in numbers):
                    image = torch.from_numpy(decode_file(self._source(edit.entry)))
                    yield edit_image(pipeline, image, edit.source, edit.target, self.settings)[None]

            SamplingJob(
                self.out / "edits.json",
                {**fingerprint, "edits": edits, "settings": self.settings.model_dump()},
                metadata,
                [self._result(edit) for edit in self.edits],
                1,
                generate,
                self._write_sources,
            ).run(world)
            mine = world.split_for_rank(self.edits)
            parts = world.gather(world.raise_on_all_ranks(lambda: [self._measure(edit) for edit in mine]))
            lines = [line for part in parts for line in part]
            return world.broadcast_from_rank0(lambda: self._finish(lines, {**metadata, **fingerprint}))

    def _check(self, pipeline: Pipeline, ranks: int) -> list[list[str]]:
        """Check all that is given, and return what is edited: each image's hash and both captions."""
        if self.detector is not None:
            _check_classes(self.edits, self.detector)
        digests, sizes = dict[int, str](), dict[tuple[int, int], Edit]()
        for entry, edit in self._entries().items():
            image = self._cropped(edit)
            digests[entry] = hashlib.sha256(image.tobytes()).hexdigest()
            sizes[image.shape[0], image.shape[1]] = edit
        largest = max(sizes, key=lambda size: size[0] * size[1])
        what = f"{sizes[largest].image}, {largest[0]} x {largest[1]} pixels"
        check_fits(pipeline, largest, 1, what, SCALE_DOWN, ranks)
        return [[digests[edit.entry], edit.source, edit.target] for edit in self.edits]

    def _entries(self) -> dict[int, Edit]:
        """An edit of each image."""
        return {edit.entry: edit for edit in self.edits}

    def _write_sources(self) -> None:
        (self.out / "images").mkdir(exist_ok=True)
        (self.out / "summary.json").unlink(missing_ok=True)  # an older one, and this job may be killed
        for entry, edit in self._entries().items():
            if not self._source(entry).exists():
                write_png(self._source(entry), self._cropped(edit))

    def _cropped(self, edit: Edit) -> Pixels:
        """The image, uint8 (H, W, 3), of whole patches; its region is checked, too."""
        image, inside = self._read(edit)
        if inside is not None and inside.all():
            raise UserError(f"entry {edit.entry}: the region covers all of {edit.image.name}: leave some background")
        return image

    def _read(self, edit: Edit) -> tuple[Pixels, Inside | None]:
        """The image and the region that its entry gives, of whole patches."""
        pixels = decode_file(edit.image)
        height, width = pixels.shape[1:]
        window = patch_window(height, width, self.patch, str(edit.image))
        inside = given_region(edit, self.folder, height, width)
        return np.ascontiguousarray(pixels.transpose(1, 2, 0)[window]), None if inside is None else inside[window]

    def _source(self, entry: int) -> Path:
        return self.out / "images" / f"{entry:05d}.png"

    def _result(self, edit: Edit) -> Path:
        return self.out / "images" / f"{edit.name}.png"

    def _measure(self, edit: Edit) -> Line:
        """An edit's line of results.jsonl."""
        files = self._source(edit.entry), self._result(edit)
        before, result = (decode_file(path).transpose(1, 2, 0) for path in files)
        _, inside = self._read(edit)
        boxes: list[Box] = []
        why = "" if inside is not None else "no region is given"
        if edit.about.detect is not None:
            why = "no detector was given"
            if self.detector is not None:
                boxes = found_boxes(edit.about.detect, (before, result), self.detector)
                inside = in_boxes(boxes, *before.shape[:2])
                why = "" if boxes else "nothing was found"
        if inside is not None and inside.all():
            why = "the region is all of the image"
        return {
            "file": str(files[1].relative_to(self.out)),
            "source_file": str(files[0].relative_to(self.out)),
            "entry": edit.entry,
            "image": edit.image.relative_to(self.folder).as_posix(),
            "source_prompt": edit.source,
            "target_prompt": edit.target,
            "target_code": edit.code,
            "size": list(before.shape[:2]),
            "found": boxes,
            "region": None if why or inside is None else float(inside.mean()),
            "background": None if why or inside is None else background_scores(before, result, inside),
            "not_measured": why,
        }

    def _finish(self, lines: Sequence[Line], made_from: Mapping[str, Any]) -> dict[str, Any]:
        """Write results.jsonl, edits.html and summary.json, and return the summary."""
        summary = {
            **summarize(lines),
            "settings": self.settings.model_dump(),
            "fingerprint": {**made_from, "speed": read_speed(self.out)},
            "detector": self.detector and {**self.detector.identity, **asdict(self.detector.thresholds)},
        }
        atomic_write(self.out / "results.jsonl", ((json.dumps(line) + "\n").encode() for line in lines))
        _write_page(self.out, lines, summary)
        write_json(self.out / "summary.json", summary)  # the last: where it is, the others are
        return summary


def found_boxes(classes: Sequence[str], images: Sequence[Pixels], detector: Detector) -> list[Box]:
    """The boxes of all objects of these classes in images (H, W, 3) that count by the detector's thresholds."""
    limits = detector.thresholds
    boxes: list[Box] = []
    for image in images:
        found = sorted(detector.detect(image), key=lambda detection: -detection.score)
        for name in classes:
            counting = [
                detection.box for detection in found if detection.label == name and detection.score > limits.score
            ]
            boxes += counting[: limits.most]
    return boxes


def _check_classes(edits: Sequence[Edit], detector: Detector) -> None:
    asked = [(edit.entry, name) for edit in edits for name in edit.about.detect or ()]
    if not asked:
        raise UserError("--detector does nothing, since no entry has 'detect': name classes there, or leave it out")
    for entry, name in asked:
        if name not in detector.classes:
            raise UserError(
                f"entry {entry}: detect {name!r}: the detector {detector.identity['name']} knows no such class: name "
                f"it as one of {', '.join(detector.classes[:3])} ... {detector.classes[-1]}"
            )
