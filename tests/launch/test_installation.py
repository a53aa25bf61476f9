"""What the documents say of installation is true of pyproject.toml and constraints.txt."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TEXTS = {path.name: path.read_text() for path in (*ROOT.glob("*.md"), ROOT / "Makefile", *ROOT.glob("docs/*.md"))}
INSTALLS = [(name, line.strip()) for name, text in TEXTS.items() for line in text.splitlines() if "pip install" in line]


def test_install_commands_name_extras_that_there_are() -> None:
    named = [
        (extra, where)
        for where in INSTALLS
        for part in re.findall(r"\.\[(.+?)\]", where[1])
        for extra in part.split(",")
    ]
    assert ("serve", "README.md") in [(extra, name) for extra, (name, _) in named]
    assert [it for it in named if it[0] not in EXTRAS] == []


def test_every_extra_is_in_the_table_of_dependencies() -> None:
    assert set(re.findall(r"^\| extra `(.+?)` \|", TEXTS["internals.md"], re.MULTILINE)) == set(EXTRAS)


def test_what_is_built_with_torch_comes_after_it_and_is_not_in_the_first_commands() -> None:
    commands = [line for name, line in INSTALLS if name == "README.md"]
    assert commands[0].startswith("pip install --constraint constraints.txt torch torchvision")
    assert commands[1] == "pip install --constraint constraints.txt ."
    built = [line for _, line in INSTALLS if "[flash-attn]" in line]
    assert built and all("--no-build-isolation" in line for line in built)
    assert [name for name, needed in EXTRAS.items() if any("flash" in it for it in needed)] == ["flash-attn"]


def test_constraints_are_versions_for_any_machine() -> None:
    lines = [it for it in (ROOT / "constraints.txt").read_text().splitlines() if not it.startswith("#")]
    assert [it for it in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", it)] == []  # no index, no +cpu
