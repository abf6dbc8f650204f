"""What workers run in, as commands; neither apptainer nor pyxis is on this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.test_render import MINIMAL
from torchspec_hpc.config import RunDir, parse_config
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.slurm.render import render_script
from torchspec_hpc.slurm.runtime import Runtime

RUN = RunDir("/shared/runs/small")


def config_with(runtime: dict[str, Any], **slurm: Any) -> Any:
    raw = {**MINIMAL, "slurm": {"runtime": runtime, **slurm}}
    return parse_config(raw, base_dir=Path("/"), source="test")


def runtime_of(kind: str, **values: Any) -> Runtime:
    return Runtime(config_with({"kind": kind, "path": "/images/t.sif", **values}), RUN)


def test_apptainer_stands_before_the_workers_alone() -> None:
    runtime = runtime_of("apptainer", mounts=["/scratch"], options=["--writable-tmpfs"])
    assert runtime.enter(["python3", "-m", "x"]) == [
        *("apptainer", "exec", "--nv", "--bind=/data", "--bind=/models/tiny", "--bind=/scratch"),
        *("--bind=/shared/runs", "--writable-tmpfs", "/images/t.sif", "python3", "-m", "x"),
    ]
    assert runtime.service(["m"], ["--nodelist=n1"]) == runtime.enter(["m"])
    assert runtime.srun_options == []
    # outside: the supervisor, which needs srun, and the shepherds
    assert runtime.node_python == runtime.shepherd_python == sys.executable
    assert runtime.worker_python == "python3"


def test_pyxis_is_options_of_srun() -> None:
    runtime = runtime_of("pyxis", python="/opt/venv/bin/python")
    mounts = "/data:/data,/models/tiny:/models/tiny,/shared/runs:/shared/runs"
    assert runtime.srun_options == [
        "--container-image=/images/t.sif",
        f"--container-mounts={mounts}",
        "--container-workdir=/shared/runs/small/code",
    ]
    assert runtime.enter(["x"]) == ["x"]
    assert runtime.service(["m"], ["--nodelist=n1"])[:3] == ["srun", "--nodelist=n1", "--nodes=1"]
    assert runtime.shepherd_python == runtime.worker_python == "/opt/venv/bin/python"
    assert runtime.node_python == sys.executable


def test_a_directory_below_another_is_mounted_once() -> None:
    assert runtime_of("apptainer", mounts=["/shared", "/data/more"]).mounts == [
        *("/data", "/models/tiny", "/shared"),
    ]


def test_whatever_the_configuration_names_is_mounted() -> None:
    raw = {
        **MINIMAL,
        "model": {**MINIMAL["model"], "initial_draft": "/drafts/one"},
        "inference": {**MINIMAL.get("inference", {}), "cache_dir": "/states"},
        "slurm": {
            "runtime": {"kind": "apptainer", "path": "/t.sif"},
            "environment": {"HF_HOME": "/hub", "HF_HUB_CACHE": "/cache"},
        },
    }
    mounts = Runtime(parse_config(raw, base_dir=Path("/"), source="test"), RUN).mounts
    assert {"/drafts/one", "/states", "/hub", "/cache"} <= set(mounts)


def test_venv_and_conda_are_entered_by_the_script(tmp_path: Path) -> None:
    for kind, line in {
        "venv": "source '/my envs/t/bin/activate'",
        "conda": "conda activate '/my envs/t'",
    }.items():
        config = config_with({"kind": kind, "path": "/my envs/t"}, setup=["module load cuda"])
        script = render_script(config, RUN)
        lines = script.splitlines()
        assert lines.index("module load cuda") < lines.index(line) < lines.index("set -u")
        assert "exec '/my envs/t/bin/python' -u -m torchspec_hpc.slurm.supervisor" in script
        (tmp_path / "job.sbatch").write_text(script)
        subprocess.run(["shellcheck", "--exclude=SC1091", tmp_path / "job.sbatch"], check=True)


@pytest.mark.parametrize("runtime", [{"kind": "venv"}, {"path": "/x"}])
def test_kind_and_path_belong_together(runtime: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="allowed: a path with venv, conda, apptainer and pyxis"):
        config_with(runtime)
