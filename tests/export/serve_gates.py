"""Serves drafts in vLLM, one engine after the other in one process, and keeps what they compute.

    python -m tests.export.serve_gates JOB REPLY

JOB: ``{"settings", "engines": [{"target", "draft", "k"}], "cases"}``. REPLY: for each engine what
:meth:`torchspec_hpc.export.served.Engine.run` returns, and of the first prompt's first draft the
target's states [T, A*H] and the draft's logits [k, V].
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from torchspec_hpc.export.served import Engine


class Recorder:
    """Listens to the draft model of an engine.

    Args:
        engine: In this process.
    """

    def __init__(self, engine: Engine) -> None:
        self.states: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []
        core = engine.llm.llm_engine.engine_core.engine_core
        model = core.model_executor.driver_worker.worker.model_runner.drafter.model
        combine, compute_logits = model.combine_hidden_states, model.compute_logits

        def record_states(states: torch.Tensor) -> torch.Tensor:
            self.states.append(states.clone())
            return combine(states)

        def record_logits(hidden: torch.Tensor) -> torch.Tensor:
            logits = compute_logits(hidden)
            self.logits.append(logits.clone())
            return logits

        model.combine_hidden_states, model.compute_logits = record_states, record_logits


def main(job_file: str, reply: str) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    job = json.loads(Path(job_file).read_text())
    replies: list[dict[str, Any]] = []
    for asked in job["engines"]:
        settings = job["settings"] | {"target": asked["target"]}
        engine = Engine(settings, asked["draft"], asked["k"], max_in_flight=2)
        recorder = Recorder(engine)
        runs = [engine.run(case) for case in job["cases"]]
        logits = torch.cat(recorder.logits[: asked["k"]])
        replies.append({"runs": runs, "states": recorder.states[0], "logits": logits})
        del engine, recorder
        gc.collect()
        cleanup_dist_env_and_memory()
    torch.save(replies, reply)


if __name__ == "__main__":
    main(*sys.argv[1:])
