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

from data.pages import smooth
from t2i.train.report import write_report

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
    record |= {"grad_norm": 0.7, "lr": 1e-4, "lr_muon": 2e-3, "images_per_s": 12.5, "data_wait_s": 0.1, "step_s": 1.0}
    return record | {"resolution": 64, "batch_size": 32, "skipped_updates": 0} | values


def validation(stage: str, step: int, loss: float) -> dict:
    values = {"loss": loss, "loss_t0.0-0.5": loss}
    return {"kind": "validation", "stage": stage, "step": step, "time": 1e9 + step} | values


def write_run(directory: Path, records: list[dict], torn: str = "", **environment: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + torn)
    (directory / "config.yaml").write_text("name: </pre><script>config()</script>\n")
    about = {"versions": {"torch": "2"}, "device": "CPU", "world_size": 1, "git": None, "parameters": 131_482_112}
    (directory / "environment.json").write_text(json.dumps(about | {"stand_ins": [], "data": []} | environment))
    return directory


def draw_grid(folder: Path, step: int, colours: tuple[str, str]) -> None:
    grid = Image.new("RGB", (64, 32))
    for i, colour in enumerate(colours):
        grid.paste(colour, (32 * i, 0, 32 * i + 32, 32))
    folder.mkdir(parents=True, exist_ok=True)
    grid.save(folder / f"step_{step:06d}.png")
    about = {"prompts": ["<script>alert(1)</script>", '"a" cat & dog'], "columns": 2, "rows": 1}
    about |= {"solver": "heun", "steps": 25, "guidance_scale": 3.0, "weights": "ema"}
    (folder / f"step_{step:06d}.json").write_text(json.dumps(about))


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """Synthetic: two stages, the second unfinished, hostile strings everywhere, a torn last line."""
    records = [train("stage1", s) for s in range(1, 41)]
    records += [validation("stage1", 20, 0.8125), validation("stage1", 40, 0.7125)]
    records.sort(key=lambda record: record["step"])
    records += [
        train("sft", s, time=1e9 + 40 + s, batch_size=8, resolution=[64, 96], grad_norm=None) for s in range(1, 11)
    ]
    records += [validation("sft", 10, 0.6375) | {"time": 1e9 + 50}]
    counters = {"samples": 80, "too_small": 1234, "<i>reason": 1}
    records += [{"kind": "counters", "stage": "sft", "step": 10, "time": 1e9 + 50, **counters}]
    source = {"name": "OpenMoji", "url": "data", "licence": "CC BY-SA", "credit": "<b>x", "samples": 3755}
    directory = write_run(
        tmp_path / "run <one>",
        records,
        torn='{"kind": "train", "stage": "sft", "step": 11, "lo',
        stand_ins=["P-DINO is a <stand-in>"],
        data=[source],
    )
    for step in (9, 10):
        draw_grid(directory / "stage1/samples", step, ("red", "green"))
        draw_grid(directory / "sft/samples", step, ("blue", "white"))
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
    assert page.tags.count("svg") == 9  # the eleven charts less two, which were not recorded
    assert "Not recorded in this run so far: score, utilisation." in page.text


def test_text_from_files_is_escaped(rich: Path) -> None:
    page = Page(write_report(rich))
    assert page.tags.count("script") == 1  # the page's own
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.html
    assert "<script>alert" not in page.html
    assert "<script>config" not in page.html
    assert not {"i", "stand-in", "one"} & set(page.tags)
    assert "<b>x" not in page.html
    assert "run <one>" in page.text


def test_numbers(rich: Path) -> None:
    page = Page(write_report(rich))
    cards = re.sub(r"<[^>]+>", "|", page.html[: page.html.index("<nav>")])
    assert re.search(r"Validation loss, stage1\|+0\.7125\|+first 0\.8125", cards)
    assert re.search(r"Validation loss, sft\|+0\.6375", cards)
    assert re.search(r"Stages done\|+1 of 2\|+sft at 25 %", cards)
    assert re.search(r"Images seen\|+1,360\|", cards)  # 40 * 32 + 10 * 8
    assert re.search(r"Wall time\|+1 min", cards)  # 50 s
    assert re.search(r"Parameters\|+131 M", cards)
    assert "P-DINO is a &lt;stand-in&gt;" in page.html
    assert "1,234" in page.section("skipped")
    assert "samples<" not in page.section("skipped")  # those used
    assert "3,755" in page.section("data")
    assert "10 / 40" in page.section("stages")
    assert "64 px" in page.section("stages") and "64×96 px" in page.section("stages")
    assert "<td class=n>0.8125</td><td class=n>0.7125</td>" in page.section("stages")


def test_latest_grid_is_cut_into_its_pictures(rich: Path) -> None:
    latest = Page(write_report(rich)).section("latest-samples")
    assert "sft, step 10 · solver heun" in latest
    assert latest.count('<img width="32" height="32"') == 2
    blue, white = (_mean_colour(uri) for uri in re.findall(r"base64,([^\"]+)", latest))
    np.testing.assert_allclose([blue, white], [[0, 0, 255], [255, 255, 255]], atol=6)


def _mean_colour(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))).mean(axis=(0, 1))


def test_both_learning_rates_are_shown(rich: Path) -> None:
    assert "AdamW <b>0.0001</b>" in Page(write_report(rich)).section("curves")
    assert "Muon <b>0.002</b>" in Page(write_report(rich)).section("curves")


def test_a_run_that_has_not_trained_a_step_says_what_is_missing(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path, [validation("stage1", 0, 2.5)])))
    for sentence in ("No samples yet", "No stage has trained a step yet", "Not recorded in this run so far"):
        assert sentence in page.text
    assert "svg" not in page.tags
    assert 'role="note"' not in page.html


def test_one_stage_without_validation_or_samples(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path, [train("stage1", 1)])))
    assert page.tags.count("svg") == 7
    assert "Validation loss," not in page.text
    assert "validation loss, score, validation loss by t, utilisation." in page.section("curves")
    assert "this stage has generated no samples yet." in page.text


def score(step: int, overall: float, **values: object) -> dict:
    about = {"prompts": 12, "images": 12, "complete": True, "held_s": 3.5}
    line = {"kind": "score", "stage": "stage1", "step": step, "time": 1e9 + step, "overall": overall}
    return line | {"single_object": overall / 2, "two_object": 0.0} | about | values


def test_scores_are_drawn_by_task_and_what_was_cut_short_is_left_out(tmp_path: Path) -> None:
    lines = [train("stage1", s) for s in range(1, 21)]
    lines += [score(0, 0.125), score(10, 0.625), score(20, 0.375), score(20, 0.9, complete=False)]
    page = Page(write_report(write_run(tmp_path, lines)))
    chart = re.search(r'<figure class="chart"><h3>Score</h3>.*?</figure>', page.section("curves"), re.DOTALL)[0]
    keys = re.findall(r"--c:var\(--(c\d)\)\">([a-z ]+) <b>([\d.]+)</b>", chart)
    assert keys == [("c0", "overall", "0.375"), ("c1", "single object", "0.1875"), ("c2", "two object", "0")]
    cards = re.sub(r"<[^>]+>", "|", page.html[: page.html.index("<nav>")])
    assert re.search(r"Score, stage1\|+0\.375\|+best 0\.625, at step 10\|", cards)
    assert all(f"--c{n}:" in page.html for n in range(7))  # GenEval has six tasks and the overall score


def test_a_stage_whose_model_is_there_is_done_at_whatever_step(tmp_path: Path) -> None:
    (tmp_path / "stage1" / "model").mkdir(parents=True)
    page = Page(write_report(write_run(tmp_path, [train("stage1", s) for s in range(1, 11)])))
    assert re.search(r"Stages done\|+1 of 1\|", re.sub(r"<[^>]+>", "|", page.html))
    assert "10 / 40" in page.section("stages")


def test_a_grid_that_is_still_being_written_is_left_out(rich: Path) -> None:
    (rich / "sft/samples/step_000011.png").write_bytes(b"torn")
    assert "sft, step 10" in Page(write_report(rich)).section("latest-samples")


def test_a_pause_does_not_count_as_wall_time(tmp_path: Path) -> None:
    records = [train("stage1", s, time=1e9 + 60 * s) for s in range(1, 21)]
    records += [train("stage1", s, time=1e9 + 90_000 + 60 * s) for s in range(21, 26)]
    page = Page(write_report(write_run(tmp_path, records)))
    assert "23 min" in page.html[: page.html.index("<nav>")]  # 19 and 4; the day between them left out


def test_smoothing_keeps_a_line_straight_inside_and_a_constant_everywhere() -> None:
    line = np.arange(50.0)
    np.testing.assert_allclose(smooth(line, 4)[8:-8], line[8:-8])
    np.testing.assert_allclose(smooth(np.full(7, 3.0), 4), 3.0)


@pytest.mark.parametrize("name", ["environment.json", "config.yaml"])
def test_not_the_folder_of_a_run(rich: Path, name: str) -> None:
    (rich / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"run <one> has no {name}"):
        write_report(rich)
