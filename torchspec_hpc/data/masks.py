"""Which tokens of a conversation the assistant said, by the model's own chat template.

Two ways to find the assistant's text in the rendered conversation:

* *generation blocks*: a template that marks its assistant text with ``{% generation %}`` is taken
  at its word;
* *prompt and answer*: otherwise, turn k is supervised exactly if the conversation begins with what
  the model is prompted with for that turn (turns before k, and the generation prompt), followed by
  the turn's text and the end-of-turn token. What the template puts between prompt and text, and
  after the end of turn, is not supervised.

Both are tried on made-up conversations first: the supervised tokens, decoded, must be the
assistant's text and end of turn. A template that fails this is an error, not a guess.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import numpy as np
from numpy.typing import NDArray

from torchspec_hpc.data.conversations import Message
from torchspec_hpc.data.report import BadRow
from torchspec_hpc.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Span = tuple[int, int]
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = [
    {"role": "user", "content": "First question, with 12 words?"},
    {"role": "assistant", "content": "First answer.\n\n    It has\ttwo  paragraphs, 3 numbers."},
    {"role": "user", "content": "Second question?"},
    {"role": "assistant", "content": "Second answer: done!"},
]
_THOUGHTS = ("weighing the first", "weighing the second")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the characters ``[start, end)`` that the assistant said."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class _AnswerForm:
    """What surrounds the assistant's text in a rendered turn."""

    lead: str
    end_of_turn: str


class ChatEncoder:
    """Turns conversations into tokens and loss masks.

    Args:
        tokenizer: Fast, with a chat template.
        last_turn_only: Supervise only the assistant's last turn. ``auto``: do so if the template
            shows earlier answers otherwise than they were given (thinking taken out, mostly).

    Attributes:
        last_turn_only: What was decided.
        description: How masks are made, for the report.

    Raises:
        ConfigError: The chat template is not valid Jinja.
        DataError: The assistant's text cannot be told apart with this template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, last_turn_only: bool | Literal["auto"]
    ) -> None:
        self._tokenizer = tokenizer
        self._template = str(tokenizer.get_chat_template())
        self._has_blocks = bool(_GENERATION_BLOCK.search(self._template))
        try:
            self._form = self._find_answer_form()
            keeps_history = self._keeps_history()
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from error
        except (jinja2.TemplateError, BadRow) as error:
            raise self._unusable(
                f"it fails on a plain conversation of two turns: {error}"
            ) from error
        self.last_turn_only = not keeps_history if last_turn_only == "auto" else last_turn_only
        self._check_itself()
        self.description = (
            f"loss mask by {'generation blocks' if self._has_blocks else 'prompt and answer'}, "
            f"{'last turn only' if self.last_turn_only else 'all turns'}, "
            f"end of turn {self._form.end_of_turn!r}"
        )

    def fingerprint(self) -> str:
        """Changes whenever the same messages could give other tokens or another mask."""
        backend: Any = self._tokenizer.backend_tokenizer
        parts = (
            backend.to_str(),
            self._template,
            json.dumps(self._tokenizer.special_tokens_map, sort_keys=True, default=str),
            str(self.last_turn_only),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def render(self, messages: list[Message]) -> Rendered:
        """Renders a conversation that ends with the assistant.

        Raises:
            BadRow: The template refuses the conversation, or shows a turn otherwise than it was
                generated.
        """
        try:
            if self._has_blocks:
                return self._render_blocks(messages)
            return self._render_answers(messages)
        except jinja2.TemplateSyntaxError:
            raise
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            if isinstance(error, BadRow):
                raise
            raise BadRow(f"chat template refuses it: {error}") from error

    def tokenize(self, batch: list[Rendered]) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """Tokens and loss mask of each conversation, int32 and bool ``[T]``.

        The text is tokenized whole, so the tokens are those of a served conversation; a token is
        supervised if all its characters are.
        """
        encoded = self._tokenizer(
            [rendered.text for rendered in batch],
            add_special_tokens=False,  # the template has written them
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # it warns about lengths that we truncate later
        )
        result = []
        for rendered, ids, offsets in zip(
            batch, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
            mask = np.zeros(len(ids), dtype=np.bool_)
            for start, end in rendered.spans:
                mask |= (starts >= start) & (ends <= end)
            result.append((np.asarray(ids, dtype=np.int32), mask))
        return result

    def _render_text(self, messages: list[Message], *, prompt: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
        )

    def _render_blocks(self, messages: list[Message]) -> Rendered:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        said = [(start, end) for start, end in spans[0] if end > start]
        num_answers = sum(message["role"] == "assistant" for message in messages)
        if len(said) != num_answers:
            raise BadRow(
                f"generation blocks do not match: {len(said)} for {num_answers} assistant turns"
            )
        return Rendered(texts[0], said[-1:] if self.last_turn_only else said)

    def _render_answers(self, messages: list[Message]) -> Rendered:
        text = self._render_text(messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.last_turn_only:
            answers = answers[-1:]
        return Rendered(text, [self._answer_span(messages, turn, text) for turn in answers])

    def _answer_span(self, messages: list[Message], turn: int, text: str) -> Span:
        if turn == 0:
            raise BadRow("begins with the assistant: there is no prompt to answer")
        prompt = self._render_text(messages[:turn], prompt=True)
        content = messages[turn]["content"]
        if self._form.end_of_turn in content:
            raise BadRow(f"text holds an end of turn: {self._form.end_of_turn} in turn {turn + 1}")
        if text.startswith(prompt):
            for said in (content, content.strip(), content.lstrip(), content.rstrip()):
                start = len(prompt) + len(self._form.lead)
                supervised = said + self._form.end_of_turn
                if text.startswith(self._form.lead + supervised, len(prompt)):
                    return start, start + len(supervised)
        raise BadRow(
            f"not rendered as generated: the chat template changes turn {turn + 1} or what comes "
            "before it; dataset.last_turn_loss_only: auto helps where only history is changed"
        )

    def _find_answer_form(self) -> _AnswerForm:
        """Looks at a rendered turn whose text we know."""
        question, answer = _PROBE[:2]
        text = self._render_text([question, answer])
        prompt = self._render_text([question], prompt=True)
        before, found, after = text.removeprefix(prompt).partition(answer["content"])
        if not found or (not self._has_blocks and not text.startswith(prompt)):
            raise self._unusable(
                f"the generation prompt {prompt!r} and the answer {answer['content']!r} do not "
                f"follow each other in {text!r}"
            )
        specials = [str(token) for token in self._tokenizer.added_tokens_decoder.values()]
        ends = [after.find(token) + len(token) for token in specials if token in after]
        if not ends and not self._has_blocks:
            raise self._unusable(f"no end-of-turn token follows the answer, but {after!r}")
        return _AnswerForm(before, after[: min(ends)] if ends else "")

    def _keeps_history(self) -> bool:
        """Whether earlier answers are shown as they were given, plain and with thinking."""
        self.last_turn_only = False
        if not self._has_blocks:
            try:
                self._render_answers(_PROBE)
            except BadRow:
                return False
        thinking = [dict(message) for message in _PROBE]
        for message, thought in zip(thinking[1::2], _THOUGHTS, strict=True):
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
        text = self._render_text(thinking)
        return not (_THOUGHTS[0] not in text and _THOUGHTS[1] in text)

    def _check_itself(self) -> None:
        """Decodes what would be supervised of known conversations."""
        for num_turns in (2,) if self.last_turn_only else (2, 4):
            messages = _PROBE[:num_turns]
            try:
                rendered = self.render(messages)
            except BadRow as error:
                if num_turns == 4 and not self._has_blocks:
                    continue  # history is changed: such rows are rejected one by one
                raise self._unusable(str(error)) from error
            [(ids, mask)] = self.tokenize([rendered])
            edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
            found = [self._decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]
            wanted = [message["content"] for message in messages[1::2]]
            if not self._says(found, wanted):
                raise self._unusable(f"of answers {wanted} it would supervise {found}")

    def _says(self, found: list[str], wanted: list[str]) -> bool:
        if len(found) != len(wanted):
            return False
        for text, answer in zip(found, wanted, strict=True):
            if self._has_blocks:  # their author decides whether the end of turn is inside
                allowed = {answer, answer + self._form.end_of_turn}
                text = text.removeprefix(self._form.lead)
            else:
                allowed = {answer + self._form.end_of_turn}
            if text.strip() not in allowed:
                return False
        return True

    def _decode(self, ids: NDArray[np.int32]) -> str:
        decoded: Any = self._tokenizer.decode(
            ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(decoded)

    def _unusable(self, found: str) -> DataError:
        return DataError(
            f"cannot tell which tokens the assistant said with this chat template: {found}",
            allowed="templates that render the generation prompt, the text and an end of turn in "
            "this order, or mark the text with {% generation %} blocks",
            hint="set dataset.chat_template to a copy with {% generation %} ... {% endgeneration %}"
            " around the assistant's text and end of turn",
        )
