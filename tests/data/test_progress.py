"""Progress is a bar on a terminal, and lines now and then in a file."""

from __future__ import annotations

import io

import pytest
from tqdm import tqdm

from data import progress
from data.progress import followed, progress_bar


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, ["1/3", "2/3", "3/3"]), (3600.0, ["3/3"])])
def test_a_file_has_a_line_now_and_then_and_one_at_the_end(monkeypatch, seconds: float, shown: list[str]) -> None:
    monkeypatch.setattr(progress, "LINE_S", seconds)
    monkeypatch.setattr(progress, "SHORT_S", 0.0)
    written = io.StringIO()
    with progress_bar(3, "step", "low", file=written) as bar:
        for _ in range(3):
            bar.set_postfix_str("loss 0.5")
            bar.update()
    lines = written.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == shown and "\r" not in written.getvalue()
    assert all(line.startswith("low: ") and "step" in line and line.endswith("loss 0.5]") for line in lines)


def test_what_was_done_before_counts_and_no_progress_is_no_line(monkeypatch) -> None:
    written = io.StringIO()
    with progress_bar(10, "image", file=written) as bar:
        bar.update(10)
    assert written.getvalue() == ""  # it took no time
    monkeypatch.setattr(progress, "SHORT_S", 0.0)
    with progress_bar(10, "image", initial=6, file=written) as bar:
        bar.update(2)
    assert written.getvalue().startswith("8/10 image (80 %)")
    progress_bar(10, "image", initial=10, file=written).close()
    assert len(written.getvalue().splitlines()) == 1


def test_a_terminal_has_a_bar() -> None:
    written = Screen()
    bar = progress_bar(3, "step", "low", file=written)
    assert isinstance(bar, tqdm)
    bar.update(3)
    bar.close()
    assert "\r" in written.getvalue()


def test_who_shows_nothing_writes_nothing(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SHORT_S", 0.0)
    assert list(followed("abc", 3, "letter", shown=False)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    assert list(followed("abc", 3, "letter", "reading")) == ["a", "b", "c"]
    assert capsys.readouterr().err.startswith("reading: 3/3 letter (100 %)")
