"""``torchspec-hpc run``: the same supervisor, services and workers, without Slurm."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import make_tiny_target
from tests.e2e.conftest import ConfigWriter, losses, torchspec_hpc
from tests.helpers import command_lines, conversations, read_jsonl, write_jsonl

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

    further = config_file(
        cluster="local",
        run_name="further",
        model={"initial_draft": str(run / "export" / "step_12")},
        training={"num_train_steps": 1},
    )
    assert torchspec_hpc("run", further).returncode == 0
    [(step, loss)] = losses(tmp_path / "runs" / "further").items()
    assert step == 1
    assert loss < losses(run)[2], "it begins where the other draft ended"


def test_a_run_on_ipv6_addresses(config_file: ConfigWriter, tmp_path: Path) -> None:
    """Services, torchrun's rendezvous and the store's segments, all on one."""
    config = config_file(cluster="local", control={"host": "::1"}, training={"num_train_steps": 3})
    done = torchspec_hpc("run", config)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny"
    assert list(losses(run)) == [1, 2, 3]
    assert "::1" in json.loads((run / "control" / "endpoints.json").read_text())["control"]


def test_a_finished_run_is_not_overwritten(config_file: ConfigWriter, tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "config.yaml").write_text("x: 1\n")
    done = torchspec_hpc("run", config_file(cluster="local"))
    assert done.returncode == 2
    assert "exists" in done.stderr


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"target_model_path": "/nowhere/model"}}, "/nowhere/model: no such directory"),
        ({"dataset": {"train_data_path": "/nowhere/x.jsonl"}}, "/nowhere/x.jsonl: no such file"),
        ({"inference": {"aux_hidden_states_layers": [1, 2, 9]}}, "the 4 layers of"),
        ({"inference": {"aux_hidden_states_layers": None}}, "aux_hidden_states_layers, for inst"),
        ({"model": {"draft_vocab_size": 1000}}, "1 to 512"),
        ({"training": {"max_seq_length": 1024}}, "up to 512"),
        ({"training": {"max_seq_len": 1024}}, "did you mean training.max_seq_length"),
        ({"inference": {"engine": "tokenspeed"}}, "inference.engine is tokenspeed"),
        ({"output_dir": "/proc/nowhere"}, "cannot write the run directory"),
    ],
)
def test_what_can_be_known_is_said_at_once(
    config_file: ConfigWriter, sections: dict[str, object], message: str
) -> None:
    """Before anything is started, and before a job waits in the queue for it."""
    started = time.monotonic()
    done = torchspec_hpc("run", config_file(cluster="local", **sections), timeout_s=60)
    assert time.monotonic() - started < 20
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def _no_chat_template(folder: Path) -> dict[str, object]:
    target = make_tiny_target(folder / "bare")
    (target / "chat_template.jinja").unlink()
    return {"model": {"target_model_path": str(target)}}


def _broken_data(folder: Path) -> dict[str, object]:
    (folder / "broken.jsonl").write_text('{"messages": [\n' * 20)
    return {"dataset": {"train_data_path": str(folder / "broken.jsonl")}}


def _wrong_columns(folder: Path) -> dict[str, object]:
    path = write_jsonl(folder / "words.jsonl", [{"words": "no turns"}] * 20)
    return {"dataset": {"train_data_path": str(path)}}


def _port_in_use(_: Path) -> dict[str, object]:
    holder = socket.create_server(("127.0.0.1", 0))
    _HELD.append(holder)
    return {"control": {"port": holder.getsockname()[1]}}


_HELD: list[socket.socket] = []


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_no_chat_template, "chat template"),
        (_broken_data, "broken JSON"),
        (_wrong_columns, "no column of turns: found words"),
        (_port_in_use, "control.port"),
    ],
)
def test_what_the_workers_find_ends_the_run_with_one_message(
    config_file: ConfigWriter,
    tmp_path: Path,
    break_it: Callable[[Path], dict[str, object]],
    message: str,
) -> None:
    """On the terminal, in the log and in the control directory; nothing is left behind."""
    config = config_file(cluster="local", **break_it(tmp_path))
    done = torchspec_hpc("run", config, timeout_s=120)
    run = tmp_path / "runs" / "tiny"
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stdout + done.stderr
    assert message in (run / "control" / "exit_codes.json").read_text()
    assert message in (run / "logs" / "latest" / "supervisor.log").read_text()
    assert not processes_naming(run)


def processes_naming(run: Path) -> list[str]:
    """Command lines of processes that work for a run."""
    lines = [" ".join(words) for words in command_lines().values()]
    return [line for line in lines if str(run) in line]


def test_a_second_run_needs_no_engine(config_file: ConfigWriter, tmp_path: Path) -> None:
    """It has the same losses to the last bit, and starts no engine."""
    write_jsonl(tmp_path / "held_out.jsonl", conversations(5))
    kept = {"cache_dir": str(tmp_path / "states")}
    data = {"eval_data_path": str(tmp_path / "held_out.jsonl"), "eval_interval": 12}
    settings = {"cluster": "local", "dataset": data, "inference": kept}
    first = torchspec_hpc("run", config_file(**settings))
    assert first.returncode == 0, first.stderr
    runs = tmp_path / "runs"
    (log,) = (runs / "tiny" / "logs" / "latest").glob("training/*/training_rank0_*.log")
    assert "training samples: hidden states of 48 samples, " in log.read_text()

    alone = ["inference.inference_num_gpus=0", "run_name=alone"]
    config = config_file(**settings)
    second = torchspec_hpc("run", config, *alone)
    assert second.returncode == 0, second.stderr
    assert not (runs / "alone" / "logs" / "latest" / "inference").exists()
    assert learning(runs / "alone") == learning(runs / "tiny")
    assert len(learning(runs / "alone")) == 12

    (lost, *_) = (tmp_path / "states").glob("*/*/*.safetensors")
    lost.unlink()
    third = torchspec_hpc("run", config, "inference.inference_num_gpus=0", "run_name=lost")
    assert third.returncode == 2
    assert "are not in" in third.stdout + third.stderr
    assert not (runs / "lost" / "metrics.jsonl").exists()


def learning(run: Path) -> list[dict[str, float]]:
    """What must not depend on time: losses, accuracies, gradient norms."""
    return [
        {tag: value for tag, value in record.items() if tag.startswith(("step", "train", "eval"))}
        for record in read_jsonl(run / "metrics.jsonl")
    ]
