"""Answers of a target to prompts, or to the questions of conversations, as training data.

A draft should be trained on what its own target says. Each row keeps its system and user turns;
the target is asked for each assistant turn, one after the other.

* Rows are written as they finish, so the same call goes on where one stopped.
* Every input row ends in one of three files: ``OUTPUT`` (done), ``OUTPUT.skipped.jsonl`` (nothing
  to learn from, with its reason) or ``OUTPUT.failed.jsonl`` (the server could not answer; the next
  call tries again).
* A row cut by ``max_tokens`` ends with the cut answer and has ``"finish_reason": "length"``. One
  whose answer runs in circles (``"finish_reason": "loop"``), was cut while the target still
  thought, or is no plain text, ends before that turn.
* ``OUTPUT.provenance.json`` says which model answered with which sampling parameters; a call with
  others is refused.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torchspec_hpc
from torchspec_hpc.config.rundir import write_atomic
from torchspec_hpc.data.answerers import Answerer, AnswerSettings
from torchspec_hpc.data.conversations import COLUMNS, conversation_of
from torchspec_hpc.data.dialogs import Dialog, Outcome, up_to_user
from torchspec_hpc.data.report import BadRow
from torchspec_hpc.data.rows import Row, read_rows, value_of
from torchspec_hpc.errors import DataError

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S = 60.0
_PROMPT = "prompt"  # a column of one question, or of turns


def regenerate(
    source: Path, output: Path, settings: AnswerSettings, answerer: Answerer, max_minutes: float
) -> Outcome:
    """Answers every row that is not done yet.

    Args:
        source: Conversations or prompts, any format of :mod:`torchspec_hpc.data.rows`.
        output: JSON lines; appended to if it exists.
        settings: Of the answers.
        answerer: Who answers.
        max_minutes: Then no new row is begun.

    Raises:
        DataError: The output is another tool's, or was made with other settings.
    """
    paths = {outcome: _path(output, outcome) for outcome in ("done", "skipped", "failed")}
    output.parent.mkdir(parents=True, exist_ok=True)
    _require_same_settings(output, source, settings)
    found = {outcome: _ids_in(paths[outcome]) for outcome in ("done", "skipped")}
    paths["failed"].unlink(missing_ok=True)  # they are asked again
    result = Outcome()
    todo = _todo(source, found, result)
    started = logged = time.monotonic()
    for dialog in _answer(todo, answerer, settings, started + 60 * max_minutes, result):
        _append(paths[dialog.outcome], dialog.row())
        result.count(dialog)
        if time.monotonic() - logged > _LOG_INTERVAL_S:
            logged = time.monotonic()
            logger.info("%s, %s", dict(result.reasons), answerer.speed(logged - started))
    assert result.adds_up, result
    return result


def _todo(source: Path, ended: dict[str, set[str]], result: Outcome) -> Iterator[Dialog]:
    """Rows that have not ended before; those that cannot be asked have no messages."""
    seen: set[str] = set()
    for row in read_rows(source):
        result.num_input += 1
        try:
            dialog = _dialog(row, source.stem)
            if dialog.id in seen:
                raise BadRow(f"duplicate id: {dialog.id}")
        except BadRow as error:
            dialog = Dialog(f"line-{row.line}", source.stem, [], [], finish_reason=str(error))
        seen.add(dialog.id)
        if dialog.id in ended["done"]:
            result.done += 1
        elif dialog.id in ended["skipped"]:
            result.skipped += 1
        else:
            yield dialog


def _dialog(row: Row, source: str) -> Dialog:
    value = value_of(row)
    columns = (*COLUMNS, _PROMPT)
    found = [c for c in columns if value.get(c)] if isinstance(value, dict) else []
    if not found:
        raise BadRow(f"no turns: expected one of the columns {', '.join(columns)}")
    if found[0] == _PROMPT and isinstance(value[_PROMPT], str):
        value = value | {_PROMPT: [{"role": "user", "content": value[_PROMPT]}]}
    messages, tools = conversation_of(value, found[0])
    if any(message["role"] == "tool" for message in messages):
        raise BadRow("a tool's results belong to calls that would change")
    asked, pending = up_to_user([m for m in messages if m["role"] != "assistant"])
    if not asked:
        raise BadRow("no user turn: there is nothing to answer")
    key = str(value.get("id") or f"line-{row.line}")
    return Dialog(key, str(value.get("source") or source), asked, pending, tools)


def _answer(
    todo: Iterator[Dialog],
    answerer: Answerer,
    settings: AnswerSettings,
    deadline: float,
    result: Outcome,
) -> Iterator[Dialog]:
    """Keeps the answerer busy and gives rows back as they end."""
    active: dict[str, Dialog] = {}
    waiting: Iterator[Dialog] | None = todo
    while waiting or active:
        while waiting and len(active) < settings.concurrency:
            dialog = next(waiting, None)
            if dialog is None:
                waiting = None
            elif not dialog.messages:
                yield dialog
            elif time.monotonic() >= deadline:
                result.not_started += 1 + sum(1 for _ in waiting)
                waiting = None
            elif not _ask(dialog, answerer, active):
                yield dialog
        for answer in answerer.collect() if active else ():
            dialog = active.pop(answer.request)
            again = dialog.take(answer, keep_loops=settings.keep_loops)
            if not (again and _ask(dialog, answerer, active)):
                yield dialog


def _ask(dialog: Dialog, answerer: Answerer, active: dict[str, Dialog]) -> bool:
    """Asks the next turn; False, and the row ends, if that cannot be asked."""
    request = f"{dialog.id}#{dialog.num_answers}"
    try:
        has_room = answerer.submit(request, dialog.messages, dialog.tools)
    except BadRow as error:
        dialog.end(str(error))
        return False
    if not has_room:
        dialog.end("too_long")
        return False
    active[request] = dialog
    return True


def _path(output: Path, outcome: str) -> Path:
    return output if outcome == "done" else output.with_name(f"{output.name}.{outcome}.jsonl")


def _ids_in(path: Path) -> set[str]:
    """The ids in an output file, after cutting off a line that a crash left unfinished."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    if len(complete) != len(data):
        logger.warning("%s: removing its unfinished last line", path)
        with path.open("r+b") as file:
            file.truncate(len(complete))
    try:
        return {json.loads(line)["id"] for line in complete.splitlines()}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not an output of this command ({error!r})",
            hint="move it, or write elsewhere",
        ) from None


def _require_same_settings(output: Path, source: Path, settings: AnswerSettings) -> None:
    """Writes the provenance of a new output; an old one must have the same."""
    path = output.with_name(f"{output.name}.provenance.json")
    now = {"input": str(source), **settings.provenance()}
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = {key for key in now if before.get(key) != now[key]}
        if changed:
            told = ", ".join(
                f"{key} {before.get(key)!r}, now {now[key]!r}" for key in sorted(changed)
            )
            raise DataError(
                f"{output} was begun with other settings: {told}",
                hint="use those, or write to another file",
            )
        return
    write_atomic(path, now | {"version": torchspec_hpc.__version__, "started": time.time()})


def _append(path: Path, row: dict[str, Any]) -> None:
    """Appends one JSON line; what was there before stays whatever happens."""
    # half of a surrogate pair, which UTF-8 cannot take, becomes JSON's own escape
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
