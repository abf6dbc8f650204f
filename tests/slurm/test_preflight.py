"""The probe of a node, and how it is started there; see also ``tests/cli``."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

import torchspec_hpc
from tests.slurm.configs import small_config
from torchspec_hpc.slurm import preflight, probe
from torchspec_hpc.slurm.shape import training_group

SOURCE = Path(torchspec_hpc.__file__).parents[1]


def command(tmp_path: Path, **slurm: Any) -> list[str]:
    config = small_config(tmp_path / "not" / "there", **slurm)
    return preflight._srun(config, training_group(config), ["--engine=hf"], wait_s=1)


def test_engines_by_their_distributions() -> None:
    check = probe._check_engine("hf")
    assert (check.verdict, check.detail.split()[0]) == ("ok", "transformers")
    assert probe._check_engine("tokenspeed").verdict == "fail"


def test_a_port_that_is_taken() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        check = probe._check_port(*probe._port(f"control.port={server.getsockname()[1]}"))
    assert (check.name, check.verdict) == ("control.port", "fail")
    assert "the port is in use" in check.detail


def test_setup_and_environment_hold_for_the_probe(tmp_path: Path) -> None:
    lines = command(tmp_path, setup=["module load x"], environment={"A": "b c"})[-1].splitlines()
    order = ["module load x", "export A='b c'", f"cd {SOURCE}"]
    assert [line for line in lines if line in order] == order
    assert f"--folder={tmp_path}" in lines[-1]


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_a_container_sees_the_checkout(tmp_path: Path, kind: str) -> None:
    runtime = {"kind": kind, "path": "/t.sif"}
    argv = command(tmp_path, runtime=runtime, environment={"HF_HOME": "/hub"})
    if kind == "apptainer":
        for folder in (SOURCE, tmp_path, "/hub"):
            assert f"--bind={folder} " in argv[-1]
        return
    assert f"--container-workdir={SOURCE}" in argv
    (mounts,) = (word for word in argv if word.startswith("--container-mounts="))
    for folder in (SOURCE, tmp_path, "/hub"):
        assert f"{folder}:{folder}" in mounts.partition("=")[2].split(",")
    assert "HF_HOME=/hub" in argv
