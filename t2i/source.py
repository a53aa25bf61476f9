"""The source that runs: its files, what git knows of them, and the versions of the libraries below it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
"""The folder of the packages: a checkout, or where an installer has put them."""
PACKAGES = ("t2i", "data", "evaluation", "launch")
LIBRARIES = (
    *("torch", "torchvision", "deepspeed", "transformers", "tokenizers", "sentencepiece", "safetensors", "numpy"),
    *("scipy", "lpips", "webdataset", "pillow", "simplejpeg", "opencv-python-headless", "pyarrow", "flash-attn"),
)
"""Those whose versions may change numbers."""


@cache
def source_files() -> dict[str, str]:
    """SHA-256 of each Python file of the packages, by its path below ROOT, in order."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): sha256(path.read_bytes()).hexdigest() for path in paths}


def source_digest() -> str:
    """One SHA-256 of all source files and their names."""
    return sha256("".join(f"{digest}  {name}\n" for name, digest in source_files().items()).encode()).hexdigest()


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the LIBRARIES that are installed."""
    versions = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def describe_source() -> dict[str, Any]:
    """`git`, the commit of this source; `git_changed`, whether its files differ from that commit; `source_sha256`.

    The first two are None where git does not track the source, such as an installed copy.
    """
    inits = [f"{package}/__init__.py" for package in PACKAGES]  # a folder counts as tracked with one file of many
    known = _git("ls-files", "--error-unmatch", "--", *inits) is not None
    commit = _git("rev-parse", "HEAD") if known else None
    changed = None if commit is None else _git("status", "--porcelain", "--", *PACKAGES) != ""
    return {"git": commit, "git_changed": changed, "source_sha256": source_digest()}


def _git(*words: str) -> str | None:
    """The output of git in ROOT's repository, or None where git is missing or fails."""
    if shutil.which("git") is None:
        return None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False, env=environment
    )
    return done.stdout.strip() if done.returncode == 0 else None
