"""Every command that a `bash` block of README or docs/ gives is one that there is, with options that it has."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
from forked import run_forked

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
FOREIGN = {"export", "hf", "srun"}
"""Commands of others, whose options are not checked."""
LAUNCHERS = {"python", "deepspeed", "torchrun", "sbatch"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of each command; comments are dropped and continued lines joined."""
    found = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    split = [" ".join(map(shlex.quote, words)).split(" '&&' ") for words in found if words]
    return [shlex.split(part) for parts in split for part in parts]


@cache
def options_of(script: str, *subcommand: str) -> set[str]:
    ended = run_forked(ROOT / script, [*subcommand, "--help"], 1)
    assert ended.codes == [0], ended.stderr
    return set(re.findall(r"--[a-z][\w.-]*", ended.stdout))


def mistakes(words: list[str]) -> str | None:
    """What is wrong with a command, or None."""
    if words[0] in FOREIGN:
        return None
    if words[0] == "make":
        return None if words[1] in TARGETS else f"make has no target {words[1]}"
    if words[:2] == ["pip", "install"]:
        extras = {extra for word in words for part in re.findall(r"\.\[(.+)\]", word) for extra in part.split(",")}
        return None if extras <= set(EXTRAS) else f"no extras {extras - set(EXTRAS)}"
    if words[0] not in LAUNCHERS:
        return f"{words[0]} is not known"
    at = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
    if at is None or not (ROOT / words[at]).is_file():
        return "it starts no script that there is"
    given = {word.partition("=")[0] for word in words[at + 1 :] if word.startswith("--")}
    if not words[at].startswith("launch/"):
        known = set(re.findall(r"--[a-z][\w-]*", (ROOT / words[at]).read_text()))
    else:
        known = options_of(words[at], *(words[at + 1 : at + 2] if words[at] == "launch/pack.py" else ()))
    return None if given <= known else f"{words[at]} has no options {sorted(given - known)}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_is_one_that_there_is(path: Path) -> None:
    texts = blocks(path)
    for text in texts:
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    assert [(words, wrong) for text in texts for words in commands(text) if (wrong := mistakes(words))] == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("python launch/sample.py --modle x", "launch/sample.py has no options ['--modle']"),
        ("python launch/pack.py folder x --columns 3", "launch/pack.py has no options ['--columns']"),
        ("deepspeed launch/stage9.py", "it starts no script that there is"),
        ("make tea", "make has no target tea"),
        ("pip install '.[gpu]'", "no extras {'gpu'}"),
        ("cd x && python launch/plan.py", "cd is not known"),
    ],
)
def test_a_wrong_command_is_found(line: str, wrong: str) -> None:
    assert [found for words in commands(line) if (found := mistakes(words))] == [wrong]
