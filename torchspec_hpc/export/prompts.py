"""Questions for the evaluation: files as the usual benchmarks have them, and small samples."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from torchspec_hpc.errors import DataError

SAMPLES = Path(__file__).parent / "samples"
#: Columns that hold one question: HumanEval and ours, GSM8K, MATH.
_ONE_QUESTION = ("prompt", "question", "problem")


@dataclass(frozen=True)
class Prompt:
    """The user's side of a conversation.

    Attributes:
        messages: In OpenAI form, the last one the user's: the first question with its history.
        followups: Questions asked after each answer, as MT-Bench has them.
    """

    messages: tuple[dict[str, str], ...]
    followups: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind.

    Attributes:
        name: For tables.
        prompts: In the order of the file.
    """

    name: str
    prompts: tuple[Prompt, ...]


def sample_names() -> list[str]:
    """Samples that ship with the package."""
    return sorted(path.stem for path in SAMPLES.glob("*.jsonl"))


def load_prompts(name: str, limit: int | None = None) -> PromptSet:
    """Prompts of a file, or of a sample that ships.

    Args:
        name: Path of a JSONL file whose rows have ``turns`` (MT-Bench), ``messages`` (OpenAI form;
            a last assistant turn is left off), ``prompt`` (HumanEval), ``question`` (GSM8K) or
            ``problem`` (MATH); or one of :func:`sample_names`.
        limit: Take only the first so many.

    Raises:
        DataError: There is no such file or sample, a row is broken, or there is none.
    """
    path = Path(name)
    if name in sample_names():
        path = SAMPLES / f"{name}.jsonl"
    if not path.is_file():
        raise DataError(
            f"there is no prompt file {name}",
            allowed=f"a JSONL file, or one of the samples {', '.join(sample_names())}",
        )
    prompts = [
        _prompt(line, f"{path}, line {number}")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.strip()
    ]
    if not prompts:
        raise DataError(f"{path} holds no prompt")
    return PromptSet(path.stem, tuple(prompts[:limit]))


def _prompt(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if isinstance(row, dict):
        if _are_texts(turns := row.get("turns")):
            return Prompt((_user(turns[0]),), tuple(turns[1:]))
        if _are_messages(messages := row.get("messages")):
            kept = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            if kept:
                return Prompt(tuple({"role": m["role"], "content": m["content"]} for m in kept))
        for column in _ONE_QUESTION:
            if isinstance(row.get(column), str):
                return Prompt((_user(row[column]),))
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise DataError(
        f"{where} has {found}",
        allowed="a column turns or messages, or one of " + ", ".join(_ONE_QUESTION),
    )


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _are_messages(value: Any) -> TypeGuard[list[dict[str, str]]]:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    )
