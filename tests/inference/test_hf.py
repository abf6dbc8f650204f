"""The Transformers engine against Transformers' own hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import make_tiny_target
from tests.inference.conftest import (
    Reference,
    Requester,
    context_of,
    make_run,
    random_prompts,
)
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.inference.engines.base import PromptRefused
from torchspec_hpc.inference.engines.hf import HfEngine, choose_batch
from torchspec_hpc.inference.engines.hf_target import HookedTarget
from torchspec_hpc.transfer.messages import Receipt, Refusal, Request, encode_tokens

LAYERS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> HookedTarget:
    return HookedTarget(str(tiny_target), layers=LAYERS, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def engine(
    services: Endpoints, tmp_path_factory: pytest.TempPathFactory, tiny_target: Path
) -> Iterator[HfEngine]:
    run = make_run(
        tmp_path_factory.mktemp("hf") / "run",
        tiny_target,
        services,
        mooncake={"global_segment_size": 150_000},
    )
    engine = HfEngine(context_of(run))
    yield engine
    engine.close()


@pytest.mark.parametrize("lengths", [[1], [37], [5, 5], [1, 9, 64, 200], [200, 1, 1, 17, 33]])
def test_states(target: HookedTarget, reference: Reference, lengths: list[int]) -> None:
    prompts = random_prompts(lengths)
    for token_ids, states in zip(prompts, target.states(prompts), strict=True):
        reference.check(token_ids, states)


def test_other_dtypes(tiny_target: Path) -> None:
    target = HookedTarget(str(tiny_target), layers=(2, 4), dtype=torch.bfloat16, device="cpu")
    [states] = target.states(random_prompts([8]))
    assert states.dtype == torch.bfloat16
    assert states.shape == (8, 2, 64)


def test_the_last_layer_may_be_an_aux_layer(tiny_target: Path) -> None:
    target = HookedTarget(str(tiny_target), layers=(2, 4, 4), dtype=torch.float32, device="cpu")
    [states] = target.states(random_prompts([8]))
    assert states[:, 1].equal(states[:, 2])
    assert not states[:, 0].equal(states[:, 1])


def test_targets_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot load model.target_model_path = .*missing"):
        HookedTarget(str(tmp_path / "missing"), layers=(1,), dtype=torch.float32, device="cpu")


def test_requests_are_served(engine: HfEngine, requester: Requester, reference: Reference) -> None:
    tokens = random_prompts([20, 90, 1])
    receipts = requester.run(engine, [requester.request(ids) for ids in tokens])
    for ids, receipt in zip(tokens, receipts, strict=True):
        shape = (ids.size, 4, 64)
        assert receipt == Receipt(
            receipt.ticket, receipt.key, shape, "float32", 5, receipt.checksum
        )
        reference.check(ids, requester.fetch(receipt.key, receipt.shape))


def test_unusable_prompts_are_refused(engine: HfEngine, requester: Requester) -> None:
    too_long, foreign = random_prompts([201, 20])
    foreign[5] = -1
    with pytest.raises(PromptRefused, match="201 tokens and the engine serves at most 200"):
        engine.admit(requester.request(too_long))
    with pytest.raises(PromptRefused, match="token id -1; the target's ids are 0 to 511"):
        engine.admit(requester.request(foreign))
    with pytest.raises(PromptRefused, match="the prompt is empty"):
        engine.admit(requester.request(np.zeros(0, np.int32)))


def test_writes_that_fail(engine: HfEngine, requester: Requester, reference: Reference) -> None:
    """150,000 bytes are the states of 146 tokens."""
    fits, too_large, bad_key = random_prompts([146, 147, 10])
    requests = [requester.request(fits), requester.request(too_large)]
    first, second, third = requester.run(engine, [*requests, requester.request(bad_key, key="")])
    reference.check(fits, requester.fetch(first.key, first.shape))
    assert isinstance(second, Refusal)
    assert second.permanent
    assert "mooncake.global_segment_size" in second.reason
    assert isinstance(third, Refusal)
    assert not third.permanent


def test_batch_invariance(
    services: Endpoints, tmp_path: Path, tiny_target: Path, requester: Requester
) -> None:
    """A row has the same bits whatever is asked for beside it."""
    run = make_run(tmp_path / "run", tiny_target, services, inference={"batch_invariant": True})
    engine = HfEngine(context_of(run))
    tokens = random_prompts([50, 3, 77])
    alone = requester.run(engine, [requester.request(tokens[0])])
    together = requester.run(engine, [requester.request(ids) for ids in tokens])
    engine.close()
    first = requester.fetch(alone[0].key, alone[0].shape)
    assert first.equal(requester.fetch(together[0].key, together[0].shape))


@pytest.mark.parametrize(
    ("lengths", "max_prompts", "max_tokens", "expected"),
    [
        ([5], 4, 100, [5]),
        ([500, 1], 4, 100, [500]),
        ([5, 90, 6, 7], 4, 100, [5, 6, 7]),
        ([90, 5, 6, 7], 4, 100, [90]),
        ([25, 25, 25, 25, 25], 8, 100, [25] * 4),
        ([20, 40, 21, 1], 8, 100, [20, 21, 1]),
        ([1, 1, 1], 2, 100, [1, 1]),
        ([3, 1, 2], 1, 100, [3]),
    ],
)
def test_a_batch_is_the_oldest_request_and_its_likes(
    lengths: list[int], max_prompts: int, max_tokens: int, expected: list[int]
) -> None:
    requests = [
        Request(str(i), 0, 0, "", str(i), encode_tokens(ids))
        for i, ids in enumerate(random_prompts(lengths))
    ]
    batch = choose_batch(requests, max_prompts, max_tokens)
    assert batch[0] is requests[0]
    assert [len(request.tokens) for request in batch] == expected


def test_sharded_and_tied_targets_load(tmp_path: Path) -> None:
    path = make_tiny_target(tmp_path / "tied", tie_word_embeddings=True)
    target = HookedTarget(str(path), layers=(1,), dtype=torch.float32, device="cpu")
    [states] = target.states(random_prompts([4]))
    assert states.isfinite().all()
