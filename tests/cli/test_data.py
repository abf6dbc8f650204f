from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers import conversations, write_jsonl
from torchspec_hpc.cli.data_commands import runs
from torchspec_hpc.cli.main import app
from torchspec_hpc.errors import DataError

CLI = CliRunner()


@pytest.fixture
def config(tmp_path: Path, tiny_target: Path) -> Path:
    path = tmp_path / "run.yaml"
    data = write_jsonl(tmp_path / "train.jsonl", conversations(40))
    held_out = write_jsonl(tmp_path / "eval.jsonl", conversations(3))
    path.write_text(
        f"output_dir: out\nmodel: {{target_model_path: {tiny_target}}}\n"
        f"dataset: {{train_data_path: {data}, eval_data_path: {held_out}}}\n"
        "training: {max_seq_length: 128, micro_batch_tokens: 256}\n"
        "inference: {aux_hidden_states_layers: [1, 2, 3]}\n"
    )
    return path


def call(*arguments: str | Path) -> str:
    done = CLI.invoke(app, ["data", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_prepare_then_inspect(config: Path, tmp_path: Path) -> None:
    lines = call("prepare", config).splitlines()
    assert [Path(line).name for line in lines[::3]] == ["train.jsonl", "eval.jsonl"]
    assert lines[1].startswith("  40 samples of 40 rows (0 rejected, 0 truncated")
    folder = Path(lines[2].strip())
    for source in (folder, tmp_path / "train.jsonl"):
        shown = call("inspect", source, "--config", config, "--tokens-per-s", "1")
        assert "\u27e6It is " in shown
        assert "<|im_end|>\u27e7" in shown
        assert "Lengths of samples" in shown
        assert "filled" in shown
        assert "hours an epoch" in shown
        assert "Rows left out" not in shown
    assert len(list(folder.parent.glob("*/index.safetensors"))) == 2


def test_inspect_names_bad_rows(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(DataError, match="1 of 41 rows"):
        call("inspect", path, "--config", config)
    share = "dataset.max_rejected_share=0.1"
    assert "broken JSON" in call("inspect", path, share, "--config", config, "--samples", "0")
    folder = call("prepare", config, share).splitlines()[2].strip()
    for again in (["prepare", config, share], ["inspect", folder, "--config", config]):
        with pytest.raises(DataError, match="1 of 41 rows"):
            call(*again, "--strict")


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        ([], []),
        ([True], [(0, 1, True)]),
        ([False, True, True, False], [(0, 1, False), (1, 3, True), (3, 4, False)]),
    ],
)
def test_runs(mask: list[bool], found: list[tuple[int, int, bool]]) -> None:
    assert runs(mask) == found


def test_prepared_data_are_inspected_without_transformers(config: Path) -> None:
    folder = call("prepare", config).splitlines()[2].strip()
    code = (
        "import sys; from torchspec_hpc.cli.main import app; sys.argv = ['x', 'data', 'inspect', "
        f"{folder!r}, '--config', {str(config)!r}]\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert not end.code\n"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
