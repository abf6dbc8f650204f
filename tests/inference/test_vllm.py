"""The real vLLM, in this process, against Transformers. One engine for all tests.

It is set up to be as hard on the connector as a tiny model allows: chunks of at most
32 tokens of a prompt and 64 of a step, blocks of 32 tokens, prompts that run side by
side, a cache too small for all of them, and prefix caching.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
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
from torchspec_hpc.inference.engines.base import PromptRefused
from torchspec_hpc.inference.engines.vllm import VllmEngine
from torchspec_hpc.transfer.messages import Generation, Receipt, Refusal, decode_tokens

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


def test_this_is_the_release_that_was_asked_for() -> None:
    import vllm

    assert vllm.__version__ == os.environ.get("EXPECTED_VLLM", vllm.__version__)


def counter(engine: VllmEngine, name: str) -> float:
    return sum(m.value for m in engine._engine.get_metrics() if m.name == name)


def test_every_length_and_block_boundary(
    engine: VllmEngine, requester: Requester, reference: Reference
) -> None:
    lengths = [1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1, 63, 64, 65, 96, 97, 127, 150, 199, 200]
    tokens = random_prompts(lengths)
    prompts = [requester.request(ids) for ids in tokens]
    results = requester.run(engine, prompts)
    assert [result.key for result in results] == [prompt.key for prompt in prompts]
    assert all(isinstance(r, Receipt) and r.engine == 5 for r in results)
    for ids, result in zip(tokens, results, strict=True):
        assert (result.shape, result.dtype) == ((ids.size, 4, 64), "float32")
        reference.check(ids, requester.fetch(result.key, result.shape))


def test_preempted_prompts(engine: VllmEngine, requester: Requester, reference: Reference) -> None:
    before = counter(engine, "vllm:num_preemptions")
    tokens = random_prompts([190, 195, 198, 200, 200, 180, 190, 200], seed=1)
    results = requester.run(engine, [requester.request(ids) for ids in tokens])
    assert counter(engine, "vllm:num_preemptions") > before
    for ids, result in zip(tokens, results, strict=True):
        reference.check(ids, requester.fetch(result.key, result.shape))


def test_prefix_cache_hits(engine: VllmEngine, requester: Requester, reference: Reference) -> None:
    [prefix] = random_prompts([3 * BLOCK], seed=2)
    tails = random_prompts([1, BLOCK, 50], seed=3)
    tokens = [np.concatenate([prefix, tail]) for tail in tails]
    requester.run(engine, [requester.request(prefix)])
    before = counter(engine, "vllm:prefix_cache_hits")
    results = requester.run(engine, [requester.request(ids) for ids in [prefix, *tokens]])
    # the last token is always computed, so the repeated prompt hits one block less
    assert counter(engine, "vllm:prefix_cache_hits") - before >= 2 * BLOCK + 3 * 3 * BLOCK
    for ids, result in zip([prefix, *tokens], results, strict=True):
        reference.check(ids, requester.fetch(result.key, result.shape))


def test_unusable_prompts_are_refused(
    engine: VllmEngine, requester: Requester, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_long, foreign, good = random_prompts([201, 20, 20], seed=4)
    foreign[5] = 512
    with pytest.raises(PromptRefused, match="201 tokens and the engine serves at most 200"):
        engine.admit(requester.request(too_long))
    with pytest.raises(PromptRefused, match="token id 512; the target's ids are 0 to 511"):
        engine.admit(requester.request(foreign))
    with pytest.raises(PromptRefused, match="the prompt is empty"):
        engine.admit(requester.request(np.zeros(0, np.int32)))
    monkeypatch.setattr(engine, "_max_prompt_tokens", 300)  # more than vLLM was told
    with pytest.raises(PromptRefused, match="vLLM refuses the prompt"):
        engine.admit(requester.request(random_prompts([250])[0]))
    [served] = requester.run(engine, [requester.request(good)])
    reference.check(good, requester.fetch(served.key, served.shape))


def test_requests_are_admitted_while_others_run(
    engine: VllmEngine, requester: Requester, reference: Reference
) -> None:
    first, second = random_prompts([200, 10], seed=8)
    early, late = requester.request(first), requester.request(second)
    engine.admit(early)
    assert list(engine.step()) == []  # a chunk of 32 tokens
    engine.admit(late)
    finished = []
    while len(finished) < 2:
        finished += engine.step()
    assert [end.request for end in finished] == [late, early]
    # delivered at once, not with the engine's next step: there is none before the early one's
    receipts = [requester.control.pop_reply(requester.rank, 60) for _ in range(2)]
    for ids, receipt in zip((second, first), receipts, strict=True):
        reference.check(ids, requester.fetch(receipt.key, receipt.shape))


def test_a_write_that_fails_is_one_prompts_failure(
    engine: VllmEngine, requester: Requester, reference: Reference
) -> None:
    first, second = random_prompts([30, 40], seed=5)
    bad = requester.request(first, key="")  # Mooncake takes no empty key
    failed, served = requester.run(engine, [bad, requester.request(second)])
    assert isinstance(failed, Refusal)
    assert not failed.permanent
    reference.check(second, requester.fetch(served.key, served.shape))


def test_rows_alone_do_not_depend_on_history(engine: VllmEngine, requester: Requester) -> None:
    """A prompt that has a batch and a cache to itself gets the same bits every time."""
    [ids] = random_prompts([150], seed=6)
    seen = []
    for _ in range(2):
        engine._engine.reset_prefix_cache()
        [result] = requester.run(engine, [requester.request(ids)])
        seen.append(requester.fetch(result.key, result.shape))
    assert seen[0].equal(seen[1])
    others = random_prompts([40, 60, 10], seed=7)
    engine._engine.reset_prefix_cache()
    results = requester.run(engine, [requester.request(i) for i in [*others, ids]])
    shared = requester.fetch(results[-1].key, results[-1].shape)
    assert relative_error(shared, seen[0]) < 1e-5


def test_the_target_answers_first(
    engine: VllmEngine, requester: Requester, reference: Reference
) -> None:
    """Greedy answers are those of Transformers; states are of prompt and answer."""
    lengths = [1, 31, 32, 70, 190]
    prompts = random_prompts(lengths, seed=11)
    greedy = Generation(max_tokens=40, temperature=0.0, top_p=1.0, seed=0, stop_token_ids=())
    requests = [
        msgspec.structs.replace(requester.request(ids), generation=greedy) for ids in prompts
    ]
    for ids, receipt in zip(prompts, requester.run(engine, requests), strict=True):
        answer = decode_tokens(receipt.answer)
        assert answer.tolist() == reference.continues(ids, min(40, 200 - ids.size))
        whole = np.concatenate([ids, answer])
        reference.check(whole, requester.fetch(receipt.key, receipt.shape))


def test_an_answer_ends_with_a_stop_token(engine: VllmEngine, requester: Requester) -> None:
    [ids] = random_prompts([30], seed=13)
    free = Generation(max_tokens=20, temperature=0.0, top_p=1.0, seed=0, stop_token_ids=())
    request = requester.request(ids)
    [reply] = requester.run(engine, [msgspec.structs.replace(request, generation=free)])
    words = decode_tokens(reply.answer).tolist()
    stop = msgspec.structs.replace(free, stop_token_ids=(words[3],))
    request = requester.request(ids)
    [stopped] = requester.run(engine, [msgspec.structs.replace(request, generation=stop)])
    expected = words[: words.index(words[3]) + 1]
    assert decode_tokens(stopped.answer).tolist() == expected
    assert stopped.shape[0] == ids.size + len(expected)


def test_no_room_for_an_answer(engine: VllmEngine, requester: Requester) -> None:
    generation = Generation(max_tokens=5, temperature=0.0, top_p=1.0, seed=0, stop_token_ids=())
    request = requester.request(random_prompts([200])[0])
    with pytest.raises(PromptRefused, match="200 tokens, which leaves no room for an answer"):
        engine.admit(msgspec.structs.replace(request, generation=generation))
