"""Files that the page keeps: in bounded number and size, found by their addresses alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from t2i.serving.limits import FileCache


@pytest.fixture
def kept(tmp_path: Path) -> FileCache:
    return FileCache(tmp_path / "uploads", 3, 100)


def address(path: Path) -> str:
    return f"/{path.relative_to(path.parents[2])}"


def test_a_file_is_found_by_its_address_and_read_by_its_path(kept: FileCache) -> None:
    path = kept.add("image.png", b"some")
    assert (kept.find(address(path)), kept.read(path), kept.read(str(path))) == (path, b"some", b"some")
    again = kept.add("image.png", b"some")
    assert again != path
    assert all(len(cached.parent.name) == 32 for cached in (path, again))


def test_the_oldest_go_when_there_are_too_many_or_they_are_too_large(kept: FileCache) -> None:
    paths = [kept.add(f"{number}.png", b"x" * 10) for number in range(5)]
    assert [path.exists() for path in paths] == [False, False, True, True, True]
    large = kept.add("large.png", b"x" * 85)
    assert [path.exists() for path in (*paths, large)] == [False] * 4 + [True, True]
    assert (kept.find(address(paths[0])), kept.read(paths[0])) == (None, None)
    assert len(list(kept.folder.iterdir())) == 2


def test_nothing_else_is_found_or_read(kept: FileCache, tmp_path: Path) -> None:
    path = kept.add("image.png", b"some")
    (path.parent / "other.png").write_bytes(b"not added")
    other = address(path.parent / "other.png")
    for wrong in ("/etc/passwd", "/dev/zero", str(path), other, address(path.parent), f"{address(path)}/", "", 7, None):
        assert kept.find(wrong) is None
    detour = path.parent / ".." / path.parent.name / "image.png"
    for wrong in ("/etc/passwd", "/dev/zero", address(path), path.parent / "other.png", path.parent, detour, None):
        assert kept.read(wrong) is None


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "gone", "grown"])
def test_what_is_no_regular_file_any_more_is_not_read(kept: FileCache, tmp_path: Path, kind: str) -> None:
    path = kept.add("image.png", b"some")
    (tmp_path / "secret").write_bytes(b"secret")
    path.unlink()
    if kind == "link":
        path.symlink_to(tmp_path / "secret")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "grown":
        path.write_bytes(b"x" * 101)
    assert kept.read(path) is None
