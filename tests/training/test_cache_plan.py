from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.training.test_state_cache import cache, sample, states
from tests.training.tiny import training_config
from torchspec_hpc.data.sample import Sample
from torchspec_hpc.data.sampler import Sampler
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.training.cache_plan import (
    EVERYTHING,
    NOTHING,
    plan_cache,
    readable,
    samples_between,
    sizes_of,
)
from torchspec_hpc.training.state_cache import StateCache

SIZES = {name * 32: 10 * place for place, name in enumerate("1234", 1)}  # 100 bytes


@pytest.fixture
def kept(tiny_target: Path, tmp_path: Path) -> StateCache:
    return cache(tiny_target, tmp_path)


def plan(kept: StateCache, max_bytes: int | None = None, has_engines: bool = True) -> str:
    return plan_cache(kept, "samples", SIZES, max_bytes=max_bytes, has_engines=has_engines)


@pytest.mark.parametrize(
    ("max_bytes", "last"),
    [
        (None, EVERYTHING),
        (100, EVERYTHING),
        (99, "3" * 32),
        (30, "2" * 32),
        (29, "1" * 32),
        (9, NOTHING),
    ],
)
def test_no_more_is_kept_than_the_bound(kept: StateCache, max_bytes, last: str):
    assert plan(kept, max_bytes) == last


def test_size_and_bound_are_said(kept: StateCache, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    plan(kept, 60)
    assert f"hidden states of 4 samples, 100 bytes; 0 of them are in {kept.folder}" in caplog.text
    assert "cache_max_bytes = 60 holds 3 of 4 samples; the others, 40 % of the" in caplog.text


def test_a_disk_without_room_is_an_error_before_training(
    kept: StateCache, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=99))
    with pytest.raises(ConfigError, match=r"100 bytes of hidden states .* 99 bytes free\n.*max_by"):
        plan(kept)
    assert plan(kept, 60) == "3" * 32


def test_a_missing_sample_is_an_error_before_training(kept: StateCache):
    with pytest.raises(ConfigError, match=r"4 of 4 samples are not in .*_gpus = 0; .*\n.*run "):
        plan(kept, has_engines=False)
    data = [Sample(0, sample(*ids), np.ones(len(ids), bool)) for ids in ([1, 2], [3], [1, 2])]
    sizes = sizes_of(kept, data, range(3))
    assert sorted(sizes.values()) == [kept.token_bytes, 2 * kept.token_bytes]
    for item in data:
        kept.write(item.input_ids, states(0, len(item.input_ids)))
    plan_cache(kept, "samples", sizes, max_bytes=None, has_engines=False)


def test_samples_that_a_run_uses():
    lengths = np.array([4] * 10)
    sampler = Sampler(lengths, training_config(micro_batch_size=2), shuffle=False)
    assert samples_between(sampler, 0, 3, 10) == [0, 1, 2, 3, 4, 5]
    assert samples_between(sampler, 4, 6, 10) == [0, 1, 8, 9]
    assert samples_between(sampler, 3, 10**9, 10) == list(range(10))
    assert samples_between(sampler, 3, 3, 10) == []


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (1536, "1.5 KiB"), (5 << 40, "5 TiB"), (10**18, "888.2 PiB")],
)
def test_readable_sizes(num_bytes: int, text: str):
    assert readable(num_bytes) == text
