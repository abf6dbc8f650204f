"""Acceptance length and speed of a draft, measured in a served vLLM engine.

Each measurement runs in a process of its own (:mod:`torchspec_hpc.export.served`):
an engine holds its memory, threads and settings until its process ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchspec_hpc.errors import DataError, DeadlineExceeded, TorchspecError, UserError


@dataclass(frozen=True)
class ServeSettings:
    """How the engine is started and asked.

    Attributes:
        target: Directory of the target model.
        num_speculative_tokens: k, draft tokens proposed a time.
        max_tokens: Longest answer.
        concurrency: Prompts in flight.
        temperature: 0 is greedy.
        max_model_len: Tokens of prompt and answer.
        dtype: Of the target and the draft.
        tensor_parallel_size: GPUs.
        deadline_s: Longest time for one measurement.
    """

    target: str
    num_speculative_tokens: int = 3
    max_tokens: int = 128
    concurrency: int = 8
    temperature: float = 0.0
    max_model_len: int = 2048
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    deadline_s: float = 3600.0


@dataclass(frozen=True)
class Measurement:
    """What one engine did with all the prompts.

    Attributes:
        name: Label of the draft, or ``no draft``.
        num_prompts: Prompts answered.
        num_tokens: Tokens generated.
        seconds: Wall time of generation, without start-up and warm-up.
        num_drafts: Times the draft proposed tokens.
        accept_len: Tokens a target step, bonus token included: 1 + accepted / drafts.
        accept_by_position: Share of drafts whose token at position 1..k was accepted.
        outputs: Generated token ids by prompt.
    """

    name: str
    num_prompts: int
    num_tokens: int
    seconds: float
    num_drafts: int
    accept_len: float
    accept_by_position: tuple[float, ...]
    outputs: tuple[tuple[int, ...], ...]

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second, over all prompts in flight."""
        return self.num_tokens / self.seconds

    def same_outputs(self, other: Measurement) -> float:
        """Share of prompts with exactly the same answer, 1.0 when drafting loses nothing."""
        pairs = list(zip(self.outputs, other.outputs, strict=True))
        return sum(mine == theirs for mine, theirs in pairs) / len(pairs)

    def summary(self) -> dict[str, Any]:
        """The figures without the answers."""
        figures = asdict(self) | {"tokens_per_s": self.tokens_per_s}
        del figures["outputs"]
        return figures


def read_prompts(path: Path, limit: int | None = None) -> list[list[dict[str, str]]]:
    """Reads prompts as chat messages; a last assistant turn is left off.

    Args:
        path: JSONL with ``messages`` (OpenAI form) or ``prompt`` (one user turn) in each row.
        limit: Take only the first so many.

    Raises:
        DataError: A row is broken, or there is none.
    """
    if not path.is_file():
        raise DataError(f"there is no prompt file {path}", hint="check the path")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            prompts.append(_prompt(line, f"{path}, line {number}"))
    if not prompts:
        raise DataError(f"{path} holds no prompt")
    return prompts[:limit]


def _prompt(line: str, where: str) -> list[dict[str, str]]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        return [{"role": "user", "content": row["prompt"]}]
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where} has {found}", allowed="a column messages, or prompt")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def measure(
    settings: ServeSettings,
    prompts: Sequence[list[dict[str, str]]],
    *,
    name: str,
    draft: Path | None,
    log: Path,
) -> Measurement:
    """Answers the prompts in a fresh engine.

    Args:
        settings: Engine and sampling.
        prompts: Chat messages, see :func:`read_prompts`.
        name: Label of the result.
        draft: Exported draft directory; None serves the target alone.
        log: File that takes the engine's output.

    Raises:
        UserError: vLLM is not installed, or the draft directory is missing.
        DeadlineExceeded: The engine took longer than ``settings.deadline_s``.
        TorchspecError: The engine failed; the message ends with the end of its log.
    """
    if draft is not None and not (draft / "config.json").is_file():
        raise UserError(f"{draft} is no exported draft", hint="run torchspec-hpc export first")
    with tempfile.TemporaryDirectory(prefix="torchspec-evaluate-") as scratch:
        job, reply = Path(scratch) / "job.json", Path(scratch) / "reply.json"
        request = {
            "settings": asdict(settings),
            "prompts": list(prompts),
            "draft": str(draft) if draft else None,
        }
        job.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "torchspec_hpc.export.served", str(job), str(reply)]
        _run(command, log, settings.deadline_s)
        answer = json.loads(reply.read_text(encoding="utf-8"))
    outputs = tuple(tuple(ids) for ids in answer.pop("outputs"))
    by_position = tuple(answer.pop("accept_by_position"))
    return Measurement(name=name, outputs=outputs, accept_by_position=by_position, **answer)


def _run(command: list[str], log: Path, deadline_s: float) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        try:
            done = subprocess.run(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=deadline_s,
                check=False,
                stdin=subprocess.DEVNULL,
                env=dict(os.environ),
            )
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded("vLLM to answer the prompts", deadline_s, f"see {log}") from None
    if done.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        raise TorchspecError(
            f"vLLM ended with code {done.returncode}; the end of {log}:\n  " + "\n  ".join(tail)
        )
