"""Scripts run the checkout that they are in, whatever is installed and under every launcher."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from forked import ROOT, free_port
from PIL import Image

from t2i.source import PACKAGES

SCRIPTS = sorted(path for path in (ROOT / "launch").glob("*.py") if '"__main__"' in path.read_text())
BIN = Path(sys.executable).parent


@pytest.fixture
def installed(tmp_path: Path, monkeypatch) -> Path:
    """A folder of packages that Python finds before the checkout's, wherever it is started; using one ends the job."""
    for package in PACKAGES:
        (tmp_path / "site" / package).mkdir(parents=True)
        (tmp_path / "site" / package / "__init__.py").write_text(f"raise SystemExit('the other copy of {package}')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_looks_beside_itself_before_it_imports(script: Path) -> None:
    """Executed up to its first import of more than the standard library, it has the checkout first."""
    head: list[ast.stmt] = []
    for statement in ast.parse(script.read_text()).body:
        names = [statement.module] if isinstance(statement, ast.ImportFrom) else []
        names += [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
        if any(str(name).partition(".")[0] not in sys.stdlib_module_names for name in names):
            break
        head.append(statement)
    code = ast.unparse(ast.Module(head, [])) + "\nprint(sys.path[0])"
    began = subprocess.run(
        [sys.executable, "-S", "-c", f"__package__ = None\n__file__ = {str(script)!r}\nexec({code!r})"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert began.stdout.strip() == str(ROOT)


@pytest.mark.parametrize(
    "launcher",
    [
        [sys.executable, "-P"],  # which does not look beside scripts at all
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"],
        [f"{BIN}/deepspeed", "--num_gpus=1", "--master_port=PORT"],
    ],
    ids=["python", "torchrun", "deepspeed"],
)
def test_it_is_not_the_installed_copy_that_runs(launcher: list[str], installed: Path) -> None:
    command = [word.replace("PORT", str(free_port())) for word in launcher]
    config = str(ROOT / "configs" / "demo.yaml")
    done = subprocess.run(
        [*command, str(ROOT / "launch" / "stage1.py"), "--config", config, "--print_config"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "name: demo" in done.stdout, done.stdout + done.stderr


def test_processes_that_a_script_starts_run_it_too(installed: Path) -> None:
    for number in range(4):
        (installed / "images").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(installed / "images" / f"{number}.png")
        (installed / "images" / f"{number}.txt").write_text("a square")
    words = ["folder", str(installed / "images"), "--out", str(installed / "packed"), "--workers", "2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "pack.py"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((installed / "packed").rglob("*.tar"))
