from __future__ import annotations

import json
import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.templates import byte_tokenizer
from tests.helpers import conversations, read_jsonl, write_jsonl
from torchspec_hpc.config.dataset_schema import DatasetConfig
from torchspec_hpc.config.schema import ModelConfig
from torchspec_hpc.data.dataset import TokenDataset, prepare_dataset
from torchspec_hpc.data.report import DatasetReport, Rejection
from torchspec_hpc.errors import ConfigError, DataError
from torchspec_hpc.target.tokenizer import load_tokenizer

GOOD = conversations(20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("target")
    byte_tokenizer().save_pretrained(folder)
    return ModelConfig(target_model_path=str(folder))


def prepare(
    path: Path, model: ModelConfig, cache: Path, max_seq_length: int = 128, **dataset: Any
) -> TokenDataset:
    config = DatasetConfig(train_data_path=str(path), **dataset)
    return prepare_dataset(path, config, model, max_seq_length, cache)


def test_samples_are_the_rendered_rows(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    dataset = prepare(path, model, tmp_path / "cache", 1000)
    tokenizer = load_tokenizer(model, None)
    assert len(dataset) == len(GOOD)
    for index, row in enumerate(GOOD):
        sample = dataset[index]
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert sample.index == index
        assert tokenizer.decode(sample.input_ids.tolist()) == text
        said = [turn["content"] + "<|im_end|>" for turn in row["messages"][1::2]]
        assert tokenizer.decode(sample.input_ids[sample.loss_mask].tolist()) == "".join(said)
        assert (sample.input_ids.dtype, sample.loss_mask.dtype) == (np.int32, np.bool_)
        assert sample.input_ids.flags.writeable  # torch.from_numpy warns about others
    assert dataset.lengths.tolist() == [len(dataset[i].input_ids) for i in range(len(dataset))]
    assert dataset.lengths.dtype == np.int32
    assert isinstance(dataset.input_ids, np.memmap)
    assert dataset.report.num_tokens == len(dataset.input_ids) == dataset.lengths.sum()
    assert dataset.report.num_supervised == dataset.loss_mask.sum()
    for index in (-1, len(GOOD)):
        with pytest.raises(IndexError, match=f"sample {index} of 20"):
            dataset[index]


def test_bad_rows_are_reported_with_line_and_reason(
    tmp_path: Path, model: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*GOOD, {"prompt": "?"}, {"messages": []}, GOOD[0]])
    path.write_text(path.read_text() + "{broken\n")
    with caplog.at_level(logging.INFO):
        dataset = prepare(path, model, tmp_path / "cache", max_rejected_share=0.2)
    report = dataset.report
    assert (report.num_rows, report.num_samples) == (24, 21)
    assert [item.line for item in report.rejected] == [21, 22, 24]
    assert [item.kind for item in report.rejected] == [
        "no column of turns",
        "no assistant turn",
        "broken JSON",
    ]
    file = tmp_path / "cache" / dataset.key / "report.json"
    assert json.loads(file.read_text())["rejected"][1] == [22, "no assistant turn"]
    assert f"3 of 24 rows of {path} cannot be used, see {file}" in caplog.text
    assert "found prompt; expected conversations or messages" in caplog.text


def test_too_many_bad_rows(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}] * 5 + GOOD[:10] + [{"messages": []}])
    with pytest.raises(DataError) as error:
        prepare(path, model, tmp_path / "cache")
    lines = str(error.value).splitlines()
    assert lines[0] == f"6 of 16 rows of {path} cannot be used:"
    assert lines[2].startswith("       5         1  no column of turns: found text; expected")
    assert lines[3] == "       1        16  no assistant turn"
    assert lines[4] == "  allowed: dataset.max_rejected_share = 0.1 of the rows"
    report = Path(lines[5].rpartition(" ")[2])
    assert len(DatasetReport.read(report).rejected) == 6
    # nothing has to be tokenized again once the user has agreed
    before = report.stat().st_mtime_ns
    assert len(prepare(path, model, tmp_path / "cache", max_rejected_share=0.5)) == 10
    assert report.stat().st_mtime_ns == before


@pytest.mark.parametrize("rows", [[{"text": "x"}], []])
def test_no_good_row(tmp_path: Path, model: ModelConfig, rows: list[Any]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="at least one good row" if rows else "has no rows"):
        prepare(path, model, tmp_path / "cache", max_rejected_share=1.0)


def test_a_missing_file(tmp_path: Path, model: ModelConfig) -> None:
    with pytest.raises(DataError, match=f"there is no data file {tmp_path}/none.jsonl"):
        prepare(tmp_path / "none.jsonl", model, tmp_path / "cache")


def test_long_samples_keep_their_beginning(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    whole = prepare(path, model, tmp_path / "cache", 1000)
    length = int(np.median(whole.lengths))
    cut = prepare(path, model, tmp_path / "cache", length)
    assert cut.report.truncated == (whole.lengths > length).sum() > 0
    assert cut.lengths.max() == length
    np.testing.assert_array_equal(cut[0].input_ids, whole[0].input_ids[:length])
    np.testing.assert_array_equal(cut[0].loss_mask, whole[0].loss_mask[:length])


def test_samples_without_enough_to_learn_are_rejected(tmp_path: Path, model: ModelConfig) -> None:
    rows = [
        GOOD[0],
        {"messages": [{"role": "user", "content": "long " * 99}, *GOOD[1]["messages"]]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    cut = prepare(path, model, tmp_path / "cache", 128, max_rejected_share=0.5)
    assert cut.report.rejected == [
        Rejection(2, "answer cut off: 0 supervised tokens in the first 128")
    ]
    said = int(prepare(path, model, tmp_path / "cache", 2000)[0].loss_mask.sum())
    with pytest.raises(DataError, match=f"too few supervised tokens: {said}"):
        prepare(path, model, tmp_path / "cache", 2000, min_loss_tokens=said + 1)


def test_the_cache_is_keyed_by_all_that_counts(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    other = write_jsonl(tmp_path / "b.jsonl", GOOD[:-1])
    same = write_jsonl(tmp_path / "c.jsonl", GOOD)
    template = tmp_path / "t.jinja"
    template.write_text(load_tokenizer(model, None).chat_template.replace("You help", "You err"))
    cache = tmp_path / "cache"
    keys = [
        prepare(path, model, cache).key,
        prepare(other, model, cache).key,
        prepare(path, model, cache, 127).key,
        prepare(path, model, cache, last_turn_loss_only=True).key,
        prepare(path, model, cache, prompt_key="messages").key,
        prepare(path, model, cache, min_loss_tokens=2).key,
        prepare(path, model, cache, chat_template=str(template)).key,
    ]
    assert len(set(keys)) == len(keys)
    for again in (same, path):
        assert prepare(again, model, cache, last_turn_loss_only="auto").key == keys[0]
    assert sorted(os.listdir(cache)) == sorted(keys)


def test_an_unwritable_cache(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(ConfigError, match="cannot write the cache directory") as error:
        prepare(path, model, path / "cache")  # a file is in the way; root may write anywhere else
    assert "cache_dir" in str(error.value)


def test_a_failure_leaves_nothing_behind(tmp_path: Path, model: ModelConfig) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(GOOD)[:-10])
    with pytest.raises(DataError, match="broken JSON in element 20"):
        prepare(path, model, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


def _prepare_at_once(barrier: Any, path: Path, model: ModelConfig, cache: Path, out: Any) -> None:
    from torchspec_hpc.data import dataset as module

    publish = module._prepare

    def wait_then_prepare(*args: Any) -> None:
        barrier.wait(60)  # everybody has seen that there is no cache
        publish(*args)

    module._prepare = wait_then_prepare
    dataset = prepare(path, model, cache)
    out.put((dataset.key, dataset.input_ids.tobytes()))


def test_callers_at_once_share_one_result(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    context = multiprocessing.get_context("fork")
    barrier, out = context.Barrier(3), context.Queue()
    arguments = (barrier, path, model, tmp_path / "cache", out)
    callers = [context.Process(target=_prepare_at_once, args=arguments) for _ in range(3)]
    for caller in callers:
        caller.start()
    results = {out.get(timeout=60) for _ in callers}
    for caller in callers:
        caller.join(60)
    assert [caller.exitcode for caller in callers] == [0, 0, 0]
    [(key, _)] = results
    assert os.listdir(tmp_path / "cache") == [key]


def test_the_demo_data(tmp_path: Path) -> None:
    """The shipped conversations under the real tokenizer, where the demo model has been made."""
    root = Path(__file__).parents[2]
    target, demo = root / ".cache/smollm2-135m-instruct", root / "configs/demo/data/train.jsonl"
    if not (target / "tokenizer.json").is_file():
        pytest.skip("tools/prepare_demo_model.py has not run")
    rows = read_jsonl(demo)[:200]
    model = ModelConfig(target_model_path=str(target))
    dataset = prepare(write_jsonl(tmp_path / "a.jsonl", rows), model, tmp_path, 256)
    assert dataset.report.rejected == []
    tokenizer = load_tokenizer(model, None)
    for index, row in enumerate(rows):
        sample = dataset[index]
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        said = "".join(answer + "<|im_end|>" for answer in answers)
        found = tokenizer.decode(sample.input_ids[sample.loss_mask].tolist())
        assert found == said or (len(sample.input_ids) == 256 and said.startswith(found))
