"""The real vLLM, in this process, against Transformers. One engine for all tests.

It is set up to be as hard on the connector as a tiny model allows: chunks of at most
32 tokens of a prompt and 64 of a step, blocks of 32 tokens, prompts that run side by
side, a cache too small for all of them, and prefix caching.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.inference.conftest import (
    Reference,
    Requester,
    context_of,
    make_run,
    random_prompts,
    relative_error,
)
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.inference.engines.base import Captured, EnginePrompt, Failed, Result
from torchspec_hpc.inference.engines.vllm import VllmEngine

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK = 32
EXTRA_ARGS = {
    "block_size": BLOCK,
    "long_prefill_token_threshold": 32,
    "num_gpu_blocks_override": 12,
    "enable_prefix_caching": True,
    "disable_log_stats": False,
}


@pytest.fixture(scope="module")
def engine(
    services: Endpoints, tmp_path_factory: pytest.TempPathFactory, tiny_target: Path
) -> Iterator[VllmEngine]:
    vllm = {"extra_args": EXTRA_ARGS, "kv_cache_bytes": 64 << 20}
    run = make_run(
        tmp_path_factory.mktemp("vllm") / "run",
        tiny_target,
        services,
        inference={"engine": "vllm", "max_num_batched_tokens": 64, "vllm": vllm},
    )
    engine = VllmEngine(context_of(run))
    yield engine
    engine.close()


def captured(results: list[Result]) -> list[Captured]:
    assert all(isinstance(result, Captured) for result in results), results
    return results


def counter(engine: VllmEngine, name: str) -> float:
    return sum(m.value for m in engine._llm.get_metrics() if m.name == name)


def test_every_length_and_block_boundary(
    engine: VllmEngine, requester: Requester, reference: Reference
) -> None:
    lengths = [1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1, 63, 64, 65, 96, 97, 127, 150, 199, 200]
    tokens = random_prompts(lengths)
    prompts = [requester.prompt(ids) for ids in tokens]
    results = captured(engine.prefill(prompts))
    assert [result.key for result in results] == [prompt.key for prompt in prompts]
    for ids, result in zip(tokens, results, strict=True):
        assert (result.shape, result.dtype) == ((ids.size, 4, 64), "float32")
        reference.check(ids, requester.fetch(result.key, result.shape))


def test_preempted_prompts(engine: VllmEngine, requester: Requester, reference: Reference) -> None:
    before = counter(engine, "vllm:num_preemptions")
    tokens = random_prompts([190, 195, 198, 200, 200, 180, 190, 200], seed=1)
    results = captured(engine.prefill([requester.prompt(ids) for ids in tokens]))
    assert counter(engine, "vllm:num_preemptions") > before
    for ids, result in zip(tokens, results, strict=True):
        reference.check(ids, requester.fetch(result.key, result.shape))


def test_prefix_cache_hits(engine: VllmEngine, requester: Requester, reference: Reference) -> None:
    [prefix] = random_prompts([3 * BLOCK], seed=2)
    tails = random_prompts([1, BLOCK, 50], seed=3)
    tokens = [np.concatenate([prefix, tail]) for tail in tails]
    captured(engine.prefill([requester.prompt(prefix)]))
    before = counter(engine, "vllm:prefix_cache_hits")
    results = captured(engine.prefill([requester.prompt(ids) for ids in [prefix, *tokens]]))
    # the last token is always computed, so the repeated prompt hits one block less
    assert counter(engine, "vllm:prefix_cache_hits") - before >= 2 * BLOCK + 3 * 3 * BLOCK
    for ids, result in zip([prefix, *tokens], results, strict=True):
        reference.check(ids, requester.fetch(result.key, result.shape))


def test_unusable_prompts_do_not_spoil_a_batch(
    engine: VllmEngine, requester: Requester, reference: Reference
) -> None:
    good, too_long, foreign = random_prompts([20, 201, 20], seed=4)
    foreign[5] = 512
    tokens = [too_long, good, np.zeros(0, np.int32), foreign]
    results = engine.prefill([requester.prompt(ids) for ids in tokens])
    assert [r.permanent for r in results if isinstance(r, Failed)] == [True] * 3
    assert "201 tokens and the engine serves at most 200" in results[0].reason
    assert results[2].reason == "the prompt is empty"
    assert "token id 512; the target's ids are 0 to 511" in results[3].reason
    reference.check(good, requester.fetch(results[1].key, results[1].shape))


def test_a_prompt_that_only_vllm_refuses_does_not_spoil_a_batch(
    engine: VllmEngine,
    requester: Requester,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "_max_prompt_tokens", 300)  # more than vLLM was told
    first, too_long, last = random_prompts([20, 250, 30], seed=8)
    results = engine.prefill([requester.prompt(ids) for ids in (first, too_long, last)])
    assert isinstance(results[1], Failed)
    assert results[1].permanent
    assert "vLLM refuses the prompt" in results[1].reason
    for ids, result in ((first, results[0]), (last, results[2])):
        reference.check(ids, requester.fetch(result.key, result.shape))


def test_a_write_that_fails_is_one_prompts_failure(
    engine: VllmEngine, requester: Requester, reference: Reference
) -> None:
    first, second = random_prompts([30, 40], seed=5)
    bad = EnginePrompt("", requester.store.segment, first)  # Mooncake takes no empty key
    failed, served = engine.prefill([bad, requester.prompt(second)])
    assert isinstance(failed, Failed)
    assert not failed.permanent
    reference.check(second, requester.fetch(served.key, served.shape))


def test_rows_alone_do_not_depend_on_history(engine: VllmEngine, requester: Requester) -> None:
    """A prompt that has a batch and a cache to itself gets the same bits every time."""
    [ids] = random_prompts([150], seed=6)
    seen = []
    for _ in range(2):
        engine._llm.reset_prefix_cache()
        [result] = captured(engine.prefill([requester.prompt(ids)]))
        seen.append(requester.fetch(result.key, result.shape))
    assert seen[0].equal(seen[1])
    others = random_prompts([40, 60, 10], seed=7)
    engine._llm.reset_prefix_cache()
    results = captured(engine.prefill([requester.prompt(i) for i in [*others, ids]]))
    shared = requester.fetch(results[-1].key, results[-1].shape)
    assert relative_error(shared, seen[0]) < 1e-5
