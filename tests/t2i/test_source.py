"""What a run's record says of the source that runs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from t2i import source


def make_packages(root: Path) -> None:
    for package in source.PACKAGES:
        (root / package / "inner").mkdir(parents=True)
        (root / package / "__init__.py").write_text(f'"""{package}"""\n')
        (root / package / "inner" / "code.py").write_text("x = 1\n")


def git(root: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", str(root), *who, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """A repository of the packages, one commit, from which they run."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    make_packages(tmp_path)
    (tmp_path / ".gitignore").write_text(".venv/\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "x")
    run_from(tmp_path, monkeypatch)
    yield tmp_path
    source.source_files.cache_clear()


def run_from(root: Path, monkeypatch) -> None:
    monkeypatch.setattr(source, "ROOT", root)
    source.source_files.cache_clear()


def test_a_checkout_has_its_commit_and_whether_it_was_changed(checkout: Path, monkeypatch) -> None:
    before = source.describe_source()
    assert before["git"] == git(checkout, "rev-parse", "HEAD") and before["git_changed"] is False
    (checkout / "README.md").write_text("x")  # is no source
    assert source.describe_source() == before
    (checkout / "data" / "inner" / "code.py").write_text("x = 2\n")
    run_from(checkout, monkeypatch)
    after = source.describe_source()
    assert after["git"] == before["git"] and after["git_changed"] is True
    assert after["source_sha256"] != before["source_sha256"]


def test_a_new_file_is_a_change(checkout: Path, monkeypatch) -> None:
    before = source.describe_source()
    (checkout / "launch" / "mine.py").write_text("x = 1\n")
    run_from(checkout, monkeypatch)
    after = source.describe_source()
    assert after["git_changed"] is True and after["source_sha256"] != before["source_sha256"]


def test_an_installed_copy_has_no_commit_though_it_lies_in_a_checkout(checkout: Path, monkeypatch) -> None:
    before = source.describe_source()
    site = checkout / ".venv" / "site-packages"
    make_packages(site)
    run_from(site, monkeypatch)
    assert source.describe_source() == before | {"git": None, "git_changed": None}


def test_variables_of_another_repository_do_not_lead_astray(checkout: Path, monkeypatch, tmp_path_factory) -> None:
    other = tmp_path_factory.mktemp("other")
    git(other, "init", "-q")
    before = source.describe_source()
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert source.describe_source() == before


def test_without_git_there_is_no_commit(checkout: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert source.describe_source()["git"] is None
