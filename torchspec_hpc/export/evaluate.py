"""Acceptance length and speed of a draft, measured in a served vLLM engine.

Each engine runs in a process of its own (:mod:`torchspec_hpc.export.served`): it holds its memory,
threads and settings until its process ends.
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

from torchspec_hpc.errors import EXIT_USER_ERROR, DeadlineExceeded, TorchspecError, UserError
from torchspec_hpc.export.figures import Interval, accept_len_interval, percentile
from torchspec_hpc.export.prompts import PromptSet


@dataclass(frozen=True)
class ServeSettings:
    """What is the same for all engines.

    Attributes:
        target: Directory of the target model.
        max_tokens: Longest answer of one turn.
        max_model_len: Tokens of a whole conversation.
        dtype: Of the target and the draft.
        tensor_parallel_size: GPUs.
        deadline_s: Longest time for one engine and all it is asked.
    """

    target: str
    max_tokens: int = 128
    max_model_len: int = 2048
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    deadline_s: float = 3600.0


@dataclass(frozen=True)
class Served:
    """What one engine serves.

    Attributes:
        name: Label for tables.
        draft: Exported draft; None: the target alone.
        num_speculative_tokens: k, draft tokens proposed at a time; 0 without a draft.
    """

    name: str
    draft: Path | None
    num_speculative_tokens: int


@dataclass(frozen=True)
class Case:
    """What an engine is asked, and how.

    Attributes:
        prompts: The questions.
        temperature: 0 is greedy.
        concurrency: Conversations in flight.
    """

    prompts: PromptSet
    temperature: float = 0.0
    concurrency: int = 8


@dataclass(frozen=True)
class Measurement:
    """What one engine did in one case.

    Attributes:
        name: Label of the draft, or ``no draft``.
        num_speculative_tokens: k; 0 without a draft.
        prompts: Name of the prompts.
        temperature: Of the sampling.
        concurrency: Conversations in flight.
        num_answers: Turns that were answered.
        num_tokens: Tokens generated.
        seconds: Wall time of generation, without start-up and warm-up.
        num_drafts: Times the draft proposed tokens.
        accept_len: Tokens a target step, bonus token included: 1 + accepted / drafts.
        accept_len_interval: Its 95 % bootstrap interval over conversations; None without a draft,
            or where the engine does not count by request.
        accept_by_position: Share of drafts whose token at position 1..k was accepted.
        latency_s: Percentiles of seconds an answer: ``p50``, ``p90``, ``p99``.
        first_token_s: Percentiles of seconds to its first token.
        outputs: Generated token ids by conversation and turn.
    """

    name: str
    num_speculative_tokens: int
    prompts: str
    temperature: float
    concurrency: int
    num_answers: int
    num_tokens: int
    seconds: float
    num_drafts: int
    accept_len: float
    accept_len_interval: Interval | None
    accept_by_position: tuple[float, ...]
    latency_s: dict[str, float]
    first_token_s: dict[str, float]
    outputs: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens a second, over all conversations in flight."""
        return self.num_tokens / self.seconds

    def is_same_case(self, other: Measurement) -> bool:
        """Whether both answered the same questions in the same way."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("prompts", "temperature", "concurrency")
        )

    def same_outputs(self, other: Measurement) -> float:
        """Share of conversations with exactly the same answers, 1.0 when drafting loses nothing."""
        pairs = list(zip(self.outputs, other.outputs, strict=True))
        return sum(mine == theirs for mine, theirs in pairs) / len(pairs)

    def summary(self) -> dict[str, Any]:
        """The figures without the answers."""
        figures = asdict(self) | {"tokens_per_s": self.tokens_per_s}
        del figures["outputs"]
        return figures


def measure(
    settings: ServeSettings, served: Served, cases: Sequence[Case], log: Path
) -> list[Measurement]:
    """Asks a fresh engine, case after case.

    Args:
        settings: Of every engine.
        served: With what.
        cases: At least one.
        log: File that takes the engine's output.

    Raises:
        UserError: vLLM is not installed, the draft directory is missing, or a prompt is too long.
        DeadlineExceeded: The engine took longer than ``settings.deadline_s``.
        TorchspecError: The engine failed; the message ends with the end of its log.
    """
    if served.draft is not None and not (served.draft / "config.json").is_file():
        raise UserError(f"{served.draft} is no exported draft", hint="torchspec-hpc export RUN")
    job = {
        "settings": asdict(settings),
        "draft": str(served.draft) if served.draft else None,
        "num_speculative_tokens": served.num_speculative_tokens,
        "cases": [
            {
                "prompts": [asdict(prompt) for prompt in case.prompts.prompts],
                "max_tokens": settings.max_tokens,
                "temperature": case.temperature,
                "concurrency": case.concurrency,
            }
            for case in cases
        ],
    }
    with tempfile.TemporaryDirectory(prefix="torchspec-evaluate-") as scratch:
        job_file, reply = Path(scratch) / "job.json", Path(scratch) / "reply.json"
        job_file.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "torchspec_hpc.export.served", str(job_file), str(reply)]
        _run(command, log, settings.deadline_s)
        answers = json.loads(reply.read_text(encoding="utf-8"))
    return [_measurement(served, case, a) for case, a in zip(cases, answers, strict=True)]


def _measurement(served: Served, case: Case, answer: dict[str, Any]) -> Measurement:
    """Figures of what :meth:`torchspec_hpc.export.served.Engine.run` returns."""
    conversations = answer["conversations"]
    outputs = tuple(tuple(tuple(turn) for turn in c["answers"]) for c in conversations)
    drafts = answer["num_drafts"]
    by_request = [(c["num_drafts"], c["num_accepted"]) for c in conversations]
    counted = [(d, a) for d, a in by_request if d is not None]
    return Measurement(
        name=served.name,
        num_speculative_tokens=served.num_speculative_tokens,
        prompts=case.prompts.name,
        temperature=case.temperature,
        concurrency=case.concurrency,
        num_answers=sum(map(len, outputs)),
        num_tokens=sum(len(turn) for turns in outputs for turn in turns),
        seconds=answer["seconds"],
        num_drafts=drafts,
        accept_len=1 + answer["num_accepted"] / drafts if drafts else 1.0,
        accept_len_interval=accept_len_interval(counted) if counted else None,
        accept_by_position=tuple(n / drafts for n in answer["num_accepted_by_position"])
        if drafts
        else (),
        latency_s=_percentiles(conversations, "latencies_s"),
        first_token_s=_percentiles(conversations, "first_token_s"),
        outputs=outputs,
    )


def _percentiles(conversations: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    values = [value for conversation in conversations for value in conversation[key]]
    return {f"p{share}": percentile(values, share) for share in (50, 90, 99)}


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
        error = UserError if done.returncode == EXIT_USER_ERROR else TorchspecError
        raise error(
            f"vLLM ended with code {done.returncode}; the end of {log}:\n  " + "\n  ".join(tail)
        )
