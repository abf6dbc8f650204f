"""The job's environment; ``recorded/`` holds what real clusters set, batch script and step."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from torchspec_hpc.config.load import parse_config
from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.slurm.env import (
    Nodes,
    SlurmEnvironmentError,
    attempt,
    expand_nodelist,
    job_id,
    node_addresses,
    read_nodes,
)


def sized_config(inference: int, training: int, topology: str = "het") -> Config:
    """So many nodes of each group."""
    raw = {
        "output_dir": "/runs",
        "model": {"target_model_path": "org/tiny"},
        "dataset": {"train_data_path": "/data"},
        "inference": {"inference_num_gpus": inference},
        "training": {"training_num_nodes": training},
        "slurm": {"topology": topology},
    }
    return parse_config(raw, base_dir=Path("/"), source="test")


VERSIONS = ("22.05", "24.11")
NODELISTS = {
    "n1": ["n1"],
    "infer[0-1]": ["infer0", "infer1"],
    "n[08-10,3],login": ["n08", "n09", "n10", "n3", "login"],
    "r[1-2]c[0,2]": ["r1c0", "r1c2", "r2c0", "r2c2"],
    "a[1-2],b,c[5]": ["a1", "a2", "b", "c5"],
    "gpu-a100-[099-101]": ["gpu-a100-099", "gpu-a100-100", "gpu-a100-101"],
}


def _recorded(name: str) -> dict[str, str]:
    text = (Path(__file__).parent / "recorded" / f"{name}.env").read_text()
    return dict(line.split("=", 1) for line in text.splitlines())


@pytest.mark.parametrize("version", VERSIONS)
def test_batch_script(version: str) -> None:
    environ = _recorded(f"batch_{version}")
    config = sized_config(2, 2)
    assert read_nodes(environ, config) == Nodes(("infer0", "infer1"), ("train0", "train1"))
    assert job_id(environ) == "1"
    assert attempt(environ) == 1  # recorded after a requeue


@pytest.mark.parametrize("version", VERSIONS)
def test_step_of_component_1(version: str) -> None:
    environ = _recorded(f"step_{version}")
    assert read_nodes(environ, sized_config(2, 2)).training == ("train0", "train1")
    assert job_id(environ) == "1"  # the leader's


def test_first_attempt_has_no_count() -> None:
    assert attempt({}) == 0


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("SLURM_HET_SIZE", "not the batch script of a heterogeneous job"),
        ("SLURM_JOB_NODELIST_HET_GROUP_1", "SLURM_JOB_NODELIST_HET_GROUP_1 is not set"),
    ],
)
def test_incomplete_environment(missing: str, message: str) -> None:
    environ = _recorded("batch_22.05")
    del environ[missing]
    with pytest.raises(SlurmEnvironmentError, match=message):
        read_nodes(environ, sized_config(2, 2))


def test_one_allocation() -> None:
    environ = {"SLURM_JOB_NODELIST": "n[1-3]"}
    assert read_nodes(environ, sized_config(1, 2, "single")) == Nodes(("n1",), ("n2", "n3"))
    environ = {"SLURM_JOB_NODELIST": "n7"}
    assert read_nodes(environ, sized_config(1, 1, "one_node")) == Nodes(("n7",), ("n7",))


@pytest.mark.parametrize(
    ("size", "environ", "message"),
    [
        ((2, 1), {}, "component 1 of the job has 2 nodes, training.training_num_nodes asks for 1"),
        ((1, 2), {}, "component 0 of the job has 2 nodes, inference.inference_num_gpus asks for 1"),
        ((2, 2), {"SLURM_HET_SIZE": "1"}, "component 1 of the job has 0 nodes"),
        ((2, 2, "single"), {}, "topology is single, and the job is heterogeneous"),
    ],
)
def test_allocation_must_fit(size: tuple[Any, ...], environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_nodes(_recorded("batch_24.11") | environ, sized_config(*size))


def test_one_allocation_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"the job has 2 nodes, .* asks for 3"):
        read_nodes({"SLURM_JOB_NODELIST": "n[1-2]"}, sized_config(1, 2, "single"))


@pytest.mark.parametrize("nodelist", NODELISTS)
def test_expands_nodelists(nodelist: str) -> None:
    assert list(expand_nodelist(nodelist)) == NODELISTS[nodelist]


@pytest.mark.slurm
def test_expands_nodelists_as_slurm_does(login_node: Cluster) -> None:
    for nodelist, expected in NODELISTS.items():
        assert login_node.run("scontrol", "show", "hostnames", nodelist).split() == expected


@pytest.mark.parametrize("nodelist", ["n[1-", "n1]", "n[a-b]", "n[1-2", "a,,b", "", "n[]"])
def test_malformed_nodelist(nodelist: str) -> None:
    with pytest.raises(SlurmEnvironmentError, match="is no list of nodes"):
        expand_nodelist(nodelist)


@pytest.mark.slurm
def test_node_addresses(login_node: Cluster) -> None:
    nodes = ["train1", "infer0", "train0"]
    addresses = node_addresses(nodes)
    assert list(addresses) == nodes
    assert addresses == {node: login_node.addresses[node] for node in nodes}
    with pytest.raises(SlurmEnvironmentError, match="no address of train9: Node train9 not found"):
        node_addresses(["train0", "train9"])


def test_node_addresses_without_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    here = socket.gethostname()
    assert list(node_addresses([here])) == [here]
    with pytest.raises(SlurmEnvironmentError, match="no scontrol on this node, and its name does"):
        node_addresses(["no-such-node.invalid"])
