from __future__ import annotations

import json
import logging
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.templates import byte_tokenizer
from tests.helpers import conversations, read_jsonl, write_jsonl
from torchspec_hpc.config.dataset_schema import DatasetConfig
from torchspec_hpc.config.schema import ModelConfig
from torchspec_hpc.data import dataset as dataset_module
from torchspec_hpc.data import encode
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
    assert dataset.report.num_tokens == dataset.lengths.sum()
    supervised = np.concatenate(list(dataset.supervised_tokens()))
    assert dataset.report.num_supervised == len(supervised)
    assert dataset.column("line").tolist() == list(range(1, 21))
    for index in (-1, len(GOOD)):
        with pytest.raises(IndexError, match=f"sample {index} of 20"):
            dataset[index]


def test_bad_rows_are_reported_with_line_and_reason(
    tmp_path: Path, model: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [{"prompt": "?"}, {"messages": []}]
    path = write_jsonl(tmp_path / "a.jsonl", [*GOOD, *bad, GOOD[0] | {"id": 99}])
    path.write_text(path.read_text() + "{broken\n")
    with caplog.at_level(logging.INFO):
        dataset = prepare(path, model, tmp_path / "cache", max_rejected_share=0.2)
    report = dataset.report
    assert (report.num_rows, report.num_samples) == (24, 21)
    assert report.rejected == {"no column of turns": 1, "no assistant turn": 1, "broken JSON": 1}
    file = tmp_path / "cache" / dataset.key / "rejected.jsonl"
    rejected = read_jsonl(file)
    assert [item["line"] for item in rejected] == [21, 22, 24]
    assert rejected[1] == {"file": str(path), "line": 22, "reason": "no assistant turn"}
    assert f"3 of 24 rows of {path} cannot be used, see {file}" in caplog.text
    assert "found prompt; expected conversations or messages" in caplog.text


def test_no_row_can_end_a_preparation(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse_row = encode.parse_row

    def parse_or_fail(row: Any, prompt_key: str | None) -> Any:
        return {}["key"] if row.get("id") == "3" else parse_row(row, prompt_key)

    monkeypatch.setattr(encode, "parse_row", parse_or_fail)
    half = GOOD[5] | {"tools": [{"name": "f", "description": "\ud800"}]}
    template = tmp_path / "tools.jinja"
    template.write_text("{{ tools | tojson if tools }}" + load_tokenizer(model, None).chat_template)
    path = write_jsonl(tmp_path / "a.jsonl", [*GOOD[:5], half, {"\ud800": 1}])
    prepared = prepare(
        path, model, tmp_path / "c", 500, max_rejected_share=0.5, chat_template=str(template)
    )
    assert len(prepared) == 4
    rejected = [item["reason"] for item in read_jsonl(prepared.folder / "rejected.jsonl")]
    assert rejected[:2] == [
        "unexpected KeyError: 'key'",
        "content is not Unicode: what the chat template makes of it has half of a surrogate pair",
    ]
    assert rejected[2].startswith("no column of turns: found \\ud800;")


def test_too_many_bad_rows(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"txt": "x"}] * 5 + GOOD[:10] + [{"messages": []}])
    with pytest.raises(DataError) as error:
        prepare(path, model, tmp_path / "cache")
    lines = str(error.value).splitlines()
    assert lines[0] == f"6 of 16 rows of {path} cannot be used:"
    assert lines[2].startswith("       5         1  no column of turns: found txt; expected")
    assert lines[3] == "       1        16  no assistant turn"
    assert lines[4] == "  allowed: dataset.max_rejected_share = 0.01 of the rows"
    rejected = Path(lines[5].rpartition(" ")[2])
    assert len(read_jsonl(rejected)) == 6
    report = rejected.with_name("report.json")
    assert DatasetReport.read(report).num_rejected == 6
    # nothing has to be tokenized again once the user has agreed
    before = report.stat().st_mtime_ns
    assert len(prepare(path, model, tmp_path / "cache", max_rejected_share=0.5)) == 10
    assert report.stat().st_mtime_ns == before


@pytest.mark.parametrize("rows", [[{"txt": "x"}], []])
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
    reason = "answer cut off: 0 supervised tokens in the first 128"
    assert cut.report.examples == {"answer cut off": Rejection(str(path), 2, reason)}
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
        prepare(path, model, cache, chat_template_kwargs={"enable_thinking": False}).key,
        prepare(path, model, cache, answer_parser="chatml").key,
        prepare(path, model, cache, unique_ids=False).key,
    ]
    assert len(set(keys)) == len(keys)
    for again in (same, path):
        assert prepare(again, model, cache, last_turn_loss_only="auto").key == keys[0]
    assert sorted(set(os.listdir(cache)) - {"digests"}) == sorted(keys)


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
    out.put((dataset.key, *(tuple(dataset[i].input_ids) for i in range(len(dataset)))))


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
    [(key, *_)] = results
    assert os.listdir(tmp_path / "cache") == [key]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "SHARD_ROWS", 6)
    monkeypatch.setattr(dataset_module, "_WORTH_PROCESSES", 3)


def same_samples(a: TokenDataset, b: TokenDataset) -> bool:
    assert len(a) == len(b)
    return all(
        np.array_equal(a[i].input_ids, b[i].input_ids)
        and np.array_equal(a[i].loss_mask, b[i].loss_mask)
        for i in range(len(a))
    )


@pytest.mark.slow  # each process imports transformers
@pytest.mark.usefixtures("small_shards")
def test_processes_and_one_process_make_the_same_shards(tmp_path: Path, model: ModelConfig) -> None:
    rows = [*GOOD, {"messages": []}, GOOD[3]]  # 22 rows: 4 shards
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    one = prepare(path, model, tmp_path / "one", num_prepare_workers=1, max_rejected_share=0.1)
    two = prepare(path, model, tmp_path / "two", num_prepare_workers=2, max_rejected_share=0.1)
    assert one.report == two.report
    assert same_samples(one, two)
    for shard in sorted(one.folder.glob("*.safetensors")):
        assert shard.read_bytes() == (two.folder / shard.name).read_bytes()
    assert len(list(one.folder.glob("shard_*"))) == 4
    assert one.report.rejected == {"no assistant turn": 1, "duplicate id": 1}
    rejected = read_jsonl(one.folder / "rejected.jsonl")[-1]
    assert rejected["line"] == 22
    assert rejected["reason"].startswith("duplicate id: it was in a.jsonl line 4;")
    supervised = [sample.input_ids[sample.loss_mask] for sample in (one[i] for i in range(20))]
    np.testing.assert_array_equal(
        np.concatenate(list(one.supervised_tokens())), np.concatenate(supervised)
    )


@pytest.mark.usefixtures("small_shards")
def test_preparation_goes_on_where_it_was_killed(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    whole = prepare(path, model, tmp_path / "whole", num_prepare_workers=1)
    made: list[int] = []
    encode_chunk = encode.encode_chunk

    def killed_at_the_third(*args: Any) -> int:
        made.append(args[2].number)
        if len(made) == 3:
            raise KeyboardInterrupt
        return encode_chunk(*args)

    monkeypatch.setattr(dataset_module, "encode_chunk", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(path, model, tmp_path / "cache", num_prepare_workers=1)
    resumed = prepare(path, model, tmp_path / "cache", num_prepare_workers=1)
    assert made == [0, 1, 2, 2, 3]
    assert resumed.report == whole.report
    assert same_samples(resumed, whole)


def test_a_directory_is_one_data_set(tmp_path: Path, model: ModelConfig) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    write_jsonl(folder / "b.jsonl", GOOD[10:])
    (folder / "a.json").write_text(json.dumps(GOOD[:10]))
    write_jsonl(folder / "sub" / "c.jsonl", [GOOD[3], {"id": "x", "messages": GOOD[0]["messages"]}])
    (folder / "state.json").write_text("{}")
    whole = prepare(write_jsonl(tmp_path / "all.jsonl", GOOD), model, tmp_path / "cache")
    parts = prepare(folder, model, tmp_path / "cache", max_rejected_share=0.1)
    assert [Path(file).name for file in parts.report.files] == ["a.json", "b.jsonl", "c.jsonl"]
    assert parts.report.rejected == {"duplicate id": 1}
    assert parts.report.examples["duplicate id"].file == str(folder / "sub" / "c.jsonl")
    assert parts.column("file").tolist() == [0] * 10 + [1] * 10 + [2]
    np.testing.assert_array_equal(parts[12].input_ids, whole[12].input_ids)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no data files"):
        prepare(tmp_path / "empty", model, tmp_path / "cache")


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    read_chunks = dataset_module.read_chunks

    def read_and_append(files: list[Path]) -> Any:
        yield from read_chunks(files)
        with path.open("a") as file:
            file.write("\n")

    monkeypatch.setattr(dataset_module, "read_chunks", read_and_append)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(path, model, tmp_path / "cache")
    monkeypatch.undo()
    assert len(prepare(path, model, tmp_path / "cache")) == 20


def test_a_file_that_changes_later_is_prepared_again(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    os.utime(path, (1, 1))  # old enough for its digest to be remembered
    first = prepare(path, model, tmp_path / "cache")
    assert len(os.listdir(tmp_path / "cache" / "digests")) == 1
    assert prepare(path, model, tmp_path / "cache").key == first.key
    path.write_text(path.read_text().replace("What", "When"))
    assert prepare(path, model, tmp_path / "cache").key != first.key


def test_text_and_tokens(tmp_path: Path, model: ModelConfig) -> None:
    tokens = {"input_ids": [5] * 9, "loss_mask": [0, 1] * 4 + [0]}
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the answer is in the text"}, tokens])
    prepared = prepare(path, model, tmp_path / "cache")
    assert (prepared.report.num_text, prepared.report.num_samples) == (1, 2)
    assert prepared[0].loss_mask.all()
    assert prepared[1].input_ids.tolist() == tokens["input_ids"]
    assert prepared[1].loss_mask.tolist() == tokens["loss_mask"]


def test_shards_are_bounded_in_bytes(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    monkeypatch.setattr(encode, "SHARD_BYTES", 1000)
    array, table = tmp_path / "a.json", tmp_path / "b.parquet"
    array.write_text(json.dumps(GOOD))
    parquet.write_table(pa.Table.from_pylist(GOOD), table)
    for path in (array, table, write_jsonl(tmp_path / "c.jsonl", GOOD)):
        assert len(list(encode.read_chunks([path]))) >= 3


def test_ids_outside_the_vocabulary(tmp_path: Path, tiny_target: Path) -> None:
    size = json.loads((tiny_target / "config.json").read_text())["vocab_size"]
    rows = [{"input_ids": [5] * 8 + [last], "loss_mask": [0] * 7 + [1, 1]} for last in (0, size)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    target = ModelConfig(target_model_path=str(tiny_target))
    prepared = prepare(path, target, tmp_path / "cache", max_rejected_share=0.5)
    reason = f"token id outside the vocabulary: {size} of {size}"
    assert list(prepared.report.examples.values()) == [Rejection(str(path), 2, reason)]


def test_a_mask_of_ones(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [5] * 9, "loss_mask": [1] * 9}] * 2)
    with pytest.raises(DataError, match="true for every token of every sample"):
        prepare(path, model, tmp_path / "cache")


def test_a_mask_of_zeros(tmp_path: Path, model: ModelConfig) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [5] * 9, "loss_mask": [0] * 9}] * 2)
    with pytest.raises(DataError, match="too few supervised tokens: 0"):
        prepare(path, model, tmp_path / "cache", max_rejected_share=1.0)


def test_many_threads_may_read(tmp_path: Path, model: ModelConfig) -> None:
    prepared = prepare(write_jsonl(tmp_path / "a.jsonl", GOOD), model, tmp_path / "cache")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: prepared[i % 20].input_ids.tolist(), range(400)))
    assert found == [prepared[i % 20].input_ids.tolist() for i in range(400)]


def test_the_demo_data(tmp_path: Path) -> None:
    """The shipped conversations under the real tokenizer, where the demo model has been made."""
    root = Path(__file__).parents[2]
    target, demo = root / ".cache/smollm2-135m-instruct", root / "configs/demo/data/train.jsonl"
    if not (target / "tokenizer.json").is_file():
        pytest.skip("tools/prepare_demo_model.py has not run")
    rows = read_jsonl(demo)[:200]
    model = ModelConfig(target_model_path=str(target))
    dataset = prepare(write_jsonl(tmp_path / "a.jsonl", rows), model, tmp_path, 256)
    assert dataset.report.rejected == {}
    tokenizer = load_tokenizer(model, None)
    for index, row in enumerate(rows):
        sample = dataset[index]
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        said = "".join(answer + "<|im_end|>" for answer in answers)
        found = tokenizer.decode(sample.input_ids[sample.loss_mask].tolist())
        assert found == said or (len(sample.input_ids) == 256 and said.startswith(found))
