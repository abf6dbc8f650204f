from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.test_state_cache import cache, sample, states
from torchspec_hpc.training.cache_plan import EVERYTHING, NOTHING
from torchspec_hpc.training.cached_states import CachedStates
from torchspec_hpc.training.state_cache import StateCache, name_of
from torchspec_hpc.transfer.feed import FeedStats, GaveUp, SampleFailed


class Engines:
    """Answers with states that follow from the first token."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._open: dict[str, np.ndarray] = {}

    def submit(self, ticket: str, token_ids: np.ndarray) -> None:
        self.asked.append(ticket)
        self._open[ticket] = token_ids

    def take(self, ticket: str, give_up: Callable[[], bool] | None = None) -> torch.Tensor:
        if give_up is not None and give_up():
            raise GaveUp("asked to stop")
        return answer(self._open.pop(ticket))

    def stats(self) -> FeedStats:
        return FeedStats(num_samples=len(self.asked))


def answer(token_ids: np.ndarray) -> torch.Tensor:
    return states(int(token_ids[0]), len(token_ids))


def take_all(cached: CachedStates, samples: list[np.ndarray]) -> None:
    for place, token_ids in enumerate(samples):
        cached.submit(f"{place}", token_ids)
    for place, token_ids in enumerate(samples):
        assert torch.equal(cached.take(f"{place}"), answer(token_ids))


@pytest.fixture
def kept(tiny_target: Path, tmp_path: Path) -> StateCache:
    return cache(tiny_target, tmp_path)


SAMPLES = [sample(*range(first, first + 5)) for first in range(20)]


def test_what_the_engines_answered_is_there_the_second_time(kept: StateCache):
    engines = Engines()
    first = CachedStates(kept, engines, EVERYTHING)
    take_all(first, SAMPLES)
    first.close()
    assert first.stats().num_samples == len(engines.asked) == 20
    without_engines = CachedStates(kept, None, EVERYTHING)
    take_all(without_engines, SAMPLES)
    assert without_engines.stats() == FeedStats()
    without_engines.close()


def test_no_more_is_kept_than_planned(kept: StateCache):
    names = sorted(map(name_of, SAMPLES))
    for keep_up_to, expected in [(NOTHING, set()), (names[7], set(names[:8]))]:
        cached = CachedStates(kept, Engines(), keep_up_to)
        take_all(cached, SAMPLES)
        cached.close()
        assert kept.names() == expected


def damage(kept: StateCache, token_ids: np.ndarray) -> None:
    (file,) = kept.folder.glob(f"*/{name_of(token_ids)}.*")
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def test_a_damaged_file_is_asked_for_and_mended(kept: StateCache):
    engines = Engines()
    kept.write(SAMPLES[0], answer(SAMPLES[0]))
    damage(kept, SAMPLES[0])
    for _ in range(2):
        cached = CachedStates(kept, engines, EVERYTHING)
        take_all(cached, SAMPLES[:1])
        cached.close()
    assert engines.asked == ["0"]


def test_without_engines_it_is_an_error(kept: StateCache):
    cached = CachedStates(kept, None, EVERYTHING)
    with pytest.raises(SampleFailed, match=r"no longer in .*inference_num_gpus = 0"):
        cached.submit("0", SAMPLES[0])
    kept.write(SAMPLES[1], answer(SAMPLES[1]))
    damage(kept, SAMPLES[1])
    cached.submit("1", SAMPLES[1])
    with pytest.raises(SampleFailed, match="or are damaged"):
        cached.take("1")
    cached.close()


def test_a_stop_ends_the_wait_and_the_ticket_stays(
    kept: StateCache, monkeypatch: pytest.MonkeyPatch
):
    kept.write(SAMPLES[0], answer(SAMPLES[0]))
    read, disk_answers = kept.read, threading.Event()

    def read_late(token_ids: np.ndarray) -> torch.Tensor | None:
        disk_answers.wait(60)
        return read(token_ids)

    monkeypatch.setattr(kept, "read", read_late)
    cached = CachedStates(kept, Engines(), EVERYTHING)
    cached.submit("disk", SAMPLES[0])
    cached.submit("engine", SAMPLES[1])
    for ticket in ("disk", "engine"):
        with pytest.raises(GaveUp):
            cached.take(ticket, lambda: True)
    disk_answers.set()
    assert torch.equal(cached.take("disk"), answer(SAMPLES[0]))
    assert torch.equal(cached.take("engine"), answer(SAMPLES[1]))
    cached.close()


def test_a_full_disk_does_not_keep_training_up(kept: StateCache, caplog: pytest.LogCaptureFixture):
    cached = CachedStates(kept, Engines(), EVERYTHING)
    shutil.rmtree(kept.folder)  # as writes fail
    take_all(cached, SAMPLES)
    cached.close()
    said = [record for record in caplog.records if "cannot write" in record.message]
    assert 1 <= len(said) <= 2  # of the writers that were at it


def test_what_a_writer_raises_is_raised(kept: StateCache, monkeypatch: pytest.MonkeyPatch):
    def write(token_ids: np.ndarray, states: torch.Tensor) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(kept, "write", write)
    cached = CachedStates(kept, Engines(), EVERYTHING)
    with pytest.raises(RuntimeError, match="a bug"):
        take_all(cached, SAMPLES)
