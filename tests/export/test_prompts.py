"""Prompt files as benchmarks have them, and the samples that ship."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import write_jsonl
from torchspec_hpc.errors import DataError
from torchspec_hpc.export.prompts import Prompt, load_prompts, sample_names


def test_every_form_of_row(tmp_path: Path) -> None:
    had = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"question_id": 81, "turns": ["one", "two", "three"]},
        {"messages": had},
        {"messages": [*had, {"role": "user", "content": "c"}]},
        {"task_id": "HumanEval/0", "prompt": "def f():"},
        {"question": "How many?", "answer": "42"},
        {"problem": "Solve.", "solution": "x"},
    ]
    found = load_prompts(str(write_jsonl(tmp_path / "all.jsonl", rows)))
    assert found.name == "all"
    assert found.prompts[0] == Prompt(({"role": "user", "content": "one"},), ("two", "three"))
    assert found.prompts[1] == Prompt(tuple(had[:1]))
    assert found.prompts[2].messages[-1]["content"] == "c"
    texts = [prompt.messages[0]["content"] for prompt in found.prompts[3:]]
    assert texts == ["def f():", "How many?", "Solve."]
    assert len(load_prompts(str(tmp_path / "all.jsonl"), 2).prompts) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is not JSON"),
        ('{"text": "x"}', r"line 1 has \['text'\]"),
        ("[1]", "line 1 has list"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages"),
        ('{"turns": []}', "turns"),
        ("", "holds no prompt"),
    ],
)
def test_bad_prompts(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        load_prompts(str(tmp_path / "p.jsonl"))


def test_missing_prompt_file() -> None:
    with pytest.raises(DataError, match="one of the samples arithmetic, chat, code, mathematics"):
        load_prompts("nothing")


@pytest.mark.parametrize("name", sample_names())
def test_samples(name: str) -> None:
    found = load_prompts(name)
    assert len(found.prompts) == 10
    assert all(prompt.followups for prompt in found.prompts) == (name == "chat")
