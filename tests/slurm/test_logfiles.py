"""Reading logs while attempts follow each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchspec_hpc.config import RunDir
from torchspec_hpc.errors import UserError
from torchspec_hpc.slurm.logfiles import LogQuery, find_logs, follow, last_lines


def begin(run: RunDir, attempt: int) -> Path:
    """The folder of an attempt, which is the latest one from now on."""
    folder = run.attempt_logs(attempt)
    folder.mkdir(parents=True)
    run.latest_logs.unlink(missing_ok=True)
    run.latest_logs.symlink_to(folder.name)
    return folder


def test_the_next_attempt_is_followed_from_its_first_line(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(UserError, match="no such log"):
        find_logs(run, LogQuery())
    first = begin(run, 0) / "supervisor.log"
    first.write_text("a long line of the first attempt\n")
    positions = {path: last_lines(path, 0)[1] for path in find_logs(run, LogQuery())}
    looks = 0

    def ended() -> bool:
        nonlocal looks
        looks += 1
        if looks == 1:
            with first.open("a") as file:
                file.write("the end\n")
            begin(run, 1)  # its log is not there yet
        elif looks == 2:
            (run.attempt_logs(1) / "supervisor.log").write_text("new\n")
        return looks == 2

    shown = follow(lambda: find_logs(run, LogQuery()), positions, ended)
    assert [text for _, text in shown] == ["the end\n", "new\n"]
