"""Prompts in, figures out: everything of the evaluation but the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import write_jsonl
from torchspec_hpc.errors import DataError, UserError
from torchspec_hpc.export.evaluate import Measurement, ServeSettings, measure, read_prompts


def test_prompts_in_both_forms(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x"}, {"messages": turns}])
    assert read_prompts(path) == [[{"role": "user", "content": "x"}], turns[:1]]
    assert len(read_prompts(path, 1)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is not JSON"),
        ('{"text": "x"}', r"line 1 has \['text'\]"),
        ("[1]", "line 1 has list"),
        ('{"messages": []}', "messages"),
        ("", "holds no prompt"),
    ],
)
def test_bad_prompts(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_missing_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prompt file"):
        read_prompts(tmp_path / "nothing.jsonl")


def test_draft_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no exported draft"):
        measure(ServeSettings("t"), [], name="d", draft=tmp_path, log=tmp_path / "log")


def test_same_outputs_and_speed() -> None:
    def measured(outputs: tuple[tuple[int, ...], ...]) -> Measurement:
        return Measurement("x", 2, 5, 2.0, 3, 1.5, (0.5,), outputs)

    one, two = measured(((1, 2), (3, 4, 5))), measured(((1, 2), (3, 4, 6)))
    assert one.same_outputs(one) == 1.0
    assert one.same_outputs(two) == 0.5
    assert one.tokens_per_s == 2.5
    assert "outputs" not in one.summary()
