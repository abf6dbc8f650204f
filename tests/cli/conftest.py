"""The command line in this process, and the cluster of the Slurm tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.slurm.conftest import cluster, login_node  # noqa: F401 - fixtures
from torchspec_hpc.cli.main import app

Command = Callable[..., Any]


def invoke(*arguments: str | Path, code: int = 0) -> Result:
    """Runs a command; an error that it raises is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def ask() -> Command:
    """Runs a command with ``--json`` and returns what it prints."""

    def run(*arguments: str | Path, code: int = 0) -> Any:
        return json.loads(invoke(*arguments, "--json", code=code).stdout)

    return run
