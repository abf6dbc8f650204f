from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.data.templates import byte_tokenizer
from torchspec_hpc.data.answerers import Answer, AnswerSettings, plain_answer, start_offline
from torchspec_hpc.data.conversations import parse_row
from torchspec_hpc.data.dialogs import Outcome
from torchspec_hpc.data.loops import is_loop
from torchspec_hpc.data.regenerate import regenerate
from torchspec_hpc.data.report import BadRow
from torchspec_hpc.data.server import Server
from torchspec_hpc.errors import DataError

SETTINGS = AnswerSettings("target")


class Parrot:
    """Answers every request at the next collection, from the last message alone."""

    def __init__(self, answers: dict[str, dict[str, Any]] | None = None) -> None:
        self.answers, self.asked, self.max_active = answers or {}, {}, 0
        self.requests: list[str] = []

    def submit(self, request: str, messages: list[dict[str, Any]], tools: Any) -> bool:
        if messages[-1]["content"] == "endless":
            return False
        if messages[-1]["content"] == "refused":
            raise BadRow("chat template refuses it: no")
        self.asked[request] = messages[-1]["content"]
        self.requests.append(request)
        return True

    def collect(self) -> list[Answer]:
        self.max_active = max(self.max_active, len(self.asked))
        said = [self._answer(request, asked) for request, asked in self.asked.items()]
        self.asked = {}
        return said

    def _answer(self, request: str, asked: str) -> Answer:
        fields = {"text": f"re: {asked}", "tokens": [1, 2, 3], "finish_reason": "stop"}
        return Answer(request, **(fields | self.answers.get(asked, {})))

    def speed(self, seconds: float) -> str:
        return "fast"


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> dict[str, Any]:
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def prompt(key: str, *turns: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": turn} for turn in turns]
    return {"id": key, "source": "test", "messages": messages}


def run(tmp_path: Path, parrot: Any, max_minutes: float = 60.0, **settings: Any) -> Outcome:
    chosen = AnswerSettings("target", **settings)
    output = tmp_path / "out.jsonl"
    return regenerate(tmp_path / "in.jsonl", output, chosen, parrot, max_minutes)


def test_regenerates_every_assistant_turn(tmp_path: Path) -> None:
    turns = [("system", "be kind"), ("human", "one"), ("gpt", "OLD"), ("human", "two")]
    conversation = [{"from": role, "value": text} for role, text in turns]
    write(tmp_path / "in.jsonl", {"id": "a", "conversations": conversation}, prompt("b", "three"))
    parrot = Parrot()
    outcome = run(tmp_path, parrot, concurrency=1)
    assert (outcome.num_input, outcome.done) == (2, 2)
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
    assert parrot.max_active == 1


def test_all_columns_of_a_row_are_kept(tmp_path: Path) -> None:
    tool = {"name": "f", "description": "half \ud800"}
    turns = [{"from": "human", "value": "one"}]
    sharegpt = {"id": "a", "system": "be kind", "conversations": turns, "functions": [tool]}
    plain = [{"id": "b", "prompt": "two"}, {"id": "c", "prompt": [turns[0]]}]
    write(tmp_path / "in.jsonl", sharegpt, *plain)
    assert run(tmp_path, Parrot()).done == 3
    rows = read(tmp_path / "out.jsonl")
    assert rows["a"]["messages"][0] == {"role": "system", "content": "be kind"}
    assert rows["a"]["tools"] == [{"type": "function", "function": tool}]
    for key, question in (("b", "two"), ("c", "one")):
        said = [turn["content"] for turn in rows[key]["messages"]]
        assert said == [question, f"re: {question}"]


def test_cut_looping_empty_and_failed_answers_are_counted(tmp_path: Path) -> None:
    parrot = Parrot(
        {
            "cut": {"text": "half an ans", "finish_reason": "length"},
            "loop": {"tokens": [5, 6] * 100},
            "empty": {"text": "  "},
            "musing": {"text": "<think>2+", "finish_reason": "length"},
            "parsed": {"text": "", "reasoning_content": "2+", "finish_reason": "length"},
            "special": {"unusable": "the answer has special tokens <|call|>"},
            "broken": {"text": "", "error": "HTTP 500"},
        }
    )
    rows = [
        prompt("cut", "cut", "never asked"),
        prompt("loop", "loop"),
        prompt("late-loop", "good", "loop"),
        prompt("empty", "empty"),
        prompt("refused", "refused"),
        *(prompt(key, key) for key in ("musing", "parsed", "special")),
        prompt("long", "endless"),
        prompt("broken", "good", "broken"),
        prompt("cut", "twice"),
        {"id": "nothing"},
        {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]},
    ]
    write(tmp_path / "in.jsonl", *rows)
    outcome = run(tmp_path, parrot)
    assert (outcome.done, outcome.failed, outcome.skipped) == (2, 1, 10)
    assert outcome.adds_up
    assert outcome.cut == "3 of 13 rows (23.1%) were cut by --max-tokens"
    done = read(tmp_path / "out.jsonl")
    assert done["cut"]["finish_reason"] == "length"
    assert [m["content"] for m in done["cut"]["messages"]] == ["cut", "half an ans"]
    assert done["late-loop"]["finish_reason"] == "loop"
    assert [m["content"] for m in done["late-loop"]["messages"]] == ["good", "re: good"]
    skipped = read(tmp_path / "out.jsonl.skipped.jsonl")
    assert {key: row["finish_reason"].partition(":")[0] for key, row in skipped.items()} == {
        "loop": "loop",
        "empty": "empty",
        "long": "too_long",
        "refused": "chat template refuses it",
        "musing": "thinking was cut by --max-tokens",
        "parsed": "thinking was cut by --max-tokens",
        "special": "the answer has special tokens <|call|>",
        "line-11": "duplicate id",
        "line-12": "no turns",
        "line-13": "a tool's results belong to calls that would change",
    }
    failed = read(tmp_path / "out.jsonl.failed.jsonl")
    assert failed["broken"]["error"] == "HTTP 500"
    # the server is well again
    parrot.answers, parrot.requests = {}, []
    outcome = run(tmp_path, parrot)
    assert (outcome.done, outcome.failed, outcome.skipped) == (3, 0, 10)
    assert parrot.requests == ["broken#0", "broken#1"]


def test_goes_on_where_it_stopped(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", *(prompt(key, key) for key in "abcd"))
    done = json.dumps({"id": "a", "messages": "kept as it is"}) + "\n"
    (tmp_path / "out.jsonl").write_text(done + '{"id": "b", "mess')  # a crash in mid line
    write(tmp_path / "out.jsonl.skipped.jsonl", {"id": "c", "finish_reason": "loop"})
    for _ in range(2):
        outcome = run(tmp_path, Parrot())
        assert (outcome.done, outcome.skipped) == (3, 1)
        assert (tmp_path / "out.jsonl").read_text().startswith(done)
        assert list(read(tmp_path / "out.jsonl")) == ["a", "b", "d"]


def test_time_limit_starts_nothing_new(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", prompt("a", "one"), prompt("b", "two"))
    outcome = run(tmp_path, Parrot(), max_minutes=0)
    assert (outcome.not_started, outcome.num_input) == (2, 2)
    assert not (tmp_path / "out.jsonl").exists()


def test_other_files_and_other_settings_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", prompt("a", "one"))
    (tmp_path / "out.jsonl").write_text("my notes\n")
    with pytest.raises(DataError, match="is not an output of this command"):
        run(tmp_path, Parrot())
    assert (tmp_path / "out.jsonl").read_text() == "my notes\n"
    (tmp_path / "out.jsonl").unlink()
    run(tmp_path, Parrot())
    provenance = json.loads((tmp_path / "out.jsonl.provenance.json").read_text())
    assert (provenance["model"], provenance["temperature"]) == ("target", 0.0)
    with pytest.raises(DataError, match=r"other settings: temperature 0.0, now 0.7"):
        run(tmp_path, Parrot(), temperature=0.7)


def test_is_loop() -> None:
    story = list(range(200))
    assert not is_loop(story)
    assert not is_loop([7] * 20)  # too short to tell
    assert is_loop([1, 2, 3, 4, 5] * 20)
    assert is_loop(story + [1, 2, 3, 4, 5, 6, 7, 8] * 10)  # ends in circles
    assert not is_loop(story + story[:60])  # quotes itself once


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


class ChatHandler(BaseHTTPRequestHandler):
    """OpenAI's protocol: what the last message asks for."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        self.server.bodies.append(body)  # type: ignore[attr-defined]
        if asked == "refuse":
            self.send_error(400, "too long")
            return
        tries = len(self.server.bodies)  # type: ignore[attr-defined]
        if asked == "flaky" and tries <= 3:
            if tries == 3:
                time.sleep(2)  # longer than the client waits
            else:
                self.send_error(503 if tries == 1 else 429)
            return
        messages = {
            "think": {"content": "4", "reasoning_content": "2+2"},
            "inline": {"content": "2+2</think>4"},
            "call": {"content": None, "tool_calls": [CALL]},
        }
        message = messages.get(asked, {"content": f"re: {asked}"})
        data = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), ChatHandler) as running:
        running.bodies = []  # type: ignore[attr-defined]
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.mark.parametrize("suffix", ["", "/v1", "/v1/"])
def test_a_server(
    tmp_path: Path, server: ThreadingHTTPServer, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchspec_hpc.data.server._RETRY_S", 0.01)
    rows = [prompt(key, key) for key in ("flaky", "think", "inline", "refuse")]
    rows.append(prompt("call", "call", "never asked") | {"tools": [{"name": "f"}]})
    write(tmp_path / "in.jsonl", *rows)
    settings = AnswerSettings("target", concurrency=1)
    answerer = Server(f"http://127.0.0.1:{server.server_port}{suffix}", settings, timeout_s=1.0)
    outcome = regenerate(tmp_path / "in.jsonl", tmp_path / "out.jsonl", settings, answerer, 60)
    assert (outcome.done, outcome.failed, outcome.skipped) == (4, 1, 0)
    found = read(tmp_path / "out.jsonl")
    answers = {key: row["messages"][-1] for key, row in found.items()}
    assert answers["flaky"]["content"] == "re: flaky"
    assert answers["think"] == {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    assert answers["inline"]["content"] == "<think>2+2</think>4"
    assert answers["call"] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert all(parse_row(row, None) for row in found.values())
    assert "400" in read(tmp_path / "out.jsonl.failed.jsonl")["refuse"]["error"]
    body = server.bodies[0]  # type: ignore[attr-defined]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("target", 2048, 0.0)


def test_special_tokens_are_no_text() -> None:
    tokenizer = byte_tokenizer()

    def taken(text: str, *, stopped: bool = True) -> tuple[str, str]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return plain_answer(tokenizer, ids, text, stopped=stopped)

    assert taken("red<|im_end|>") == ("red", "")
    assert taken("red", stopped=False) == ("red", "")
    text, unusable = taken("red</s>blue<|im_end|>")
    assert text == "red</s>blue"
    assert unusable.startswith("the answer has special tokens </s>; use --server")


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_in_this_process(tmp_path: Path, tiny_target: Path) -> None:
    picture = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    asked = [prompt("a", "What is red?", "And blue?"), prompt("b", "x " * 600)]
    asked.append({"id": "c", "messages": [{"role": "user", "content": picture}]})
    write(tmp_path / "in.jsonl", *asked)
    settings = AnswerSettings(str(tiny_target), max_tokens=8, keep_loops=True, concurrency=2)
    answerer = start_offline(settings, max_model_len=256, tp_size=1, trust_remote_code=False)
    outcome = regenerate(tmp_path / "in.jsonl", tmp_path / "out.jsonl", settings, answerer, 60)
    assert (outcome.done, outcome.skipped) == (1, 2)
    row = read(tmp_path / "out.jsonl")["a"]
    assert row["messages"][1]["role"] == "assistant"
    skipped = read(tmp_path / "out.jsonl.skipped.jsonl")
    assert skipped["b"]["finish_reason"] == "too_long"
    assert skipped["c"]["finish_reason"].startswith("chat template refuses it")
    answerer._engine.engine_core.shutdown()  # and with it the process group
