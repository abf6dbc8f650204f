"""What a run says about the code that started it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from torchspec_hpc.observe.provenance import git_state, provenance


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one committed package."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("x = 1\n")
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", ".")
    _git(
        tmp_path, "-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "--message=first"
    )
    return tmp_path


def _git(folder: Path, *arguments: str) -> str:
    argv = ["git", "-C", str(folder), *arguments]
    return subprocess.run(argv, check=True, text=True, capture_output=True).stdout.strip()


def test_commit_and_changes(repository: Path) -> None:
    package = repository / "package"
    commit = _git(repository, "rev-parse", "HEAD")
    assert git_state(package) == {"commit": commit, "dirty": False}
    (repository / "notes.txt").write_text("untracked files change nothing\n")
    assert git_state(package) == {"commit": commit, "dirty": False}
    (package / "code.py").write_text("x = 2\n")
    assert git_state(package) == {"commit": commit, "dirty": True}


def test_environment_inside_a_repository_is_not_its_code(repository: Path) -> None:
    installed = repository / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "code.py").write_text("x = 1\n")
    assert git_state(installed) is None


def test_without_git(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    assert git_state(repository / "package") is None
    assert provenance()["git"] is None
