"""Conversations as the model's chat template writes them, and where in the text the answers are.

Three ways to find an answer:

* *generation blocks*: a template that marks what the assistant says with ``{% generation %}`` is
  taken at its word, but for a header before it and white space after the end of turn;
* *render difference*: otherwise turn k is what the conversation up to and with it has after the
  prompt of that turn (turns before k, and the generation prompt), up to the end of turn. Text is
  compared to the letter. What the template puts between prompt and text is not part of it (empty
  thinking, say), unless it is white space, which may be one token with the first word. An earlier
  turn that the whole conversation shows otherwise than it was generated (thinking taken out of
  history) is not supervised, and counted;
* *a named parser*: the family's marks, see :mod:`torchspec_hpc.data.parsers`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchspec_hpc.config.dataset_schema import ParserName
from torchspec_hpc.data.conversations import Conversation
from torchspec_hpc.data.forms import as_wanted, is_plain, pieces_of, refuse_marks, require_shown
from torchspec_hpc.data.messages import Message, texts_of
from torchspec_hpc.data.parsers import parse_answers
from torchspec_hpc.data.probe import PROBE, answer_form
from torchspec_hpc.data.report import BadRow
from torchspec_hpc.data.template import Span, Template, Tools, num_shared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: All of it.
        spans: Characters ``[start, end)`` of each answer to supervise.
        num_changed: Earlier answers that are shown otherwise than they were given.
        plain: Text without a template: the tokenizer adds what begins and ends a text.
    """

    text: str
    spans: list[Span]
    num_changed: int = 0
    plain: bool = False


class ChatTemplate:
    """The chat template of a tokenizer, and where it puts answers.

    Args:
        tokenizer: With a chat template.
        variables: More of what the template knows.
        parser: Find answers by these marks.

    Raises:
        BadRow: It refuses a plain conversation.
        DataError: Answers cannot be found with it.
        jinja2.TemplateSyntaxError: It is no template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        variables: dict[str, Any],
        parser: ParserName | None,
    ) -> None:
        self.template = Template(tokenizer, variables)
        self.parser = parser
        self.has_blocks = self.template.has_blocks and parser is None
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        self.form = answer_form(self.template, added)
        if not self.form.end_of_turn:
            logger.warning("the chat template ends no answer: the draft will not learn to stop")

    @property
    def method(self) -> str:
        """How answers are found."""
        if self.parser:
            return f"parser {self.parser}"
        return "generation blocks" if self.has_blocks else "render difference"

    def render(self, conversation: Conversation, *, last_turn_only: bool) -> Rendered:
        """Renders a conversation that ends with the assistant.

        Raises:
            BadRow: The template refuses the conversation, leaves something out, or shows the last
                answer otherwise than it was generated.
        """
        tools = conversation.tools
        messages = [as_wanted(message, self.form) for message in conversation.messages]
        refuse_marks(messages, self.form.end_of_turn)
        if self.parser or self.has_blocks:
            rendered = self._render_marked(messages, tools, last_turn_only)
        else:
            rendered = self._render_difference(messages, tools, last_turn_only)
        require_shown(messages, tools, rendered.text)
        return rendered

    def keeps_history(self) -> bool:
        """Whether an earlier answer is shown as it was given, without and with thinking."""
        if self.has_blocks or self.parser:
            first = PROBE[1]["content"] + self.form.end_of_turn
            return first in self.template.text(PROBE)
        for thought in ("", "<think>\nThis comes first.\n</think>\n\n"):
            messages = [dict(message) for message in PROBE]
            for message in messages[1::2]:
                message["content"] = thought + message["content"]
            if self.render(Conversation(messages), last_turn_only=False).num_changed:
                return False
        return True

    def _render_marked(
        self, messages: list[Message], tools: Tools, last_turn_only: bool
    ) -> Rendered:
        """By what the template or the family marks."""
        num_answers = sum(message["role"] == "assistant" for message in messages)
        if self.parser:
            text = self.template.text(messages, tools)
            spans, enough = parse_answers(text, self.parser), int.__ge__
        else:
            text, blocks = self.template.text_and_blocks(messages, tools)
            spans, enough = [self._trimmed(text, span) for span in _joined(blocks)], int.__eq__
        if not enough(len(spans), num_answers):
            raise BadRow(
                f"{self.method} do not match: {len(spans)} for {num_answers} assistant turns"
            )
        if last_turn_only:
            before = len(self.template.text(messages[:-1], tools).rstrip())
            spans = [span for span in spans if span[0] >= before] or spans[-1:]
        return Rendered(text, spans)

    def _trimmed(self, text: str, span: Span) -> Span:
        """A block without its header, up to the end of turn: the engine stops there."""
        start, end = span
        header = self.form.header
        for inside in range(len(header), 0, -1):  # all of the header, or its end
            if text.startswith(header, start - len(header) + inside):
                start += inside
                break
        end_of_turn = self.form.end_of_turn
        if text.startswith(end_of_turn, end):  # many templates leave it out of the block
            end += len(end_of_turn)
        found = text.rfind(end_of_turn, start, end) if end_of_turn else -1
        return (start, found + len(end_of_turn)) if found >= 0 else (start, end)

    def _render_difference(
        self, messages: list[Message], tools: Tools, last_turn_only: bool
    ) -> Rendered:
        text, last = self._render_last(messages, tools)
        if last is None:
            raise BadRow(
                f"not rendered as generated: the chat template changes turn {len(messages)} or "
                "what comes before it"
            )
        if last_turn_only:
            return Rendered(text, [last])
        turns = [i for i, m in enumerate(messages[:-1]) if m["role"] == "assistant"]
        found = [self._earlier(messages, turn, text, tools) for turn in turns]
        spans = [span for span in found if span is not None]
        return Rendered(text, [*spans, last], found.count(None))

    def _render_last(self, messages: list[Message], tools: Tools) -> tuple[str, Span | None]:
        """The conversation with its last answer as it was generated, and that answer."""
        text = self.template.text(messages, tools)
        prompt = self.template.text(messages[:-1], tools, prompt=True)
        if messages[-1].get("reasoning_content") and not self.form.shows_reasoning:
            text = prompt + self._written(messages[-1], prompt)
            return text, (len(prompt), len(text))
        if not text.startswith(prompt):
            text = self._after_its_prompt(messages, tools, text, prompt)
        return text, self._answer(messages, len(messages) - 1, text, prompt)

    def _written(self, answer: Message, prompt: str) -> str:
        """An answer of a model that thinks, by a template that writes no thinking at all.

        DeepSeek R1 and Kimi K2 Thinking generate ``thought</think>answer``; their templates only
        ever write history, without the thought.
        """
        opening, closing = self.form.thought_marks or ("", "")
        prompted = bool(self.form.hidden)
        if "tool_calls" in answer or (prompted and not prompt.endswith(self.form.hidden)):
            raise BadRow("chat template shows no reasoning: the row has it with a tool's call")
        said = "".join(texts_of(answer["content"])).strip()
        thought = answer["reasoning_content"].strip()
        return f"{opening}{thought}{closing}{said}{self.form.end_of_turn}"

    def _after_its_prompt(
        self, messages: list[Message], tools: Tools, text: str, prompt: str
    ) -> str:
        """The last answer after what the model was prompted with for it.

        Once there is an answer, templates take the thinking that led to its tool calls out of
        history (gpt-oss); when it was generated, that was there.
        """
        earlier = self.template.text(messages[:-2], tools) if len(messages) > 2 else ""
        asked = prompt[num_shared(prompt, earlier) :]
        found = text.rfind(asked)
        return prompt + text[found + len(asked) :] if asked and found >= 0 else text

    def _earlier(self, messages: list[Message], turn: int, text: str, tools: Tools) -> Span | None:
        """An answer before the last one, if the whole conversation has it as it was generated."""
        # where text alone has to be found, there is no need to know where the answer would end
        shown = (
            text if is_plain(messages[turn]) else self.template.text(messages[: turn + 1], tools)
        )
        prompt = self.template.text(messages[:turn], tools, prompt=True)
        span = self._answer(messages, turn, shown, prompt)
        return span if span and text.startswith(shown[: span[1]]) else None

    def _answer(self, messages: list[Message], turn: int, shown: str, prompt: str) -> Span | None:
        """Characters of an answer.

        Args:
            messages: Of the conversation.
            turn: Index of the answer.
            shown: The conversation up to and with it.
            prompt: What the model was prompted with for it.

        Returns:
            None if it is not there as it was given.
        """
        answer, form = messages[turn], self.form
        start = self._start(prompt, shown)
        if start is None:
            return None
        content_start = start + (len(form.lead) if form.lead.strip() else 0)
        if is_plain(answer):
            content = answer["content"]
            for said in (content, content.strip(), content.lstrip(), content.rstrip()):
                whole = form.lead + said + form.end_of_turn
                if shown.startswith(whole, start):
                    return content_start, start + len(whole)
            return None
        if "reasoning_content" not in answer and shown.startswith(form.lead, start):
            start = content_start
        end = self._end(shown, start)
        said = shown[start:end]
        return (start, end) if end and all(p.strip() in said for p in pieces_of(answer)) else None

    def _start(self, prompt: str, shown: str) -> int | None:
        """Where the prompt of a turn ends in what is shown."""
        if not shown.startswith(prompt) and self.form.hidden:
            prompt = prompt.removesuffix(self.form.hidden)
        return len(prompt) if shown.startswith(prompt) else None

    def _end(self, shown: str, start: int) -> int | None:
        """Where the engine stops: at the end of turn, or at the token that ends a tool call."""
        end_of_turn = self.form.end_of_turn
        if end_of_turn and (found := shown.rfind(end_of_turn, start)) >= 0:
            return found + len(end_of_turn)
        trimmed = shown.rstrip()
        return len(trimmed) if trimmed.endswith(self.form.specials) else None


def _joined(spans: list[Span]) -> list[Span]:
    """Spans in order, those that touch made one, empty ones left out."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        elif end > start:
            joined.append((start, end))
    return joined
