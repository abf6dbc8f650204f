from __future__ import annotations

import hashlib
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.conftest import MakeRun, Run
from tests.training.producer import Producer
from tests.training.test_state_cache import cache
from tests.training.tiny import training_config
from torchspec_hpc.data.sample import Sample
from torchspec_hpc.drafts.batch import PackedBatch
from torchspec_hpc.training.cache_plan import EVERYTHING
from torchspec_hpc.training.cached_states import CachedStates
from torchspec_hpc.training.evaluation import EvaluationSet
from torchspec_hpc.training.parallel import World
from torchspec_hpc.transfer.feed import GaveUp, SampleFailed
from torchspec_hpc.transfer.messages import Request

LENGTHS = np.array([5, 3, 8, 4, 6, 7, 3])
WINDOW_TOKENS = 12


class Samples:
    """Sample i consists of tokens i."""

    lengths = LENGTHS

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, index: int) -> Sample:
        length = int(LENGTHS[index])
        ids = np.full(length, index, dtype=np.int32)
        return Sample(index, ids, np.arange(length) > 1)


class States:
    """Answers with states that tell of the sample; notes what is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_silent = False
        self.most_lent = 0  # tokens of answers that somebody still held, at any time
        self._lent = 0
        self._open: dict[str, np.ndarray] = {}

    def submit(self, ticket: str, token_ids: np.ndarray) -> None:
        self.asked.append(ticket)
        self._open[ticket] = token_ids
        assert sum(map(len, self._open.values())) <= WINDOW_TOKENS

    def take(self, ticket: str, give_up: Callable[[], bool]) -> torch.Tensor:
        if self.is_silent and give_up():
            raise GaveUp("asked to stop")
        ids = torch.tensor(self._open.pop(ticket), dtype=torch.float32)
        memory = ids[:, None, None].expand(-1, 3, 8).numpy().copy()
        self._lend(len(ids))
        weakref.finalize(memory, self._lend, -len(ids))
        return torch.from_numpy(memory)

    def _lend(self, num_tokens: int) -> None:
        self._lent += num_tokens
        self.most_lent = max(self.most_lent, self._lent)


def never() -> bool:
    return False


MakeSet = Callable[..., EvaluationSet]


@pytest.fixture
def opened() -> Iterator[list[CachedStates]]:
    """Closed in the end; closing waits until everything is written."""
    caches: list[CachedStates] = []
    yield caches
    for kept in caches:
        kept.close()


@pytest.fixture
def make_set(
    tiny_target: Path, tmp_path: Path, one_rank: None, opened: list[CachedStates]
) -> MakeSet:
    """One rank's share, of as many ranks as one likes: the collective is of this process alone."""

    def make(
        states: States,
        rank: int = 0,
        size: int = 1,
        max_tokens: int = 1000,
        folder: str | None = "a",
        **settings: object,
    ) -> EvaluationSet:
        kept = states
        if folder is not None:
            (tmp_path / folder).mkdir(exist_ok=True)
            kept = CachedStates(cache(tiny_target, tmp_path / folder), states, EVERYTHING)
            opened.append(kept)
        return EvaluationSet(
            Samples(),
            kept,
            World(rank, size, torch.device("cpu")),
            training_config(**({"micro_batch_tokens": 10} | settings)),
            max_tokens,
            WINDOW_TOKENS,
        )

    return make


def supervised(batches: list[PackedBatch]) -> list[int]:
    """Samples with supervision, in order; checks that states and tokens belong together."""
    seen = []
    for batch in batches:
        ids = batch.input_ids
        assert torch.equal(batch.last, ids[:, None].expand(-1, 8).float())
        documents = zip(ids.split(batch.lengths.tolist()), batch.document_ids.unique(), strict=True)
        seen += [
            int(document[0])
            for document, at in documents
            if batch.loss_mask[batch.document_ids == at].any()
        ]
    return seen


def test_samples_are_asked_for_once_and_then_never_again(make_set: MakeSet):
    states = States()
    first = make_set(states)
    batches = first.batches(never)
    assert supervised(batches) == list(range(7))
    assert [batch.num_tokens for batch in batches] == [8, 8, 10, 10]
    assert states.asked == [f"eval-{index}" for index in range(7)]
    assert first.batches(never) is batches
    again = make_set(states, micro_batch_tokens=20).batches(never)
    assert supervised(again) == list(range(7))
    assert len(states.asked) == 7


def test_the_memory_of_answers_is_given_back(make_set: MakeSet):
    states = States()
    batches = make_set(states, folder=None).batches(never)
    assert sum(batch.num_tokens for batch in batches) == 36
    assert states.most_lent == 10  # of the longest micro-batch


def test_no_more_is_asked_for_than_in_training(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "WINDOW_TOKENS", 1000)
    assert make_set(States(), prefetch_depth=2)._window_tokens == 20


@pytest.mark.parametrize("settings", [{}, {"micro_batch_tokens": None, "micro_batch_size": 2}])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_any_number_of_ranks_evaluates_each_sample_once(make_set: MakeSet, size: int, settings):
    states = States()
    shares = [make_set(states, rank, size, **settings).batches(never) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) == -(-4 // size)
    assert sorted(index for share in shares for index in supervised(share)) == list(range(7))
    assert len(states.asked) == 7  # ranks without a pack of their own found the first in the cache


def test_a_rank_without_a_pack_does_not_need_the_cache(make_set: MakeSet):
    (batch,) = make_set(States(), rank=5, size=6).batches(never)
    assert supervised([batch]) == []
    assert batch.num_tokens == 8


def test_no_more_than_max_tokens(make_set: MakeSet, caplog: pytest.LogCaptureFixture):
    states = States()
    assert supervised(make_set(states, max_tokens=17).batches(never)) == [0, 1, 2]
    assert "first 3 of 7 samples: dataset.eval_max_tokens = 17" in caplog.text
    assert supervised(make_set(states, max_tokens=2).batches(never)) == [0]


def test_a_stop_ends_the_wait_and_what_came_is_kept(make_set: MakeSet):
    states = States()
    states.is_silent = True
    with pytest.raises(GaveUp, match="not all held-out samples came before the end"):
        make_set(states).batches(lambda: len(states.asked) > 3)
    assert len(states.asked) < 7
    others = States()
    make_set(others).batches(never)
    assert others.asked == [f"eval-{index}" for index in range(7 - len(others.asked), 7)]
    assert 0 < len(others.asked) < 7


def test_what_never_comes_ends_the_wait_with_its_reason(make_set: MakeSet, monkeypatch):
    states = States()

    def fail(ticket: str, give_up: Callable[[], bool]) -> torch.Tensor:
        raise SampleFailed("sample 'eval-0': refused")

    monkeypatch.setattr(states, "take", fail)
    with pytest.raises(SampleFailed, match="eval-0"):
        make_set(states).batches(never)


# ---- real trainers, real services -------------------------------------------------------------


def evaluated(run: Run) -> dict[int, float]:
    return {r["step"]: r["eval/accept_len"] for r in run.records() if "eval/accept_len" in r}


@pytest.mark.slow
def test_runs_share_what_the_engines_answered(make_run: MakeRun, engine: Producer):
    asked: dict[str, bytes] = {}

    def note(request: Request) -> None:
        if request.ticket.startswith("eval-"):
            asked[request.ticket] = request.tokens.astype("<i4").tobytes()

    engine.on_request = note
    settings = {"micro_batch_size": 1, "num_train_steps": 4}
    first = make_run("first", evaluate=True, **settings)
    assert first.train() == 0
    assert sorted(asked) == [f"eval-{index}" for index in range(5)]
    assert evaluated(first).keys() == {3, 4}
    tokens = dict(asked)
    asked.clear()

    second = make_run("second", evaluate=True, **settings)
    assert second.train() == 0
    assert not asked
    assert second.learning() == first.learning()
    two = make_run("two", evaluate=True, **settings)
    assert two.train(num_ranks=2) == 0
    assert not asked

    # rank 0 has all of its share, rank 1 waits for an engine that does not answer
    root = first.dir.root.parent / "cache" / "hidden_states"
    lost = hashlib.sha256(tokens["eval-1"]).hexdigest()[:32]
    (file,) = root.glob(f"*/*/{lost}.safetensors")
    file.unlink()
    stopped = make_run("stopped", evaluate=True, **settings)
    answer = threading.Event()

    def on_request(request: Request) -> None:
        note(request)
        if request.ticket.startswith("eval-"):
            stopped.dir.stop.write_text('{"reason": "test"}')
            answer.wait(60)

    engine.on_request = on_request
    try:
        assert stopped.train(num_ranks=2, timeout_s=60) == 85
    finally:
        answer.set()
    assert list(asked) == ["eval-1"]
    assert (stopped.dir.checkpoints / "latest").read_text() == "step_3\n"
    assert not evaluated(stopped)
    stopped.dir.stop.unlink()
    engine.on_request = note
    assert stopped.train(num_ranks=2) == 0
    assert stopped.learning() == two.learning()


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_steps",  # the evaluation is that of the last step, or not
    [pytest.param(3, marks=pytest.mark.long), 4],
)
def test_a_stop_during_an_evaluation_changes_nothing(
    make_run: MakeRun, engine: Producer, num_steps: int
):
    settings = {"micro_batch_size": 1, "num_train_steps": num_steps}
    straight = make_run("straight", evaluate=True, **settings)
    assert straight.train() == 0
    shutil.rmtree(straight.dir.root.parent / "cache" / "hidden_states")

    stopped = make_run("stopped", evaluate=True, **settings)
    answer = threading.Event()

    def on_request(request: Request) -> None:
        if request.ticket.startswith("eval-"):
            stopped.dir.stop.write_text('{"reason": "test"}')
            answer.wait(60)

    engine.on_request = on_request
    for _ in range(2):  # the second attempt gets no further
        answer.clear()
        try:
            assert stopped.train() == 85
        finally:
            answer.set()
        assert not stopped.dir.done.exists()
        assert [record["step"] for record in stopped.records()] == [1, 2]
        stopped.dir.stop.unlink()
    engine.on_request = lambda request: None
    assert stopped.train() == 0
    assert stopped.dir.done.exists()
    assert stopped.learning() == straight.learning()
    assert stopped.dir.best_checkpoint.read_text() == straight.dir.best_checkpoint.read_text()
