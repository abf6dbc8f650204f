"""The wheel: complete, and enough for a login node without torch."""

from __future__ import annotations

import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOGIN_NODE = ["pydantic", "pyyaml", "typer", "rich", "submitit"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", folder, ROOT], check=True, cwd=folder)
    return next(folder.glob("torchspec_hpc-*.whl"))


def test_wheel_holds_every_module(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "torchspec_hpc").rglob("*.py")}
    assert sources <= packed
    assert "torchspec_hpc/py.typed" in packed


@pytest.mark.slow
def test_clean_environment_runs_the_command_line_without_torch(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, *LOGIN_NODE], check=True)
    subprocess.run([*install, "--no-deps", wheel], check=True)
    command = [tmp_path / "venv" / "bin" / "torchspec-hpc", "--help"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)  # compiles .pyc files
    times = []
    for _ in range(5):
        started = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
        times.append(time.perf_counter() - started)
    assert "submit" in done.stdout
    assert min(times) < 0.5, f"--help took {min(times):.2f} s"
