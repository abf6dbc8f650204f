"""Answers found by the marks of a model family: for templates that show no other way.

Marks say where an assistant's turn begins and ends, not whether the template shows it as it was
generated; that is why a parser is only used where ``dataset.answer_parser`` names one.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torchspec_hpc.config.dataset_schema import ParserName
from torchspec_hpc.data.template import Span


class Marks(NamedTuple):
    """What the template writes before an answer, and what the engine stops at."""

    header: str
    ends: tuple[str, ...]


MARKS: dict[ParserName, Marks] = {
    "chatml": Marks("<|im_start|>assistant\n", ("<|im_end|>",)),
    "llama3": Marks(
        "<|start_header_id|>assistant<|end_header_id|>\n\n", ("<|eot_id|>", "<|eom_id|>")
    ),
    "llama4": Marks("<|header_start|>assistant<|header_end|>\n\n", ("<|eot|>", "<|eom|>")),
    "phi3": Marks("<|assistant|>\n", ("<|end|>",)),
    "phi4": Marks("<|im_start|>assistant<|im_sep|>", ("<|im_end|>",)),
    "harmony": Marks("<|start|>assistant", ("<|end|>", "<|return|>", "<|call|>")),
    # DeepSeek writes its marks with full-width bars and lower one eighth blocks
    "deepseek": Marks("<\uff5cAssistant\uff5c>", ("<\uff5cend\u2581of\u2581sentence\uff5c>",)),
    "kimi": Marks("<|im_assistant|>assistant<|im_middle|>", ("<|im_end|>",)),
    "ling": Marks("<role>ASSISTANT</role>", ("<|role_end|>",)),
    "minimax": Marks("]~b]ai\n", ("[e~[",)),
}


def parse_answers(text: str, name: ParserName) -> list[Span]:
    """Characters of each answer in a rendered conversation, the end of turn included."""
    marks = MARKS[name]
    ends = "|".join(map(re.escape, marks.ends))
    pattern = re.compile(f"(?<={re.escape(marks.header)}).*?(?:{ends})", re.DOTALL)
    return [match.span() for match in pattern.finditer(text)]
