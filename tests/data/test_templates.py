"""Public chat templates: the rendered text and the supervised spans, to the letter."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.templates import byte_tokenizer
from torchspec_hpc.config.dataset_schema import DatasetConfig
from torchspec_hpc.data.conversations import Conversation, parse_row
from torchspec_hpc.data.masks import ChatEncoder
from torchspec_hpc.data.parsers import MARKS, parse_answers
from torchspec_hpc.data.report import BadRow

HERE = Path(__file__).parent
TEMPLATES, GOLDEN = HERE / "chat_templates", HERE / "golden"
BAR, BLOCK = "\uff5c", "\u2581"  # DeepSeek's marks
DEEPSEEK = [
    f"<{BAR}{mark}{BAR}>".replace(" ", BLOCK)
    for mark in (
        "User", "Assistant", "begin of sentence", "end of sentence", "tool calls begin",
        "tool calls end", "tool call begin", "tool call end", "tool sep", "tool outputs begin",
        "tool outputs end", "tool output begin", "tool output end",
    )
]  # fmt: skip
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
KIMI = ["<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"]
KIMI += ["<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"]
KIMI += ["<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|media_pad|>"]
HARMONY = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"]
CHATML = ["<|im_start|>", "<|im_end|>"]

#: The marks of each template, the beginning and end of a text first.
MARKS_OF = {
    "deepseek_r1_distill": [DEEPSEEK[2], DEEPSEEK[3], *DEEPSEEK],
    "deepseekv3": [DEEPSEEK[2], DEEPSEEK[3], *DEEPSEEK],
    "gptoss": ["<|startoftext|>", "<|return|>", *HARMONY],
    "kimi_k2": ["[BOS]", "[EOS]", *KIMI],
    "kimi_k2_5": ["[BOS]", "[EOS]", *KIMI],
    "ling": ["<|startoftext|>", "<|endoftext|>", "<role>", "</role>", "<|role_end|>"],
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", *LLAMA3],
    "llama3_1": ["<|begin_of_text|>", "<|eot_id|>", *LLAMA3, "<|eom_id|>", "<|python_tag|>"],
    "llama4": ["<|begin_of_text|>", "<|eot|>", "<|header_start|>", "<|header_end|>", "<|eom|>"],
    "minimax_m2": ["]~!b[", "[e~[", "]~b]", "<think>", "</think>"],
    "phi3": ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "phi4": ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|im_sep|>"],
    "qwen2_5": ["<|endoftext|>", "<|im_end|>", *CHATML, "<tool_call>", "</tool_call>"],
    "qwen2_5_vl": ["<|endoftext|>", "<|im_end|>", *CHATML, "<|image_pad|>"],
    "qwen3": ["<|endoftext|>", "<|im_end|>", *CHATML, "<think>", "</think>"],
    "qwen3_coder": ["<|endoftext|>", "<|im_end|>", *CHATML],
    "qwen3_instruct_2507": ["<|endoftext|>", "<|im_end|>", *CHATML],
    "qwen3_thinking": ["<|endoftext|>", "<|im_end|>", *CHATML, "<think>", "</think>"],
    "smollm2": ["<|endoftext|>", "<|im_end|>", *CHATML],
}

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {
    "id": "functions.weather:0",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
}
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Grüße?"},
    {"role": "assistant", "content": "Grüße,\n\n  世界!"},
]
LOOP = [
    TURNS[1],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {
        "role": "tool",
        "content": "sunny",
        "name": "weather",
        "tool_call_id": "functions.weather:0",
    },
    {"role": "assistant", "content": "Sunny."},
]


def thinking(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every answer with a thought of its own."""
    return [
        turn | {"reasoning": f"Thought {i}."} if turn["role"] == "assistant" else turn
        for i, turn in enumerate(turns)
    ]


IMAGE = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}]
CASES: dict[str, dict[str, Any]] = {
    "one turn": {"messages": TURNS[1:3]},
    "turns": {"messages": TURNS},
    "thinking": {"messages": thinking(TURNS)},
    "inline thinking": {
        "messages": [TURNS[1], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\n4"}]
    },
    "tools": {"messages": LOOP, "tools": [TOOL]},
    "thinking and tools": {"messages": [*TURNS[1:3], *thinking(LOOP)], "tools": [TOOL]},
    "image": {"messages": [{"role": "user", "content": IMAGE}, TURNS[2]]},
}


def tokenizer_of(name: str) -> Any:
    family = name.removesuffix("_training")
    begin, end, *marks = MARKS_OF[family]
    tokenizer = byte_tokenizer((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    tokenizer.add_special_tokens({"bos_token": begin, "eos_token": end})
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    return tokenizer


def encoder_of(name: str, **dataset: Any) -> ChatEncoder:
    return ChatEncoder(tokenizer_of(name), DatasetConfig(train_data_path="a.jsonl", **dataset))


def conversation(case: str) -> Conversation:
    parsed = parse_row(CASES[case], None)
    assert isinstance(parsed, Conversation)
    return parsed


def supervised(encoder: ChatEncoder, case: str) -> str:
    """The text of a case with its supervised tokens enclosed, or why it is rejected."""
    try:
        rendered = encoder.render(conversation(case))
    except BadRow as error:
        return f"rejected: {error}"
    [(ids, mask)] = encoder.tokenize([rendered])
    edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)).tolist()
    tokenizer: Any = encoder._tokenizer
    bounds = [0, *edges, len(ids)]
    pieces = [tokenizer.decode(ids[a:b].tolist()) for a, b in pairwise(bounds)]
    assert "".join(pieces) == rendered.text
    marks = ["", *["\u27e6", "\u27e7"] * len(edges)]
    text = "".join(mark + piece for mark, piece in zip(marks, pieces, strict=False))
    left_out = f"\n-- earlier answers left out: {rendered.num_changed}" * bool(rendered.num_changed)
    return text + left_out


def golden(name: str) -> str:
    encoder = encoder_of(name)
    cases = [f"== {case}\n{supervised(encoder, case)}\n" for case in CASES]
    return "\n".join([f"{encoder.description}\n", *cases])


@pytest.mark.parametrize("name", MARKS_OF)
def test_text_and_spans(name: str) -> None:
    assert golden(name) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_every_template_has_a_golden_file() -> None:
    templates = {path.stem for path in TEMPLATES.glob("*.jinja")}
    assert {name for name in templates if not name.endswith("_training")} == set(MARKS_OF)
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(MARKS_OF)


@pytest.mark.parametrize("name", ["llama3", "phi3", "qwen2_5", "deepseekv3"])
@pytest.mark.parametrize("case", ["one turn", "turns"])
def test_differences_find_what_generation_blocks_mark(name: str, case: str) -> None:
    """TRL's templates for training say where answers are; by the originals we find the same."""
    assert supervised(encoder_of(name), case) == supervised(encoder_of(f"{name}_training"), case)


@pytest.mark.parametrize(
    ("name", "parser"),
    [
        ("qwen2_5", "chatml"),
        ("smollm2", "chatml"),
        ("llama3_1", "llama3"),
        ("llama4", "llama4"),
        ("phi3", "phi3"),
        ("phi4", "phi4"),
        ("deepseekv3", "deepseek"),
        ("kimi_k2", "kimi"),
        ("ling", "ling"),
    ],
)
def test_named_parsers_find_what_differences_find(name: str, parser: Any) -> None:
    assert set(MARKS) >= {parser}
    plain, parsed = encoder_of(name), encoder_of(name, answer_parser=parser)
    for case in ("one turn", "turns"):
        assert supervised(parsed, case) == supervised(plain, case)


def test_a_parser_of_another_family_is_refused() -> None:
    with pytest.raises(Exception, match="parser llama3 do not match: 0 for 1 assistant turns"):
        encoder_of("qwen2_5", answer_parser="llama3")


def test_harmony_marks() -> None:
    text = encoder_of("gptoss").render(conversation("thinking and tools")).text
    found = [text[start:end] for start, end in parse_answers(text, "harmony")]
    assert found[-1] == "<|channel|>final<|message|>Sunny.<|return|>"


def test_thinking_can_be_turned_off() -> None:
    """The prompt then holds the empty thinking: what is supervised stays the same."""
    off = encoder_of("qwen3", chat_template_kwargs={"enable_thinking": False})
    assert supervised(off, "one turn") == supervised(encoder_of("qwen3"), "one turn")


@pytest.mark.parametrize(
    ("name", "auto"), [("qwen2_5", False), ("qwen3", True), ("gptoss", True), ("minimax_m2", True)]
)
def test_auto(name: str, auto: bool) -> None:
    assert encoder_of(name, last_turn_loss_only="auto").last_turn_only is auto


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for template in MARKS_OF:
        (GOLDEN / f"{template}.txt").write_text(golden(template), encoding="utf-8")
