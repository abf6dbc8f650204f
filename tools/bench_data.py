#!/usr/bin/env python3
"""Measure preparation of training data: rows/s, tokens/s, peak memory.

    python tools/bench_data.py --rows 100000 [--workers 2] [--datasets] [--output DIR]

Rows are those of the demo, over and over, each with its own id. ``--datasets`` also times the
Hugging Face ``datasets`` map with the same tokenizer and chat template (``pip install datasets``):
batches of rendered texts, as many processes, no loss mask.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / ".cache/smollm2-135m-instruct"
ROWS = ROOT / "configs/demo/data/train.jsonl"
MAX_SEQ_LENGTH = 512


def main() -> None:
    """Runs the benchmark and prints a line for each measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--datasets", action="store_true", help="time Hugging Face datasets, too")
    parser.add_argument("--output", type=Path, help="keep what is made; default: a temporary place")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    folder = args.output or Path(tempfile.mkdtemp(prefix="bench_data"))
    folder.mkdir(parents=True, exist_ok=True)
    path = write_rows(folder / f"rows_{args.rows}.jsonl", args.rows)
    bench_prepare(path, folder / "cache", args.workers)
    if args.datasets:
        bench_datasets(path, folder / "datasets", args.workers)
    if args.output is None:
        shutil.rmtree(folder)


def write_rows(path: Path, num: int) -> Path:
    """The demo's conversations until there are so many."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for i, row in enumerate(islice(cycle(rows), num)):
            file.write(json.dumps(row | {"id": f"row-{i}"}) + "\n")
    return path


def bench_prepare(path: Path, cache: Path, workers: int) -> None:
    """Our preparation, then opening what it made."""
    from torchspec_hpc.config.dataset_schema import DatasetConfig
    from torchspec_hpc.config.schema import ModelConfig
    from torchspec_hpc.data.dataset import TokenDataset, prepare_dataset

    config = DatasetConfig(train_data_path=str(path), num_prepare_workers=workers)
    model = ModelConfig(target_model_path=str(TARGET))
    started = time.perf_counter()
    prepared = prepare_dataset(path, config, model, MAX_SEQ_LENGTH, cache)
    report("prepare", time.perf_counter() - started, len(prepared), prepared.report.num_tokens)
    started = time.perf_counter()
    dataset = TokenDataset(prepared.folder)
    print(f"open {len(dataset)} samples: {1e3 * (time.perf_counter() - started):.1f} ms")
    size = sum(file.stat().st_size for file in prepared.folder.iterdir())
    print(f"on disk: {size / 2**20:.0f} MiB of {path.stat().st_size / 2**20:.0f} MiB JSON")


def bench_datasets(path: Path, cache: Path, workers: int) -> None:
    """``datasets``: load the JSON, then map it to tokens."""
    import datasets
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    tokenizer = AutoTokenizer.from_pretrained(TARGET)

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [tokenizer.apply_chat_template(m, tokenize=False) for m in batch["messages"]]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return {"input_ids": [i[:MAX_SEQ_LENGTH] for i in ids]}

    started = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    mapped = rows.map(tokenize, batched=True, num_proc=workers, remove_columns=rows.column_names)
    seconds = time.perf_counter() - started
    num_tokens = sum(len(ids) for ids in mapped.with_format("numpy")["input_ids"])
    report(f"datasets {datasets.__version__}", seconds, len(mapped), num_tokens)


def report(name: str, seconds: float, num_rows: int, num_tokens: int) -> None:
    """Prints one measurement; memory is the most that any process had so far."""
    peak = [
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    print(
        f"{name}: {num_rows} rows in {seconds:.1f} s, {num_rows / seconds:.0f} rows/s, "
        f"{num_tokens / seconds:.0f} tokens/s, peak {peak[0]:.0f} MiB, "
        f"largest child {peak[1]:.0f} MiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
