#!/usr/bin/env python3
"""Speed and memory of one optimizer step against the plain one, without engines.

    python tools/bench_trainer.py                                  SmolLM2-135M's draft, on a CPU
    python tools/bench_trainer.py --data chat --draft-vocab 49152
    python tools/bench_trainer.py --preset 8b --tokens 8192 --compare compile checkpointing

Every row compares, in one run and in turns:

- *fast*: the trainer's own step, as ``torchspec-hpc`` runs it, FSDP2 and optimizer included;
- *plain*: tests/drafts/padded_eagle3.py on the same samples, two at a time, padded: the step of the
  reference system, with AdamW;
- *products*: the fast step's matrix products alone, attention's among them: its floor.

Hidden states are random.  Medians of --rounds; peak memory is measured in a process of its own per
step: growth over the built model, after two steps.  --json keeps everything.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import bench_steps as steps
import torch
from rich.console import Console
from rich.table import Table

COLUMNS = (
    "data", "tokens", "V_draft", "step", "s/step", "tokens/s", "supervised/s", "x plain",
    "of products", "peak GiB", "x plain", "skipped", "MFU",
)  # fmt: skip


def main() -> None:
    """Measures every combination that was asked for."""
    options = parse()
    if options.memory_of:
        print(json.dumps({"peak_bytes": steps.memory_of(options, options.memory_of)}))
        return
    rows = []
    is_main = os.environ.get("RANK", "0") == "0"
    for tokens in options.tokens:
        for draft_vocab in options.draft_vocab or [steps.PRESETS[options.preset].draft_vocab]:
            options.case = (tokens, draft_vocab)
            rows += measure(options)
            if is_main:
                Console(width=150).print(table(options, rows))
    if options.json and is_main:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """One combination: all its steps, in turns."""
    case = steps.Case.make(options)
    names = ["fast", *options.compare, *(() if options.no_plain else ("plain",)), "products"]
    if case.is_cuda:  # steady, and too small for all at once
        seconds = {name: timed(case, [name], options.rounds)[name] for name in names}
    else:
        seconds = timed(case, names, options.rounds)
    seconds = {name: times for name, times in seconds.items() if times}
    if options.profile:
        case.print_profile()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    floor = medians.pop("products")
    # a ratio per round: the machine's speed drifts
    return [
        {
            "data": options.data,
            "tokens": case.num_tokens,
            "supervised": case.num_supervised,
            "draft_vocab": options.case[1],
            "preset": options.preset,
            "ttt": options.ttt,
            "dtype": case.dtype_name,
            "device": case.device_name,
            "threads": torch.get_num_threads(),
            "step": name,
            "seconds": median,
            "all_seconds": seconds[name],
            "products_seconds": floor,
            "of_products": ratio(seconds["products"], seconds[name]),
            "speedup": ratio(seconds["plain"], seconds[name]) if "plain" in seconds else None,
            "peak_bytes": case.peaks.get(name) or peak_in_its_own_process(options, name),
            "skipped": case.skipped_share,
            "tflops": case.flops / median / 1e12 if name != "plain" else None,
            "mfu": case.flops / median / (options.peak_tflops * 1e12)
            if options.peak_tflops and name != "plain"
            else None,
            "recompiles": case.num_recompiles(),
        }
        for name, median in medians.items()
    ]


def timed(case: steps.Case, names: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of some ways to train, in turns; none of one that does not fit into memory."""
    gc.collect()
    torch.cuda.empty_cache()
    runners = {name: case.runner(name, steps.VARIANTS.get(name, {})) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    case.reset_peak()
    for round_ in range(rounds + 1):
        for name, run in runners.items():
            case.synchronize()
            start = time.perf_counter()
            try:
                run()
            except torch.OutOfMemoryError as error:
                print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
                return {name: []}
            case.synchronize()
            if round_:  # the first one is warm-up
                seconds[name].append(time.perf_counter() - start)
    if case.is_cuda:
        case.peaks[names[0]] = case.grown_peak()
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios of each round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def peak_in_its_own_process(options: argparse.Namespace, name: str) -> int | None:
    """Growth of memory by two steps."""
    if options.no_memory:
        return None
    tokens, draft_vocab = options.case
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
    command += ["--tokens", str(tokens), "--draft-vocab", str(draft_vocab)]
    environ = {key: value for key, value in os.environ.items() if key != "MASTER_PORT"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: no figure for memory: {done.stderr[-300:]}", file=sys.stderr)
        return None
    peak: int = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    return peak


def table(options: argparse.Namespace, rows: list[dict[str, object]]) -> Table:
    """What people read."""
    made = Table(*COLUMNS, title=f"{options.preset}, K={options.ttt}, {rows[0]['dtype']}")
    plain_peak = {
        (row["tokens"], row["draft_vocab"]): row["peak_bytes"]
        for row in rows
        if row["step"] == "plain"
    }
    for row in rows:
        before = plain_peak.get((row["tokens"], row["draft_vocab"]))
        peak, seconds = row["peak_bytes"], row["seconds"]
        assert isinstance(seconds, float)
        made.add_row(
            str(row["data"]), str(row["tokens"]), str(row["draft_vocab"]), str(row["step"]),
            f"{seconds:.3f}", f"{row['tokens'] / seconds:.0f}",
            f"{row['supervised'] / seconds:.0f}", number(row["speedup"], "{:.2f}"),
            number(row["of_products"], "{:.0%}"), number(peak and peak / 2**30, "{:.2f}"),
            number(peak and before and peak / before, "{:.2f}"), number(row["skipped"], "{:.0%}"),
            number(row["mfu"], "{:.1%}"),
        )  # fmt: skip
    return made


def number(value: object, form: str) -> str:
    """The value, or a dash."""
    return "-" if value is None else form.format(value)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=steps.PRESETS, default="smollm2")
    parser.add_argument(
        "--data",
        choices=("dense", "chat"),
        default="dense",
        help="dense: two samples of --tokens each, all supervised; chat: lengths of "
        "64 to 1024 in turns, about half supervised, --tokens in all",
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--draft-vocab", type=int, nargs="+", help="rows of the draft's head")
    parser.add_argument("--document", type=int, help="dense: tokens of a sample, --tokens in all")
    parser.add_argument("--fsdp", choices=("full_shard", "replicate"), default="full_shard")
    parser.add_argument("--profile", action="store_true", help="print the longest operations")
    parser.add_argument("--ttt", type=int, default=7, help="K")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    parser.add_argument("--compare", nargs="*", choices=steps.VARIANTS, default=[])
    parser.add_argument("--chunk-mib", type=int, help="training.loss_chunk_mib")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU")
    parser.add_argument("--no-plain", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.case = (options.tokens[-1], (options.draft_vocab or [None])[-1])
    return options


if __name__ == "__main__":
    main()
