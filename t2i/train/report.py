"""The report of a run: `write_report(run_dir)` reads a run's folder and writes `run_dir/report.html`.

- One file: images are data URIs, curves are inline SVG, and nothing is loaded from elsewhere.
- The run may go on, or have been killed: a section that has nothing to show yet says so.
- All text from files is escaped, and an atomic rename replaces the old page.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from data.pages import Chart, Line, absent, cards, draw, duration, figure, number, smooth_pieces, table, write_page
from t2i.train.run_dir import NO_SCORES, Run, read_grid, read_run

_STRIP_GRIDS = 16  # thumbnails a stage shows, evenly spread, the first and the last among them
_TILE_SIDE, _THUMBNAIL_SIDE = 640, 480  # pixels

_CHARTS = [
    Chart("Training loss", "What is minimised: all terms with their weights.", "train", {"total": "loss"}),
    Chart(
        "Terms of the loss",
        "Each term of the training loss by itself.",
        "train",
        {"flow matching": "loss_fm", "LPIPS": "loss_lpips", "P-DINO": "loss_pdino", "REPA": "loss_repa"},
    ),
    Chart("Validation loss", "On images never trained on; lower is better.", "validation", {"held-out": "loss"}),
    Chart(
        "Score",
        "Of images of prompts, by task; higher is better. A score that was cut short is left out.",
        "score",
        beside=NO_SCORES,
        from_zero=True,
    ),
    Chart("Training loss by t", "Flow matching: t is 0 in pure noise, 1 in the image.", "train", bands="loss_fm_t"),
    Chart("Validation loss by t", "Held-out: t is 0 in pure noise, 1 in the image.", "validation", bands="loss_t"),
    Chart("Gradient norm", "Of each update; a lasting climb is a warning.", "train", {"norm": "grad_norm"}),
    Chart("Learning rate", "As the optimizers used it.", "train", {"AdamW": "lr", "Muon": "lr_muon"}, from_zero=True),
    Chart("Images per second", "Over all devices.", "train", {"images": "images_per_s"}, from_zero=True),
    Chart("Data wait", "Near zero when loading keeps up.", "train", {"seconds": "data_wait_s"}, from_zero=True),
    Chart("Utilisation", "MFU: model FLOPs as a share of the peak.", "train", {"share": "mfu"}, from_zero=True),
]
_COLOURS = 7  # of curves
_EXACT = ("lr", "lr_muon")  # of the metrics of training, those that need no smoothing


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from what the run has written so far; returns its path.

    Raises:
        FileNotFoundError: `run_dir` has no environment.json or no config.yaml.
    """
    run = read_run(run_dir)
    sections = {
        "Latest samples": _latest_samples(run),
        "Curves": _curves(run),
        "Samples over time": _strips(run),
        "Stages": _stage_table(run),
        "Skipped": _counters(run),
        "Configuration": _config(run_dir / "config.yaml"),
        "Environment": _environment(run),
        "Data": _data(run),
    }
    return write_page(
        run_dir / "report.html",
        title=run_dir.resolve().name,
        kind="training report",
        subtitle="A text-to-image model trained in pixels",
        cards=_cards(run),
        notes=[f"<b>Stand-in</b><span>{escape(sentence)}</span>" for sentence in run.environment["stand_ins"]],
        sections=sections,
    )


def _cards(run: Run) -> str:
    done = sum(stage.progress >= 1 for stage in run.stages)
    under_way = [f"{stage.name} at {100 * stage.progress:.0f} %" for stage in run.stages if stage.progress < 1]
    found = [
        ("Stages done", f"{done} of {len(run.stages)}", ", ".join(under_way) or "of those begun"),
        ("Images seen", number(sum(stage.images for stage in run.stages)), "repeats counted"),
        ("Wall time", duration(sum(stage.seconds for stage in run.stages)), "pauses of over an hour left out"),
        ("Parameters", number(run.environment["parameters"]), "of the trained network"),
    ]
    for stage in run.stages:
        if losses := stage.series("validation", "loss"):
            first, last = losses[1][[0, -1]]
            found.append((f"Validation loss, {stage.name}", number(last), f"first {number(first)}"))
        if scores := stage.series("score", "overall"):
            steps, values = scores
            best = int(values.argmax())
            note = f"best {number(values[best])}, at step {number(steps[best] - stage.start)}"
            found.append((f"Score, {stage.name}", number(values[-1]), note))
    return cards(found)


def _latest_samples(run: Run) -> str:
    sampled = [stage for stage in run.stages if stage.grids]
    if not sampled:
        return absent("No samples yet: the first grid appears here once a stage has generated one.")
    step, path = sampled[-1].grids[-1]
    about, images = read_grid(path)
    settings = f"solver {about['solver']} · steps {about['steps']} · guidance {about['guidance_scale']}"
    lead = escape(f"{sampled[-1].name}, step {step:,} · {settings} · weights {about['weights']}")
    tiles = [figure(image, _TILE_SIDE, prompt) for image, prompt in zip(images, about["prompts"], strict=True)]
    return f'<p class="lead">{lead}</p><div class="grid">{"".join(tiles)}</div>'


def _strips(run: Run) -> str:
    parts = []
    for stage in run.stages:
        count = len(stage.grids)
        shown = [stage.grids[round(i)] for i in np.linspace(0, count - 1, min(count, _STRIP_GRIDS))]
        figures = [figure(Image.open(path), _THUMBNAIL_SIDE, f"{stage.name}, step {step:,}") for step, path in shown]
        strip = f'<div class="strip" tabindex=0>{"".join(figures)}</div>'
        parts.append(strip if figures else absent(f"{escape(stage.name)}: this stage has generated no samples yet."))
    return "".join(parts) or absent("No samples yet.")


def _lines(run: Run, chart: Chart) -> list[Line]:
    """The curves of a chart that the run has; those of single steps are smoothed, and drawn raw beneath."""
    metrics, colours = chart.lines, [f"c{i}" for i in range(len(chart.lines))]
    names = list(dict.fromkeys(name for stage in run.stages for line in stage.of(chart.kind) for name in line))
    if chart.beside:
        metrics = {name.replace("_", " "): name for name in names if name not in chart.beside}
        colours = [f"c{i % _COLOURS}" for i in range(len(metrics))]
    if chart.bands:
        bands = sorted(name for name in names if name.startswith(chart.bands))
        metrics = {"t " + name.removeprefix(chart.bands).replace("-", "–"): name for name in bands}
        colours = [f"t{round(i)}" for i in np.linspace(0, 4, len(bands))]
    lines = []
    for (label, metric), colour in zip(metrics.items(), colours, strict=True):
        noisy = chart.kind == "train" and metric not in _EXACT
        raw = [piece for stage in run.stages if (piece := stage.series(chart.kind, metric))]
        pieces = smooth_pieces(raw) if noisy else raw
        if pieces:
            lines.append(Line(label, colour, pieces, raw if noisy and not chart.bands else []))
    return lines


def _curves(run: Run) -> str:
    starts = {stage.name: stage.start for stage in run.stages}
    found = [(chart, _lines(run, chart)) for chart in _CHARTS]
    drawn = "".join(draw(chart, lines, starts, run.end) for chart, lines in found if lines)
    missing = ", ".join(chart.title.lower() for chart, lines in found if not lines)
    lead = "All stages on one axis: batches since the run began. Beside each name, its latest value."
    html = f'<p class="lead">{lead}</p><div class="charts">{drawn}</div>' if drawn else ""
    return html + (absent(f"Not recorded in this run so far: {missing}.") if missing else "")


def _sides(resolution: int | list[int]) -> str:
    """`data.resolution` as text: the side of squares, or height and width."""
    return "×".join(map(str, resolution)) if isinstance(resolution, list) else str(resolution)


def _stage_table(run: Run) -> str:
    if not run.stages:
        return absent("No stage has trained a step yet.")
    rows = []
    for stage in run.stages:
        last, held_out = stage.last, stage.series("validation", "loss")
        first_loss, last_loss = (number(x) for x in held_out[1][[0, -1]]) if held_out else ("–", "–")
        rows.append(
            {
                "Stage": stage.name,
                "Steps": f"{number(last['step'])} / {number(last['total_steps'])}",
                "Resolution": f"{_sides(last['resolution'])} px",
                "Batch": number(last["batch_size"]),
                "Images": number(stage.images),
                "First val. loss": first_loss,
                "Last val. loss": last_loss,
                "Images/s": number(np.mean([line["images_per_s"] for line in stage.of("train")])),
                "Hours": f"{stage.seconds / 3600:.2f}",
                "Skipped updates": number(last["skipped_updates"]),
            }
        )
    return table(list(rows[0]), [list(row.values()) for row in rows])


def _counters(run: Run) -> str:
    counted = {stage.name: counters[-1] for stage in run.stages if (counters := stage.of("counters"))}
    reasons = {reason for counters in counted.values() for reason in counters}
    rows = [
        [
            {"bad": "bad content, in all"}.get(reason, reason.replace("_", " ")),
            *(number(counters.get(reason, 0)) for counters in counted.values()),
        ]
        for reason in sorted(reasons - {"kind", "stage", "step", "time", "samples"})
    ]
    if not rows:
        return absent("The loader has reported no skipped sample.")
    lead = "Samples left out of training, by reason; the next one of the same lane took their place."
    return f'<p class="lead">{lead}</p>' + table(["Reason", *counted], rows)


def _config(path: Path) -> str:
    text = escape(path.read_text(encoding="utf-8"))
    return f"<details><summary>config.yaml, as resolved</summary><pre>{text}</pre></details>"


def _environment(run: Run) -> str:
    about = {key: run.environment[key] for key in ("device", "world_size", "git")} | run.environment["versions"]
    if run.environment.get("git_changed"):
        about["git"] += ", with changes"
    rows = [[key.replace("_", " "), str(value)] for key, value in about.items() if value]
    return table(["", ""], rows, text_columns=2)


def _data(run: Run) -> str:
    rows = [
        [source["name"], source["licence"] or "–", source["credit"] or "–", number(source["samples"])]
        for source in run.environment["data"]
    ]
    return table(["Source", "Licence", "Credit", "Samples"], rows, text_columns=3)
