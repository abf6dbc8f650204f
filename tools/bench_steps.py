"""What the trainer's benchmarks run: a draft with random data, and several ways to train it."""

from __future__ import annotations

import argparse
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from tests.drafts import padded_eagle3
from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.drafts.batch import PackedBatch, pack
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.eagle3.flops import step_flops
from torchspec_hpc.drafts.eagle3.model import Eagle3Draft
from torchspec_hpc.drafts.eagle3.plan import TTTPlan, make_plan, scored_targets
from torchspec_hpc.drafts.fused_loss import CHUNK_BYTES
from torchspec_hpc.drafts.target_head import TargetHead
from torchspec_hpc.target.weights import TargetTensors
from torchspec_hpc.training.draft import compute_options
from torchspec_hpc.training.optim import build_optimizer, set_hyperparameters
from torchspec_hpc.training.parallel import World, join, shard
from torchspec_hpc.training.step import Eagle3Step, step_weights

Sample = tuple[Tensor, Tensor, Tensor]
#: Samples that the plain step pads and computes at a time.
PLAIN_SAMPLES = 2

#: What --compare switches on in turn.
VARIANTS: dict[str, dict[str, object]] = {
    "compile": {"torch_compile": True},
    "eager": {"torch_compile": False},
    "checkpointing": {"gradient_checkpointing": True},
    "flex": {"attention_backend": "flex_attention"},
    "plain-attention": {"attention_backend": "plain"},
}


class Preset(NamedTuple):
    """Shape of a target's draft."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    draft_vocab: int


PRESETS = {
    "smollm2": Preset(576, 1536, 9, 3, 64, 49152, 8192),
    "8b": Preset(4096, 12288, 32, 8, 128, 151936, 32000),
}


@dataclass
class Case:
    """One setting: a draft, its target's head and the samples of an optimizer step."""

    options: argparse.Namespace
    world: World
    config: TrainingConfig
    shape: Eagle3Config
    target: TargetTensors
    samples: list[Sample]
    peaks: dict[str, int] = field(default_factory=dict)

    @classmethod
    def make(cls, options: argparse.Namespace) -> Case:
        """Builds the case ``options.case``, (tokens, rows of the draft's head)."""
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        with socket.create_server(("127.0.0.1", 0)) as server:  # any port that is free
            os.environ.setdefault("MASTER_PORT", str(server.getsockname()[1]))
        dtype = options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
        config = TrainingConfig(
            ttt_length=options.ttt,
            compute_dtype=dtype,
            loss_chunk_mib=options.chunk_mib,
            fsdp_strategy=options.fsdp,
        )
        world = _join(options.threads)
        shape = _shape(options)
        torch.manual_seed(0)
        size = (shape.vocab_size, shape.hidden_size)
        embedding = torch.randn(size, device=world.device).mul_(0.02).to(getattr(torch, dtype))
        target = TargetTensors(embedding, torch.ones(shape.hidden_size).to(embedding), embedding)
        generator = torch.Generator().manual_seed(world.rank)
        return cls(options, world, config, shape, target, _samples(options, shape, generator))

    def runner(self, name: str, settings: dict[str, object]) -> Callable[[], object]:
        """One of the ways to train, or the products alone."""
        special = {"plain": self.plain, "products": self.products}
        return special[name]() if name in special else self.fast(settings)

    def fast(self, settings: dict[str, object]) -> Callable[[], object]:
        """The trainer's step."""
        config = self.config.model_copy(update=settings)
        draft = self._draft(config)
        shard(draft, self.world, config)
        optimizer = build_optimizer(draft, config)
        set_hyperparameters(optimizer, config, 1e-4)
        step = Eagle3Step(draft, self._head(), optimizer, self.world, config)
        batch = self.batch.to("cpu", getattr(torch, config.compute_dtype))  # as engines send it
        if self.is_cuda:
            batch = PackedBatch(**{k: v.pin_memory() for k, v in vars(batch).items()})
        return lambda: step([batch])

    def plain(self) -> Callable[[], object]:
        """The padded step, a few samples at a time."""
        draft = self._draft(self.config).to(getattr(torch, self.config.compute_dtype))
        head = self._head()
        optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-4, fused=True)
        weights = torch.tensor(step_weights(self.config), device=self.world.device)
        groups = range(0, len(self.samples), PLAIN_SAMPLES)
        padded = [padded_eagle3.pad(self.samples[i : i + PLAIN_SAMPLES]) for i in groups]

        def step() -> None:
            batches = [
                batch._replace(
                    input_ids=batch.input_ids.to(weights.device),
                    loss_mask=batch.loss_mask.to(weights.device),
                    states=batch.states.to(weights.device, draft.fc.weight.dtype),
                )
                for batch in padded
            ]
            trained = [
                padded_eagle3.trained_positions(draft, head, batch, len(weights))
                for batch in batches
            ]
            counts = sum(torch.stack([step.sum() for step in steps]) for steps in trained)
            for batch, positions in zip(batches, trained, strict=True):
                loss, _ = padded_eagle3.loss(draft, head, batch, positions, counts, weights)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(draft.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def products(self) -> Callable[[], object]:
        """The matrix products of the fast step, in the shapes that it uses."""
        dtype = getattr(torch, self.config.compute_dtype)
        made: list[tuple[Tensor, Tensor, int]] = []
        for (m, k, n), times in _products(self.shape, self.plan, self._chunk_rows()).items():
            x = torch.randn(m, k, device=self.world.device, dtype=dtype)
            w = torch.randn(n, k, device=self.world.device, dtype=dtype)
            made.append((x, w, times))

        # attention's two forward and four backward products, as batches over the heads
        shape, scores = self.shape, self.plan.num_scores
        side = max(64, math.isqrt(scores))
        heads = shape.num_attention_heads
        q = torch.randn(heads, side, shape.head_dim, device=self.world.device, dtype=dtype)
        p = torch.randn(heads, side, side, device=self.world.device, dtype=dtype)
        repeats = max(1, round(scores / side**2))

        def run() -> None:
            for x, w, times in made:
                for _ in range(times):
                    torch.mm(x, w.T)
            for _ in range(repeats):
                for _ in range(2):
                    torch.bmm(q, q.transpose(1, 2))
                for _ in range(4):
                    torch.bmm(p, q)

        return run

    @property
    def plan(self) -> TTTPlan:
        """Of all samples in one row."""
        kept = None
        if self.shape.draft_vocab_size < self.shape.vocab_size:
            # about all of them: random choices would leave out most
            kept = torch.ones(len(scored_targets(self.batch)), dtype=torch.bool)
        return make_plan(self.batch, self.options.ttt, kept)

    @property
    def flops(self) -> float:
        """Of the fast step."""
        return step_flops(self.shape, self.plan)

    @property
    def num_tokens(self) -> int:
        """Of all samples."""
        return sum(len(ids) for ids, *_ in self.samples)

    @property
    def num_supervised(self) -> int:
        """Tokens that are learned."""
        return sum(int(mask.sum()) for _, mask, _ in self.samples)

    @property
    def skipped_share(self) -> float:
        """Of rows, because no step needs them."""
        return 1 - self.plan.num_states / (self.options.ttt * self.num_tokens)

    @property
    def dtype_name(self) -> str:
        """Of matrix products."""
        return str(self.config.compute_dtype)

    @property
    def device_name(self) -> str:
        """For people."""
        return torch.cuda.get_device_name() if self.is_cuda else "cpu"

    def num_recompiles(self) -> int:
        """Graphs that torch.compile made so far in this process."""
        return int(counters["stats"]["unique_graphs"])

    @property
    def is_cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.world.device.type == "cuda"

    def reset_peak(self) -> None:
        """Begins to look for the highest use of GPU memory; the models are there."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self._built_bytes = torch.cuda.memory_allocated()

    def grown_peak(self) -> int:
        """Bytes of GPU memory over those of the models as they were built."""
        return torch.cuda.max_memory_allocated() - self._built_bytes

    def print_profile(self) -> None:
        """Where the fast step's time goes."""
        run = self.fast({})
        run()
        kinds = {ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.is_cuda else [])}
        with profile(activities=kinds) as found:
            run()
            self.synchronize()
        key = f"self_{'cuda' if self.is_cuda else 'cpu'}_time_total"
        print(found.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))

    def synchronize(self) -> None:
        """Waits for the GPU, if there is one."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def __post_init__(self) -> None:
        self.batch = pack(self.samples)

    def _draft(self, config: TrainingConfig) -> Eagle3Draft:
        kept = None
        if self.shape.draft_vocab_size < self.shape.vocab_size:
            kept = torch.arange(self.shape.draft_vocab_size, device=self.world.device)
        options = compute_options(config, self.world.device)
        with torch.device(self.world.device):
            draft = Eagle3Draft(self.shape, self.target.embedding, kept, options)
            for parameter in draft.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        if draft.t2d is not None:
            # the random target's choices are anywhere: let all of them count
            draft.t2d = torch.ones_like(draft.t2d)
        return draft

    def _head(self) -> TargetHead:
        return TargetHead(self.target.norm, self.target.lm_head, self.shape.rms_norm_eps)

    def _chunk_rows(self) -> int:
        limit = CHUNK_BYTES[self.world.device.type]
        if self.options.chunk_mib:
            limit = self.options.chunk_mib * 2**20
        targets = max(1, limit // (4 * self.shape.draft_vocab_size * self.options.ttt))
        return min(targets, len(self.plan.targets))


def memory_of(options: argparse.Namespace, name: str) -> int:
    """Growth of a process's peak memory by two steps of one kind, bytes; without a GPU."""
    case = Case.make(options)
    run = case.runner(name, VARIANTS.get(name, {}))
    before = resident_peak()
    for _ in range(2):
        run()
    return resident_peak() - before


@cache
def _join(threads: int | None) -> World:
    return join(TrainingConfig(num_threads=threads))


def limit_memory(num_bytes: int, exit_code: int) -> None:
    """Ends this process with ``exit_code`` once it holds more; for CPUs.

    Not a limit of the system's: a library's thread that may not allocate hangs, or aborts.
    """

    def watch() -> None:
        while resident_peak() <= num_bytes:
            time.sleep(0.02)
        os._exit(exit_code)

    threading.Thread(target=watch, daemon=True).start()


def resident_peak() -> int:
    """Most memory that this process has had, bytes."""
    # not getrusage: its figure starts with that of the process that started this one
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _shape(options: argparse.Namespace) -> Eagle3Config:
    preset = PRESETS[options.preset]
    return Eagle3Config(
        hidden_size=preset.hidden,
        intermediate_size=preset.inner,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        head_dim=preset.head_dim,
        vocab_size=preset.vocab,
        draft_vocab_size=options.case[1] or preset.draft_vocab,
        aux_layers=(1, 2, 3),
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )


def _samples(
    options: argparse.Namespace, shape: Eagle3Config, generator: torch.Generator
) -> list[Sample]:
    tokens = options.case[0]
    if options.data == "dense":
        length = options.document or tokens
        number = tokens // length if options.document else 2
        masks = [torch.ones(length, dtype=torch.bool)] * number
    else:
        masks = list(_chat_masks(tokens, generator))
    columns = len(shape.aux_layers) + 1
    return [
        (
            torch.randint(shape.draft_vocab_size, (len(mask),), generator=generator),
            mask,
            torch.randn(len(mask), columns, shape.hidden_size, generator=generator),
        )
        for mask in masks
    ]


def _chat_masks(tokens: int, generator: torch.Generator) -> list[Tensor]:
    """Loss masks of conversations of 64 to 1024 tokens in 1 to 3 turns, half of them answers."""
    masks: list[Tensor] = []
    while (left := tokens - sum(map(len, masks))) >= 64:
        length = min(left, int(torch.randint(64, 1025, (), generator=generator)))
        turns = int(torch.randint(1, 4, (), generator=generator))
        parts = torch.rand(2 * turns, generator=generator) + 0.2
        ends = (parts.cumsum(0) / parts.sum() * length).long()
        turn = torch.searchsorted(ends, torch.arange(length), right=True)
        masks.append(turn % 2 == 1)
    return masks


def _products(shape: Eagle3Config, plan: TTTPlan, chunk: int) -> Counter[tuple[int, int, int]]:
    """(rows, inner, columns) of every product of forward and backward, and how often."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    q = shape.num_attention_heads * shape.head_dim
    kv = 2 * shape.num_key_value_heads * shape.head_dim
    tokens = int(plan.steps[0].cu_seqlens[-1])
    found: Counter[tuple[int, int, int]] = Counter()

    def linear(rows: int, width_in: int, width_out: int, *, input_gradient: bool = True) -> None:
        found[rows, width_in, width_out] += 1
        found[width_out, rows, width_in] += 1  # of the weight
        if input_gradient:
            found[rows, width_out, width_in] += 1

    linear(tokens, len(shape.aux_layers) * hidden, hidden, input_gradient=False)
    linear(tokens, hidden, q + kv)
    linear(tokens, hidden, kv)
    for step, here in enumerate(plan.steps):
        rows = len(here.index)
        linear(rows, hidden, q + (kv if step else 0))
        linear(rows, q, hidden)
        linear(rows, hidden, inner)
        linear(rows, hidden, inner)
        linear(rows, inner, hidden)
    num_targets, ttt_length = len(plan.targets), len(plan.steps)
    for start in range(0, num_targets, chunk):
        targets = min(chunk, num_targets - start)
        linear(targets * ttt_length, hidden, shape.draft_vocab_size)
        found[targets, hidden, shape.draft_vocab_size] += 1
    if shape.draft_vocab_size < shape.vocab_size:
        found[int(plan.scored[0]), hidden, shape.vocab_size] += 1
    return found
