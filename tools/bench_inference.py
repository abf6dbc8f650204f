#!/usr/bin/env python3
"""Measure prefill with and without the capture of hidden states.

    python tools/bench_inference.py --model .cache/smollm2-135m-instruct --length 512

Each engine runs in a process of its own, against real services of its own, with the states
going to a memory segment of this process and the receipts read by the engine's. Printed: prompt
tokens per second and per second of CPU time (median of the repeats; the latter is the one to
trust on a busy machine, with --threads 1), the share of plain vLLM's that is left, and the
process's peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchspec_hpc.config import RunDir, load_config, parse_config, save_config
from torchspec_hpc.config.endpoints import Endpoints, create_secret, node_name
from torchspec_hpc.slurm.services import Services
from torchspec_hpc.transfer import control_server

PLAIN = "vllm-plain"
MODES = {
    PLAIN: "vLLM, no capture",
    "vllm": "vLLM, states to the store",
    "hf": "Transformers, states to the store",
}
SEGMENT_BYTES = 1 << 30
SERVICE_READY_S = 60


def main() -> None:
    """Runs the benchmark, or one measurement of it."""
    options = parse_options()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    results = {}
    with tempfile.TemporaryDirectory(prefix="bench-inference-") as folder:
        for mode in options.modes:
            results[mode] = run_mode(mode, options, Path(folder) / mode)
    print_table(options, results)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="target directory or hub id")
    parser.add_argument("--length", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--num-prompts", type=int, default=8, help="prompts of one repeat")
    parser.add_argument("--batch", type=int, default=8, help="inference.inference_batch_size")
    parser.add_argument("--repeats", type=int, default=3, help="after one that is not counted")
    parser.add_argument("--threads", type=int, help="inference.num_threads")
    parser.add_argument("--device", default="auto", help="inference.device")
    parser.add_argument("--dtype", default="auto", help="inference.dtype")
    parser.add_argument(
        "--modes", nargs="+", default=list(MODES), choices=MODES, help="what to measure"
    )
    parser.add_argument("--measure", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--segment", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_mode(mode: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One engine in one process, with services around it."""
    from torchspec_hpc.transfer.store import HiddenStateStore

    run = RunDir(folder)
    run.create()
    config = parse_config(settings(mode, options), base_dir=Path.cwd(), source="the options")
    save_config(config, run.config)
    create_secret(run)
    services = Services(config, "127.0.0.1", folder, control_server.__name__)
    try:
        services.start(check=lambda: None)
        endpoints = Endpoints(
            "bench-00000000",
            0,
            services.control.endpoint or "",
            services.mooncake.endpoint or "",
            {node_name(): "127.0.0.1"},
        )
        endpoints.write(run)
        store = HiddenStateStore.open(
            config.mooncake,
            endpoints,
            segment_bytes=SEGMENT_BYTES,
            deadline_s=SERVICE_READY_S,
        )
        command = [sys.executable, *sys.argv, "--measure", mode, "--run-dir", str(folder)]
        output = subprocess.run(
            [*command, "--segment", store.segment], check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        store.close()
    finally:
        services.stop()
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(f"{MODES[mode]}: {result['tokens_per_s']:.0f} tokens/s", flush=True)
    return result


def settings(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """The configuration of one measurement."""
    return {
        "output_dir": ".",
        "model": {"target_model_path": options.model},
        "dataset": {"train_data_path": "none"},
        "training": {"max_seq_length": options.length},
        "inference": {
            "engine": "vllm" if mode == PLAIN else mode,
            "inference_batch_size": options.batch,
            "num_threads": options.threads,
            "device": options.device,
            "dtype": options.dtype,
        },
        "mooncake": {"global_segment_size": SEGMENT_BYTES},
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What one engine does; runs in the engine's process."""
    from torchspec_hpc.inference.engines.base import EngineContext
    from torchspec_hpc.inference.placement import place
    from torchspec_hpc.target.spec import TargetSpec

    run = RunDir(options.run_dir)
    config = load_config(run.config)
    spec = TargetSpec.from_path(config.model.target_model_path)
    context = EngineContext(
        config, run, Endpoints.read(run, 1), spec, 0, place(config.inference, 0, 1)
    )
    start = time.monotonic()
    if options.measure == PLAIN:
        prefill = plain_vllm(context)
    else:
        prefill = capturing_engine(context, options.segment)
    start_s = time.monotonic() - start
    generator = np.random.default_rng(0)
    seconds, cpu_seconds = [], []
    for _ in range(1 + options.repeats):  # new prompts each time: no prefix is cached
        shape = (options.num_prompts, options.length)
        prompts = list(generator.integers(0, spec.vocab_size, shape, dtype=np.int32))
        start, cpu_start = time.monotonic(), time.process_time()
        prefill(prompts)
        seconds.append(time.monotonic() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    tokens = options.num_prompts * options.length
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "tokens_per_s": tokens / statistics.median(seconds[1:]),
        "tokens_per_cpu_s": tokens / statistics.median(cpu_seconds[1:]),
        "first_tokens_per_s": tokens / seconds[0],
        "start_s": start_s,
        "peak_gib": peak_kib / (1 << 20),
        "device_gib": peak_device_bytes() / (1 << 30),
    }


def plain_vllm(context: Any) -> Callable[[Sequence[np.ndarray]], None]:
    """VLLM with our arguments, less those that capture."""
    from torchspec_hpc.inference.engines.vllm_arguments import environment, llm_arguments

    os.environ.update(environment(context))
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    import vllm

    llm = vllm.LLM(**llm_arguments(context))
    params = vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)

    def prefill(prompts: Sequence[np.ndarray]) -> None:
        ids = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        llm.generate(ids, params, use_tqdm=False)

    return prefill


def capturing_engine(context: Any, segment: str) -> Callable[[Sequence[np.ndarray]], None]:
    """An engine of ours. Objects are removed within the measured time, as a trainer does."""
    from torchspec_hpc.config.endpoints import read_secret
    from torchspec_hpc.inference.engines.registry import create_engine
    from torchspec_hpc.transfer.control import ControlClient
    from torchspec_hpc.transfer.messages import Receipt, Request, encode_tokens
    from torchspec_hpc.transfer.store import HiddenStateStore

    engine = create_engine(context)
    control = ControlClient(context.endpoints.control, read_secret(context.run), timeout_s=10)
    store = HiddenStateStore.open(
        context.config.mooncake, context.endpoints, segment_bytes=0, deadline_s=SERVICE_READY_S
    )

    def prefill(prompts: Sequence[np.ndarray]) -> None:
        for i, prompt in enumerate(prompts):
            key = f"bench/{i}"
            engine.admit(Request(key, 0, 0, segment, key, encode_tokens(prompt)))
        num_open = len(prompts)
        while num_open:
            num_open -= len(engine.step())
        for _ in prompts:
            receipt = control.pop_reply(0, SERVICE_READY_S)
            assert isinstance(receipt, Receipt), receipt
            store.remove(receipt.key)

    return prefill


def peak_device_bytes() -> int:
    """Of this process's GPU; a vLLM that runs in processes of its own is not seen."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def print_table(options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """One row for each engine."""
    print(
        f"\n{options.model}: {options.num_prompts} prompts of {options.length} tokens, "
        f"batches of {options.batch}, median of {options.repeats}"
    )
    columns = ("tokens/s", "of plain", "per CPU s", "of plain", "first", "start s", "peak GiB")
    print(f"{'':36}" + "".join(f"{column:>10}" for column in columns))
    plain = results.get(PLAIN)
    for mode, result in results.items():
        speed, cpu_speed = result["tokens_per_s"], result["tokens_per_cpu_s"]
        print(
            f"{MODES[mode]:36}"
            f"{speed:>10.0f}{share(speed, plain, 'tokens_per_s'):>10}"
            f"{cpu_speed:>10.0f}{share(cpu_speed, plain, 'tokens_per_cpu_s'):>10}"
            f"{result['first_tokens_per_s']:>10.0f}{result['start_s']:>10.1f}"
            f"{result['peak_gib']:>10.2f}"
        )


def share(value: float, plain: dict[str, Any] | None, name: str) -> str:
    """A value as a share of plain vLLM's."""
    return f"{value / plain[name]:.0%}" if plain else "-"


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # no minutes in the destructors of engines
