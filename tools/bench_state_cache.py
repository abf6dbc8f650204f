#!/usr/bin/env python3
"""Measure the cache of hidden states on a disk against plain files on the same disk.

    python tools/bench_state_cache.py [--folder DIR] [--sizes-mib 0.25 1 4 16 64] [--total-mib 512]

For every size of a sample's states, one after the other and so under the same load:

======  ==========================================================================================
write   ``StateCache.write``, against writing the same bytes to a plain file
file    plain files read into a warm buffer: what no cache can beat
read    ``StateCache.read``, checksum included, in one thread
ahead   ``CachedStates``, as trainers use it: 4 samples open at a time, read in the background
======  ==========================================================================================

GB/s (1e9 bytes), medians of the repeats.  *Cold* has asked the kernel to drop the pages first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from torchspec_hpc.config import parse_config
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.training.cache_plan import EVERYTHING
from torchspec_hpc.training.cached_states import CachedStates
from torchspec_hpc.training.state_cache import StateCache

MIB = 1024**2
WINDOW = 4
#: Qwen3-8B: 3 aux layers and the last one, bfloat16; 32 KiB a token
AUX_LAYERS = (2, 18, 33)
TARGET = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "dtype": "bfloat16",
}


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary)")
    parser.add_argument("--sizes-mib", type=float, nargs="+", default=[0.25, 1, 4, 16, 64])
    parser.add_argument("--total-mib", type=int, default=512, help="of all samples of a size")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("         |     write      |         warm         |         cold         |")
    print("     MiB |  file   write  |  file   read   ahead |  file   read   ahead |")
    for size_mib in arguments.sizes_mib:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            bench = Bench(Path(folder), size_mib, arguments.total_mib)
            print(bench.row(size_mib, arguments.repeats), flush=True)


class Bench:
    """Samples of one size, in the cache and as plain files."""

    def __init__(self, folder: Path, size_mib: float, total_mib: int) -> None:
        (folder / "config.json").write_text(json.dumps(TARGET))
        raw = {
            "output_dir": str(folder),
            "model": {"target_model_path": str(folder)},
            "dataset": {"train_data_path": "unused"},
            "inference": {"dtype": "bfloat16", "cache_dir": str(folder / "states")},
        }
        config = parse_config(raw, base_dir=folder, source="benchmark")
        spec = TargetSpec.from_path(str(folder))
        self.cache = StateCache(config, spec, AUX_LAYERS, "cpu")
        num_tokens = int(size_mib * MIB) // self.cache.token_bytes
        num_samples = max(WINDOW, int(total_mib / size_mib))
        shape = (num_tokens, len(AUX_LAYERS) + 1, spec.hidden_size)
        self.states = torch.randn(shape).to(torch.bfloat16)
        self.samples = [np.full(num_tokens, index, np.int32) for index in range(num_samples)]
        self.files = [folder / f"plain_{index}" for index in range(num_samples)]
        self.buffer = memoryview(bytearray(self.states.nbytes))
        self.num_bytes = num_samples * self.states.nbytes

    def row(self, size_mib: float, repeats: int) -> str:
        """Writes everything once, reads it some times over, and says how fast that was."""
        written = [self._gb_per_s(write) for write in (self._write_files, self._write_cache)]
        reads = (self._read_files, self._read_cache, self._read_ahead)
        cells = [" ".join(f"{speed:6.2f}" for speed in written)]
        for is_cold in (False, True):
            speeds = [[self._gb_per_s(read, is_cold) for read in reads] for _ in range(repeats)]
            medians = map(statistics.median, zip(*speeds, strict=True))
            cells.append(" ".join(f"{speed:6.2f}" for speed in medians))
        return f"{size_mib:8.2f} | {'  | '.join(cells)} |"

    def _gb_per_s(self, work: Callable[[], None], is_cold: bool = False) -> float:
        if is_cold:
            _drop_pages(self.files)
            _drop_pages(list(self.cache.folder.glob("*/*")))
        start = time.monotonic()
        work()
        return self.num_bytes / (time.monotonic() - start) / 1e9

    def _write_files(self) -> None:
        content = self.states.view(torch.uint8).numpy().data
        for file in self.files:
            with file.open("wb") as opened:
                opened.write(content)

    def _write_cache(self) -> None:
        for token_ids in self.samples:
            self.cache.write(token_ids, self.states)

    def _read_files(self) -> None:
        for file in self.files:
            with file.open("rb", buffering=0) as opened:
                assert opened.readinto(self.buffer) == len(self.buffer)

    def _read_cache(self) -> None:
        for token_ids in self.samples:
            assert self.cache.read(token_ids) is not None

    def _read_ahead(self) -> None:
        cached = CachedStates(self.cache, None, EVERYTHING)
        for place, token_ids in enumerate(self.samples):
            cached.submit(str(place), token_ids)
            if place >= WINDOW:
                cached.take(str(place - WINDOW))
        for place in range(len(self.samples) - WINDOW, len(self.samples)):
            cached.take(str(place))
        cached.close()


def _drop_pages(files: Sequence[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
