"""The page: every image with its boxes and its reason, found by relative path, and foreign text that stays text."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from evaluation.geneval.job import kind_of, name_of, notes_on
from evaluation.geneval.page import write_page
from evaluation.geneval.prompts import Metadata, official
from evaluation.geneval.summary import ImageResult, summarize

CAT = {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a <b>cat</b>"}
LEFT: Metadata = {
    "tag": "position",
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a dog left of a cat",
}


def judged(
    metadata: Metadata, correct: bool, details: dict[str, list[list[float]]], file: str = "a.png"
) -> ImageResult:
    result = {
        "filename": file,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": correct,
        "reason": "" if correct else "cat: 1 expected, 0 found & <no> more",
        "metadata": json.dumps(metadata),
        "details": json.dumps(details),
    }
    return ImageResult("digest", 100, 200, result)


IMAGES = [
    [
        judged(CAT, True, {"cat": [[20, 10, 120, 60, 0.987]]}, "images/00000/samples/0000.png"),
        judged(CAT, False, {}, "../what others drew/#1.png"),
    ],
    [judged(LEFT, False, {"dog": [[0, 0, 10, 10, 0.5]], "tie": [[1, 2, 3, 4, 0.4]], "cat": [[0, 0, 200, 100, 0.3]]})],
]


class Page(HTMLParser):
    """The elements of a page in their order, with the text that each directly holds."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str], str]] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}, ""))

    def handle_data(self, data: str) -> None:
        if self.found:
            tag, attributes, text = self.found[-1]
            self.found[-1] = (tag, attributes, text + data)

    def all(self, tag: str, **having: str) -> list[tuple[dict[str, str], str]]:
        return [(a, text) for name, a, text in self.found if name == tag and having.items() <= a.items()]


@pytest.fixture
def page(tmp_path: Path) -> Page:
    summary: dict[str, Any] = summarize([image.result for images in IMAGES for image in images])
    summary |= {
        "name": "GenEval's rules",
        "notes": ["Not <all> of it."],
        "detector": {"name": "by & by", "weights": {"sha256": "abc"}},
    }
    write_page(tmp_path / "report.html", "a <model>", summary, IMAGES)
    return Page(tmp_path / "report.html")


def test_images_are_loaded_by_relative_path_as_they_come_into_view(page: Page) -> None:
    images = page.all("img")
    assert [it["src"] for it, _ in images] == [
        "images/00000/samples/0000.png",
        "../what%20others%20drew/%231.png",
        "a.png",
    ]
    assert {(it["loading"], it["width"], it["height"]) for it, _ in images} == {("lazy", "200", "100")}


def test_nothing_comes_from_elsewhere(page: Page, tmp_path: Path) -> None:
    assert "://" not in (tmp_path / "report.html").read_text()
    assert not page.all("link") and all("src" not in it for it, _ in page.all("script"))
    (policy,) = (it["content"] for it, _ in page.all("meta") if "http-equiv" in it)
    assert policy.startswith("default-src 'none';img-src 'self' file:;")


def test_each_image_tells_its_verdict_and_reason(page: Page) -> None:
    assert [it["class"] for it, _ in page.all("figure")] == ["right", "wrong", "wrong"]
    assert [it["data-task"] for it, _ in page.all("article")] == ["single_object", "position"]
    said = [text for _, text in page.all("b")][-3:]
    assert said[0] == "Right"
    assert said[1] == "Wrong\ncat: 1 expected, 0 found & <no> more\nnothing was found"
    assert said[2].startswith("Wrong\ncat: 1 expected") and "nothing" not in said[2]


def test_boxes_are_in_thousandths_of_the_width_with_label_and_score(page: Page) -> None:
    rects = [tuple(int(it[name]) for name in ("x", "y", "width", "height")) for it, _ in page.all("rect")]
    assert rects[0] == (100, 50, 500, 250)
    assert {it["viewbox"] for it, _ in page.all("svg")} == {"0 0 1000 500"}
    assert page.all("text")[0][1].startswith("cat 0.99")


def test_what_is_not_asked_for_lies_beneath_and_apart(page: Page) -> None:
    kinds = [(it["class"], text[1].split()[0]) for (it, _), text in zip(page.all("g"), page.all("text"), strict=True)]
    assert kinds == [("o0", "cat"), ("other", "tie"), ("o1", "dog"), ("o0", "cat")]


def test_tasks_and_verdicts_can_be_chosen(page: Page) -> None:
    choices = [(it["name"], it["value"], "checked" in it) for it, _ in page.all("input")]
    tasks, verdicts = ("all", "single_object", "position"), ("all", "right", "wrong")
    expected = [("task", task, task == "all") for task in tasks]
    assert choices == expected + [("verdict", verdict, verdict == "all") for verdict in verdicts]


def test_foreign_text_stays_text(page: Page) -> None:
    (title,) = (text for _, text in page.all("title"))
    assert title == "a <model> · GenEval's rules"
    assert [text for _, text in page.all("h1")] == ["GenEval's rules"]
    assert [text for _, text in page.all("h3")] == [CAT["prompt"], LEFT["prompt"]]
    assert [text.strip() for _, text in page.all("aside")] == ["Not <all> of it."]
    cells = [text.strip() for _, text in page.all("td")]
    rows = dict(zip(cells[::2], cells[1::2], strict=True))
    assert rows["detector.name"] == "by & by" and rows["detector.weights.sha256"] == "abc"
    assert "overall" not in rows and rows["images"] == "3"


def test_scores_stand_first(page: Page) -> None:
    shown = [(it["value"]) for it, _ in page.all("meter")]
    assert shown == ["0.2500", "0.5000", "0.0000"]  # overall, single object, position


def test_prompts_that_are_not_the_official_ones_are_said() -> None:
    prompts = official()
    assert kind_of(prompts) == ("official", "") and notes_on("official", "", 4, {"name": "a"}) == []
    assert kind_of([dict(sorted(it.items())) for it in prompts]) == ("official", "")
    assert kind_of([{"id": 7, "exclude": [], **it} for it in prompts]) == ("official", "")
    assert kind_of([*prompts[1:], prompts[0]]) == ("official", "")
    assert kind_of(prompts[100:]) == ("official", "453 of the 553 official")
    assert kind_of([{**it, "prompt": f"{it['prompt']}, in detail"} for it in prompts]) == ("reworded", "")
    changed = [{**prompts[0], "include": [{"class": "cat", "count": 2}]}, *prompts[1:]]
    twice = [prompts[0], *prompts[:-1]]
    shape = [{**prompts[0], "include": [{"class": "circle", "count": 1}]}]
    assert kind_of(changed) == kind_of(twice) == kind_of(shape) == ("other", "")
    (said,) = notes_on("reworded", "", 4, {})
    assert "in other words" in said
    assert len(notes_on("other", "the first 2 of each task", 1, {})) == 3


def test_only_what_compares_with_published_scores_is_called_geneval() -> None:
    pinned, others = ({"name": "a", "weights": {"file": "b.pth", "pinned": is_so}} for is_so in (True, False))
    assert name_of(notes_on("official", "", 4, pinned), pinned) == "GenEval"
    for kind, choice, each, detector in (
        ("reworded", "", 4, pinned),
        ("other", "", 4, pinned),
        ("official", "the first 2 of each task", 4, pinned),
        ("official", "", 1, pinned),
        ("official", "", 4, others),
    ):
        assert name_of(notes_on(kind, choice, each, detector), detector) == "GenEval's rules"
    assert name_of([], {"name": "shapes"}) == "Proving ground"
