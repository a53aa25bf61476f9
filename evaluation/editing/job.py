"""Editing as a job that may be killed at any moment, on any number of processes: edit, measure, sum up.

In its folder it leaves

    edits.json       what the edits are made from
    images/          of each entry the image as it was edited, 00003.png, and its edits, 00003_0.png
    results.jsonl    a line an edit, with what it did to the background
    summary.json     the means, and everything they depend on
    edits.html       every image beside its edits

A folder holds edits of one kind; others are refused. The regions are no part of that: they may be given later.

What a job of edits hands in: results.jsonl, summary.json, edits.html and a table.

The intervals are of the bootstrap over images, each with all its edits: edits of one image share its background.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.decode import Pixels, decode_file
from data.errors import UserError
from data.files import atomic_write
from data.pages import cards, figure, number, table, write_page
from data.randomness import key
from evaluation.editing.edit_list import METRICS, Box, Edit, Inside, background_scores, given_region, in_boxes
from evaluation.geneval.rules import Detector
from evaluation.geneval.summary import RESAMPLES, bootstrap, interval
from evaluation.sampling_job import begin_or_go_on, draw_together, held, read_speed, write_json, write_png
from t2i.distributed import World
from t2i.pipeline import EditSettings, Pipeline, edit_image, patch_window
from t2i.size_limits import check_fits

Line = dict[str, Any]
"""Of results.jsonl; `EditJob` makes it."""

_TITLES = {"mse": "MSE", "ssim": "SSIM", "ssim_replaced": "SSIM, inside replaced"}
_SIDE = 320
"""Pixels of a picture on the page, at most."""


def summarise(lines: Sequence[Line], seed: int = 0) -> dict[str, Any]:
    """The means over all edits that were measured.

    Returns:
        "edits", "images", "measured": how many; "not_measured": how many by reason; "background": of each metric "mean"
        and "interval", empty if none was measured; "bootstrap": how the intervals were made. In JSON's types.
    """
    by_image: dict[int, list[dict[str, float]]] = defaultdict(list)
    for line in lines:
        if line["background"] is not None:
            by_image[line["entry"]].append(line["background"])
    measured = [scores for of_image in by_image.values() for scores in of_image]
    background = {}
    for metric in METRICS if measured else ():
        drawn = bootstrap(
            [[scores[metric] for scores in of_image] for of_image in by_image.values()],
            key(seed, "editing", "bootstrap"),
        )
        mean = float(np.mean([scores[metric] for scores in measured]))
        background[metric] = {"mean": mean, "interval": interval(drawn)}
    return {
        "edits": len(lines),
        "images": len({line["entry"] for line in lines}),
        "measured": len(measured),
        "not_measured": dict(Counter(line["not_measured"] for line in lines if line["not_measured"])),
        "background": background,
        "bootstrap": {"resamples": RESAMPLES, "seed": seed, "unit": "images with their edits"},
    }


def finish(
    out: Path,
    lines: Sequence[Line],
    fingerprint: Mapping[str, Any],
    settings: EditSettings,
    detector: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write everything, and return the summary.

    Args:
        out: the job's folder.
        lines: of all edits.
        fingerprint: what the edits were made with.
        settings: how.
        detector: who found the regions that are not given.
    """
    summary = {
        **summarise(lines),
        "settings": settings.model_dump(),
        "fingerprint": {**fingerprint, "speed": read_speed(out)},
        "detector": detector,
    }
    atomic_write(out / "results.jsonl", ((json.dumps(line) + "\n").encode() for line in lines))
    _write_page(out, lines, summary)
    write_json(out / "summary.json", summary)  # the last: where it is, the others are
    return summary


def as_text(summary: Mapping[str, Any]) -> str:
    """The means as lines for a terminal."""
    lines = [f"{summary['edits']} edits of {summary['images']} images, {summary['measured']} with a region"]
    for metric, it in summary["background"].items():
        low, high = it["interval"]
        lines.append(f"background {_TITLES[metric]:22} {it['mean']:.6f}   95 %: {low:.6f} to {high:.6f}")
    return "\n".join([*lines, *(f"{count} not measured: {why}" for why, count in summary["not_measured"].items())])


def _write_page(out: Path, lines: Sequence[Line], summary: Mapping[str, Any]) -> None:
    background = summary["background"]
    rows = [("edits", str(summary["edits"]), f"of {summary['images']} images")]
    for metric, it in background.items():
        low, high = it["interval"]
        rows.append((f"background {_TITLES[metric]}", number(it["mean"]), f"95 %: {number(low)} to {number(high)}"))
    told = {**summary["settings"], **summary["fingerprint"], "detector": summary["detector"]}
    settings = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in told.items()]
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
    about = (
        " · ".join(f"{_TITLES[name]} {number(scores[name])}" for name in METRICS) if scores else line["not_measured"]
    )
    before, after = (_shown(out / line[name]) for name in ("source_file", "file"))
    figures = figure(before, _SIDE, line["source_prompt"]) + figure(after, _SIDE, line["target_prompt"])
    name = " ".join([Path(line["file"]).stem, line["target_code"]]).strip()
    return f'<div><h3>{escape(name)}</h3><div class="beside">{figures}</div><small>{escape(about)}</small></div>'


def _shown(path: Path) -> Image.Image:
    """A picture for the page: small ones by their pixels."""
    image = Image.fromarray(decode_file(path).transpose(1, 2, 0))
    times = max(1, _SIDE // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


SCALE_DOWN = "scale the image down"
"""What to do with one that is too large to be edited."""


@dataclass(frozen=True)
class EditJob:
    """The edits of a file in the making.

    Attributes:
        out: the job's folder.
        folder: that of the file of edits.
        edits: all of them.
        patch: side of the model's patches: images are cropped to whole ones.
        settings: how they are edited.
        detector: finds the regions of entries that name classes; None: those have none.
    """

    out: Path
    folder: Path
    edits: Sequence[Edit]
    patch: int
    settings: EditSettings
    detector: Detector | None

    def run(
        self, world: World, pipeline: Pipeline, fingerprint: dict[str, Any], beside: dict[str, Any]
    ) -> dict[str, Any]:
        """Edit what is missing, measure everything, and write what comes of it; return the summary. A collective.

        Args:
            fingerprint: what else the edits depend on, in JSON's types.
            beside: what else is worth knowing of them.

        Raises:
            UserError: an image, box or mask is wrong, or the folder holds other edits.
        """
        with held(world, self.out):
            missing = world.broadcast_from_rank0(lambda: self._begin(world, pipeline, fingerprint, beside))
            draw_together(
                world, self.out, [[edit] for edit in missing], lambda mine, done: self._edit(pipeline, mine, done)
            )
            measured = world.raise_on_all_ranks(
                lambda: [self._measure(edit) for edit in world.split_for_rank(self.edits)]
            )
            lines = [line for part in world.gather(measured) for line in part]
            detector = None if self.detector is None else {**self.detector.identity, **asdict(self.detector.thresholds)}
            return world.broadcast_from_rank0(
                lambda: finish(self.out, lines, {**beside, **fingerprint}, self.settings, detector)
            )

    def _begin(
        self, world: World, pipeline: Pipeline, fingerprint: dict[str, Any], beside: dict[str, Any]
    ) -> list[Edit]:
        """Look at all that is given, make the folder or see that it is of the same edits; those that are missing."""
        if self.detector is not None:
            _check_classes(self.edits, self.detector)
        entries = {edit.entry: edit for edit in self.edits}
        digests, sizes = dict[int, str](), dict[tuple[int, int], Edit]()
        for entry, edit in entries.items():
            image = self._cropped(edit)
            digests[entry] = hashlib.sha256(image.tobytes()).hexdigest()
            sizes[image.shape[0], image.shape[1]] = edit
        largest = max(sizes, key=lambda size: size[0] * size[1])
        where = f"{sizes[largest].image}, {largest[0]} x {largest[1]} pixels"
        check_fits(pipeline, largest, 1, where, SCALE_DOWN, world.local_size)
        contents = [[digests[it.entry], it.source, it.target] for it in self.edits]
        settings = {
            **fingerprint,
            "edits": hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
            "settings": self.settings.model_dump(),
        }
        begin_or_go_on(self.out / "edits.json", settings, beside, "edits made otherwise")
        try:
            (self.out / "images").mkdir(exist_ok=True)
            (self.out / "summary.json").unlink(missing_ok=True)  # of what was there, and this job may be killed
            for entry, edit in entries.items():
                if not self._source(entry).exists():
                    write_png(self._source(entry), self._cropped(edit))
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written to: {error.strerror}") from error
        return [edit for edit in self.edits if not self._result(edit).exists()]

    def _cropped(self, edit: Edit) -> Pixels:
        """The image, uint8 (H, W, 3), of whole patches; its region is looked at, too."""
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

    def _edit(self, pipeline: Pipeline, mine: Sequence[Edit], done: Callable[[int], object]) -> None:
        for edit in mine:
            image = torch.from_numpy(decode_file(self._source(edit.entry)))
            result = edit_image(pipeline, image, edit.source, edit.target, self.settings)
            write_png(self._result(edit), result.permute(1, 2, 0).numpy())
            done(1)

    def _measure(self, edit: Edit) -> Line:
        """An edit's line of results.jsonl."""
        before, result = (
            decode_file(path).transpose(1, 2, 0) for path in (self._source(edit.entry), self._result(edit))
        )
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
            "file": str(self._result(edit).relative_to(self.out)),
            "source_file": str(self._source(edit.entry).relative_to(self.out)),
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


def found_boxes(classes: Sequence[str], images: Sequence[Pixels], detector: Detector) -> list[Box]:
    """The boxes of all objects of these classes in images (H, W, 3) that count by the detector's thresholds."""
    limits = detector.thresholds
    boxes: list[Box] = []
    for image in images:
        found = sorted(detector.detect(image), key=lambda it: -it.score)
        for name in classes:
            boxes += [it.box for it in found if it.label == name and it.score > limits.score][: limits.most]
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
