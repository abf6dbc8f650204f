"""When a prompt is complete, whatever the scheduler does to it."""

from __future__ import annotations

import random
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from torchspec_hpc.inference.delivery import Destination
from torchspec_hpc.inference.engines.vllm_tracking import PromptTracker, Save

BLOCK = 4


def destination(req_id: str) -> Destination:
    return Destination(f"ticket-{req_id}", f"key-{req_id}", "host:1", 3)


def new(req_id: str, tokens: int, blocks: list[int], computed: int = 0, ours: bool = True) -> Any:
    params = {"kv_transfer_params": asdict(destination(req_id))}
    return SimpleNamespace(
        req_id=req_id,
        prompt_token_ids=[7] * tokens,
        sampling_params=SimpleNamespace(extra_args=params if ours else None),
        block_ids=([0], blocks),  # the states are in group 1
        num_computed_tokens=computed,
    )


def step(
    scheduled: dict[str, int],
    *news: Any,
    cached: dict[str, tuple[list[int] | None, int]] | None = None,
    resumed: tuple[str, ...] = (),
) -> Any:
    cached = cached or {}
    return SimpleNamespace(
        num_scheduled_tokens=scheduled,
        scheduled_new_reqs=list(news),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached),
            resumed_req_ids=set(resumed),
            new_block_ids=[None if b is None else ([0], b) for b, _ in cached.values()],
            num_computed_tokens=[n for _, n in cached.values()],
        ),
    )


def save(req_id: str, tokens: int, *blocks: int) -> Save:
    return Save(destination(req_id), tokens, blocks)


def test_one_step() -> None:
    assert PromptTracker(1).step(step({"a": 6}, new("a", 6, [3, 9]))) == [save("a", 6, 3, 9)]


def test_chunks() -> None:
    tracker = PromptTracker(1)
    assert tracker.step(step({"a": 4}, new("a", 9, [3]))) == []
    # the blocks for the whole prompt are there; its rows are not
    assert tracker.step(step({"a": 4}, cached={"a": ([5, 6], 4)})) == []
    assert tracker.step(step({"a": 1}, cached={"a": (None, 8)})) == [save("a", 9, 3, 5, 6)]
    assert tracker.step(step({"a": 1}, cached={"a": (None, 9)})) == []


def test_prefix_cache() -> None:
    # 8 of 9 tokens were computed for an earlier prompt; their blocks are shared
    output = step({"a": 1}, new("a", 9, [3, 4, 5], computed=8))
    assert PromptTracker(1).step(output) == [save("a", 9, 3, 4, 5)]


def test_preemption_replaces_the_blocks() -> None:
    tracker = PromptTracker(1)
    assert tracker.step(step({"a": 4}, new("a", 8, [3]))) == []
    resumed = step({"a": 8}, cached={"a": ([6, 7], 0)}, resumed=("a",))
    assert tracker.step(resumed) == [save("a", 8, 6, 7)]


def test_preempted_prompts_may_come_back_as_new_ones() -> None:
    tracker = PromptTracker(1)
    assert tracker.step(step({"a": 4}, new("a", 8, [3]))) == []
    assert tracker.step(step({"a": 8}, new("a", 8, [6, 7]))) == [save("a", 8, 6, 7)]
    assert tracker.step(step({"a": 8}, new("a", 8, [1, 2]))) == []


def test_foreign_and_forgotten_requests() -> None:
    tracker = PromptTracker(1)
    assert tracker.step(step({"x": 4}, new("x", 4, [3], ours=False))) == []
    assert tracker.step(step({"a": 4}, new("a", 8, [3]))) == []
    assert not tracker.forget("a")
    assert not tracker.forget("never seen")
    assert tracker.step(step({"a": 4}, cached={"a": ([4], 4)})) == []


@given(seed=st.integers(0, 2**32), tokens=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_any_schedule_saves_each_prompt_once(seed: int, tokens: list[int]) -> None:
    """Plays a scheduler that chunks, interleaves and preempts at random."""
    rng = random.Random(seed)
    tracker, fresh_block = PromptTracker(1), iter(range(10_000))
    computed = dict.fromkeys(range(len(tokens)), 0)
    blocks: dict[int, list[int]] = {}
    preempted: set[int] = set()
    saved: dict[str, Save] = {}
    while computed:
        scheduled, news, cached, resumed = {}, [], {}, []
        for i in list(computed):
            name = str(i)
            if rng.random() < 0.2:  # not in this step; perhaps its blocks are taken away
                if i in blocks and rng.random() < 0.5:
                    computed[i], blocks[i] = 0, []
                    preempted.add(i)
                continue
            amount = rng.randint(1, tokens[i] - computed[i])
            needed = -(-(computed[i] + amount) // BLOCK)
            first = i not in blocks
            added = [next(fresh_block) for _ in range(needed - len(blocks.get(i, [])))]
            blocks.setdefault(i, []).extend(added)
            scheduled[name] = amount
            if first:
                news.append(new(name, tokens[i], list(blocks[i])))
            else:
                cached[name] = (added or None, computed[i])
                if i in preempted:
                    resumed.append(name)
                    preempted.discard(i)
            computed[i] += amount
        for found in tracker.step(step(scheduled, *news, cached=cached, resumed=tuple(resumed))):
            assert found.destination not in saved
            saved[found.destination] = found
        for i in [i for i in computed if computed[i] == tokens[i]]:
            assert saved[destination(str(i))] == save(str(i), tokens[i], *blocks[i])
            del computed[i]
    assert len(saved) == len(tokens)
