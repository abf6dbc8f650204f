"""``torchspec-hpc run``: the same supervisor, services and workers, without Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import ConfigWriter, losses, torchspec_hpc

pytestmark = pytest.mark.slow


def test_run_trains_exports_and_leaves_nothing_behind(
    config_file: ConfigWriter, tmp_path: Path
) -> None:
    done = torchspec_hpc("run", config_file(cluster="local"))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny"
    assert list(losses(run)) == list(range(1, 13))
    assert losses(run)[12] < losses(run)[1]
    assert (run / "control" / "done").is_file()
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_12"
    assert list((run / "logs" / "latest").glob("training/*/training_rank0_*.log"))
    assert list((run / "logs" / "latest").glob("inference/*/inference_rank0_*.log"))
    assert not processes_naming(run)

    exported = torchspec_hpc("export", run, "--dtype", "float32")
    assert exported.returncode == 0, exported.stderr
    config = json.loads((run / "export" / "step_12" / "config.json").read_text())
    assert config["draft_vocab_size"] == 256
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]


def test_a_finished_run_is_not_overwritten(config_file: ConfigWriter, tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "config.yaml").write_text("x: 1\n")
    done = torchspec_hpc("run", config_file(cluster="local"))
    assert done.returncode == 2
    assert "exists" in done.stderr


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"target_model_path": "/nowhere/model"}}, "/nowhere/model"),
        ({"dataset": {"train_data_path": "/nowhere/data.jsonl"}}, "/nowhere/data.jsonl"),
        ({"inference": {"aux_hidden_states_layers": [1, 2, 9]}}, "9"),
        ({"inference": {"engine": "tokenspeed"}}, "tokenspeed"),
        ({"mooncake": {"global_segment_size": "4KiB"}}, "global_segment_size"),
    ],
    ids=["no model", "no data", "no such layer", "no such engine", "tiny segment"],
)
def test_bad_input_ends_quickly_with_one_message(
    config_file: ConfigWriter, tmp_path: Path, sections: dict[str, object], message: str
) -> None:
    done = torchspec_hpc("run", config_file(cluster="local", **sections), timeout_s=90)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    run = tmp_path / "runs" / "tiny"
    if run.exists():  # found before anything was started, nothing needs to be recorded
        assert message in (run / "control" / "exit_codes.json").read_text()
        assert not processes_naming(run)


def processes_naming(run: Path) -> list[str]:
    """Command lines of processes that work for a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text().replace("\0", " ")
        except OSError:
            continue
        if str(run) in line:
            found.append(line)
    return found
