"""Turns in all their spellings as OpenAI messages.

A message has a ``role`` and ``content`` (text, or parts where one of them is no text), and where
the turn has them ``reasoning_content``, ``tool_calls``, ``tool_call_id`` and ``name``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from torchspec_hpc.data.report import BadRow

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
#: What data sets call the thinking before an answer.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
_CALL_ROLES = ("function_call", "tool_call")  # ShareGPT: the turn's text is the call
_PLACEHOLDERS = {"image": "image", "image_url": "image", "input_image": "image"}
_PLACEHOLDERS |= {"video": "video", "video_url": "video", "input_video": "video"}
_TEXT_PARTS = ("text", "input_text", "output_text")


def message_of(turn: Any, number: int) -> Message:
    """One turn of OpenAI's or ShareGPT's form.

    Args:
        turn: As it is in the row.
        number: Of the turn, counts from 1; for the reason.

    Raises:
        BadRow: With the reason.
    """
    if not isinstance(turn, Mapping):
        raise BadRow(f"turn is no object: turn {number} is {type(turn).__name__}")
    name, value = _fields(turn, number)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadRow(f"unknown role: {name!r} in turn {number}; known: {', '.join(ROLES)}")
    where = f"turn {number} ({role})"
    message: Message = {"role": role}
    if name in _CALL_ROLES:
        return message | {"content": "", "tool_calls": _calls(_json(value, where), where)}
    content, thoughts = _content(value, where)
    message["content"] = content
    if role == "assistant":
        _add_reasoning(message, turn, thoughts, where)
        calls = turn.get("tool_calls") or turn.get("function_call")
        if calls:
            message["tool_calls"] = _calls(calls, where)
    for key in ("name", "tool_call_id"):
        if role == "tool" and isinstance(turn.get(key), str):
            message[key] = turn[key]
    empty = isinstance(content, str) and not content.strip() and "tool_calls" not in message
    if role in ("user", "assistant") and empty:
        raise BadRow(f"empty text: {where}")
    return message


def tool_definitions(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a row in OpenAI form; text is read as JSON.

    Raises:
        BadRow: They are no list of objects with a name.
    """
    if not value:
        return None
    tools = _json(value, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow(f"tools are no list of objects: found {type(tools).__name__}")
    made = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    for number, tool in enumerate(made, start=1):
        function = tool["function"]
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f"tool without name: number {number} of tools")
    return made or None


def plain_text(value: Any, where: str) -> str:
    """Text that can be tokenized.

    Raises:
        BadRow: It is something else.
    """
    if not isinstance(value, str):
        raise BadRow(f"content is not text: {where} is {type(value).__name__}")
    try:
        value.encode()  # JSON can spell half of a surrogate pair, tokenizers cannot take it
    except UnicodeEncodeError:
        raise BadRow(f"content is not Unicode: {where} has half of a surrogate pair") from None
    return value


def texts_of(content: Any) -> Iterator[str]:
    """The text of a message's content, piece by piece."""
    if isinstance(content, str):
        yield content
    else:
        yield from (part["text"] for part in content or () if part["type"] == "text")


def _fields(turn: Mapping[str, Any], number: int) -> tuple[Any, Any]:
    for role_key, text_key in (("role", "content"), ("from", "value")):
        if turn.get(role_key) is not None:  # Parquet fills absent fields with null
            return turn[role_key], turn.get(text_key)
    raise BadRow(
        f"turn without role: turn {number} has {', '.join(map(str, turn)) or 'nothing'}; "
        "expected role and content, or from and value"
    )


def _content(value: Any, where: str) -> tuple[str | list[dict[str, Any]], list[str]]:
    """Text, or parts if one of them is an image or a video; and thoughts that were parts."""
    if value is None:
        return "", []
    if not isinstance(value, list):
        return plain_text(value, where), []
    parts: list[dict[str, Any]] = []
    thoughts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _TEXT_PARTS:
            parts.append({"type": "text", "text": plain_text(part.get("text") or "", where)})
        elif kind in ("thinking", "reasoning"):
            thoughts.append(plain_text(part.get(kind) or part.get("text") or "", where))
        elif isinstance(kind, str) and kind in _PLACEHOLDERS:
            parts.append({"type": _PLACEHOLDERS[kind]})
        else:
            raise BadRow(f"content is not text: {where} has a part of type {kind!r}")
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts), thoughts
    return parts, thoughts


def _add_reasoning(
    message: Message, turn: Mapping[str, Any], thoughts: list[str], where: str
) -> None:
    given = [turn[key] for key in REASONING_KEYS if turn.get(key)]
    reasoning = "".join(thoughts) or (plain_text(given[0], f"{where} reasoning") if given else "")
    if reasoning.strip():
        message["reasoning_content"] = reasoning


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI form, their arguments as objects."""
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f"tool call without name: {where}")
        arguments = _json(function.get("arguments") or {}, f"{where} arguments")
        if not isinstance(arguments, Mapping):
            raise BadRow(f"tool call's arguments are no object: {where}")
        form = {"name": function["name"], "arguments": dict(arguments)}
        made: dict[str, Any] = {"type": "function", "function": form}
        if isinstance(call.get("id"), str):
            made["id"] = call["id"]
        calls.append(made)
    return calls


def _json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"broken JSON in a text: {where}: {error}") from None
