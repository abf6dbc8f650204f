"""Messages in the form that a template takes, and the check that it left nothing out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from torchspec_hpc.data.messages import Message, texts_of
from torchspec_hpc.data.probe import AnswerForm
from torchspec_hpc.data.report import BadRow
from torchspec_hpc.data.template import Tools

_INLINE_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def as_wanted(message: Message, form: AnswerForm) -> Message:
    """A message in the form that a template takes.

    Raises:
        BadRow: The template would leave out its images, its thinking or its tool calls, or its
            thinking has no end.
    """
    if isinstance(message["content"], list) and not form.shows_images:
        raise BadRow("chat template shows no images: the row has some")
    if message["role"] != "assistant":
        return message
    message = dict(message)
    if form.splits_thoughts and isinstance(message["content"], str):
        _split_thought(message)
    if thought := message.get("reasoning_content"):
        if not form.splits_thoughts:
            raise BadRow("chat template shows no reasoning: the row has reasoning_content")
        message["thinking"] = thought  # as gpt-oss calls it
    if calls := message.get("tool_calls"):
        if form.calls is None:
            raise BadRow("chat template shows no tool calls: the row has some")
        message["content"] = message["content"] or form.calls.empty_content
        if form.calls.arguments_as_text:
            message["tool_calls"] = [_with_text_arguments(call) for call in calls]
    return message


def _split_thought(message: Message) -> None:
    """Takes thinking at the beginning of an answer out of its text.

    Raises:
        BadRow: It has no end.
    """
    content = message["content"].lstrip()
    if content.startswith("<think>") and "</think>" not in content:
        raise BadRow("thinking is not closed: an answer begins with <think>, without </think>")
    if found := _INLINE_THOUGHT.match(message["content"]):
        message["content"] = message["content"][found.end() :]
        if found[1].strip():
            message.setdefault("reasoning_content", found[1].strip("\n"))


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return call | {"function": function | {"arguments": arguments}}


def pieces_of(answer: Message) -> Iterator[str]:
    """What of an answer must be in the text."""
    yield from texts_of(answer["content"])
    yield answer.get("reasoning_content", "")
    yield from (call["function"]["name"] for call in answer.get("tool_calls", ()))


def is_plain(answer: Message) -> bool:
    """Whether an answer is its text and nothing else."""
    return set(answer) == {"role", "content"} and isinstance(answer["content"], str)


def refuse_marks(messages: list[Message], end_of_turn: str) -> None:
    """An answer that holds the mark of its end would be cut there.

    Raises:
        BadRow: One does.
    """
    for number, message in enumerate(messages, start=1):
        pieces = pieces_of(message) if message["role"] == "assistant" and end_of_turn else ()
        if any(end_of_turn in piece for piece in pieces):
            raise BadRow(f"text holds an end of turn: {end_of_turn} in turn {number}")


def require_shown(messages: list[Message], tools: Tools, text: str) -> None:
    """Training on a conversation that lacks something would be training on another one.

    Raises:
        BadRow: A question, an instruction or a tool is not in the text.
    """
    for number, message in enumerate(messages, start=1):
        if message["role"] in ("system", "developer", "user") and not all(
            piece.strip() in text for piece in texts_of(message["content"])
        ):
            raise BadRow(f"chat template leaves out text: turn {number} ({message['role']})")
    if not all(tool["function"]["name"] in text for tool in tools or ()):
        raise BadRow("chat template shows no tools: the row has some")
