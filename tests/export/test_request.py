"""From a run on the disk to a draft directory: pruning, formats, the card, the two commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.export.conftest import KEPT, RunWriter, make_checkpoint
from torchspec_hpc.config.yaml_io import dump_yaml
from torchspec_hpc.errors import UserError
from torchspec_hpc.export.request import (
    DataRequest,
    ExportRequest,
    analyze_vocabulary,
    run_export,
)

ROOT = Path(__file__).parents[2]


def _configure(run: Path, target: Path, data: Path) -> None:
    """Puts the run's own settings, metrics and provenance beside its checkpoints."""
    config = {
        "run_name": "run",
        "output_dir": str(run.parent),
        "model": {"target_model_path": str(target)},
        "dataset": {"train_data_path": str(data)},
        "training": {"max_seq_length": 128},
        "inference": {"aux_hidden_states_layers": [1, 3, 4]},
    }
    (run / "config.yaml").write_text(dump_yaml(config))
    metrics = {"step": 7, "train/loss": 2.5, "train/accept_len": 1.75, "eval/accept_len": None}
    (run / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    start = {"time": "2026-11-25", "user": "me", "git": {"commit": "c0ffee", "dirty": False}}
    (run / "provenance.json").write_text(json.dumps({"starts": [start]}))


def test_pruned_before_training_is_exported_as_it_is(write_run: RunWriter) -> None:
    checkpoint = make_checkpoint("nowhere")
    run = write_run(checkpoint)
    folder = run_export(ExportRequest(run, dtype="float32"))
    assert folder == run / "export" / "step_7"
    written = load_file(folder / "model.safetensors")
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(written[name], tensor)
    assert (torch.arange(12) + written["d2t"]).tolist() == KEPT.tolist()


def test_pruned_after_training(
    write_run: RunWriter, tiny_target: Path, tiny_conversations: Path
) -> None:
    checkpoint = make_checkpoint(str(tiny_target), None)
    run = write_run(checkpoint)
    _configure(run, tiny_target, tiny_conversations)
    request = ExportRequest(
        run, dtype="float32", draft_format="speculators", draft_vocab_size=64, target="org/name"
    )
    folder = run_export(request)
    written = load_file(folder / "model.safetensors")
    kept = torch.arange(64) + written["d2t"]
    assert torch.equal(written["lm_head.weight"], checkpoint.tensors["lm_head.weight"][kept])
    assert {1, 2} <= set(kept.tolist()), "tokens that begin and end answers stay"
    config = json.loads((folder / "config.json").read_text())
    assert config["draft_vocab_size"] == 64
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": "org/name",
        "architectures": ["LlamaForCausalLM"],
    }
    # a second time from the cache that the first, or training, has filled
    [cached] = [path for path in (run.parent / "cache").iterdir() if path.name != "digests"]
    before = cached.stat().st_mtime_ns
    coverage = analyze_vocabulary(run, DataRequest())
    assert cached.stat().st_mtime_ns == before
    assert dict(coverage.by_size)[512] == 1.0
    assert dict(coverage.by_size)[coverage.num_different] == 1.0
    assert 0 < coverage.num_different < 512


def test_pruning_twice_is_refused(
    write_run: RunWriter, tiny_target: Path, tiny_conversations: Path
) -> None:
    run = write_run(make_checkpoint(str(tiny_target)))
    _configure(run, tiny_target, tiny_conversations)
    with pytest.raises(UserError, match="was trained with 12 tokens"):
        run_export(ExportRequest(run, draft_vocab_size=8))
    assert not (run / "export").exists()


def test_away_from_its_run_the_data_must_be_named(write_run: RunWriter) -> None:
    run = write_run(make_checkpoint("nowhere", None))
    with pytest.raises(UserError, match="--dataset-path, --max-seq-length and --cache-dir"):
        run_export(ExportRequest(run, draft_vocab_size=64))


def test_the_card_says_how_to_serve_and_where_from(
    write_run: RunWriter, tiny_target: Path, tiny_conversations: Path
) -> None:
    run = write_run(make_checkpoint(str(tiny_target)))
    _configure(run, tiny_target, tiny_conversations)
    folder = run_export(ExportRequest(run, num_speculative_tokens=5))
    card = (folder / "README.md").read_text()
    assert f"vllm serve {tiny_target} --speculative-config '" in card
    [line] = [line for line in card.splitlines() if line.startswith("vllm serve")]
    settings = json.loads(line.split("'")[1])
    assert settings == {"method": "eagle3", "model": str(folder), "num_speculative_tokens": 5}
    assert "--speculative-num-steps 5" in card
    assert "--speculative-num-draft-tokens 6" in card
    for fact in ("12 of 512 tokens", "1.7500", "c0ffee", "conversations.jsonl", "1, 3, 4"):
        assert fact in card
    assert "me" not in card.split(), "a card that is published names nobody"


def test_a_checkpoint_that_vanishes_is_explained(write_run: RunWriter) -> None:
    """As the retention of a run that trains on may do it."""
    run = write_run(make_checkpoint("nowhere"))
    for shard in run.glob("checkpoints/step_7/*.distcp"):
        shard.unlink()
    with pytest.raises(UserError, match="export again if the run is training"):
        run_export(ExportRequest(run))
    assert not (run / "export" / "step_7").exists()


def test_the_reference_systems_tool(
    write_run: RunWriter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import convert_to_hf

    run = write_run(make_checkpoint("nowhere"))
    arguments = ["--input-dir", str(run / "checkpoints" / "step_7"), "--dtype", "float16"]
    assert convert_to_hf.main(arguments) == 0
    folder = run / "checkpoints" / "step_7_hf"
    assert capsys.readouterr().out.strip() == str(folder)
    assert load_file(folder / "model.safetensors")["fc.weight"].dtype == torch.float16
    assert convert_to_hf.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert convert_to_hf.main([*arguments, "--force", "--prune-vocab"]) == 2
    assert "go together" in capsys.readouterr().err


def test_streaming_reads_one_tensor_at_a_time(write_run: RunWriter) -> None:
    from torchspec_hpc.export.checkpoint import read_checkpoint

    checkpoint = make_checkpoint("nowhere")
    stored = read_checkpoint(write_run(checkpoint))
    assert set(stored.tensors) == set(checkpoint.tensors)
    assert stored.tensors["fc.weight"] is not stored.tensors["fc.weight"], "nothing is kept"
    assert np.array_equal(stored.kept_ids, KEPT)
