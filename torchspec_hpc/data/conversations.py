"""Rows of any known form as one: OpenAI messages, text, or tokens."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchspec_hpc.data.messages import Message, message_of, plain_text, tool_definitions
from torchspec_hpc.data.report import BadRow

COLUMNS = ("conversations", "messages")
TOKENS, TEXT = ("input_ids", "loss_mask"), "text"
_MAX_TOKEN_ID = np.iinfo(np.int32).max


class Conversation(NamedTuple):
    """Turns of one row, up to the last one of the assistant, and the tools it may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


class Tokens(NamedTuple):
    """A row that is tokenized already: int32 and bool ``[T]``."""

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]


class Text(NamedTuple):
    """A row of text without turns: every token of it is trained on."""

    text: str


def parse_row(row: Any, prompt_key: str | None) -> Conversation | Tokens | Text:
    """What a row holds.

    Args:
        row: An object of a data file.
        prompt_key: Column of the turns; None takes ``conversations`` or ``messages``, then
            ``input_ids`` with ``loss_mask``, then ``text``.

    Raises:
        BadRow: With the reason.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"not an object: found {type(row).__name__}")
    for column in (prompt_key,) if prompt_key else COLUMNS:
        if row.get(column) is not None:
            return _conversation(row, column)
    if prompt_key is None and row.get(TOKENS[0]) is not None:
        return _tokens(row)
    if prompt_key is None and row.get(TEXT) is not None:
        return Text(plain_text(row[TEXT], TEXT))
    expected = prompt_key or f"{' or '.join(COLUMNS)}, {' with '.join(TOKENS)}, or {TEXT}"
    raise BadRow(
        f"no column of turns: found {', '.join(map(str, row)) or 'no column'}; "
        f"expected {expected} (dataset.prompt_key)"
    )


def conversation_of(row: Mapping[str, Any], column: str) -> Conversation:
    """All turns of a row in OpenAI form, the ``system`` column before them, and its tools.

    Raises:
        BadRow: With the reason.
    """
    turns = row[column]
    if not isinstance(turns, list):
        raise BadRow(f"turns are no list: {column} is {type(turns).__name__}")
    messages = [message_of(turn, number) for number, turn in enumerate(turns, start=1)]
    if row.get("system") and messages and messages[0]["role"] != "system":
        messages.insert(
            0, {"role": "system", "content": plain_text(row["system"], "system column")}
        )
    return Conversation(messages, tool_definitions(row.get("tools") or row.get("functions")))


def _conversation(row: Mapping[str, Any], column: str) -> Conversation:
    """What can be trained on.

    Turns after the assistant's last one are left out: nothing in them is trained on, and templates
    that shorten history would treat the answer before them as history.
    """
    messages, tools = conversation_of(row, column)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise BadRow("no assistant turn")
    _check_order(messages)
    return Conversation(messages, tools)


def _check_order(messages: list[Message]) -> None:
    """What no chat is: an answer to nothing, or a tool's result that nobody asked for."""
    roles = [message["role"] for message in messages]
    before = [role for role in roles[: roles.index("assistant")] if role != "system"]
    if not before:
        raise BadRow("role order: begins with the assistant, there is no prompt to answer")
    for number, (earlier, role) in enumerate(pairwise(roles), start=2):
        if role == "assistant" and earlier == "assistant":
            raise BadRow(f"role order: turn {number} is an answer to the answer before it")
        if role == "tool" and earlier not in ("assistant", "tool"):
            raise BadRow(f"role order: turn {number} is a tool's result after {earlier}")


def _tokens(row: Mapping[str, Any]) -> Tokens:
    ids, mask = (row.get(column) for column in TOKENS)
    if not isinstance(ids, list) or not isinstance(mask, list):
        found = ", ".join(f"{c} is {type(row.get(c)).__name__}" for c in TOKENS)
        raise BadRow(f"tokens are no lists: {found}")
    if len(ids) != len(mask):
        raise BadRow(f"tokens and mask differ in length: {len(ids)} and {len(mask)}")
    if not all(type(i) is int and 0 <= i <= _MAX_TOKEN_ID for i in ids):
        raise BadRow("tokens are not ids: input_ids must be whole numbers of 0 and up")
    if odd := [value for value in mask if value not in (0, 1)]:
        raise BadRow(f"mask is not of 0 and 1: loss_mask has {odd[:5]}")
    return Tokens(np.array(ids, dtype=np.int32), np.array(mask, dtype=np.bool_))
