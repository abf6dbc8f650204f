"""The vLLM engine: unpatched vLLM, whose worker puts the states into the store itself."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from torchspec_hpc.errors import ConfigError
from torchspec_hpc.inference.delivery import Destination
from torchspec_hpc.inference.engine_group import EngineGroup
from torchspec_hpc.inference.engines.base import (
    EngineContext,
    Finished,
    PromptRefused,
    check_prompt,
)
from torchspec_hpc.inference.engines.vllm_arguments import (
    all_arguments,
    check_extra_args,
    check_generation,
    environment,
    max_prompts,
)
from torchspec_hpc.inference.engines.vllm_tracking import CAPTURED, TRANSFER_PARAMS
from torchspec_hpc.transfer.messages import Generation, Request, encode_tokens

TokenIds = npt.NDArray[np.int32]

logger = logging.getLogger(__name__)

#: Steps' worth of requests inside vLLM: one that runs, and one for when it has ended.
_STEPS_AHEAD = 2


class VllmEngine:
    """vLLM's synchronous engine, asked for one token a prompt and stepped by hand."""

    def __init__(self, context: EngineContext) -> None:
        inference = context.config.inference
        check_generation(context)
        os.environ.update(environment(context))
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
        if inference.num_threads is not None:
            torch.set_num_threads(inference.num_threads)
        import vllm  # takes seconds, and reads the environment

        from torchspec_hpc.inference.engines import vllm_compat

        if context.device != vllm_compat.DEVICE:
            raise ConfigError(
                f"inference.device is {context.device} and this vLLM is built for "
                f"{vllm_compat.DEVICE}",
                hint="install the other build of vLLM, or set inference.device",
            )
        # it warns, with a traceback, that there is no tokenizer to warm up
        logging.getLogger("vllm.renderers.base").setLevel(logging.ERROR)
        check_extra_args(inference, {field.name for field in dataclasses.fields(vllm.EngineArgs)})
        self._group: EngineGroup | None = None
        session = None
        if context.placement.num_nodes > 1:
            self._group = EngineGroup(context.run, context.endpoints, context.placement)
            session = self._group.lead()
            self._group.watch(session)
        arguments = all_arguments(context, session)
        try:
            self._engine: Any = vllm.LLM(**arguments).llm_engine
        except vllm_compat.REFUSALS as error:
            raise ConfigError(
                f"vLLM {vllm.__version__} refuses the target or its settings: {error}",
                hint="see model.* and inference.vllm.* in the configuration",
            ) from error
        self._sampling_params = vllm.SamplingParams
        self._refusals = vllm_compat.REFUSALS
        self._max_prompt_tokens = context.max_prompt_tokens
        self._vocab_size = context.spec.vocab_size
        scheduler = self._engine.vllm_config.scheduler_config
        self.max_prompts = _STEPS_AHEAD * max_prompts(context)
        self.max_tokens = _STEPS_AHEAD * int(scheduler.max_num_batched_tokens)
        self._serial = itertools.count()
        # what vLLM is doing for a request: with an answer, be it empty, its states
        self._open: dict[str, tuple[Request, TokenIds | None]] = {}
        logger.info("vLLM %s is ready: %s", vllm.__version__, arguments)

    def admit(self, request: Request) -> None:
        """See :class:`~torchspec_hpc.inference.engines.base.Engine`."""
        check_prompt(request.tokens, self._max_prompt_tokens, self._vocab_size)
        if request.generation is None:
            self._capture(request, np.zeros(0, np.int32))
        else:
            self._answer(request, request.generation)

    def step(self) -> list[Finished]:
        """See :class:`~torchspec_hpc.inference.engines.base.Engine`."""
        finished = []
        for output in self._engine.step():
            if not output.finished:
                continue
            request, answer = self._open.pop(output.request_id)
            if answer is None:  # now its states, and those of the prompt
                self._capture(request, np.array(output.outputs[0].token_ids, np.int32))
            elif (output.kv_transfer_params or {}).get(CAPTURED):
                finished.append(Finished(request, answer.size))
            else:
                problem = "vLLM finished the prompt without capturing its states"
                finished.append(Finished(request, problem=problem))
        return finished

    def close(self) -> None:
        """See :class:`~torchspec_hpc.inference.engines.base.Engine`."""
        if self._group is not None:
            self._group.leave()
        self._engine.engine_core.shutdown()

    def _answer(self, request: Request, generation: Generation) -> None:
        room = self._max_prompt_tokens - len(request.tokens)
        if room == 0:
            raise PromptRefused(
                f"the prompt has {len(request.tokens)} tokens, which leaves no room for an answer "
                "(training.max_seq_length)"
            )
        params = self._sampling_params(
            max_tokens=min(generation.max_tokens, room),
            temperature=generation.temperature,
            top_p=generation.top_p,
            seed=generation.seed,
            stop_token_ids=list(generation.stop_token_ids),
            detokenize=False,
        )
        self._add(request.tokens, params, (request, None))

    def _capture(self, request: Request, answer: TokenIds) -> None:
        destination = Destination.of(request, encode_tokens(answer))
        params = self._sampling_params(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            extra_args={TRANSFER_PARAMS: dataclasses.asdict(destination)},
        )
        self._add(np.concatenate([request.tokens, answer]), params, (request, answer))

    def _add(
        self, token_ids: TokenIds, params: Any, entry: tuple[Request, TokenIds | None]
    ) -> None:
        name = str(next(self._serial))
        try:
            self._engine.add_request(name, {"prompt_token_ids": token_ids.tolist()}, params)
        except self._refusals as error:
            raise PromptRefused(f"vLLM refuses the prompt: {error}") from error
        self._open[name] = entry
