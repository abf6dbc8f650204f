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
from collections.abc import Iterator
from contextlib import contextmanager
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
            self.last_turn_only = (
                not self._keeps_history() if last_turn_only == "auto" else last_turn_only
            )
            self._check_itself(_PROBE[:2])
            if self.last_turn_only or self._has_blocks or self._keeps_history():
                self._check_itself(_PROBE)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from error
        except BadRow as error:
            raise _unusable(f"on a plain conversation: {error}") from error
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
        if self._has_blocks:
            return self._render_blocks(messages)
        text = self._render_text(messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.last_turn_only:
            answers = answers[-1:]
        return Rendered(text, [self._answer_span(messages, turn, text) for turn in answers])

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
                # the last condition: tokenizers may trim a header's final newline to no width
                mask |= (starts >= start) & (ends <= end) & (ends > start)
            result.append((np.asarray(ids, dtype=np.int32), mask))
        return result

    def _render_text(self, messages: list[Message], *, prompt: bool = False) -> str:
        with _refusals():
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt
                )
            )

    def _render_blocks(self, messages: list[Message]) -> Rendered:
        from transformers.utils.chat_template_utils import render_jinja_template

        with _refusals():
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
            raise _unusable(
                f"the generation prompt {prompt!r} and the answer {answer['content']!r} do not "
                f"follow each other in {text!r}"
            )
        specials = [str(token) for token in self._tokenizer.added_tokens_decoder.values()]
        ends = [after.find(token) + len(token) for token in specials if token in after]
        if not ends and not self._has_blocks:
            raise _unusable(f"no end-of-turn token follows the answer, but {after!r}")
        return _AnswerForm(before, after[: min(ends)] if ends else "")

    def _keeps_history(self) -> bool:
        """Whether an earlier answer is shown as it was given, without and with thinking."""
        answer = _PROBE[1]["content"]
        for thought in ("", "<think>\nThis comes first.\n</think>\n\n"):
            messages = [dict(message) for message in _PROBE]
            for message in messages[1::2]:
                message["content"] = thought + message["content"]
            before, found, _ = self._render_text(messages[:2]).partition(answer)
            given = before + found + self._form.end_of_turn
            if not found or not self._render_text(messages).startswith(given):
                return False
        return True

    def _check_itself(self, messages: list[Message]) -> None:
        """Decodes what would be supervised of a known conversation."""
        [(ids, mask)] = self.tokenize([self.render(messages)])
        edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
        found = [self._decode(ids[start:end]) for start, end in edges.reshape(-1, 2)]
        wanted = [message["content"] for message in messages[1::2]]
        if self.last_turn_only:
            wanted = wanted[-1:]
        if not self._says(found, wanted):
            raise _unusable(f"of the answers {wanted} it would supervise {found}")

    def _says(self, found: list[str], wanted: list[str]) -> bool:
        if len(found) != len(wanted):
            return False
        end_of_turn = self._form.end_of_turn
        if self._has_blocks:  # whether the end of turn is inside, and a newline, is up to them
            said = [text.removeprefix(self._form.lead).strip() for text in found]
            return all(a in (b, b + end_of_turn) for a, b in zip(said, wanted, strict=True))
        # some tokenizers decode the beginning of a text with a space before it
        return [text.lstrip() for text in found] == [text + end_of_turn for text in wanted]

    def _decode(self, ids: NDArray[np.int32]) -> str:
        decoded: Any = self._tokenizer.decode(
            ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(decoded)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns what a template does to a conversation it does not like into :class:`BadRow`."""
    try:
        yield
    except jinja2.TemplateSyntaxError:
        raise  # no conversation is at fault
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise BadRow(f"chat template refuses it: {error}") from error


def _unusable(found: str) -> DataError:
    return DataError(
        f"cannot tell which tokens the assistant said with this chat template: {found}",
        allowed="templates that render the generation prompt, the text and an end of turn in "
        "this order, or mark the text with {% generation %} blocks",
        hint="set dataset.chat_template to a copy with {% generation %} ... {% endgeneration %} "
        "around the assistant's text and end of turn",
    )
