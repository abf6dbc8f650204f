"""The cluster that the Slurm tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing_programs
from torchspec_hpc.slurm.executor import RunJob

_NOT_RUN = "Slurm test NOT RUN"
_INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Nodes infer0, infer1, train0, train1 in the partitions infer and train, 4 fake GPUs each.

    Without Slurm the tests are skipped, and the summary says so in red; where ``CI`` or
    ``TORCHSPEC_REQUIRE_SLURM`` is set that is a failure.
    """
    if missing := missing_programs():
        reason = f"{_NOT_RUN}: no {', '.join(missing)} on this machine ({_INSTALL})"
        if os.environ.get("CI") or os.environ.get("TORCHSPEC_REQUIRE_SLURM"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    with Cluster() as running:
        yield running


@pytest.fixture
def login_node(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, with this process as a shell on its login node."""
    for name in os.environ:
        if name.startswith(("SLURM_", "SBATCH_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    RunJob.watcher.clear()  # another cluster of this session may have had jobs of the same ids
    return cluster


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("skipped", [])
    not_run = [r for r in reports if _NOT_RUN in str(r.longrepr)]
    if not_run:
        terminalreporter.section("SLURM TESTS NOT RUN", sep="!", red=True, bold=True)
        terminalreporter.line(f"{len(not_run)} tests need a Slurm cluster. Install it: {_INSTALL}")
