"""Tokens of a conversation, and which of them the assistant said.

A template is tried on a made-up conversation first: the supervised tokens, decoded, must be the
assistant's text and end of turn. A template that fails this is an error, not a guess.
"""

from __future__ import annotations

import hashlib
import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from torchspec_hpc.config.dataset_schema import DatasetConfig
from torchspec_hpc.data.chat import ChatTemplate, Rendered
from torchspec_hpc.data.conversations import Conversation, Text
from torchspec_hpc.data.messages import Message
from torchspec_hpc.data.probe import PROBE, unusable
from torchspec_hpc.data.report import BadRow
from torchspec_hpc.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatEncoder:
    """Turns conversations into tokens and loss masks.

    Args:
        tokenizer: Fast, with a chat template.
        dataset: How answers are found, and which count. ``last_turn_loss_only: auto`` means the
            last one if the template shows earlier answers otherwise than they were given, as those
            do that take thinking out of history.

    Attributes:
        last_turn_only: What was decided.

    Raises:
        ConfigError: The chat template is not valid Jinja.
        DataError: The assistant's text cannot be told apart with this template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dataset: DatasetConfig) -> None:
        self._tokenizer = tokenizer
        wanted = dataset.last_turn_loss_only
        try:
            self._chat = ChatTemplate(
                tokenizer, dataset.chat_template_kwargs, dataset.answer_parser
            )
            keeps_history = self._chat.keeps_history()
            self.last_turn_only = not keeps_history if wanted == "auto" else wanted
            self._check_itself(PROBE[:2])
            if self.last_turn_only or keeps_history:  # else earlier answers are left out
                self._check_itself(PROBE)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from error
        except BadRow as error:
            raise unusable(f"on a plain conversation: {error}") from error

    @property
    def description(self) -> str:
        """How masks are made, for the report."""
        turns = "last turn only" if self.last_turn_only else "all turns"
        end = self._chat.form.end_of_turn
        return f"loss mask by {self._chat.method}, {turns}, end of turn {end!r}"

    def fingerprint(self) -> str:
        """Changes whenever the same messages could give other tokens or another mask."""
        backend: Any = self._tokenizer.backend_tokenizer
        template = self._chat.template
        parts = (
            backend.to_str(),
            template.source,
            json.dumps(template.variables, sort_keys=True, default=str),
            self._chat.method,
            str(self.last_turn_only),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def render(self, row: Conversation | Text) -> Rendered:
        """Text of a row, and where its answers are; all of a text without turns is one.

        Raises:
            BadRow: It cannot be masked; says why.
        """
        if isinstance(row, Text):
            return Rendered(row.text, [(0, len(row.text))], plain=True)
        return self._chat.render(row, last_turn_only=self.last_turn_only)

    def tokenize(self, batch: list[Rendered]) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """Tokens and loss mask of each conversation, int32 and bool ``[T]``.

        The text is tokenized whole, so the tokens are those of a served conversation; a token is
        supervised if all its characters are.
        """
        result: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = []
        for plain, group in groupby(batch, key=lambda rendered: rendered.plain):
            rows = list(group)
            encoded = self._tokenizer(
                [rendered.text for rendered in rows],
                add_special_tokens=plain,  # a chat template has written them
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # it warns about lengths that we truncate later
            )
            result += (
                _masked(*row)
                for row in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True)
            )
        return result

    def _check_itself(self, messages: list[Message]) -> None:
        """Decodes what would be supervised of a known conversation."""
        [(ids, mask)] = self.tokenize([self.render(Conversation(messages))])
        edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
        found = [self._decode(ids[start:end]) for start, end in edges.reshape(-1, 2)]
        wanted = [message["content"] for message in messages[1::2]]
        if self.last_turn_only:
            wanted = wanted[-1:]
        if len(found) != len(wanted) or not all(map(self._says, found, wanted)):
            raise unusable(f"of the answers {wanted} it would supervise {found}")

    def _says(self, found: str, answer: str) -> bool:
        end_of_turn = self._chat.form.end_of_turn
        if self._chat.method != "render difference":  # what else is said is up to the marks
            asked = any(question["content"] in found for question in PROBE[::2])
            return answer in found and found.endswith(end_of_turn) and not asked
        # some tokenizers decode the beginning of a text with a space before it
        return found.lstrip() == answer + end_of_turn

    def _decode(self, ids: NDArray[np.int32]) -> str:
        decoded: Any = self._tokenizer.decode(
            ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(decoded)


def _masked(
    rendered: Rendered, ids: list[int], offsets: list[tuple[int, int]]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(ids), dtype=np.bool_)
    for start, end in rendered.spans:
        # the last condition: a header's final space may be trimmed to no width, here
        mask |= (starts >= start) & (ends <= end) & (ends > start)
    return np.asarray(ids, dtype=np.int32), mask
