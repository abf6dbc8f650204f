"""Conversations as the model's chat template writes them, and where in the text the answers are.

Two ways to find an answer:

* *generation blocks*: a template that marks what the assistant says with ``{% generation %}`` is
  taken at its word, but for white space after the end of turn;
* *prompt and answer*: otherwise, turn k is an answer exactly if the conversation begins with what
  the model is prompted with for that turn (turns before k, and the generation prompt), followed by
  the turn's text and the end-of-turn token. What the template puts between prompt and text is not
  part of it (empty thinking, say), unless it is white space, which may be one token with the first
  word; what follows the end of turn is not, either.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2

from torchspec_hpc.data.conversations import Message
from torchspec_hpc.data.report import BadRow
from torchspec_hpc.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Span = tuple[int, int]
#: A conversation to try templates with.
PROBE = [
    {"role": "user", "content": "First question, with 12 words?"},
    {"role": "assistant", "content": "First answer.\n\n    It has\ttwo  paragraphs, 3 numbers."},
    {"role": "user", "content": "Second question?"},
    {"role": "assistant", "content": "Second answer: done!"},
]
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the characters ``[start, end)`` of its answers."""

    text: str
    spans: list[Span]


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: With a chat template.

    Attributes:
        source: The template's own text.
        has_blocks: Whether it marks answers itself.
        lead: What it puts between the generation prompt and an answer's text.
        end_of_turn: What it ends an answer with; empty if with nothing.

    Raises:
        BadRow: It refuses a plain conversation.
        DataError: Answers cannot be found with it.
        jinja2.TemplateSyntaxError: It is no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.source = str(tokenizer.get_chat_template())
        self.has_blocks = bool(_GENERATION_BLOCK.search(self.source))
        self.lead, self.end_of_turn = self._find_answer_form()

    def render(self, messages: list[Message], *, last_turn_only: bool) -> Rendered:
        """Renders a conversation that ends with the assistant.

        Raises:
            BadRow: The template refuses the conversation, or shows an answer otherwise than it was
                generated.
        """
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if last_turn_only and not self.has_blocks:
            answers = answers[-1:]
        text, spans = self._render_spans(messages, answers)
        return Rendered(text, spans[-1:] if last_turn_only else spans)

    def keeps_history(self) -> bool:
        """Whether an earlier answer is shown as it was given, without and with thinking."""
        answer = PROBE[1]["content"]
        for thought in ("", "<think>\nThis comes first.\n</think>\n\n"):
            messages = [dict(message) for message in PROBE]
            for message in messages[1::2]:
                message["content"] = thought + message["content"]
            before, found, _ = self._render_text(messages[:2]).partition(answer)
            given = before + found + self.end_of_turn
            if not found or not self._render_text(messages).startswith(given):
                return False
        return True

    def _render_text(self, messages: list[Message], *, prompt: bool = False) -> str:
        with _refusals():
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt
                )
            )

    def _render_spans(self, messages: list[Message], answers: list[int]) -> tuple[str, list[Span]]:
        if self.has_blocks:
            return self._render_blocks(messages, len(answers))
        text = self._render_text(messages)
        return text, [self._answer_span(messages, turn, text) for turn in answers]

    def _render_blocks(self, messages: list[Message], num_answers: int) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        with _refusals():
            [text], [blocks] = render_jinja_template(
                conversations=[messages],
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        spans = [self._without_newline(text, span) for span in _joined(blocks)]
        if len(spans) != num_answers:
            raise BadRow(
                f"generation blocks do not match: {len(spans)} for {num_answers} assistant turns"
            )
        return text, spans

    def _without_newline(self, text: str, span: Span) -> Span:
        """Cuts what is after the end of turn: the engine stops there."""
        start, end = span
        trimmed = text[start:end].rstrip()
        ends = self.end_of_turn and trimmed.endswith(self.end_of_turn)
        return (start, start + len(trimmed)) if ends else span

    def _answer_span(self, messages: list[Message], turn: int, text: str) -> Span:
        if turn == 0:
            raise BadRow("begins with the assistant: there is no prompt to answer")
        content = messages[turn]["content"]
        if self.end_of_turn and self.end_of_turn in content:
            raise BadRow(f"text holds an end of turn: {self.end_of_turn} in turn {turn + 1}")
        prompt = self._render_text(messages[:turn], prompt=True)
        if text.startswith(prompt):
            for said in (content, content.strip(), content.lstrip(), content.rstrip()):
                answer = said + self.end_of_turn
                if text.startswith(self.lead + answer, len(prompt)):
                    start = len(prompt) + (len(self.lead) if self.lead.strip() else 0)
                    return start, len(prompt) + len(self.lead) + len(answer)
        raise BadRow(
            f"not rendered as generated: the chat template changes turn {turn + 1} or what comes "
            "before it; dataset.last_turn_loss_only: auto helps where only history is changed"
        )

    def _find_answer_form(self) -> tuple[str, str]:
        """Looks at a rendered answer whose text we know."""
        question, answer = PROBE[:2]
        text = self._render_text([question, answer])
        prompt = self._render_text([question], prompt=True)
        lead, found, tail = text.removeprefix(prompt).partition(answer["content"])
        if not found or (not self.has_blocks and not text.startswith(prompt)):
            raise unusable(
                f"the generation prompt {prompt!r} and the answer {answer['content']!r} do not "
                f"follow each other in {text!r}"
            )
        added = [str(token) for token in self._tokenizer.added_tokens_decoder.values()]
        # Gemma's newlines are added tokens, too; of two that begin together the longer counts
        found_ends = [(tail.find(t), -len(t)) for t in added if t.strip() and t in tail]
        if found_ends:
            start, negative_length = min(found_ends)
            return lead, tail[: start - negative_length]
        if tail.strip() and not self.has_blocks:
            raise unusable(f"no end-of-turn token follows the answer, but {tail!r}")
        logger.warning("the chat template ends no answer: the draft will not learn to stop")
        return lead, ""


def unusable(found: str) -> DataError:
    """The error of a template with which answers cannot be found."""
    return DataError(
        f"cannot tell which tokens the assistant said with this chat template: {found}",
        allowed="templates that render the generation prompt, the text and an end of turn in "
        "this order, or mark the text with {% generation %} blocks",
        hint="set dataset.chat_template to a copy with {% generation %} ... {% endgeneration %} "
        "around the assistant's text and end of turn",
    )


def _joined(spans: list[Span]) -> list[Span]:
    """Spans in order, those that touch made one, empty ones left out."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        elif end > start:
            joined.append((start, end))
    return joined


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns what a template does to a conversation it does not like into :class:`BadRow`."""
    try:
        yield
    except jinja2.TemplateSyntaxError:
        raise  # no conversation is at fault
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise BadRow(f"chat template refuses it: {error}") from error
