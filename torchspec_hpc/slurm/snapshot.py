"""The code of a run: a copy in its directory, so that later edits change no queued job."""

from __future__ import annotations

import shutil
from pathlib import Path

import torchspec_hpc
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.errors import UserError

_PACKAGE = Path(torchspec_hpc.__file__).parent


def snapshot_code(run: RunDir) -> None:
    """Copies this package to ``<run>/code``, in place of what an earlier start left there.

    Raises:
        UserError: The directory cannot be written.
    """
    if _PACKAGE.is_relative_to(run.code):
        return  # this process runs from the copy
    fresh, old = (run.root / f".code.{word}" for word in ("new", "old"))
    try:
        for folder in (fresh, old):
            shutil.rmtree(folder, ignore_errors=True)
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(_PACKAGE, fresh / _PACKAGE.name, ignore=ignore)
        if run.code.exists():
            run.code.rename(old)
        fresh.rename(run.code)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot copy the package to {run.code}: {error}",
            hint="choose another output_dir, on a disk that every node can write",
        ) from error
