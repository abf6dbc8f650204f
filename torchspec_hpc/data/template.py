"""A chat template as a function from messages to text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import jinja2

from torchspec_hpc.data.messages import Message
from torchspec_hpc.data.report import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
Tools = list[dict[str, Any]] | None

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: What templates take for today (Llama 3.1, gpt-oss): prepared data must not depend on the day.
TODAY = datetime(2026, 1, 1, tzinfo=timezone.utc)


class Template:
    """The chat template of a tokenizer.

    Args:
        tokenizer: With a chat template.
        variables: More of what the template knows, such as ``enable_thinking``.

    Attributes:
        source: The template's own text.
        variables: What it is rendered with beside messages and tools.
        has_blocks: Whether it marks answers with ``{% generation %}``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> None:
        self.source = str(tokenizer.get_chat_template())
        self.variables = {**tokenizer.special_tokens_map, **variables}
        self.has_blocks = bool(_GENERATION_BLOCK.search(self.source))

    def text(self, messages: list[Message], tools: Tools = None, *, prompt: bool = False) -> str:
        """Renders messages; `prompt` adds the generation prompt.

        Raises:
            BadRow: The template refuses them.
            jinja2.TemplateSyntaxError: It is no template.
        """
        return self._render(messages, tools, add_generation_prompt=prompt)[0]

    def text_and_blocks(self, messages: list[Message], tools: Tools) -> tuple[str, list[Span]]:
        """Renders messages; also the characters of each generation block.

        Raises:
            BadRow: The template refuses them.
        """
        return self._render(messages, tools, return_assistant_tokens_mask=True)

    def _render(
        self, messages: list[Message], tools: Tools, **options: bool
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        with refusals():
            [text], blocks = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.source,
                strftime_now=TODAY.strftime,
                **options,
                **self.variables,
            )
        return text, blocks[0] if blocks else []


def num_shared(a: str, b: str) -> int:
    """Characters that two texts have in common at their beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@contextmanager
def refusals() -> Iterator[None]:
    """Turns what a template does to a conversation it does not like into :class:`BadRow`."""
    try:
        yield
    except jinja2.TemplateSyntaxError:
        raise  # no conversation is at fault
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise BadRow(f"chat template refuses it: {error}") from error
