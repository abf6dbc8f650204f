"""Answers of the target: what is asked for, what is trained on, and whole runs of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.training.conftest import MakeRun
from tests.training.producer import Producer
from torchspec_hpc.config import parse_config
from torchspec_hpc.config.inference_schema import GenerationConfig
from torchspec_hpc.data.sample import Sample
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.training.answers import TargetAnswers, check_prompts, prompt_length, seed_of
from torchspec_hpc.transfer.messages import Generation, Request


def sample_of(mask: list[int], index: int = 4) -> Sample:
    ids = np.arange(10, 10 + len(mask), dtype=np.int32)
    return Sample(index, ids, np.array(mask, np.bool_))


@pytest.mark.parametrize(
    ("mask", "expected"),
    [([0, 0, 1, 1], 2), ([0, 1, 1, 0, 0, 1, 1, 0], 5), ([1], 0), ([0, 1, 0, 1, 0, 1], 5)],
)
def test_the_prompt_ends_before_the_last_answer(mask: list[int], expected: int) -> None:
    assert prompt_length(sample_of(mask)) == expected


def test_what_is_asked_for_and_what_is_trained_on() -> None:
    asked = {}

    class States:
        def submit(self, ticket: str, token_ids: np.ndarray, generation: Generation) -> None:
            asked[ticket] = token_ids.tolist(), generation

        def take_with_answer(self, ticket, give_up=None):
            return torch.zeros(7, 4, 8), np.array([7, 8], np.int32)

    config = GenerationConfig(max_tokens=5, temperature=0.5, top_p=0.9, seed=3)
    answers = TargetAnswers(States(), config, max_seq_length=9)
    sample = sample_of([0, 1, 0, 0, 0, 1, 1])
    assert answers.most_tokens(sample) == 9  # 5 + 5, cut
    answers.submit("t", sample)
    expected = Generation(5, 0.5, 0.9, seed_of(3, sample.index), ())
    assert asked == {"t": ([10, 11, 12, 13, 14], expected)}
    answered, states = answers.take("t", sample, lambda: False)
    assert answered.input_ids.tolist() == [10, 11, 12, 13, 14, 7, 8]
    assert answered.loss_mask.tolist() == [False] * 5 + [True] * 2
    assert states.shape[0] == 7


def test_each_sample_has_a_seed_of_its_own() -> None:
    seeds = {seed_of(seed, index) for seed in range(3) for index in range(300)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.slow
def test_a_stopped_run_gets_the_same_answers(make_run: MakeRun, engine: Producer) -> None:
    respond = {
        "engine": "vllm",
        "respond": "target",
        "generation": {"max_tokens": 20, "temperature": 1.0},
    }
    settings = {"micro_batch_tokens": 200, "num_train_steps": 6, "inference": respond}
    straight = make_run("straight", **settings)
    assert straight.train() == 0
    assert straight.records()[-1]["train/loss"] < straight.records()[0]["train/loss"]

    stopped = make_run("stopped", **settings)

    def stop(request: Request) -> None:
        assert request.generation is not None
        if request.ticket == "train-2.0":
            stopped.dir.stop.write_text('{"reason": "test"}')

    engine.on_request = stop
    assert stopped.train() == 85
    engine.on_request = lambda request: None
    stopped.dir.stop.unlink()
    assert stopped.train() == 0
    assert stopped.learning() == straight.learning()


def test_rows_without_a_prompt_are_refused_before_training(tmp_path) -> None:
    answered, plain = sample_of([0, 1, 1]), sample_of([1, 1, 1])
    raw = {
        "output_dir": str(tmp_path),
        "model": {"target_model_path": "x/y"},
        "dataset": {"train_data_path": "rows.jsonl"},
        "inference": {"respond": "target"},
    }
    config = parse_config(raw, base_dir=tmp_path, source="test")
    check_prompts([answered], config)
    with pytest.raises(ConfigError, match=r"2 of 3 rows of .*rows.jsonl have no prompt"):
        check_prompts([answered, plain, plain], config)
