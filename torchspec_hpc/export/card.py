"""The model card of an exported draft: what it is, how to serve it, and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchspec_hpc.config import RunDir
from torchspec_hpc.config.yaml_io import parse_yaml
from torchspec_hpc.drafts.eagle3.formats import DraftFormat, Served
from torchspec_hpc.export.checkpoint import DraftCheckpoint

#: Tags of ``metrics.jsonl`` that the card shows, where the step has them.
_METRICS = {
    "train/loss": "training loss",
    "train/accept_len": "acceptance length, training estimate",
    "eval/loss": "loss on held-out data",
    "eval/accept_len": "acceptance length, estimate on held-out data",
}


#: Settings of ``training`` that the card shows.
_SETTINGS = {
    "ttt_length": "steps of the training-time test",
    "loss_type": "loss",
    "learning_rate": "learning rate",
    "max_seq_length": "longest sample, tokens",
}


def model_card(
    checkpoint: DraftCheckpoint, output: Path, served: Served, draft_format: DraftFormat
) -> str:
    """Text of ``README.md``. A checkpoint without its run has a card that says less.

    Args:
        checkpoint: What is exported.
        output: Where to, as the commands name it.
        served: How.
        draft_format: For whom.
    """
    run = RunDir(checkpoint.path.parent.parent)
    sections = [
        _front_matter(served),
        f"# EAGLE-3 draft for {served.target}\n",
        "Proposes tokens that the target checks: the answers stay the target's own.\n",
        "## Serve it\n",
        *_commands(output, served, draft_format),
        "## What it is\n",
        _table(_facts(checkpoint, draft_format, run)),
    ]
    if metrics := _metrics(run, checkpoint.meta.step):
        sections += ["## At this step\n", _table(metrics)]
        sections.append("Acceptance lengths count the bonus token. Served ones are measured with\n"
                        "`torchspec-hpc evaluate`.\n")  # fmt: skip
    sections += ["## Provenance\n", _table(_provenance(checkpoint, run))]
    return "\n".join(sections)


def _front_matter(served: Served) -> str:
    return f"---\nbase_model: {served.target}\ntags: [speculative-decoding, eagle3]\n---\n"


def vllm_command(output: Path, served: Served, draft_format: DraftFormat) -> str:
    """The command that serves the target with this draft in vLLM."""
    if draft_format == "speculators":
        return f"vllm serve {output}"
    settings = {
        "method": "eagle3",  # without it vLLM guesses from the directory's name
        "model": str(output),
        "num_speculative_tokens": served.num_speculative_tokens,
    }
    return f"vllm serve {served.target} --speculative-config '{json.dumps(settings)}'"


def sglang_command(output: Path, served: Served) -> str:
    """The command that serves the target with this draft in SGLang: a chain, no tree."""
    k = served.num_speculative_tokens
    return (
        f"python -m sglang.launch_server --model-path {served.target} \\\n"
        f"    --speculative-algorithm EAGLE3 --speculative-draft-model-path {output} \\\n"
        f"    --speculative-num-steps {k} --speculative-eagle-topk 1"
        f" --speculative-num-draft-tokens {k + 1}"
    )


def _commands(output: Path, served: Served, draft_format: DraftFormat) -> list[str]:
    commands = [f"```bash\n{vllm_command(output, served, draft_format)}\n```\n"]
    if draft_format == "hf":
        commands.append(f"```bash\n{sglang_command(output, served)}\n```\n")
    else:
        commands.append("SGLang does not read this format: export with `--format hf` for it.\n")
    return commands


def _facts(checkpoint: DraftCheckpoint, draft_format: DraftFormat, run: RunDir) -> dict[str, Any]:
    shape = checkpoint.meta.draft["config"]
    rows, full = shape["draft_vocab_size"], shape["vocab_size"]
    facts = {
        "format": draft_format,
        "target": checkpoint.meta.target,
        "reads the residual stream after layers": ", ".join(map(str, shape["aux_layers"])),
        "draft vocabulary": f"{rows:,} of {full:,} tokens" if rows < full else f"all {full:,}",
        "optimizer steps": checkpoint.meta.step,
    }
    if run.config.is_file():
        # as it is: a run of an older version must be exported, too
        settings = parse_yaml(run.config.read_text(encoding="utf-8"), str(run.config))
        data = settings["dataset"]["train_data_path"]
        facts["training data"] = Path(str(data)).name
        training = settings.get("training", {})
        facts |= {label: training[key] for key, label in _SETTINGS.items() if key in training}
    return facts


def _metrics(run: RunDir, step: int) -> dict[str, Any]:
    """The numbers of a step, as the run's log has them."""
    found: dict[str, Any] = {}
    if run.metrics.is_file():
        for line in run.metrics.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record.get("step") == step:
                found |= {tag: value for tag, value in record.items() if value is not None}
    return {label: f"{found[tag]:.4f}" for tag, label in _METRICS.items() if tag in found}


def _provenance(checkpoint: DraftCheckpoint, run: RunDir) -> dict[str, Any]:
    """Versions, code and samples; nothing that names people or machines."""
    meta = checkpoint.meta
    facts: dict[str, Any] = {
        "run": run.root.name,
        "checkpoint": checkpoint.path.name,
        "trainers": meta.world_size,
        "samples": f"{meta.stream.get('num_samples')}, key {meta.stream.get('dataset')}",
        "seed": meta.stream.get("seed"),
        **meta.versions,
    }
    if run.provenance.is_file():
        start = json.loads(run.provenance.read_text(encoding="utf-8"))["starts"][-1]
        git = start.get("git") or {}
        facts |= {"started": start.get("time")}
        facts["commit"] = f"{git.get('commit')}{', changed' if git.get('dirty') else ''}"
    return facts


def _table(rows: dict[str, Any] | Iterable[tuple[str, Any]]) -> str:
    items = rows.items() if isinstance(rows, dict) else rows
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in items)]) + "\n"
