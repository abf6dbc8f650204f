"""Every configuration and site profile that is shipped renders and plans."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from torchspec_hpc.config import RunDir, load_config
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.slurm.estimate import make_plan
from torchspec_hpc.slurm.render import render_script

CONFIGS = Path(__file__).parents[2] / "configs"
#: Nodes of each component, and GPUs of the job.
SIZES = {
    "demo": ([1, 1], 0),
    "hf_quickstart": ([1], 2),
    "kimi_k25_2node_h200": ([1, 1], 16),
    "kimi_k25_3node_h100": ([2, 1], 24),
    "kimi_k26_2node_h200": ([1, 1], 16),
    "minimax_m25_5node_h200": ([3, 2], 40),
    "qwen3_8b_1node": ([1], 4),
    "qwen3_8b_het": ([1, 1], 8),
    "qwen3_8b_single": ([2], 8),
    "qwen3_coder_next_2node": ([1, 1], 16),
}
SITES = sorted(path.stem for path in (CONFIGS / "sites").glob("*.yaml"))


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SCRATCH", "WORK", "PROJECT", "CFS", "HOME", "USER"):
        monkeypatch.setenv(name, f"/{name.lower()}")


def test_all_are_listed() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_renders_and_plans(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", ["cluster=slurm"])
    script = render_script(config, RunDir("/runs/r"))
    plan = make_plan(config)
    nodes = [part.num_nodes for part in plan.components]
    assert (nodes, plan.num_gpus) == SIZES[name]
    assert [f"#SBATCH --nodes={n}" in script for n in nodes] == [True] * len(nodes)
    assert script.count("#SBATCH hetjob") == len(nodes) - 1
    if config.model.draft_model_config:
        assert Path(config.model.draft_model_config).is_file()


@pytest.mark.parametrize("site", SITES)
def test_site_profiles(site: str, tmp_path: Path) -> None:
    config = load_config(CONFIGS / "qwen3_8b_het.yaml", [f"site={site}"])
    script = tmp_path / "job.sbatch"
    script.write_text(render_script(config, RunDir("/runs/r")))
    subprocess.run(["shellcheck", "--exclude=SC1091", script], check=True)
    text = script.read_text()
    assert text.count("#SBATCH --account=") == 2
    assert "#SBATCH --time=08:00:00" in text  # the configuration wins
    assert "export HF_HOME=/scratch/hf" in text
    assert config.slurm.runtime.path in text


def test_a_site_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"site = nowhere: .*\n  allowed: jean_zay_h100, "):
        load_config(CONFIGS / "demo.yaml", ["site=nowhere"])


def test_a_site_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections are filled in, lists and values replaced; a path counts from where it is given."""
    (tmp_path / "mine.yaml").write_text(
        "slurm: {account: abc, setup: [module load cuda], inference: {partition: gpu, mem: 1G}}\n"
    )
    monkeypatch.chdir(tmp_path)
    overrides = ["site=mine.yaml", "slurm.inference.mem=2G", "slurm.setup=[]"]
    slurm = load_config(CONFIGS / "demo.yaml", overrides).slurm
    assert (slurm.account, slurm.setup) == ("abc", ())
    assert (slurm.inference.partition, slurm.inference.mem) == ("gpu", "2G")
    assert slurm.inference.gpus == "none"  # of the configuration
