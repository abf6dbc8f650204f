"""ShareGPT and OpenAI rows as one form: OpenAI messages of plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torchspec_hpc.data.report import BadRow, Rejection
from torchspec_hpc.data.rows import read_rows

#: ``{"role": ..., "content": ...}``
Message = dict[str, str]

COLUMNS = ("conversations", "messages")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
# Parts of a conversation that carry text which this version does not render. Leaving them out
# silently would train on conversations that never happened.
_UNSUPPORTED_TURN_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning")
_UNSUPPORTED_ROW_KEYS = ("tools", "functions")


class Conversation(NamedTuple):
    """Turns of one row, up to the last one of the assistant."""

    line: int
    messages: list[Message]


def read_conversations(path: Path, prompt_key: str | None) -> Iterator[Conversation | Rejection]:
    """Streams the conversations of a data file.

    Args:
        path: ``.jsonl``, ``.json`` or ``.parquet``.
        prompt_key: Column of the turns; None takes ``conversations`` or ``messages``.

    Raises:
        DataError: The file cannot be read at all.
    """
    for row in read_rows(path):
        if isinstance(row, Rejection):
            yield row
            continue
        try:
            yield Conversation(row.line, parse_conversation(row.value, prompt_key))
        except BadRow as error:
            yield Rejection(row.line, str(error))


def parse_conversation(row: Any, prompt_key: str | None) -> list[Message]:
    """Turns of a row in OpenAI form.

    Turns after the assistant's last one are left out: nothing in them is trained on, and templates
    that shorten history would treat the answer before them as history.

    Raises:
        BadRow: With the reason.
    """
    turns = _turns(row, prompt_key)
    messages = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
    if row.get("system") and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(row["system"], "system column")})
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise BadRow("no assistant turn")
    return messages


def _turns(row: Any, prompt_key: str | None) -> list[Any]:
    if not isinstance(row, Mapping):
        raise BadRow(f"not an object: found {type(row).__name__}")
    for key in _UNSUPPORTED_ROW_KEYS:
        if row.get(key):
            raise BadRow(f"{key} are not supported")
    columns = (prompt_key,) if prompt_key else COLUMNS
    column = next((name for name in columns if row.get(name) is not None), None)
    if column is None:
        raise BadRow(
            f"no column of turns: found {', '.join(map(str, row)) or 'no column'}; "
            f"expected {' or '.join(columns)} (dataset.prompt_key)"
        )
    turns = row[column]
    if not isinstance(turns, list):
        raise BadRow(f"turns are no list: {column} is {type(turns).__name__}")
    return turns


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRow(f"turn is no object: turn {number} is {type(turn).__name__}")
    for key in _UNSUPPORTED_TURN_KEYS:
        if turn.get(key):
            raise BadRow(f"{key} is not supported: turn {number}")
    name, text = _fields(turn, number)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadRow(f"unknown role: {name!r} in turn {number}; known: {', '.join(ROLES)}")
    content = _text(text, f"turn {number} ({role})")
    if role in ("user", "assistant") and not content.strip():
        raise BadRow(f"empty text: turn {number} ({role})")
    return {"role": role, "content": content}


def _fields(turn: Mapping[str, Any], number: int) -> tuple[Any, Any]:
    for role_key, text_key in (("role", "content"), ("from", "value")):
        if turn.get(role_key) is not None:  # Parquet fills absent fields with null
            return turn[role_key], turn.get(text_key)
    raise BadRow(
        f"turn without role: turn {number} has {', '.join(map(str, turn)) or 'nothing'}; "
        "expected role and content, or from and value"
    )


def _text(value: Any, where: str) -> str:
    """Plain text, or the joined text parts of OpenAI's list form."""
    if value is None:
        value = ""
    if isinstance(value, list):
        kinds = {part.get("type") if isinstance(part, Mapping) else None for part in value}
        if kinds - {"text"}:
            raise BadRow(f"content is not text: {where} has parts {sorted(map(str, kinds))}")
        value = "".join(str(part.get("text") or "") for part in value)
    if not isinstance(value, str):
        raise BadRow(f"content is not text: {where} is {type(value).__name__}")
    try:
        value.encode()  # JSON can spell half of a surrogate pair, tokenizers cannot take it
    except UnicodeEncodeError:
        raise BadRow(f"content is not Unicode: {where} has half of a surrogate pair") from None
    return value
