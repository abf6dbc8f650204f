"""Tokens of a conversation, and which of them the assistant said.

A template is tried on a made-up conversation first: the supervised tokens, decoded, must be the
assistant's text and end of turn. A template that fails this is an error, not a guess.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import numpy as np
from numpy.typing import NDArray

from torchspec_hpc.data.chat import PROBE, ChatTemplate, Rendered, unusable
from torchspec_hpc.data.conversations import Message
from torchspec_hpc.data.report import BadRow
from torchspec_hpc.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatEncoder:
    """Turns conversations into tokens and loss masks.

    Args:
        tokenizer: Fast, with a chat template.
        last_turn_only: Supervise only the assistant's last turn. ``auto``: do so if the template
            shows earlier answers otherwise than they were given, as those do that take thinking
            out of history.

    Attributes:
        last_turn_only: What was decided.

    Raises:
        ConfigError: The chat template is not valid Jinja.
        DataError: The assistant's text cannot be told apart with this template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, last_turn_only: bool | Literal["auto"]
    ) -> None:
        self._tokenizer = tokenizer
        try:
            self._template = ChatTemplate(tokenizer)
            keeps_history = self._template.keeps_history()
            self.last_turn_only = not keeps_history if last_turn_only == "auto" else last_turn_only
            self._check_itself(PROBE[:2])
            if self.last_turn_only or keeps_history:  # else such rows are rejected one by one
                self._check_itself(PROBE)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from error
        except BadRow as error:
            raise unusable(f"on a plain conversation: {error}") from error

    @property
    def description(self) -> str:
        """How masks are made, for the report."""
        how = "generation blocks" if self._template.has_blocks else "prompt and answer"
        turns = "last turn only" if self.last_turn_only else "all turns"
        return f"loss mask by {how}, {turns}, end of turn {self._template.end_of_turn!r}"

    def fingerprint(self) -> str:
        """Changes whenever the same messages could give other tokens or another mask."""
        backend: Any = self._tokenizer.backend_tokenizer
        parts = (
            backend.to_str(),
            self._template.source,
            json.dumps(self._tokenizer.special_tokens_map, sort_keys=True, default=str),
            str(self.last_turn_only),
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def render(self, messages: list[Message]) -> Rendered:
        """Renders a conversation that ends with the assistant.

        Raises:
            BadRow: It cannot be masked; says why.
        """
        return self._template.render(messages, last_turn_only=self.last_turn_only)

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
                # the last condition: a header's final space may be trimmed to no width, here
                mask |= (starts >= start) & (ends <= end) & (ends > start)
            result.append((np.asarray(ids, dtype=np.int32), mask))
        return result

    def _check_itself(self, messages: list[Message]) -> None:
        """Decodes what would be supervised of a known conversation."""
        [(ids, mask)] = self.tokenize([self.render(messages)])
        edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
        found = [self._decode(ids[start:end]) for start, end in edges.reshape(-1, 2)]
        wanted = [message["content"] for message in messages[1::2]]
        if self.last_turn_only:
            wanted = wanted[-1:]
        if len(found) != len(wanted) or not all(map(self._says, found, wanted)):
            raise unusable(f"of the answers {wanted} it would supervise {found}")

    def _says(self, found: str, answer: str) -> bool:
        if self._template.has_blocks:  # what else is said, e.g. empty thinking, is up to them
            return answer in found and not any(asked["content"] in found for asked in PROBE[::2])
        # some tokenizers decode the beginning of a text with a space before it
        return found.lstrip() == answer + self._template.end_of_turn

    def _decode(self, ids: NDArray[np.int32]) -> str:
        decoded: Any = self._tokenizer.decode(
            ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(decoded)
