"""What a chat template does, found out by rendering conversations that we know."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from torchspec_hpc.data.messages import Message
from torchspec_hpc.data.report import BadRow
from torchspec_hpc.data.template import Template, num_shared
from torchspec_hpc.errors import DataError

#: A conversation to try templates with.
PROBE: list[Message] = [
    {"role": "user", "content": "First question, with 12 words?"},
    {"role": "assistant", "content": "First answer.\n\n    It has\ttwo  paragraphs, 3 numbers."},
    {"role": "user", "content": "Second question?"},
    {"role": "assistant", "content": "Second answer: done!"},
]
_THOUGHT = "A thought, 7 words long."
_TOOL = {"name": "look_up", "description": "Looks.", "parameters": {"type": "object"}}
_TOOLS = [{"type": "function", "function": _TOOL}]
_EMPTY_THOUGHT = re.compile(r"(\s*<think>\s*)?(</think>\s*)")
_ARGUMENTS = {"word": "quetzal"}


@dataclass(frozen=True)
class CallForm:
    """How a template wants tool calls."""

    arguments_as_text: bool
    empty_content: str | None


@dataclass(frozen=True)
class AnswerForm:
    """How a template shows an answer.

    Attributes:
        header: What the generation prompt begins an answer with, as far as answers show it.
        lead: What it puts between the generation prompt and an answer's text.
        end_of_turn: What it ends an answer with; empty if with nothing.
        hidden: The end of the generation prompt that it does not show with a plain answer, where
            that is the opening of thinking (DeepSeek R1, MiniMax M2).
        shows_reasoning: Whether it writes ``reasoning_content``.
        calls: How it wants tool calls; None if it shows none.
        shows_images: Whether it writes something for an image.
        specials: Tokens that can end a turn.
    """

    header: str
    lead: str
    end_of_turn: str
    hidden: str
    shows_reasoning: bool
    calls: CallForm | None
    shows_images: bool
    specials: tuple[str, ...]

    @property
    def thought_marks(self) -> tuple[str, str] | None:
        """What opens and closes thinking, for templates that do not show it; None if unknown."""
        if self.hidden:
            return "", "\n</think>\n\n"  # the prompt opens it
        empty = _EMPTY_THOUGHT.fullmatch(self.lead)
        return (empty[1] or "", empty[2]) if empty else None

    @property
    def splits_thoughts(self) -> bool:
        """Whether ``<think>`` at the beginning of an answer is to be taken out of its text."""
        return self.shows_reasoning or self.thought_marks is not None


def answer_form(template: Template, added_tokens: list[str]) -> AnswerForm:
    """Looks at rendered answers whose text we know.

    Raises:
        BadRow: The template refuses a plain conversation.
        DataError: Answers cannot be found with it.
    """
    question, answer = PROBE[:2]
    text = template.text([question, answer])
    prompt = template.text([question], prompt=True)
    shared = num_shared(text, prompt)
    hidden = prompt[shared:]
    lead, found, tail = text[shared:].partition(answer["content"])
    known_prompt = not hidden or "think" in hidden
    if not found or not (known_prompt or template.has_blocks):
        raise unusable(
            f"the generation prompt {prompt!r} and the answer {answer['content']!r} do not "
            f"follow each other in {text!r}"
        )
    specials = tuple(token for token in added_tokens if token.strip())
    before = num_shared(template.text([question]), prompt)
    return AnswerForm(
        prompt[before:shared],
        lead,
        _end_of_turn(tail, specials, template.has_blocks),
        hidden if known_prompt else "",
        _shows(template, {"reasoning_content": _THOUGHT, "thinking": _THOUGHT}, _THOUGHT),
        _call_form(template),
        _shows_images(template),
        specials,
    )


def unusable(found: str) -> DataError:
    """The error of a template with which answers cannot be found."""
    return DataError(
        f"cannot tell which tokens the assistant said with this chat template: {found}",
        allowed="templates that render the generation prompt, the text and an end of turn in "
        "this order, or mark the text with {% generation %} blocks",
        hint="set dataset.chat_template to a copy with {% generation %} ... {% endgeneration %} "
        "around the assistant's text and end of turn, or dataset.answer_parser to the family",
    )


def _end_of_turn(tail: str, specials: tuple[str, ...], has_blocks: bool) -> str:
    # Gemma's newlines are added tokens, too; of two that begin together the longer counts
    found = [(tail.find(token), -len(token)) for token in specials if token in tail]
    if found:
        start, negative_length = min(found)
        return tail[: start - negative_length]
    if tail.strip() and not has_blocks:
        raise unusable(f"no end-of-turn token follows the answer, but {tail!r}")
    return ""


def _shows(template: Template, fields: dict[str, Any], *wanted: str) -> bool:
    """Whether an answer with more fields is rendered with these texts."""
    messages = [PROBE[0], PROBE[1] | fields]
    try:
        text = template.text(messages, _TOOLS if "tool_calls" in fields else None)
    except BadRow:
        return False
    return all(piece in text for piece in wanted)


def _call_form(template: Template) -> CallForm | None:
    for as_text in (False, True):
        arguments: Any = json.dumps(_ARGUMENTS) if as_text else _ARGUMENTS
        function = {"name": "fetch_word", "arguments": arguments}
        call = {"id": "functions.fetch_word:0", "type": "function", "function": function}
        for empty in ("", None):
            fields = {"content": empty, "tool_calls": [call]}
            if _shows(template, fields, "fetch_word", *_ARGUMENTS.values()):
                return CallForm(as_text, empty)
    return None


def _shows_images(template: Template) -> bool:
    words = {"type": "text", "text": "What is this?"}

    def with_parts(*parts: dict[str, str]) -> str:
        return template.text([{"role": "user", "content": list(parts)}, PROBE[1]])

    try:
        shown, without = with_parts({"type": "image"}, words), with_parts(words)
    except BadRow:
        return False
    spelled_out = "'type'" in shown or '"type"' in shown  # the list as Python or JSON has it
    return words["text"] in shown and shown != without and not spelled_out
