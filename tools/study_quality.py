#!/usr/bin/env python3
"""What each choice of training is worth: drafts of equal token budgets, measured alike.

    nice -n 19 python tools/study_quality.py STUDY --tokens 16000 --seeds 0
    python tools/study_quality.py STUDY --serve --limit 8       # acceptance in vLLM of each draft
    python tools/study_quality.py STUDY --table

Hidden states of the demo data are computed once and kept in STUDY; every draft is trained on them
by the trainer's own step, without engines. STUDY/results.jsonl has a line for each draft that is
done: started again, the study goes on with the next one. Estimates are of held-out text.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from torchspec_hpc.config import Config, load_config
from torchspec_hpc.config.checkpoint_meta import CheckpointMeta
from torchspec_hpc.data.dataset import TokenDataset, prepare_dataset
from torchspec_hpc.data.sampler import Sampler
from torchspec_hpc.data.vocab import draft_vocabulary
from torchspec_hpc.drafts.batch import PackedBatch, pack
from torchspec_hpc.drafts.eagle3.formats import Served as ServedAs
from torchspec_hpc.drafts.eagle3.ttt import accept_len
from torchspec_hpc.export.checkpoint import DraftCheckpoint
from torchspec_hpc.export.eagle3 import ExportOptions, export_draft
from torchspec_hpc.export.evaluate import Case, Served, ServeSettings, measure
from torchspec_hpc.export.prompts import load_prompts
from torchspec_hpc.inference.engines.hf_target import HookedTarget
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.training.draft import build_draft
from torchspec_hpc.training.optim import Schedule, build_optimizer, set_hyperparameters
from torchspec_hpc.training.parallel import World
from torchspec_hpc.training.state_cache import StateCache
from torchspec_hpc.training.step import Eagle3Step

ROOT = Path(__file__).parents[1]
#: Every draft is measured with so many steps, whatever it was trained with.
EVAL_K = 5
SERVED_K = 3
#: Packs of this many tokens make an optimizer step.
STEP_TOKENS = 512


@dataclass(frozen=True)
class Variant:
    """One choice that differs from the first variant's.

    Attributes:
        overrides: Settings, as on the command line.
        mask_lag: Tokens by which the loss mask comes late; the reference system's is 2.
    """

    overrides: tuple[str, ...] = ()
    mask_lag: int = 0


VARIANTS = {
    "K = 3, 8,192 tokens, forward KL, packed": Variant(),
    "K = 1": Variant(("training.ttt_length=1",)),
    "K = 5": Variant(("training.ttt_length=5",)),
    "K = 7": Variant(("training.ttt_length=7",)),
    "4,096 tokens": Variant(("model.draft_vocab_size=4096",)),
    "16,384 tokens": Variant(("model.draft_vocab_size=16384",)),
    "all tokens": Variant(("model.draft_vocab_size=null",)),
    "total variation": Variant(("training.loss_type=total_variation",)),
    "LK, lambda": Variant(("training.loss_type=lk_lambda",)),
    "LK, alpha": Variant(("training.loss_type=lk_alpha",)),
    "mask lags by two": Variant(mask_lag=2),
    "three samples a step, not packed": Variant(
        (
            "training.micro_batch_tokens=null",
            "training.micro_batch_size=1",
            "training.draft_accumulation_steps=3",
        )
    ),
}


class Study:
    """States, drafts and results of one directory.

    Args:
        folder: Takes everything.
        tokens: Trained on by each draft.
        eval_tokens: Held out.
    """

    def __init__(self, folder: Path, tokens: int, eval_tokens: int) -> None:
        self.folder, self.tokens, self.eval_tokens = folder, tokens, eval_tokens
        self.results = folder / "results.jsonl"
        self.world = World(0, 1, torch.device("cpu"))
        self._states: dict[bytes, Tensor] = {}

    def config(self, seed: int, overrides: tuple[str, ...] = ()) -> Config:
        """The demo's settings with those of a variant."""
        fixed = (f"output_dir={self.folder}", f"training.seed={seed}", "inference.engine=hf",
                 f"training.micro_batch_tokens={STEP_TOKENS}")  # fmt: skip
        return load_config(ROOT / "configs" / "demo.yaml", [*fixed, *overrides])

    def done(self) -> list[dict[str, Any]]:
        """Drafts that are trained."""
        if not self.results.is_file():
            return []
        return [json.loads(line) for line in self.results.read_text().splitlines()]

    def prepare(self, config: Config) -> tuple[TokenDataset, list[int], TokenDataset, list[int]]:
        """Training and held-out samples within the budget, their states computed or read."""
        spec = TargetSpec.from_path(config.model.target_model_path)
        layers = spec.aux_layers(config.inference.aux_hidden_states_layers)
        cache = StateCache(config, spec, layers, "cpu")
        parts: list[Any] = []
        for name, budget in (("train", self.tokens), ("eval", self.eval_tokens)):
            path = ROOT / "configs" / "demo" / "data" / f"{name}.jsonl"
            length = config.training.max_seq_length
            data = prepare_dataset(
                path, config.dataset, config.model, length, self.folder / "cache"
            )
            count = int((data.lengths.cumsum() <= budget).sum())
            self._fill(cache, config, spec, layers, [data[i].input_ids for i in range(count)])
            parts += [data, list(range(count))]
        return parts[0], parts[1], parts[2], parts[3]

    def _fill(
        self, cache: StateCache, config: Config, spec: TargetSpec, layers: Any, prompts: list[Any]
    ) -> None:
        target: HookedTarget | None = None
        for ids in prompts:
            states = cache.read(ids)
            if states is None:
                target = target or HookedTarget(
                    config.model.target_model_path,
                    layers=(*layers, spec.num_layers),
                    dtype=torch.float32,
                    device="cpu",
                )
                [states] = target.states([ids])
                cache.write(ids, states)
            self._states[ids.tobytes()] = states

    def batch(self, data: TokenDataset, indices: Any, mask_lag: int = 0) -> PackedBatch:
        """A micro-batch of these samples."""
        samples = []
        for index in indices:
            sample = data[int(index)]
            mask = np.roll(sample.loss_mask, mask_lag)
            mask[:mask_lag] = False
            samples.append((sample.input_ids, mask, self._states[sample.input_ids.tobytes()]))
        return pack(samples)

    def train(self, name: str, seed: int) -> dict[str, Any]:
        """Trains, measures and exports one draft."""
        variant = VARIANTS[name]
        config = self.config(seed, variant.overrides)
        data, train_on, held_out, eval_on = self.prepare(config)
        spec = TargetSpec.from_path(config.model.target_model_path)
        layers = spec.aux_layers(config.inference.aux_hidden_states_layers)
        size, kept = config.model.draft_vocab_size, None
        if size is not None:
            specials = {spec.bos_token_id, *spec.eos_token_ids} - {None}
            kept = torch.from_numpy(draft_vocabulary(data, spec.vocab_size, size, specials))
        draft, head, description = build_draft(config, self.world, spec, layers, kept)
        optimizer = build_optimizer(draft, config.training)
        step = Eagle3Step(draft, head, optimizer, self.world, config.training)
        started, num_tokens = time.monotonic(), 0
        steps = list(self._steps(config, data, train_on))
        schedule = Schedule.from_config(config.training, len(steps))
        for number, packs in enumerate(steps):
            set_hyperparameters(optimizer, config.training, schedule(number))
            batches = [self.batch(data, indices, variant.mask_lag) for indices in packs]
            step(batches)
            num_tokens += sum(batch.num_tokens for batch in batches)
        seconds = time.monotonic() - started
        measured = config.training.model_copy(update={"ttt_length": EVAL_K})
        evaluator = Eagle3Step(draft, head, optimizer, self.world, measured)
        sampler = Sampler(held_out.lengths[eval_on], config.training, shuffle=False)
        packs = [sampler.samples_at(i) for i in range(sampler.end_of(1))]
        _, correct, scored, _ = evaluator.evaluate([self.batch(held_out, p) for p in packs])
        meta = CheckpointMeta(
            len(steps), 0, description, config.model.target_model_path, {"seed": seed}, 1
        )
        weights = {key: p.full_tensor().detach() for key, p in draft.named_parameters()}
        checkpoint = DraftCheckpoint(
            self.folder / "step_0", meta, weights, None if kept is None else kept.numpy()
        )
        served = ServedAs(config.model.target_model_path, spec.architecture, SERVED_K)
        output = self.folder / "drafts" / f"{list(VARIANTS).index(name):02}-seed{seed}"
        export_draft(checkpoint, output, ExportOptions(served, dtype="float32", replace=True))
        return {
            "variant": name,
            "seed": seed,
            "tokens": num_tokens,
            "steps": len(steps),
            "eval_tokens": int(held_out.lengths[eval_on].sum()),
            "seconds": seconds,
            "accuracy": (correct / scored).tolist(),
            "accept_len_3": accept_len(correct[:SERVED_K], scored[:SERVED_K]),
            "accept_len": accept_len(correct, scored),
            "draft": str(output),
        }

    def _steps(
        self, config: Config, data: TokenDataset, train_on: list[int]
    ) -> Iterator[list[Any]]:
        """Packs of each optimizer step, in the order that the trainer would take, one epoch."""
        sampler = Sampler(data.lengths[train_on], config.training, shuffle=True)
        per_step = config.training.draft_accumulation_steps
        for first in range(0, sampler.end_of(1) - per_step + 1, per_step):
            yield [sampler.samples_at(first + i) for i in range(per_step)]

    def serve(self, limit: int) -> None:
        """Measures in vLLM each draft that has not been."""
        served = {row["draft"]: row for row in _rows(self.folder / "served.jsonl")}
        target = self.config(0).model.target_model_path
        prompts = ROOT / "configs" / "demo" / "data" / "eval_prompts.jsonl"
        cases = [Case(load_prompts(str(prompts), limit))]
        for row in self.done():
            if row["draft"] in served:
                continue
            [found] = measure(
                ServeSettings(target, max_tokens=64),
                Served(row["variant"], Path(row["draft"]), SERVED_K),
                cases,
                self.folder / "vllm.log",
            )
            _append(self.folder / "served.jsonl", {"draft": row["draft"], **found.summary()})

    def table(self) -> Table:
        """Medians over seeds."""
        served = {row["draft"]: row for row in _rows(self.folder / "served.jsonl")}
        table = Table(title=f"{self.folder}: medians over seeds")
        for column in ("variant", "seeds", "accept len, k = 3, held out", "served, k = 3",
                       "acc 0", "acc 1", "acc 2", "seconds"):  # fmt: skip
            table.add_column(column, justify="left" if column == "variant" else "right")
        for name in VARIANTS:
            rows = [row for row in self.done() if row["variant"] == name]
            if not rows:
                continue
            lengths = [served[r["draft"]]["accept_len"] for r in rows if r["draft"] in served]
            table.add_row(
                name,
                str(len(rows)),
                f"{statistics.median(row['accept_len_3'] for row in rows):.3f}",
                f"{statistics.median(lengths):.3f}" if lengths else "-",
                *(f"{statistics.median(row['accuracy'][i] for row in rows):.3f}" for i in range(3)),
                f"{statistics.median(row['seconds'] for row in rows):.0f}",
            )
        return table


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="directory for states, drafts and results")
    parser.add_argument("--tokens", type=int, default=100_000, help="trained on by each draft")
    parser.add_argument("--eval-tokens", type=int, default=4_000, help="held out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--serve", action="store_true", help="measure in vLLM instead of training")
    parser.add_argument("--limit", type=int, default=24, help="prompts for --serve")
    parser.add_argument("--table", action="store_true", help="print the results so far, and end")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Trains every variant with every seed, first all with the first seed."""
    options = parse(arguments)
    study = Study(options.study.absolute(), options.tokens, options.eval_tokens)
    if options.serve:
        study.serve(options.limit)
    elif not options.table:
        torch.set_num_threads(options.threads)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        done = {(row["variant"], row["seed"]) for row in study.done()}
        todo = [(name, seed) for seed in options.seeds for name in options.only]
        for name, seed in todo:
            if (name, seed) not in done:
                row = study.train(name, seed)
                _append(study.results, row)
                print(f"{name}, seed {seed}: {row['accept_len_3']:.3f}", flush=True)
    Console(width=140).print(study.table())


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
