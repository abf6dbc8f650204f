"""Rows on their way from question to answers, and the count of what became of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torchspec_hpc.data.answerers import Answer
from torchspec_hpc.data.loops import is_loop
from torchspec_hpc.data.messages import Message

_CUT_THOUGHT = "thinking was cut by --max-tokens"


@dataclass
class Dialog:
    """One row on its way: its messages so far and the turns still to ask."""

    id: str
    source: str
    messages: list[Message]  # ends with the user turn that waits for its answer
    pending: list[Message]
    tools: list[dict[str, Any]] | None = None
    num_answers: int = 0
    finish_reason: str = "stop"
    error: str = ""

    def take(self, answer: Answer, *, keep_loops: bool) -> bool:
        """Takes the answer to the last turn; returns whether there is another turn to ask."""
        self.error = answer.error
        if unusable := _unusable(answer, keep_loops=keep_loops):
            self.end(unusable)
            return False
        message: Message = {"role": "assistant", "content": answer.text.strip()}
        for key in ("reasoning_content", "tool_calls"):
            if value := getattr(answer, key):
                message[key] = value
        self.messages.append(message)
        self.num_answers += 1
        self.finish_reason = answer.finish_reason
        # what a tool would say to another call than the one in the data is not known
        goes_on = answer.finish_reason == "stop" and not answer.tool_calls
        asked, self.pending = up_to_user(self.pending) if goes_on else ([], [])
        self.messages += asked
        return bool(asked)

    def end(self, reason: str) -> None:
        """Ends before the last turn; a row without any answer keeps it, to show the prompt."""
        self.finish_reason = reason
        if self.num_answers:
            while self.messages[-1]["role"] != "assistant":
                self.messages.pop()

    @property
    def outcome(self) -> str:
        """``done``, ``failed`` or ``skipped``."""
        if self.finish_reason == "failed":
            return "failed"
        return "done" if self.num_answers else "skipped"

    def row(self) -> dict[str, Any]:
        """The output row; a finish reason other than ``stop`` is part of it."""
        row: dict[str, Any] = {"id": self.id, "source": self.source, "messages": self.messages}
        row |= {"tools": self.tools} if self.tools else {}
        row |= {"error": self.error} if self.error else {}
        return row if self.finish_reason == "stop" else row | {"finish_reason": self.finish_reason}


def _unusable(answer: Answer, *, keep_loops: bool) -> str:
    """Why an answer is nothing to learn from; empty if it is something."""
    if answer.error:
        return "failed"
    if not keep_loops and is_loop(answer.tokens):
        return "loop"
    text = answer.text.strip()
    said = text or answer.tool_calls
    open_thought = text.startswith("<think>") and "</think>" not in text
    thought_only = bool(answer.reasoning_content) and not said
    if answer.finish_reason == "length" and (open_thought or thought_only):
        return _CUT_THOUGHT
    if open_thought:
        return "thinking is not closed"
    return answer.unusable or ("" if said else "empty")


@dataclass
class Outcome:
    """What became of the input: ``done + failed + skipped + not_started == num_input``."""

    num_input: int = 0
    done: int = 0
    failed: int = 0
    skipped: int = 0
    not_started: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def count(self, dialog: Dialog) -> None:
        """One more row has ended."""
        setattr(self, dialog.outcome, getattr(self, dialog.outcome) + 1)
        self.reasons[f"{dialog.outcome}: {dialog.finish_reason}"] += 1

    @property
    def cut(self) -> str:
        """Share of this call's rows whose last answer ``max_tokens`` cut."""
        rows = self.reasons.total()
        cut = sum(n for why, n in self.reasons.items() if why.endswith((": length", _CUT_THOUGHT)))
        return f"{cut} of {rows} rows ({cut / max(rows, 1):.1%}) were cut by --max-tokens"

    @property
    def adds_up(self) -> bool:
        """Whether every row of the input is accounted for."""
        ended = self.done + self.failed + self.skipped
        return ended + self.not_started == self.num_input


def up_to_user(turns: list[Message]) -> tuple[list[Message], list[Message]]:
    """Splits turns behind the first user turn; the first part is empty if there is none."""
    end = next((i + 1 for i, turn in enumerate(turns) if turn["role"] == "user"), 0)
    return turns[:end], turns[end:]
