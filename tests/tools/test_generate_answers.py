import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import generate_answers as tool
import pytest


class FakeEngine:
    """Answers every request after one step; the answer depends on the last message alone."""

    def __init__(self, answers: dict[str, tuple[str, list[int], str]]) -> None:
        self.model_config = SimpleNamespace(max_model_len=1000)
        self.answers, self.requests, self.max_active = answers, {}, 0
        self.aborted: list[str] = []

    def add_request(self, request_id: str, prompt: dict[str, list[str]], _params: Any) -> None:
        self.requests[request_id] = prompt["prompt_token_ids"][-1]

    def step(self) -> list[SimpleNamespace]:
        self.max_active = max(self.max_active, len(self.requests))
        finished = []
        for request_id, last in self.requests.items():
            text, ids, reason = self.answers.get(last, (f"re: {last}", [1, 2, 3], "stop"))
            answer = SimpleNamespace(text=text, token_ids=ids, finish_reason=reason)
            finished.append(
                SimpleNamespace(
                    request_id=request_id, outputs=[answer], finished=reason != "unfinished"
                )
            )
        self.requests = {}
        return finished

    def abort_request(self, request_ids: list[str]) -> None:
        self.aborted += request_ids


class FakeTokenizer:
    """One token per message, so that the engine sees what it is asked."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[str]:
        return [message["content"] for message in messages]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEngine]:
    fake = FakeEngine({})
    monkeypatch.setattr(tool, "build_engine", lambda _: (fake, FakeTokenizer()))
    sampling = SimpleNamespace(RequestOutputKind=SimpleNamespace(CUMULATIVE=1))
    vllm = SimpleNamespace(SamplingParams=SimpleNamespace, sampling_params=sampling)
    monkeypatch.setitem(__import__("sys").modules, "vllm", vllm)
    monkeypatch.setitem(__import__("sys").modules, "vllm.sampling_params", sampling)
    return fake


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> dict[str, Any]:
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def prompt(key: str, *turns: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": turn} for turn in turns]
    return {"id": key, "source": "test", "messages": messages}


def run(tmp_path: Path, *more: str) -> int:
    paths = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    return tool.main(["--model", "target", *paths, *more])


def test_regenerates_every_assistant_turn(tmp_path: Path, engine: FakeEngine) -> None:
    turns = [("system", "be kind"), ("human", "one"), ("gpt", "OLD"), ("human", "two")]
    conversation = [{"from": role, "value": text} for role, text in turns]
    write(tmp_path / "in.jsonl", {"id": "a", "conversations": conversation}, prompt("b", "three"))
    assert run(tmp_path, "--concurrency", "1") == 0
    rows = read(tmp_path / "out.jsonl")
    assert rows["a"]["source"] == "in"
    assert rows["a"]["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "re: one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "re: two"},
    ]
    assert "finish_reason" not in rows["a"]
    assert rows["b"]["messages"][-1]["content"] == "re: three"
    assert engine.max_active == 1


def test_cut_looping_and_empty_answers_are_marked_and_counted(
    tmp_path: Path, engine: FakeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.answers = {
        "cut": ("half an ans", [1, 2], "length"),
        "loop": ("round and round", [5, 6] * 100, "length"),
        "empty": ("  ", [2], "stop"),
        "long": ("fine", [1], "stop"),
    }
    write(
        tmp_path / "in.jsonl",
        prompt("cut", "cut", "never asked"),
        prompt("loop", "loop"),
        prompt("late-loop", "good", "loop"),
        prompt("empty", "empty"),
    )
    assert run(tmp_path) == 0
    rows = read(tmp_path / "out.jsonl")
    assert set(rows) == {"cut", "late-loop"}
    assert rows["cut"]["finish_reason"] == "length"
    assert [m["content"] for m in rows["cut"]["messages"]] == ["cut", "half an ans"]
    assert rows["late-loop"]["finish_reason"] == "loop"
    assert [m["content"] for m in rows["late-loop"]["messages"]] == ["good", "re: good"]
    skipped = read(tmp_path / "out.jsonl.skipped.jsonl")
    assert {key: row["finish_reason"] for key, row in skipped.items()} == {
        "loop": "loop",
        "empty": "empty",
    }
    assert skipped["loop"]["messages"] == [{"role": "user", "content": "loop"}]
    assert "written:length       1" in capsys.readouterr().out


def test_loop_is_stopped_while_it_runs(tmp_path: Path, engine: FakeEngine) -> None:
    engine.answers = {"one": ("round and round", [5, 6] * 32, "unfinished")}
    write(tmp_path / "in.jsonl", prompt("a", "one"))
    assert run(tmp_path) == 0
    assert engine.aborted == ["a#0"]
    assert read(tmp_path / "out.jsonl.skipped.jsonl")["a"]["finish_reason"] == "loop"


def test_prompt_without_room_is_skipped_with_its_reason(tmp_path: Path, engine: FakeEngine) -> None:
    engine.model_config.max_model_len = 10
    write(tmp_path / "in.jsonl", prompt("a", "one"))
    assert run(tmp_path, "--max-tokens", "10") == 0
    assert read(tmp_path / "out.jsonl.skipped.jsonl")["a"]["finish_reason"] == "too_long"


def test_goes_on_where_it_stopped(tmp_path: Path, engine: FakeEngine) -> None:
    write(tmp_path / "in.jsonl", *(prompt(key, key) for key in "abcd"))
    done = json.dumps({"id": "a", "messages": "kept as it is"}) + "\n"
    (tmp_path / "out.jsonl").write_text(done + '{"id": "b", "mess')  # a crash in mid line
    write(tmp_path / "out.jsonl.skipped.jsonl", {"id": "c", "finish_reason": "loop"})
    assert run(tmp_path) == 0
    assert (tmp_path / "out.jsonl").read_text().startswith(done)
    assert list(read(tmp_path / "out.jsonl")) == ["a", "b", "d"]
    assert run(tmp_path) == 0
    assert list(read(tmp_path / "out.jsonl")) == ["a", "b", "d"]


def test_time_limit_starts_nothing_new(tmp_path: Path, engine: FakeEngine) -> None:
    write(tmp_path / "in.jsonl", prompt("a", "one"))
    assert run(tmp_path, "--max-minutes", "0") == 0
    assert not (tmp_path / "out.jsonl").exists()


def test_foreign_output_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in.jsonl", prompt("a", "one"))
    (tmp_path / "out.jsonl").write_text("my notes\n")
    assert run(tmp_path) == 1
    assert "is not an output of this tool" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == "my notes\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "a row must be an object with a list 'messages'"),
        ({"id": "x"}, "a row must be an object with a list 'messages'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool' is not supported"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "content must be text, found list"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "it has no user turn"),
        (prompt("first", "again"), "the id 'first' occurs twice"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "in.jsonl", prompt("first", "hello"), row)
    with pytest.raises(tool.InputError) as caught:
        list(tool.read_conversations(path))
    assert message in str(caught.value)
    assert f"{path}:2: " in str(caught.value)


def test_missing_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 1
    assert "no such input file" in capsys.readouterr().err


def test_is_loop() -> None:
    story = list(range(200))
    assert not tool.is_loop(story)
    assert not tool.is_loop([7] * 20)  # too short to tell
    assert tool.is_loop([1, 2, 3, 4, 5] * 20)
    assert tool.is_loop(story + [1, 2, 3, 4, 5, 6, 7, 8] * 10)  # ends in circles
    assert not tool.is_loop(story + story[:60])  # quotes itself once
