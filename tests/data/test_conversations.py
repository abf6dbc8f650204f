from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import write_jsonl
from torchspec_hpc.data.conversations import (
    Conversation,
    parse_conversation,
    read_conversations,
)
from torchspec_hpc.data.report import BadRow, Rejection

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
        # what Parquet makes of a column whose rows have different fields
        ({"messages": [t | {"from": None, "tool_calls": None} for t in OPENAI]}, None),
        ({"messages": [*OPENAI[:2], {"role": "assistant", "content": [
            {"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]}, None),
    ],
)  # fmt: skip
def test_every_form_gives_the_same_messages(row: Any, prompt_key: str | None) -> None:
    assert parse_conversation(row, prompt_key) == OPENAI


def turn(**fields: Any) -> dict[str, Any]:
    return {"messages": [*OPENAI[:2], fields]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "not an object: found str"),
        (
            {"prompt": "Hi", "answer": "Hello"},
            (
                "no column of turns: found prompt, answer; expected conversations or messages "
                "(dataset.prompt_key)"
            ),
        ),
        ({}, "no column of turns: found no column; expected"),
        ({"messages": "Hi"}, "turns are no list: messages is str"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": OPENAI[:2]}, "no assistant turn"),
        ({"messages": ["Hi"]}, "turn is no object: turn 1 is str"),
        ({"messages": [{"text": "Hi"}]}, "turn without role: turn 1 has text; expected role and"),
        (turn(role="wizard", content="Hm"), "unknown role: 'wizard' in turn 3; known: system"),
        (turn(role=["user"], content="Hm"), "unknown role: ['user'] in turn 3"),
        (turn(role="assistant", content=" \n"), "empty text: turn 3 (assistant)"),
        (turn(role="assistant"), "empty text: turn 3 (assistant)"),
        (turn(role="assistant", content=3), "content is not text: turn 3 (assistant) is int"),
        (
            turn(role="assistant", content=[{"type": "image_url"}]),
            "content is not text: turn 3 (assistant) has parts ['image_url']",
        ),
        (turn(role="assistant", content="\ud800"), "content is not Unicode: turn 3"),
        (turn(role="assistant", tool_calls=[{}]), "tool_calls is not supported: turn 3"),
        (
            turn(role="assistant", content="4", reasoning_content="2+2"),
            "reasoning_content is not supported: turn 3",
        ),
        ({"messages": OPENAI, "tools": [{}]}, "tools are not supported"),
    ],
)
def test_bad_rows_say_why(row: Any, reason: str) -> None:
    with pytest.raises(BadRow) as error:
        parse_conversation(row, None)
    assert str(error.value).startswith(reason)


def test_an_empty_system_message_stays() -> None:
    """It keeps templates from writing their own."""
    row = {"messages": [{"role": "system", "content": ""}, *OPENAI[1:]]}
    assert parse_conversation(row, None)[0] == {"role": "system", "content": ""}


def test_a_prompt_key_that_is_not_there() -> None:
    with pytest.raises(BadRow, match="found messages; expected dialog "):
        parse_conversation({"messages": OPENAI}, "dialog")


def test_lines_of_good_and_bad_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": OPENAI}, {"messages": []}])
    with path.open("a") as file:
        file.write("{\n")
    good, empty, broken = read_conversations(path, None)
    assert good == Conversation(1, OPENAI)
    assert empty == Rejection(2, "no assistant turn")
    assert (broken.line, broken.kind) == (3, "broken JSON")  # type: ignore[union-attr]
