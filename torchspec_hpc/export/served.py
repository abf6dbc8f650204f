"""One vLLM engine, with or without a draft, answers a file of prompts.

Run by :mod:`torchspec_hpc.export.evaluate` as ``python -m torchspec_hpc.export.served JOB REPLY``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from torchspec_hpc.errors import EXIT_USER_ERROR, UserError

_ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
_DRAFTS = "vllm:spec_decode_num_drafts"


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """Starts the engine, warms it up, answers all prompts and reads its counters."""
    settings = job["settings"]
    llm, sampling = _engine(settings, job["draft"])
    warm_up = sampling(max_tokens=4)
    llm.chat(job["prompts"][:1], warm_up, use_tqdm=False)
    before = _counters(llm)

    started = time.perf_counter()
    answers = llm.chat(job["prompts"], sampling(max_tokens=settings["max_tokens"]), use_tqdm=False)
    seconds = time.perf_counter() - started

    outputs = [list(answer.outputs[0].token_ids) for answer in answers]
    drafts, accepted, positions = _difference(_counters(llm), before)
    return {
        "num_prompts": len(outputs),
        "num_tokens": sum(map(len, outputs)),
        "seconds": seconds,
        "num_drafts": drafts,
        "accept_len": 1 + accepted / drafts if drafts else 1.0,
        "accept_by_position": [count / drafts for count in positions] if drafts else [],
        "outputs": outputs,
    }


def _engine(settings: dict[str, Any], draft: str | None) -> tuple[Any, Any]:
    on_cpu = _prepare_environment()
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise UserError(
            f"vLLM cannot be imported: {error}",
            hint="pip install 'torchspec_hpc[vllm]' (GPU), or bash tools/setup_env.sh cpu",
        ) from error
    options: dict[str, Any] = {
        "model": settings["target"],
        "dtype": "float32" if on_cpu and settings["dtype"] == "auto" else settings["dtype"],
        "max_model_len": settings["max_model_len"],
        "max_num_seqs": settings["concurrency"],
        "tensor_parallel_size": settings["tensor_parallel_size"],
        "enforce_eager": on_cpu,
        "seed": 0,
        "disable_log_stats": False,  # the offline LLM keeps no counters otherwise
    }
    if draft:
        options["speculative_config"] = {
            "method": "eagle3",  # without it vLLM guesses from the directory's name
            "model": draft,
            "num_speculative_tokens": settings["num_speculative_tokens"],
        }

    def sampling(max_tokens: int) -> Any:
        return SamplingParams(max_tokens=max_tokens, temperature=settings["temperature"], seed=0)

    return LLM(**options), sampling


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


def _counters(llm: Any) -> tuple[int, int, list[int]]:
    drafts, accepted, positions = 0, 0, []
    for metric in llm.get_metrics():
        if metric.name == _DRAFTS:
            drafts = metric.value
        elif metric.name == _ACCEPTED:
            accepted = metric.value
        elif metric.name == _ACCEPTED + "_per_pos":
            positions = list(metric.values)
    return drafts, accepted, positions


def _difference(
    after: tuple[int, int, list[int]], before: tuple[int, int, list[int]]
) -> tuple[int, int, list[int]]:
    """Counters of the measured part only, without the warm-up."""
    earlier = before[2] or [0] * len(after[2])
    positions = [now - then for now, then in zip(after[2], earlier, strict=True)]
    return after[0] - before[0], after[1] - before[1], positions


def main(argv: list[str]) -> int:
    """Reads the job file, writes the reply file."""
    job, reply = map(Path, argv)
    try:
        answer = serve(json.loads(job.read_text(encoding="utf-8")))
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_USER_ERROR
    reply.write_text(json.dumps(answer), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
