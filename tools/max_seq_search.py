#!/usr/bin/env python3
"""Finds the longest sequence that a trainer can take, without engines.

    python tools/max_seq_search.py --preset 8b        on a GPU: until its memory is full
    python tools/max_seq_search.py --limit-gib 8      on a CPU: until the process has 8 GiB
    python tools/max_seq_search.py --preset 8b --gradient-checkpointing --draft-vocab 151936

Trains one fully supervised document of T tokens for two steps, each trial in a process of its own,
doubles T while it fits and then halves the gap.  The result is what training.micro_batch_tokens and
training.max_seq_length may be on such a device; leave a tenth for fragmentation and NCCL.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

#: Exit code of a trial that ran out of memory.
DOES_NOT_FIT = 3


def main() -> int:
    """Searches, or makes one trial."""
    options = parse()
    if options.trial:
        return trial(options)
    fits, too_long = 0, None
    tokens = options.start
    while too_long is None or too_long - fits > options.step:
        peak = ask(tokens)
        print(f"{tokens:>9} tokens: " + (f"{peak / 2**30:.2f} GiB" if peak else "does not fit"))
        if peak:
            fits = tokens
        else:
            too_long = tokens
        if fits >= options.most:
            break
        middle = fits * 2 if too_long is None else (fits + too_long) // 2
        tokens = min(options.most, max(options.step, middle // options.step * options.step))
        if too_long is not None and tokens in (fits, too_long):
            break
    if not fits:
        print(f"not even {too_long} tokens fit: try --gradient-checkpointing or --chunk-mib")
        return 1
    print(f"longest sequence that fits: {fits} tokens")
    return 0


def ask(tokens: int) -> int | None:
    """Peak memory of a trial in bytes; None: it does not fit.

    Raises:
        RuntimeError: It failed for another reason.
    """
    command = [sys.executable, __file__, *sys.argv[1:], "--trial", "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == DOES_NOT_FIT or done.returncode == -9:  # the kernel's way to say it
        return None
    if done.returncode:
        raise RuntimeError(f"a trial with {tokens} tokens failed:\n{done.stderr[-2000:]}")
    peak: int = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    return peak


def trial(options: argparse.Namespace) -> int:
    """Two steps of one length."""
    import bench_steps as steps
    import torch

    options.case = (options.tokens, options.draft_vocab)
    options.data, options.document, options.fsdp = "dense", options.tokens, "full_shard"
    case = steps.Case.make(options)
    if options.limit_gib and case.is_cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.limit_gib * 2**30 / total))
    elif options.limit_gib:
        steps.limit_memory(int(options.limit_gib * 2**30), DOES_NOT_FIT)
    try:
        run = case.fast({"gradient_checkpointing": options.gradient_checkpointing})
        for _ in range(2):
            run()
    except torch.OutOfMemoryError:
        return DOES_NOT_FIT
    peak = torch.cuda.max_memory_allocated() if case.is_cuda else steps.resident_peak()
    print(json.dumps({"peak_bytes": peak}))
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("smollm2", "8b"), default="smollm2")
    parser.add_argument("--draft-vocab", type=int, help="rows of the draft's head")
    parser.add_argument("--ttt", type=int, default=7, help="K")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--chunk-mib", type=int, help="training.loss_chunk_mib")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--start", type=int, default=1024, help="first length that is tried")
    parser.add_argument("--most", type=int, default=2**20, help="longest that is tried")
    parser.add_argument("--step", type=int, default=256, help="precision of the answer, tokens")
    parser.add_argument("--limit-gib", type=float, help="memory to stay below; needed on CPUs")
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--trial", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
