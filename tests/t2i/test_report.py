"""The report page. The run directories are synthetic: made-up numbers and flat colours, no training."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i.train.report import _smooth, write_report

VOID = {"meta", "img", "br", "hr", "link", "input", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would load, the scripts and the visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html, self.open, self.loaded, self.tags, self.text = path.read_text(), [], [], [], ""
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loaded += [v for k, v in attributes if k in ("src", "srcset") or (k == "href" and tag != "a")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [v for k, v in attributes if k in ("src", "srcset") or (k == "href" and tag != "a")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += " " + data.strip()

    def section(self, name: str) -> str:
        return re.search(rf'<section id="{name}">(.*?)</section>', self.html, re.DOTALL)[1]


def train(stage: str, step: int, **values: object) -> dict:
    record = {"kind": "train", "stage": stage, "step": step, "total_steps": 40}
    record |= {"time": 1e9 + step, "loss": 2 / step}
    record |= {"loss_fm": 1 / step, "loss_repa": -0.5, "loss_fm_t0.0-0.5": 2.5, "loss_fm_t0.5-1.0": 1.5}
    record |= {"grad_norm": 0.7, "lr": 1e-4, "images_per_s": 12.5, "data_wait_s": 0.1, "step_s": 1.0}
    return record | {"resolution": 64, "batch_size": 32, "skipped_updates": 0} | values


def write_metrics(directory: Path, records: list[dict], torn: str = "") -> None:
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + torn)


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """Synthetic: two stages, the second unfinished, hostile strings everywhere, a torn last line."""
    directory = tmp_path / "run <one>"
    records = [train("stage1", s) for s in range(1, 41)]
    records += [{"kind": "validation", "stage": "stage1", "step": s, "loss": v, "loss_t0.0-0.5": v}
                for s, v in ((20, 0.8125), (40, 0.7125))]  # fmt: skip
    records += [train("sft", s, time=1e9 + 40 + s, batch_size=8, grad_norm=float("nan"))
                for s in range(1, 11)]  # fmt: skip
    records += [{"kind": "validation", "stage": "sft", "step": 10, "loss": 0.6375, "unknown": [1]}]
    records += [{"kind": "counters", "stage": "sft", "step": 10, "too_small": 1234, "<i>reason": 1}]
    for stage, colours in (("stage1", "red green"), ("sft", "blue white")):
        samples = directory / stage / "samples"
        samples.mkdir(parents=True)
        for step in (9, 10):
            grid = Image.new("RGB", (64, 32))
            for i, colour in enumerate(colours.split()):
                grid.paste(colour, (32 * i, 0, 32 * i + 32, 32))
            grid.save(samples / f"step_{step:06d}.png")
            prompts = ["<script>alert(1)</script>", '"a" cat & dog']
            about = {"prompts": prompts, "columns": 2, "rows": 1, "solver": "heun"}
            (samples / f"step_{step:06d}.json").write_text(json.dumps(about))
    (directory / "config.yaml").write_text("name: </pre><script>config()</script>\n")
    data = [{"name": "OpenMoji", "url": "https://openmoji.org", "licence": "CC BY-SA", "credit": "<b>x"},
            {"name": "bad link", "url": "javascript:alert(1)"}]  # fmt: skip
    environment = {"versions": {"torch": "2"}, "device": "CPU", "world_size": 1, "parameters": 131_482_112,
                   "notices": ["P-DINO is a <stand-in>"], "data": data}  # fmt: skip
    (directory / "environment.json").write_text(json.dumps(environment))
    write_metrics(directory, records, torn='{"kind": "train", "stage": "sft", "step": 11, "lo')
    return directory


def test_page_is_well_formed_and_loads_nothing(rich: Path) -> None:
    path = write_report(rich)
    page = Page(path)
    assert path == rich / "report.html"
    assert not list(rich.glob(".report*"))
    assert page.loaded
    assert all(v.startswith(("data:image/", "#")) for v in page.loaded)
    assert "@import" not in page.html
    assert re.findall(r"url\((?!#)", page.html) == []
    assert page.tags.count("svg") == 9  # the ten charts less utilisation, which was not recorded
    assert "Not recorded in this run so far: utilisation." in page.text


def test_text_from_files_is_escaped(rich: Path) -> None:
    page = Page(write_report(rich))
    assert page.tags.count("script") == 1  # the page's own
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.html
    assert "<script>alert" not in page.html
    assert "<script>config" not in page.html
    assert 'href="javascript:' not in page.html
    assert not {"i", "stand-in", "one"} & set(page.tags)
    assert "run <one>" in page.text


def test_numbers(rich: Path) -> None:
    page = Page(write_report(rich))
    cards = re.sub(r"<[^>]+>", "|", page.html[: page.html.index("<nav>")])
    assert re.search(r"Validation loss, stage1\|+0\.7125\|+first 0\.8125", cards)
    assert re.search(r"Validation loss, sft\|+0\.6375", cards)
    assert re.search(r"Stages done\|+1 of 2\|+sft at 25 %", cards)
    assert re.search(r"Images seen\|+1,360\|", cards)  # 40 * 32 + 10 * 8
    assert re.search(r"Wall time\|+50 s", cards)
    assert re.search(r"Parameters\|+131 M", cards)
    assert "P-DINO is a &lt;stand-in&gt;" in page.html
    assert "1,234" in page.section("passed-over")
    assert "10 / 40" in page.section("stages")
    assert "<td class=n>0.8125</td><td class=n>0.7125</td>" in page.section("stages")
    assert "1 unreadable line(s)" in page.text


def test_latest_grid_is_cut_into_its_pictures(rich: Path) -> None:
    latest = Page(write_report(rich)).section("latest-samples")
    assert "sft, step 10 · solver heun" in latest
    assert latest.count('<img width="32" height="32"') == 2
    blue, white = (_mean_colour(uri) for uri in re.findall(r"base64,([^\"]+)", latest))
    np.testing.assert_allclose([blue, white], [[0, 0, 255], [255, 255, 255]], atol=6)


def _mean_colour(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))).mean(axis=(0, 1))


def test_an_empty_run_directory_says_what_is_missing(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    missing = ["No samples yet", "No stage has written a metric yet", "has no config.yaml"]
    missing += ["no readable environment.json", "names no data source", "Not recorded in this run so far"]
    for sentence in missing:
        assert sentence in page.text
    assert "svg" not in page.tags
    assert 'role="note"' not in page.html


def test_one_stage_without_validation_or_samples(tmp_path: Path) -> None:
    write_metrics(tmp_path, [{"kind": "train", "stage": "stage1", "step": 1, "loss": 1.5}, {"kind": "else"}])
    page = Page(write_report(tmp_path))
    assert page.tags.count("svg") == 1
    assert "Validation loss," not in page.text
    assert "validation loss" in page.section("curves")
    assert "This stage has drawn no samples yet." in page.text


def test_a_torn_picture_gives_way_to_the_one_before(rich: Path) -> None:
    torn = rich / "sft/samples/step_000010.png"
    torn.write_bytes(torn.read_bytes()[:60])
    assert "sft, step 9" in Page(write_report(rich)).section("latest-samples")


def test_a_resume_overtakes_the_lost_attempt_and_pauses_do_not_count(tmp_path: Path) -> None:
    lost = [train("stage1", s) for s in range(1, 31)]
    lost += [{"kind": "validation", "stage": "stage1", "step": 30, "loss": 9}]
    resumed = [train("stage1", s, time=1e9 + 90_000 + s) for s in range(21, 26)]
    write_metrics(tmp_path, lost + resumed)
    page = Page(write_report(tmp_path))
    assert "25 / 40" in page.section("stages")
    assert "Validation loss," not in page.text
    assert "34 s" in page.html[: page.html.index("<nav>")]  # 30 and 4; the day between them left out


def test_smoothing_keeps_a_line_straight_inside_and_a_constant_everywhere() -> None:
    line = np.arange(50.0)
    np.testing.assert_allclose(_smooth(line, 4)[8:-8], line[8:-8])
    np.testing.assert_allclose(_smooth(np.full(7, 3.0), 4), 3.0)


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        write_report(tmp_path / "nowhere")
