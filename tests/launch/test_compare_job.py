"""The command: what it prints, the page it writes, mistakes in one sentence; on runs made by hand and on real ones."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from made_runs import draw_grid, results, score, train, validation, write_run, write_scores
from PIL import Image, ImageColor
from tiny import run, tiny_config, write_config

from launch.compare import main

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a browser would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html, self.open, self.loaded = path.read_text(), [], []
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "srcset", "xlink:href")]
        self.loaded += [value for name, value in attributes if name == "href" and tag != "a"]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def section(self, name: str) -> str:
        return re.search(rf'<section id="{name}">(.*?)</section>', self.html, re.DOTALL)[1]


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two runs of 40 steps, the second at half the speed, with scores and grids."""
    runs = []
    for name, pace in (("a<b>", 60.0), ("b", 120.0)):
        lines = [train("low", s, time=1e9 + pace * s, step_s=pace, loss=1 / s) for s in range(1, 41)]
        lines += [validation("low", 40, 0.5, time=1e9 + pace * 40), score("low", 40, overall=0.5)]
        lines[-1]["time"] = 1e9 + pace * 40
        runs.append(write_run(tmp_path / name, lines))
        write_scores(runs[-1] / "geneval", results("colors", [[True, False]] * 20))
    draw_grid(runs[0], "low", 20, {"a <cat>": "black"})
    draw_grid(runs[0], "low", 40, {"a <cat>": "red", "a dog": "green"})
    draw_grid(runs[1], "low", 40, {"a fox": "white", "a <cat>": "blue"})
    return runs


def assert_shows(html: str, *colours: str) -> None:
    pictures = [Image.open(io.BytesIO(base64.b64decode(it))) for it in re.findall(r"base64,([^\"]+)", html)]
    found = [np.asarray(it.convert("RGB")).mean((0, 1)) for it in pictures]
    np.testing.assert_allclose(found, [ImageColor.getrgb(it) for it in colours], atol=6)


def test_it_prints_and_writes_no_page(pair: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(pair[0].parent.rglob("*"))
    assert main([str(path) for path in pair]) == 0
    said = capsys.readouterr().out
    for title in ("Settings that differ", "GenEval", "Newest scores while training, stage low", "Stage low"):
        assert f"\n{title}" in said
    assert "compare.html" not in said and sorted(pair[0].parent.rglob("*")) == before


def test_the_page_is_one_file_that_loads_nothing(pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "new/compared"
    assert main([*map(str, pair), "--out", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["compare.html"]
    page = Page(out / "compare.html")
    assert page.loaded and all(it.startswith("data:image/") for it in page.loaded)
    assert re.findall(r"url\((?!#)|@import", page.html) == []
    assert "a<b>" not in page.html and "a <cat>" not in page.html  # text, not tags


def test_both_runs_are_in_the_same_axes(pair: list[Path], tmp_path: Path) -> None:
    main([*map(str, pair), "--out", str(tmp_path / "out")])
    charts = Page(tmp_path / "out/compare.html").section("curves").split("<figure")[1:]
    titles = [re.search("<h3>(.*?)</h3>", chart)[1] for chart in charts]
    names = ("Training loss", "Validation loss", "Score while training", "Images per second")
    assert titles == [f"{name} by {over}" for name in names for over in ("steps", "hours")]
    assert all(chart.count("var(--c0)") == chart.count("var(--c1)") == 2 for chart in charts)

    def right_ends(chart: str) -> list[float]:
        return [float(it) for it in re.findall(r'class="line" d="[^"]*?([\d.]+),[\d.]+"', chart)]

    steps, hours = right_ends(charts[0]), right_ends(charts[1])
    assert steps[0] == steps[1] == hours[1]
    assert (hours[0] - 34) / (hours[1] - 34) == pytest.approx(0.5, abs=0.001)  # 34: where the axes begin


def test_samples_of_a_prompt_stand_side_by_side(pair: list[Path], tmp_path: Path) -> None:
    main([*map(str, pair), "--out", str(tmp_path / "out")])
    cells = Page(tmp_path / "out/compare.html").section("samples").split("<h3>")[1:]
    assert [cell.partition("</h3>")[0] for cell in cells] == ["a &lt;cat&gt;", "a dog", "a fox"]
    assert_shows(cells[0], "red", "blue")  # not the black of step 20
    assert_shows(cells[1], "green")
    assert_shows(cells[2], "white")
    assert "b: no sample" in cells[1] and "a&lt;b&gt;: no sample" in cells[2]


def test_a_curve_of_seeds_is_their_mean_over_each(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / f"r{seed}", [train("low", s, images_per_s=float(rate)) for s in (1, 2)], seed=seed)
        for seed, rate in ((0, 10), (1, 30))
    ]
    assert main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    chart = Page(tmp_path / "out/compare.html").section("curves").split("<figure")[-1]
    assert "r{0,1} <b>20</b>" in chart and chart.count('class="raw"') == 2 and chart.count('class="line"') == 1
    assert main([*map(str, runs), "--out", str(tmp_path / "out"), "--seeds", "apart"]) == 0
    assert "r1 <b>30</b>" in Page(tmp_path / "out/compare.html").section("curves")


def test_runs_without_anything_still_make_a_page(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, []) for name in "ab"]
    assert main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    html = Page(tmp_path / "out/compare.html").html
    assert "Recorded in none of the runs: training loss" in html and "None of the runs has samples yet" in html


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("{a} {b}/low", "error: {b}/low is no run: it should be a run's folder (with config.yaml and metrics.jsonl)"),
        ("{a}", "error: a single run is given"),
        ("{a} {b} --out {b}/config.yaml", "error: --out {b}/config.yaml: cannot be written"),
        ("{a} {b} --seeds alone", "error: "),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    places = {name: write_run(tmp_path / name, []) for name in "ab"}
    assert main(words.format(**places).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(said.format(**places)) and error.count("\n") == 1


def test_more_runs_than_a_page_has_colours_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / str(i), [])) for i in range(8)]
    assert main([*runs, "--out", str(tmp_path / "out")]) == 2
    assert "7 colours for curves, not 8" in capsys.readouterr().err
    assert main(runs) == 0


def test_what_training_leaves_can_be_compared(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tiny_config(scenes, tmp_path / "runs", stages=[{"name": "low"}])
    tree["train"]["steps"] = 4
    run("forked", "curriculum.py", "--config", str(write_config(tmp_path / "config.yaml", tree)), ranks=1)
    first, second = tmp_path / "runs/tiny", tmp_path / "runs/copy"
    shutil.copytree(first, second)
    config = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(config.replace("muon_lr: 0.002", "muon_lr: 0.003"))
    assert main([str(first), str(second), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    settings = said[said.index("Settings that differ") : said.index("\n\nStage low")]
    assert [line.split() for line in settings.splitlines()[2:]] == [["optimizer.muon_lr", "0.002", "0.003", "≠"]]
    stage = said[said.index("Stage low") : said.index("\n\nthe page")].splitlines()[2:]
    assert re.fullmatch("  steps +4 of 4 +4 of 4", stage[0])
    values = [re.split("  +", line.strip())[1:] for line in stage]
    assert len(values) > 15 and all(len(row) == 2 and row[0] == row[1] != "-" for row in values)
    samples = Page(tmp_path / "out/compare.html").section("samples")
    assert samples.count("<img") == 4 and "a photo of a blue star" in samples
