#!/usr/bin/env python3
"""Speed and peak memory of one optimizer step, without engines: random hidden states.

    python tools/bench_train_step.py                                    the quick start's draft
    python tools/bench_train_step.py --preset 8b --tokens 8192          Qwen3-8B's, on a GPU

Prints tokens/s of the step and of its largest unavoidable part, the head's matrix products of
the same run, and their ratio; medians.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time

import torch
import torch.distributed as dist

from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.drafts.batch import PackedBatch, pack
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.eagle3.model import Eagle3Draft
from torchspec_hpc.drafts.target_head import TargetHead
from torchspec_hpc.target.weights import TargetTensors
from torchspec_hpc.training.optim import build_optimizer, set_hyperparameters
from torchspec_hpc.training.parallel import World, join, shard
from torchspec_hpc.training.step import Eagle3Step

# hidden, intermediate, heads, kv heads, head_dim, vocabulary, draft vocabulary
PRESETS = {
    "smollm2": (576, 1536, 9, 3, 64, 49152, 8192),
    "8b": (4096, 12288, 32, 8, 128, 151936, 32000),
}


def main() -> None:
    """Measures one setting."""
    options = parse()
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29513")
    dtype = options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    config = TrainingConfig(
        ttt_length=options.ttt, num_threads=options.threads, compute_dtype=dtype
    )
    world = join(config)
    shape = draft_config(options)
    step, flops_head = build(shape, world, config)
    batches = [random_batch(shape, options, world) for _ in range(options.micro_batches)]
    num_tokens = sum(batch.num_tokens for batch in batches)

    seconds = timed(lambda: step(batches), options.repeats, world)
    head_s = timed(lambda: head_only(shape, world, getattr(torch, dtype)), options.repeats, world)
    speed = num_tokens / seconds
    head_speed = flops_head * head_rows(world) / head_s / 1e12
    print(
        f"{options.preset}: {num_tokens} tokens, {options.supervised:.0%} supervised, "
        f"K={options.ttt}, V={shape.vocab_size}, V_draft={shape.draft_vocab_size}, {dtype}, "
        f"{world.device}: {seconds:.3f} s a step, {speed:.0f} tokens/s; "
        f"peak memory {peak_bytes(world) / 2**30:.2f} GiB; "
        f"head's product alone: {head_speed:.2f} TFLOP/s"
    )
    dist.destroy_process_group()


def draft_config(options: argparse.Namespace) -> Eagle3Config:
    """The draft of a preset."""
    hidden, inner, heads, kv_heads, head_dim, vocab, draft_vocab = PRESETS[options.preset]
    return Eagle3Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        draft_vocab_size=vocab if options.full_vocab else draft_vocab,
        aux_layers=(1, 2, 3),
        rms_norm_eps=1e-5,
        max_position_embeddings=max(8192, options.document),
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )


def build(shape: Eagle3Config, world: World, config: TrainingConfig) -> tuple[Eagle3Step, float]:
    """The step as the trainer builds it; FLOP of the draft head for one row."""
    dtype = getattr(torch, config.compute_dtype)
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator) * 0.02
    target = TargetTensors(embedding.to(dtype), torch.ones(shape.hidden_size), embedding.to(dtype))
    pruned = shape.draft_vocab_size < shape.vocab_size
    kept = torch.arange(shape.draft_vocab_size) if pruned else None
    draft = Eagle3Draft(shape, target.embedding, kept)
    draft.initialize(target, 0)
    shard(draft.to(world.device), world, config)
    head = TargetHead(target.norm, target.lm_head, shape.rms_norm_eps).to(world.device)
    optimizer = build_optimizer(draft, config)
    set_hyperparameters(optimizer, config, 1e-4)
    step = Eagle3Step(draft, head, optimizer, world, config)
    return step, 2.0 * shape.hidden_size * shape.draft_vocab_size


def random_batch(shape: Eagle3Config, options: argparse.Namespace, world: World) -> PackedBatch:
    """Documents whose last part is supervised, as an answer is."""
    documents = []
    columns = len(shape.aux_layers) + 1
    for _ in range(max(1, options.tokens // options.document)):
        length = options.document
        ids = torch.randint(shape.draft_vocab_size, (length,))
        mask = torch.arange(length) >= length * (1 - options.supervised)
        documents.append((ids, mask, torch.randn(length, columns, shape.hidden_size)))
    return pack(documents).to(world.device, torch.float32)


def head_rows(world: World) -> int:
    """Rows of the product that serves as a yardstick."""
    return 4096 if world.device.type == "cuda" else 512


def head_only(shape: Eagle3Config, world: World, dtype: torch.dtype) -> None:
    """The draft head's product for some rows."""
    x = torch.ones(head_rows(world), shape.hidden_size, device=world.device, dtype=dtype)
    w = torch.ones(shape.draft_vocab_size, shape.hidden_size, device=world.device, dtype=dtype)
    torch.mm(x, w.T)


def timed(call: object, repeats: int, world: World) -> float:
    """Median seconds of a call, after one that is not counted."""
    assert callable(call)
    seconds = []
    for _ in range(repeats + 1):
        synchronize(world)
        start = time.perf_counter()
        call()
        synchronize(world)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def synchronize(world: World) -> None:
    """Waits for the GPU, if there is one."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(world: World) -> int:
    """Of the GPU, or resident of the process."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="smollm2")
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch")
    parser.add_argument("--document", type=int, default=256, help="tokens of a document")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--supervised", type=float, default=0.5, help="share of a document")
    parser.add_argument("--ttt", type=int, default=3, help="K")
    parser.add_argument("--full-vocab", action="store_true", help="do not prune the vocabulary")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
