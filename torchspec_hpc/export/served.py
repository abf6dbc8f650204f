"""One vLLM engine, with or without a draft, answers conversations; so many at a time.

Run by :mod:`torchspec_hpc.export.evaluate` as ``python -m torchspec_hpc.export.served JOB REPLY``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from torchspec_hpc.errors import EXIT_USER_ERROR, UserError

_ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
_DRAFTS = "vllm:spec_decode_num_drafts"
#: An engine argument of newer versions: what was accepted by request, for the intervals.
_BY_REQUEST = "per_request_spec_decode_metrics"


class Conversation:
    """One conversation that is being had.

    Args:
        prompt: ``{"messages", "followups"}``; see :class:`torchspec_hpc.export.prompts.Prompt`.
        index: Its place among the prompts.

    Attributes:
        answers: Token ids of each turn.
        latencies_s: Seconds of each turn, from the question to the last token.
        first_token_s: Seconds of each turn to its first token.
        num_drafts: Times that tokens were proposed to it; None if the engine does not tell.
        num_accepted: Proposed tokens that it took.
    """

    def __init__(self, prompt: dict[str, Any], index: int) -> None:
        self.index = index
        self.messages = list(prompt["messages"])
        self._followups = deque(prompt["followups"])
        self.answers: list[list[int]] = []
        self.latencies_s: list[float] = []
        self.first_token_s: list[float] = []
        self.num_drafts: int | None = None
        self.num_accepted: int | None = None
        self._asked_at, self._has_begun = 0.0, False

    def ask(self) -> str:
        """Notes the time of a question; returns a name for it."""
        self._asked_at, self._has_begun = time.perf_counter(), False
        return f"{self.index}-{len(self.answers)}"

    def hear(self, output: Any) -> bool:
        """Takes what the engine has said so far.

        Returns:
            Whether another question is to be asked.
        """
        now, said = time.perf_counter() - self._asked_at, output.outputs[0]
        if not self._has_begun:
            self._has_begun = True
            self.first_token_s.append(now)
        if not output.finished:
            return False
        self.answers.append(list(said.token_ids))
        self.latencies_s.append(now)
        if (found := getattr(said, "spec_decode_metrics", None)) is not None:
            accepted = sum(j * count for j, count in enumerate(found.histogram))
            self.num_drafts = (self.num_drafts or 0) + sum(found.histogram)
            self.num_accepted = (self.num_accepted or 0) + accepted
        if not self._followups:
            return False
        self.messages += [
            {"role": "assistant", "content": said.text},
            {"role": "user", "content": self._followups.popleft()},
        ]
        return True

    def result(self) -> dict[str, Any]:
        """What is measured of it."""
        return {
            "answers": self.answers,
            "latencies_s": self.latencies_s,
            "first_token_s": self.first_token_s,
            "num_drafts": self.num_drafts,
            "num_accepted": self.num_accepted,
        }


class Engine:
    """vLLM in this process.

    Args:
        settings: Fields of :class:`torchspec_hpc.export.evaluate.ServeSettings`.
        draft: Directory of the draft, None: the target alone.
        num_speculative_tokens: k.
        max_in_flight: Most conversations at a time.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        draft: str | None,
        num_speculative_tokens: int,
        max_in_flight: int,
    ) -> None:
        on_cpu = _prepare_environment()
        try:
            from vllm import LLM
            from vllm.engine.arg_utils import EngineArgs
        except ImportError as error:
            raise UserError(
                f"vLLM cannot be imported: {error}",
                hint="pip install 'torchspec_hpc[vllm]' (GPU), or bash tools/setup_env.sh cpu",
            ) from error
        options: dict[str, Any] = {
            "model": settings["target"],
            "dtype": "float32" if on_cpu and settings["dtype"] == "auto" else settings["dtype"],
            "max_model_len": settings["max_model_len"],
            "max_num_seqs": max_in_flight,
            "tensor_parallel_size": settings["tensor_parallel_size"],
            "enforce_eager": on_cpu,
            "seed": 0,
            "disable_log_stats": False,  # the offline LLM keeps no counters otherwise
        }
        if draft:
            options["speculative_config"] = {
                "method": "eagle3",  # without it vLLM guesses from the directory's name
                "model": draft,
                "num_speculative_tokens": num_speculative_tokens,
            }
            if _BY_REQUEST in {field.name for field in dataclasses.fields(EngineArgs)}:
                options[_BY_REQUEST] = "summary"
        self.llm = LLM(**options)
        self._max_model_len = settings["max_model_len"]
        self._answer([Conversation({"messages": [_WARM_UP], "followups": []}, 0)], 4, 0.0, 1)

    def run(self, case: dict[str, Any]) -> dict[str, Any]:
        """Has all conversations of a case.

        Args:
            case: ``prompts``, ``max_tokens``, ``temperature``, ``concurrency``.
        """
        conversations = [Conversation(prompt, i) for i, prompt in enumerate(case["prompts"])]
        self.llm.reset_prefix_cache()  # of the case before, which may have asked the same
        before, started = self._counters(), time.perf_counter()
        self._answer(conversations, case["max_tokens"], case["temperature"], case["concurrency"])
        seconds = time.perf_counter() - started
        drafts, accepted, positions = _difference(self._counters(), before)
        return {
            "seconds": seconds,
            "num_drafts": drafts,
            "num_accepted": accepted,
            "num_accepted_by_position": positions,
            "conversations": [conversation.result() for conversation in conversations],
        }

    def _answer(
        self,
        conversations: list[Conversation],
        max_tokens: int,
        temperature: float,
        concurrency: int,
    ) -> None:
        """Keeps `concurrency` conversations in flight until all are had."""
        waiting, asked = deque(conversations), dict[str, Conversation]()
        while waiting or asked:
            while waiting and len(asked) < concurrency:
                self._ask(waiting.popleft(), asked, max_tokens, temperature)
            for output in self.llm.llm_engine.step():
                conversation = asked[output.request_id]
                goes_on = conversation.hear(output)
                if output.finished:
                    del asked[output.request_id]
                if goes_on:
                    self._ask(conversation, asked, max_tokens, temperature)

    def _ask(
        self,
        conversation: Conversation,
        asked: dict[str, Conversation],
        max_tokens: int,
        temperature: float,
    ) -> None:
        from vllm import SamplingParams

        tokens = self.llm.get_tokenizer().apply_chat_template(
            conversation.messages, add_generation_prompt=True, return_dict=False
        )
        if len(tokens) + max_tokens > self._max_model_len:
            raise UserError(
                f"prompt {conversation.index + 1} has {len(tokens)} tokens; with --max-tokens "
                f"{max_tokens} that is more than --max-model-len {self._max_model_len}",
                hint="raise --max-model-len, or leave the prompt out",
            )
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, seed=conversation.index
        )
        name = conversation.ask()
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": tokens}, params)
        asked[name] = conversation

    def _counters(self) -> tuple[int, int, list[int]]:
        drafts, accepted, positions = 0, 0, []
        for metric in self.llm.get_metrics():
            if metric.name == _DRAFTS:
                drafts = metric.value
            elif metric.name == _ACCEPTED:
                accepted = metric.value
            elif metric.name == _ACCEPTED + "_per_pos":
                positions = list(metric.values)
        return drafts, accepted, positions


_WARM_UP = {"role": "user", "content": "Hello"}


def _prepare_environment() -> bool:
    """Settings vLLM reads from the environment; returns whether it will run on the CPU."""
    import torch

    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if torch.cuda.is_available():
        return False
    # vLLM sizes the cache from the NUMA node's total memory otherwise, and may refuse to start
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return True


def _difference(
    after: tuple[int, int, list[int]], before: tuple[int, int, list[int]]
) -> tuple[int, int, list[int]]:
    """Counters of one case only, without what was before."""
    earlier = before[2] or [0] * len(after[2])
    positions = [now - then for now, then in zip(after[2], earlier, strict=True)]
    return after[0] - before[0], after[1] - before[1], positions


def main(argv: list[str]) -> int:
    """Reads the job file, writes the reply file."""
    job_file, reply = map(Path, argv)
    job = json.loads(job_file.read_text(encoding="utf-8"))
    cases = job.pop("cases")
    try:
        engine = Engine(**job, max_in_flight=max(case["concurrency"] for case in cases))
        answer = [engine.run(case) for case in cases]
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_USER_ERROR
    reply.write_text(json.dumps(answer), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
