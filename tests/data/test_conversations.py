from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from torchspec_hpc.data.conversations import Conversation, Text, Tokens, parse_row
from torchspec_hpc.data.messages import ROLES
from torchspec_hpc.data.report import BadRow

SHAREGPT = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
]
OPENAI = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it", "why": None}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def messages_of(row: Any, prompt_key: str | None = None) -> list[dict[str, Any]]:
    parsed = parse_row(row, prompt_key)
    assert isinstance(parsed, Conversation)
    return parsed.messages


@pytest.mark.parametrize(
    ("row", "prompt_key"),
    [
        ({"conversations": SHAREGPT}, None),
        ({"messages": OPENAI}, None),
        ({"messages": SHAREGPT}, None),
        ({"conversations": None, "messages": OPENAI}, None),
        ({"dialog": OPENAI, "messages": []}, "dialog"),
        ({"messages": OPENAI[1:], "system": "Be kind."}, None),
        ({"messages": OPENAI, "system": None, "tools": []}, None),
        ({"messages": [*OPENAI, {"role": "user", "content": "Thanks"}]}, None),
        ({"messages": [t | {"from": None, "tool_calls": None} for t in OPENAI]}, None),
        ({"messages": [*OPENAI[:2], {"role": "assistant", "content": [
            {"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]}, None),
    ],
)  # fmt: skip
def test_every_form_gives_the_same_messages(row: Any, prompt_key: str | None) -> None:
    assert parse_row(row, prompt_key) == Conversation(OPENAI)


@pytest.mark.parametrize(
    "answer",
    [
        *(
            {"role": "assistant", "content": "4", key: "2+2"}
            for key in ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
        ),
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "2+2"},
                {"type": "output_text", "text": "4"},
            ],
        },
        {"from": "gpt", "value": "4", "reasoning": "2+2", "thinking": None},
    ],
)
def test_every_spelling_of_reasoning(answer: dict[str, Any]) -> None:
    found = messages_of({"messages": [*OPENAI[:2], answer]})[-1]
    assert found == {"role": "assistant", "content": "4", "reasoning_content": "2+2"}


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "function_call": CALL["function"]},
        {"role": "assistant", "tool_calls": [
            {"type": "function",
             "function": {"name": "look", "arguments": '{"at": "it", "why": null}'}}]},
        {"from": "function_call",
         "value": '{"name": "look", "arguments": {"at": "it", "why": null}}'},
    ],
)  # fmt: skip
@pytest.mark.parametrize("tools", [[TOOL], [TOOL["function"]], '[{"name": "look"}]'])
def test_tools_and_their_calls(call: dict[str, Any], tools: Any) -> None:
    result = {"from": "observation", "value": "seen"}
    row = {"messages": [*OPENAI[:2], call, result, OPENAI[2]], "tools": tools}
    parsed = parse_row(row, None)
    assert isinstance(parsed, Conversation)
    assert parsed.messages[2:] == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "seen"},
        OPENAI[2],
    ]
    assert [(tool["type"], tool["function"]["name"]) for tool in parsed.tools or ()] == [
        ("function", "look")
    ]


def test_images_and_videos_stay_as_placeholders() -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "data:..."}},
        {"type": "text", "text": "What?"},
        {"type": "video", "video": "a.mp4"},
    ]
    row = {"messages": [{"role": "user", "content": parts}, OPENAI[2]]}
    assert messages_of(row)[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "What?"},
        {"type": "video"},
    ]


def test_text_and_tokens() -> None:
    assert parse_row({"text": "Once upon a time"}, None) == Text("Once upon a time")
    tokens = parse_row({"input_ids": [1, 2, 3], "loss_mask": [0, True, 1]}, None)
    assert isinstance(tokens, Tokens)
    np.testing.assert_array_equal(tokens.input_ids, np.array([1, 2, 3], dtype=np.int32))
    np.testing.assert_array_equal(tokens.loss_mask, [False, True, True])


def turn(**fields: Any) -> dict[str, Any]:
    return {"messages": [*OPENAI[:2], fields]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "not an object: found str"),
        (
            {"prompt": "Hi", "answer": "Hello"},
            (
                "no column of turns: found prompt, answer; expected conversations or messages, "
                "input_ids with loss_mask, or text (dataset.prompt_key)"
            ),
        ),
        ({}, "no column of turns: found no column; expected"),
        ({"messages": "Hi"}, "turns are no list: messages is str"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": OPENAI[:2]}, "no assistant turn"),
        ({"messages": ["Hi"]}, "turn is no object: turn 1 is str"),
        ({"messages": [{"text": "Hi"}]}, "turn without role: turn 1 has text; expected role and"),
        ({"messages": OPENAI[2:]}, "role order: begins with the assistant"),
        ({"messages": [OPENAI[0], OPENAI[2]]}, "role order: begins with the assistant"),
        ({"messages": [*OPENAI, OPENAI[2]]}, "role order: turn 4 is an answer to the answer"),
        (
            {"messages": [*OPENAI[:2], {"role": "tool", "content": "4"}, OPENAI[2]]},
            "role order: turn 3 is a tool's result after user",
        ),
        (turn(role="wizard", content="Hm"), "unknown role: 'wizard' in turn 3; known: system"),
        (turn(role=["user"], content="Hm"), "unknown role: ['user'] in turn 3"),
        (turn(role="assistant", content=" \n"), "empty text: turn 3 (assistant)"),
        (turn(role="assistant"), "empty text: turn 3 (assistant)"),
        (turn(role="assistant", content=3), "content is not text: turn 3 (assistant) is int"),
        (
            turn(role="assistant", content=[{"type": "audio"}]),
            "content is not text: turn 3 (assistant) has a part of type 'audio'",
        ),
        (turn(role="assistant", content="\ud800"), "content is not Unicode: turn 3"),
        (turn(role="assistant", tool_calls=[{}]), "tool call without name: turn 3"),
        (
            turn(role="assistant", tool_calls=[{"name": "f", "arguments": "{"}]),
            "broken JSON in a text: turn 3 (assistant) arguments",
        ),
        (
            turn(role="assistant", tool_calls=[{"name": "f", "arguments": "[1]"}]),
            "tool call's arguments are no object: turn 3",
        ),
        ({"messages": OPENAI, "tools": "{}"}, "tools are no list of objects: found dict"),
        ({"messages": OPENAI, "tools": [{"type": "function"}]}, "tool without name: number 1"),
        ({"messages": OPENAI, "tools": [TOOL, {"function": "f"}]}, "tool without name: number 2"),
        (
            turn(role="assistant", content=[{"type": {}}]),
            "content is not text: turn 3 (assistant) has a part of type {}",
        ),
        ({"text": 3}, "content is not text: text is int"),
        ({"input_ids": [1]}, "tokens are no lists: input_ids is list, loss_mask is NoneType"),
        ({"input_ids": [1], "loss_mask": []}, "tokens and mask differ in length: 1 and 0"),
        ({"input_ids": [-1], "loss_mask": [1]}, "tokens are not ids"),
        ({"input_ids": [2**31], "loss_mask": [1]}, "tokens are not ids"),
        ({"input_ids": [1], "loss_mask": [2]}, "mask is not of 0 and 1: loss_mask has [2]"),
        (
            {"input_ids": [1] * 4, "loss_mask": [0, "x", None, [1]]},
            "mask is not of 0 and 1: loss_mask has ['x', None, [1]]",
        ),
    ],
)
def test_bad_rows_say_why(row: Any, reason: str) -> None:
    with pytest.raises(BadRow) as error:
        parse_row(row, None)
    assert str(error.value).startswith(reason)


def test_an_empty_system_message_stays() -> None:
    """It keeps templates from writing their own."""
    row = {"messages": [{"role": "system", "content": ""}, *OPENAI[1:]]}
    assert messages_of(row)[0] == {"role": "system", "content": ""}


def test_a_prompt_key_that_is_not_there() -> None:
    with pytest.raises(BadRow, match="found messages; expected dialog "):
        parse_row({"messages": OPENAI}, "dialog")


def test_every_role_is_one_that_templates_know() -> None:
    assert set(ROLES.values()) == {"system", "developer", "user", "assistant", "tool"}
