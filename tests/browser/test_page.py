"""The page in a real browser: the server is started as a user does; a headless Chromium types, clicks and looks.

    pytest -m browser tests/browser
    PAGE_MODEL=runs/prove/scenes/model PAGE_SCREENSHOT=docs/page.png pytest -m browser tests/browser -k screenshot

It needs Gradio, Playwright's Python package and a Chromium on the path, such as Debian's; Playwright's own browsers are
not used. The model has random weights unless PAGE_MODEL names another one's folder; the screenshot is written to
PAGE_SCREENSHOT.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked import ROOT, free_port
from PIL import Image
from random_model import write_random_model
from tiny import open_process

pytestmark = pytest.mark.browser
pytest.importorskip("gradio", reason="comes with the extra 'serve'")
api = pytest.importorskip("playwright.sync_api", reason="the browser's driver is not installed: pip install playwright")

PATIENCE_MS = 30_000
SOURCES = "images => images.map(image => image.src)"
LONG = {"steps": 500, "pictures": 16}
"""A request that takes longer than anything else that a test does."""


@dataclass(frozen=True)
class Server:
    url: str
    calls_outside: Callable[[], int]
    """How many connections it tried to make to other machines."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """launch/serve.py with a queue of one; its proxy settings lead to a socket that counts connections."""
    folder = os.environ.get("PAGE_MODEL") or write_random_model(tmp_path_factory.mktemp("model") / "model")
    port = free_port()
    words = [str(ROOT / "launch" / "serve.py"), "--model", str(folder), "--port", str(port), "--queue", "1"]
    with socket.create_server(("127.0.0.1", 0)) as outside:
        outside.setblocking(False)
        proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
        ways = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), proxy)
        ways |= {name.lower(): proxy for name in ways} | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        process = open_process([sys.executable, *words, "--max_pixels", "4096"], PYTHONPATH=str(ROOT), **ways)
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("serving on"):
                break
        else:
            pytest.fail("".join(said))

        def calls_outside() -> int:
            count = 0
            while True:
                try:
                    outside.accept()[0].close()
                except BlockingIOError:
                    return count
                count += 1

        yield Server(f"http://127.0.0.1:{port}/", calls_outside)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output, output


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on the path: apt-get install chromium")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield running
        running.close()


class Visitor:
    """A browser session at the page; `foreign` are the addresses on other hosts that it asked for."""

    def __init__(self, browser: Any, server: Server, **context: Any) -> None:
        self.page = browser.new_context(**context).new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.foreign: list[str] = []
        self.page.on("request", lambda request: self._note(request.url, server.url))
        self.page.goto(server.url)
        self.page.wait_for_selector("#prompt textarea")
        for tab in ("History", "Draw"):  # a tab has nothing in it before it is looked at
            self.open(tab)

    def open(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab).click()

    def _note(self, url: str, own: str) -> None:
        if not url.startswith((own, "data:", "blob:")):
            self.foreign.append(url)

    def fill(self, prompt: str, **numbers: float) -> None:
        self.page.fill("#prompt textarea", prompt)
        for name, value in numbers.items():
            self.page.fill(f"#{name} input", str(value))

    def ask(self, prompt: str, **numbers: float) -> None:
        self.fill(prompt, **numbers)
        self.page.click("#draw")

    def shows(self, words: str) -> None:
        self.page.get_by_text(re.compile(words)).first.wait_for()

    def is_shown(self, selector: str, count: int = 1) -> None:
        api.expect(self.page.locator(selector)).to_have_count(count, timeout=PATIENCE_MS)

    def draw(self, prompt: str, count: int = 1, **numbers: float) -> list[bytes]:
        """Ask, wait, and fetch the pictures' files as a click on their download does."""
        before = self.page.locator("#history img").count()
        self.ask(prompt, pictures=count, **{"steps": 4} | numbers)
        self.is_shown("#history img", before + count)
        self.shows(rf"{count} pictures? in [\d.]+ s")
        self.is_shown(".pictures .grid-container img", count)
        sources = self.page.locator(".pictures .grid-container img").evaluate_all(SOURCES)
        return [self.page.request.get(source).body() for source in sources]


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Callable[..., Visitor]]:
    found: list[Visitor] = []

    def open_page(**context: Any) -> Visitor:
        found.append(Visitor(browser, server, **context))
        return found[-1]

    yield open_page
    for visitor in found:
        visitor.page.context.close()
        assert visitor.foreign == []
    assert server.calls_outside() == 0


def test_the_picture_changes_with_the_prompt_and_repeats_with_the_seed(visit: Callable[..., Visitor]) -> None:
    page = visit()
    (circle,) = page.draw("a red circle")
    (star,) = page.draw("a blue star")
    (again,) = page.draw("a red circle")
    (other,) = page.draw("a red circle", **{"seed": 1})
    shown = [Image.open(io.BytesIO(file)).convert("RGB").tobytes() for file in (circle, star, again, other)]
    assert shown[0] == shown[2]
    assert circle == again  # to the last byte of the file
    assert len(set(shown)) == 3
    (elsewhere,) = visit().draw("a red circle")
    assert elsewhere == circle


def test_a_downloaded_picture_says_what_it_was_generated_with(visit: Callable[..., Visitor]) -> None:
    first, second = visit().draw("a red circle", 2, width=24, height=8, steps=3)
    settings = [json.loads(Image.open(io.BytesIO(file)).text["settings"]) for file in (first, second)]
    assert [image["number"] for image in settings] == [0, 1]
    assert (settings[0]["prompt"], settings[0]["size"], settings[0]["sampling"]["steps"]) == (
        "a red circle",
        [8, 24],
        3,
    )
    assert Image.open(io.BytesIO(first)).size == (24, 8)


def test_the_picture_is_seen_forming_and_a_request_can_be_stopped(visit: Callable[..., Visitor]) -> None:
    page = visit()
    page.ask("a red circle", **LONG)
    page.is_shown("img.preview")
    page.shows(r"picture \d+ of 16")
    seen = page.page.get_attribute("img.preview", "src")
    page.page.wait_for_function("seen => document.querySelector('img.preview')?.src !== seen", arg=seen)
    with page.page.expect_response(re.compile("/reset$")):  # before, Gradio drops another click on the button
        page.page.click("#stop-draw")
    page.shows("Stopped.")
    page.is_shown("img.preview", 0)
    kept = page.page.locator("#history img").count()
    assert kept < 16
    page.draw("a blue star")  # the model is free again
    assert page.page.locator("#history img").count() == kept + 1


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"width": 30}, "width 30: must be a multiple of the model's patch, 4 pixels, such as 32"),
        ({"width": 128, "height": 128}, "this server allows at most 4,096 pixels in all, such as 64 x 64"),
        ({"pictures": 99}, "pictures 99: must be a whole number from 1 to 16"),
        ({"steps": ""}, "steps is empty: must be a whole number from 1 to 500"),
    ],
)
def test_what_is_wrong_is_said_on_the_page(visit: Callable[..., Visitor], numbers: dict[str, Any], words: str) -> None:
    page = visit()
    page.ask("a red circle", **numbers)
    page.shows(re.escape(words))
    assert page.page.locator("#history img").count() == 0
    page.draw("a red circle", width=16, height=16)


def test_a_prompt_cannot_put_markup_into_the_page(visit: Callable[..., Visitor]) -> None:
    page = visit()
    page.draw("<b id=planted>a red circle</b>")
    page.open("History")
    page.page.locator("#history button img").first.click()
    page.shows("a red circle")
    page.is_shown("#planted", 0)


def test_a_full_queue_is_said_on_the_page(visit: Callable[..., Visitor]) -> None:
    running, waiting, refused = visit(), visit(), visit()
    running.ask("a red circle", **LONG)
    running.is_shown("img.preview")
    waiting.ask("a blue star", **LONG)
    waiting.shows(r"queue: 1/1")
    refused.ask("a green heart")
    refused.shows("currently busy. Please try again")
    waiting.page.click("#stop-draw")
    waiting.shows("Stopped.")
    running.page.click("#stop-draw")
    running.shows("Stopped.")
    refused.draw("a green heart")


def test_one_who_leaves_does_not_keep_the_model(visit: Callable[..., Visitor]) -> None:
    left, stayed = visit(), visit()
    left.ask("a red circle", **LONG)
    left.is_shown("img.preview")
    left.page.goto("about:blank")
    stayed.draw("a blue star")


def test_two_pictures_side_by_side_and_settings_used_again(visit: Callable[..., Visitor]) -> None:
    page = visit()
    page.draw("a red circle", steps=3)
    page.draw("a blue star", steps=5)
    page.open("History")
    thumbnails = page.page.locator("#history button:has(img)")
    for index in (0, 1):  # the latest, then the one before: the last that was clicked is on the left
        thumbnails.nth(index).click()
        api.expect(page.page.locator(".settings")).to_have_count(index + 1)
    api.expect(page.page.locator(".settings").nth(0)).to_contain_text("a red circle")
    api.expect(page.page.locator(".settings").nth(1)).to_contain_text("a blue star")
    assert page.page.locator(".settings").nth(0).locator("tr.differs th").all_inner_texts() == ["prompt", "steps"]
    page.page.click("#again-left")
    api.expect(page.page.locator("#prompt textarea")).to_be_visible()
    api.expect(page.page.locator("#prompt textarea")).to_have_value("a red circle")
    api.expect(page.page.locator("#steps input")).to_have_value("3")


def test_an_image_is_edited(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    page = visit()
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    page.open("Edit")
    page.page.fill("#target textarea", "a blue star")
    page.page.click("#edit")
    page.shows("image: there is none")
    page.page.set_input_files("#image input[type=file]", tmp_path / "red.png")
    page.is_shown("#image img")
    page.page.click("#edit")
    page.is_shown("#history img")
    source = page.page.locator(".pictures .grid-container img").evaluate_all(SOURCES)[-1]
    edited = Image.open(io.BytesIO(page.page.request.get(source).body()))
    assert edited.size == (16, 12)
    assert json.loads(edited.text["settings"])["target"] == "a blue star"
    page.open("History")
    page.page.locator("#history button img").first.click()
    page.page.click("#again-left")
    api.expect(page.page.locator("#target textarea")).to_be_visible()
    page.page.click("#edit")
    page.is_shown("#history img", 2)
    sources = page.page.locator("#history img").evaluate_all(SOURCES)
    again, before = (page.page.request.get(source).body() for source in sources)
    assert sources[0] != sources[1]
    assert again == before


def test_a_file_that_is_no_image_is_refused_in_words(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    page = visit()
    (tmp_path / "words.png").write_text("no image")
    page.open("Edit")
    page.page.fill("#target textarea", "a blue star")
    page.page.set_input_files("#image input[type=file]", tmp_path / "words.png")
    page.is_shown("#image img")
    page.page.click("#edit")
    page.shows("image: cannot be read")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_without_scrolling_sideways(visit: Callable[..., Visitor], scheme: str) -> None:
    page = visit(viewport={"width": 400, "height": 800}, color_scheme=scheme)
    page.draw("a red circle", 4)
    for tab in ("Draw", "Edit", "History"):
        page.open(tab)
        page.page.wait_for_timeout(300)
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 400


def test_screenshot(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    page = visit(viewport={"width": 1280, "height": 900})
    page.page.mouse.move(0, 0)
    page.draw("a photo of a red circle left of a blue square", 4, steps=25)
    page.page.wait_for_function("[...document.querySelectorAll('.pictures img')].every(image => image.complete)")
    path = Path(os.environ.get("PAGE_SCREENSHOT") or tmp_path / "page.png")
    page.page.screenshot(path=path)
    with Image.open(path) as image:
        assert image.size == (1280, 900)
        assert len(image.convert("RGB").getcolors(2**20) or []) > 100
