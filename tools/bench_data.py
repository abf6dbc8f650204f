#!/usr/bin/env python3
"""Measure preparation of training data: rows/s, tokens/s, CPU seconds, peak memory.

    python tools/bench_data.py --rows 100000 [--workers 2] [--datasets] [--output DIR]

Rows are those of the demo, over and over, each with its own id. ``--datasets`` also times the
Hugging Face ``datasets`` map with the same tokenizer and chat template (``pip install datasets``):
batches of rendered texts, as many processes, no loss mask.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
from typing_extensions import Self

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
    parser.add_argument(
        "--tokenized", action="store_true", help="rows of 16 token ids instead: the way of the data"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--datasets", action="store_true", help="time Hugging Face datasets, too")
    parser.add_argument("--output", type=Path, help="keep what is made; default: a temporary place")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    folder = args.output or Path(tempfile.mkdtemp(prefix="bench_data"))
    folder.mkdir(parents=True, exist_ok=True)
    path = write_rows(folder / f"rows_{args.rows}.jsonl", args.rows, args.tokenized)
    bench_prepare(path, folder / "cache", args.workers)
    if args.datasets:
        bench_datasets(path, folder / "datasets", args.workers)
    if args.output is None:
        shutil.rmtree(folder)


def write_rows(path: Path, num: int, tokenized: bool) -> Path:
    """The demo's conversations until there are so many."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    if tokenized:
        rows = [{"input_ids": list(range(16)), "loss_mask": [0] * 8 + [1] * 8}]
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
    with Meter() as meter:
        prepared = prepare_dataset(path, config, model, MAX_SEQ_LENGTH, cache)
        meter.report("prepare", len(prepared), prepared.report.num_tokens)
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

    with Meter() as meter:
        rows = datasets.load_dataset(
            "json", data_files=str(path), split="train", cache_dir=str(cache)
        )
        mapped = rows.map(
            tokenize, batched=True, num_proc=workers, remove_columns=rows.column_names
        )
        lengths = [len(ids) for ids in mapped.with_format("numpy")["input_ids"]]
        meter.report(f"datasets {datasets.__version__}", len(mapped), sum(lengths))


class Meter:
    """CPU seconds and memory of this process and its children, looked at twice a second."""

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        self._cpu_s: dict[int, float] = {}
        self._before = sum(self._processes().values())
        self.peak_mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self._processes()

    def _processes(self) -> dict[int, float]:
        this = psutil.Process()
        num_bytes = 0
        for process in [this, *this.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                times = process.cpu_times()
                self._cpu_s[process.pid] = times.user + times.system
                memory = process.memory_full_info()
                num_bytes += memory.pss
        self.peak_mib = max(getattr(self, "peak_mib", 0.0), num_bytes / 2**20)
        return self._cpu_s

    def report(self, name: str, num_rows: int, num_tokens: int) -> None:
        """Prints one measurement."""
        seconds = time.perf_counter() - self._started
        cpu_s = sum(self._processes().values()) - self._before
        print(
            f"{name}: {num_rows} rows in {seconds:.1f} s ({cpu_s:.1f} CPU s): "
            f"{num_rows / seconds:.0f} rows/s, {num_tokens / seconds:.0f} tokens/s; "
            f"{num_rows / cpu_s:.0f} rows and {num_tokens / cpu_s:.0f} tokens a CPU second; "
            f"peak of all processes {self.peak_mib:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
