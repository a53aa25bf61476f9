"""Inspection finds what was put in, the same for the same seed, and its page is safe and complete."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tar_samples import MemoryStore, jpeg, tar_bytes, write_source

from data.errors import DataError, StoreError
from data.filters import Filters
from data.inspect.page import Report, printable, share, size_of
from data.inspect.scan import ANY_SIZE, Findings, Tally, header_size, image_format, inspect
from data.sample import ImageSettings
from data.shards.index import SourceIndex, open_index
from data.store import open_store


def picture(width: int, height: int, form: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def small_source(folder: Path, members: list[tuple[str, bytes]]) -> SourceIndex:
    folder.mkdir(exist_ok=True)
    (folder / "00000.tar").write_bytes(tar_bytes(members))
    return open_index(open_store(str(folder)), "source")


def ids(findings: Findings) -> list[str]:
    return [tile.id for tile in findings.sheet]


# --- which samples ---


def test_every_sample_once_when_all_are_asked_for(tmp_path: Path) -> None:
    index = write_source(tmp_path, [70, 1, 0, 129])
    findings = inspect(index, Filters(), ANY_SIZE, samples=None, decodes=None, sheet=1000)
    assert (findings.read, findings.decoded, findings.usable) == (200, 200, 200)
    assert sorted(ids(findings)) == sorted(
        f"source/{shard}.tar/{number:06d}"
        for shard, numbers in {"00000": range(70), "00001": range(70, 71), "00003": range(71, 200)}.items()
        for number in numbers
    )


def test_a_subset_has_one_sample_of_each_stretch_and_follows_the_seed(tmp_path: Path) -> None:
    index = write_source(tmp_path, [50] * 4)

    def drawn(seed: int) -> list[int]:
        found = ids(inspect(index, Filters(), ANY_SIZE, samples=20, sheet=20, seed=seed))
        return [int(id_.rpartition("/")[2]) for id_ in found]

    first = drawn(0)
    assert [number // 10 for number in first] == list(range(20))
    assert first == drawn(0)
    assert first != drawn(1)
    assert len({number % 10 for number in first}) > 4


def test_only_the_stated_number_is_decoded(tmp_path: Path) -> None:
    index = write_source(tmp_path, [40], replaced={n: {"jpg": picture(32, 32)[:-300]} for n in range(40)})
    findings = inspect(index, Filters(), ANY_SIZE, samples=40, decodes=10)
    assert (findings.read, findings.decoded, findings.shorter.total) == (40, 10, 40)
    assert {name: it.count for name, it in findings.bad.items()} == {("undecodable_image", True): 10}
    text = " ".join(Report(index, findings, "").text().split())
    assert "undecodable image 10 100 % 10 decoded" in text


def test_a_sample_that_cannot_be_shown_leaves_its_place_to_the_next(tmp_path: Path) -> None:
    index = write_source(tmp_path, [40], replaced={n: {"jpg": b"none"} for n in range(0, 40, 2)})
    assert len(inspect(index, Filters(), ANY_SIZE, sheet=10).sheet) == 10


def test_progress_adds_up_and_reads_are_joined_within_what_a_request_costs() -> None:
    members = [(f"{n:03d}.{end}", content) for n in range(90) for end, content in (("jpg", jpeg(n)), ("txt", b"a"))]
    content = tar_bytes(members, tarfile.USTAR_FORMAT)
    store = MemoryStore({"00000.tar": content}, readahead=1 << 14)
    index = open_index(store, "source")
    store.reads.clear()
    told: list[int] = []
    inspect(index, Filters(), ANY_SIZE, samples=None, progress=told.append)
    assert told == [64, 26]
    sizes = [stop - start for _, start, stop in store.reads]
    assert sum(sizes) == index.offsets(0)[-1]
    assert max(sizes) <= 2 * store.readahead
    assert len(sizes) < 10


def test_numbers_below_one_are_refused(tmp_path: Path) -> None:
    index = write_source(tmp_path, [2])
    with pytest.raises(DataError, match="decodes is 0: it should be at least 1"):
        inspect(index, Filters(), ANY_SIZE, decodes=0)
    with pytest.raises(DataError, match="samples is -1"):
        inspect(index, Filters(), ANY_SIZE, samples=-1)


def test_a_fault_of_the_store_ends_it(tmp_path: Path) -> None:
    index = write_source(tmp_path, [200])

    def fail(*_: object, **__: object) -> bytes:
        raise StoreError("reading 00000.tar: gone for 10 minutes")

    index.store.read = fail
    with pytest.raises(StoreError, match="gone for"):
        inspect(index, Filters(), ANY_SIZE)


# --- what they are like ---


def test_sizes_formats_members_and_words(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    index = small_source(
        tmp_path,
        [
            ("a.jpg", picture(160, 90)), ("a.txt", b"one two three"), ("a.json", b"{}"),
            ("b.png", picture(30, 40, "PNG")), ("b.txt", b"  "),
            ("c.webp", picture(64, 64, "WEBP")), ("c.txt", b"four words are here"),
            ("d.jpg", picture(160, 90, exif=turned)), ("d.txt", b"on its side"),
        ],
    )  # fmt: skip
    found = inspect(index, Filters(), ANY_SIZE)
    assert found.formats == {"JPEG": 2, "PNG": 1, "WebP": 1}
    assert found.members == {"jpg": 2, "txt": 4, "json": 1, "png": 1, "webp": 1}
    assert found.member_bytes["json"] == 2
    assert found.aspect_ratios == {"16:9": 1, "3:4": 1, "1:1": 1, "9:16": 1}
    assert [found.shorter.quantile(at) for at in (0, 0.5, 1)] == [30, 64, 90]
    assert [found.longer.quantile(at) for at in (0, 0.5, 1)] == [40, 64, 160]
    assert found.elongation.quantile(1) == 178
    assert [found.words.quantile(at) for at in (0, 0.5, 1)] == [0, 3, 4]
    tile = found.sheet[-1]
    assert (tile.id, tile.width, tile.height) == ("source/00000.tar/d", 90, 160)
    assert header_size(tile.jpeg) == (90, 160)
    assert found.usable == 3  # the blank caption is left out


def test_judged_as_training_would(tmp_path: Path) -> None:
    index = small_source(
        tmp_path,
        [
            ("a.jpg", picture(64, 64)), ("a.txt", b"one two three"), ("a.json", b'{"score": 0.1}'),
            ("b.jpg", picture(64, 64)), ("b.txt", b"one"), ("b.json", b'{"score": 0.9}'),
            ("c.jpg", picture(64, 64)[:-99]), ("c.txt", b"one two three"), ("c.json", b'{"score": 0.9}'),
            ("d.jpg", picture(64, 20)), ("d.txt", b"one two three"), ("d.json", b'{"score": 0.9}'),
            ("e.jpg", picture(64, 64)), ("e.json", b'{"score": 0.9}'),
            ("f.jpg", b"<html>"), ("f.txt", b"one two three"), ("f.json", b"[]"),
            ("g.jpg", picture(64, 64)), ("g.txt", b"one two three"), ("g.json", b'{"score": 0.9}'),
        ],
    )  # fmt: skip
    filters = Filters(min_caption_words=2, fields={"score": (0.5, None)}, prefix_probability=1.0)
    found = inspect(index, filters, ImageSettings(32))
    assert {name: it.count for name, it in found.filtered.items()} == {
        ("field:score", False): 1, ("caption_words", False): 1, ("small_image", True): 1, ("missing_caption", False): 1,
    }  # fmt: skip
    assert {name: [id_ for id_, _ in it.first] for name, it in found.bad.items()} == {
        ("undecodable_image", True): ["source/00000.tar/c"],
        ("bad_metadata", False): ["source/00000.tar/f"],
    }
    assert (found.usable, found.formats["HTML or XML"]) == (1, 1)
    # Lengths are those of what is stored, captions of the sheet those of training.
    assert (found.words.total, found.words.below(3), found.words.quantile(1)) == (7, 2, 3)  # none is no words
    assert found.sheet[0].caption.endswith("one two three") and len(found.sheet[0].caption) > len("one two three")


def test_a_few_ids_are_named_the_first_ones(tmp_path: Path) -> None:
    index = write_source(tmp_path, [150], replaced={n: {"txt": b"\xff"} for n in range(150)})
    reason = inspect(index, Filters(), ANY_SIZE).bad["bad_caption", False]
    assert reason.count == 150
    assert [id_ for id_, _ in reason.first] == [f"source/00000.tar/{n:06d}" for n in range(5)]


def test_members_without_end_are_bounded() -> None:
    more = Findings()
    for n in range(3000):
        more.update(Findings(members=Counter([f"{n}.jpg"])))
    assert len(more.members) == 1000


def test_tally_against_numpy() -> None:
    values = np.random.default_rng(0).integers(0, 9000, 501)
    tally = Tally()
    for value in values.tolist():
        tally.add(value)
    for at in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1):
        assert tally.quantile(at) == np.quantile(values, at, method="inverted_cdf")
    assert tally.below(4000) == (values < 4000).sum()
    tally.add(123_456_789)
    assert tally.quantile(1) == 123_000_000


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"\xff\xd8\xff\xe0", "JPEG"), (b"RIFF1234WEBPVP8 ", "WebP"), (b"RIFF1234WAVE", "unknown"), (b"", "unknown"),
     (b"\0\0\0\x1cftypavif", "AVIF"), (b"<!doctype html>", "HTML or XML"), (b"GIF89a", "GIF")],
)  # fmt: skip
def test_formats_by_content(content: bytes, name: str) -> None:
    assert image_format(content) == name


def test_headers_that_lie_or_break_cost_nothing() -> None:
    assert header_size(b"\xff\xd8nothing more") is None
    assert header_size(picture(40, 30)[:700]) == (40, 30)
    bomb = bytearray(picture(8, 8, "PNG"))
    bomb[16:24] = b"\0\1\0\0" * 2
    assert header_size(bytes(bomb)) is None  # 65536 x 65536


# --- the page ---


class _Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "img", "path", "rect", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, content: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(content)


@pytest.fixture
def hostile(tmp_path: Path) -> Report:
    evil = "<script>alert(1)</script><img src=http://evil/x onerror=y>"
    index = small_source(
        tmp_path / "a<b>",
        [
            ("x<i>.jpg", picture(32, 32)), ("x<i>.txt", f"{evil} &amp;".encode()),
            ('y<u>"onload="z.jpg', b"bad"), ('y<u>"onload="z.txt', b"fine"),
            ("z\x1b[31m\udcff.jpg", picture(32, 32)), ("z\x1b[31m\udcff.txt", "שלום".encode()),
            ("w.jpg", picture(32, 32)), ("w.txt", b"w"), ("w.<u>$name", b"1"),
        ],
    )  # fmt: skip
    return Report(index, inspect(index, Filters(), ANY_SIZE), "Judged by <b>nothing</b>.")


def test_the_page_escapes_and_loads_nothing(hostile: Report) -> None:
    page = hostile.page()
    page.encode("utf-8")
    seen = _Seen()
    seen.feed(page)
    assert not seen.open
    assert len(seen.scripts) == 1
    assert not {"i", "u", "iframe", "link", "object"} & set(seen.tags)
    assert seen.tags.count("img") == 3
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    links = [value for name, value in seen.attributes if name in ("src", "href")]
    assert all(value.startswith(("data:image/jpeg;base64,", "#")) for value in links)
    assert "http://evil" not in re.sub(r"&lt;img src=http://evil", "", page)
    assert "default-src 'none'" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&amp;amp;" in page
    assert "z\\x1b[31m\\udcff" in page and "$name" in page
    anchors = {value for name, value in seen.attributes if name == "id"}
    assert {value[1:] for value in links if value.startswith("#")} == anchors


def test_both_themes_and_every_histogram(hostile: Report) -> None:
    page = hostile.page()
    assert "prefers-color-scheme:dark" in page and "width=device-width" in page
    for title in ("Shorter side", "Aspect ratio", "Caption length", "Image file"):
        assert f'aria-label="{title}"' in page


def test_the_text_cannot_steer_a_terminal(hostile: Report) -> None:
    text = hostile.text()
    assert "\x1b" not in text and "\udcff" not in text
    assert printable("a\x1b[2J\u202eb é") == "a\\x1b[2J\\u202eb é"


def test_the_text_says_what_was_found(tmp_path: Path) -> None:
    captions = {n: {"txt": b"w " * (98 if n < 30 else 99)} for n in range(40)}
    captions[3] = {"txt": b"\xff"}
    index = write_source(tmp_path, [20, 20], replaced=captions, size=300)
    (tmp_path / "00002.tar").write_bytes((tmp_path / "00000.tar").read_bytes()[:-15_000])
    index = open_index(open_store(str(tmp_path)), "photos")
    text = Report(index, inspect(index, Filters(), ANY_SIZE, samples=None), "Judged so.").text()

    def row(label: str) -> list[str]:
        lines = [" ".join(line.split()) for line in text.splitlines()]
        return next(line for line in lines if line.startswith(label)).removeprefix(label).split()

    kept = int(index.counts[2])
    assert 0 < kept < 20
    assert row("samples: ")[0] == f"{40 + kept},"
    assert row("shorter side below 256 px") == ["0", "0", "%"]
    assert row("shorter side below 512 px") == [str(40 + kept), "100", "%"]
    # 99 words are 128.7 tokens, 98 are 127.4; 40 + kept samples, of which two or one have no caption.
    assert row("caption over 128 tokens (estimate: 1.3 a word)")[0] == "10"
    assert row("bad caption")[0] == "2"
    assert "00002.tar: cut off at byte" in text and f"; {kept} samples kept" in text
    assert "photos/00000.tar/000003: txt:" in text
    assert json.dumps(str(tmp_path))[1:-1] in text


def test_what_none_of_a_subset_means(tmp_path: Path) -> None:
    index = write_source(tmp_path, [100])
    some = Report(index, inspect(index, Filters(), ANY_SIZE, samples=50), "").text()
    assert "with 95 % confidence their share is below 6 %" in some
    every = Report(index, inspect(index, Filters(), ANY_SIZE, samples=None), "").text()
    assert "confidence" not in every and "There is none." in every


def test_a_source_of_which_nothing_is_usable(tmp_path: Path) -> None:
    index = write_source(tmp_path, [3], replaced={n: {"jpg": b"?"} for n in range(3)})
    report = Report(index, inspect(index, Filters(), ANY_SIZE), "")
    assert "None of the samples that were decoded is usable." in report.page()
    assert "usable: 0 %" in report.text()


def test_shares_and_sizes() -> None:
    assert [share(n, 10_000) for n in (0, 1, 10, 9_999, 10_000)] == ["0 %", "< 0.1 %", "0.1 %", "> 99.9 %", "100 %"]
    assert share(0, 0) == "–"
    assert [size_of(n) for n in (0, 999, 1000, 12_345, 999_600, 3.6e12)] == [
        "0 B", "999 B", "1 kB", "12.3 kB", "1 MB", "3.6 TB",
    ]  # fmt: skip
