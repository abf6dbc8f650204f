"""From a run's configuration to a trainer that is ready to go on."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import torchspec_hpc
from torchspec_hpc.config import Config, RunDir
from torchspec_hpc.config.checkpoint_files import find_checkpoint, latest_checkpoint
from torchspec_hpc.config.checkpoint_meta import CheckpointMeta, Progress
from torchspec_hpc.config.endpoints import Endpoints, read_secret
from torchspec_hpc.config.rundir import cache_dir
from torchspec_hpc.data.dataset import TokenDataset, prepare_dataset
from torchspec_hpc.data.packing import longest_pack
from torchspec_hpc.data.sampler import Sampler
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.training.answers import answers_of, check_prompts, most_tokens
from torchspec_hpc.training.batches import MicroBatches, packs_per_step, steps_of_run
from torchspec_hpc.training.checkpoint import Checkpointer
from torchspec_hpc.training.draft import build_draft
from torchspec_hpc.training.evaluation import EvaluationSet
from torchspec_hpc.training.initial_draft import load_initial_draft
from torchspec_hpc.training.main_rank import ask_main
from torchspec_hpc.training.meter import EngineMonitor
from torchspec_hpc.training.optim import build_optimizer
from torchspec_hpc.training.parallel import World, seed_rank
from torchspec_hpc.training.sources import StateSources
from torchspec_hpc.training.state_cache import token_bytes
from torchspec_hpc.training.step import Eagle3Step
from torchspec_hpc.training.trainer import Trainer
from torchspec_hpc.training.vocabulary import load_kept_ids
from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.feed import HiddenStateFeed
from torchspec_hpc.transfer.holders import STALE_BEATS
from torchspec_hpc.transfer.store import HiddenStateStore

#: Share of a segment that requests may fill; the rest is the allocator's.
_SEGMENT_SHARE = 0.9

logger = logging.getLogger(__name__)


def build_trainer(
    config: Config, run: RunDir, endpoints: Endpoints, world: World, stack: ExitStack
) -> Trainer:
    """Builds everything and loads the checkpoint to go on from; every rank calls it.

    Args:
        config: Of the run.
        run: Its directory.
        endpoints: Where the services of this attempt answer.
        world: The training group.
        stack: Closes connections in the end.

    Raises:
        UserError: Configuration, model, data or checkpoint cannot be used.
        DeadlineExceeded: A service does not answer.
    """
    settings = config.training
    spec = TargetSpec.from_path(config.model.target_model_path)
    aux_layers = spec.aux_layers(config.inference.aux_hidden_states_layers)
    dataset = _open_dataset(config, world, config.dataset.train_data_path)
    held_out = _open_held_out(config, world)
    ask_main(world, partial(check_prompts, dataset, config))
    lengths = most_tokens(dataset.lengths, config)
    window_tokens = _window_tokens(
        config,
        token_bytes(config, spec, aux_layers, world.device.type),
        [lengths, *(held.lengths for held in held_out)],
    )
    source = ask_main(world, partial(_source, config, run))
    initial = load_initial_draft(config.model, spec, aux_layers)
    kept_ids = load_kept_ids(config, run, world, dataset, spec, source, initial)
    draft, head, description = build_draft(config, world, spec, aux_layers, kept_ids, initial)
    meta = _describe(config, world, dataset, description)
    optimizer = build_optimizer(draft, settings)
    checkpointer = Checkpointer(run, world, draft, optimizer, meta, settings)
    seed_rank(settings.seed, 0, world.rank)
    progress = _load(config, run, checkpointer, source)
    sampler = Sampler(lengths, settings, config.dataset.shuffle_dataset)
    num_steps = steps_of_run(settings, sampler, packs_per_step(world, settings), progress)
    control, feed = _connect(config, run, endpoints, world, stack)
    sources = StateSources(config, spec, aux_layers, feed, world, stack)
    end = progress.cursor + packs_per_step(world, settings) * (num_steps - progress.step)
    states = sources.training(dataset, sampler, progress.cursor, end)
    answers = answers_of(states, config)
    batches = MicroBatches(
        dataset, sampler, answers, world, settings, progress, num_steps, window_tokens
    )
    stack.callback(batches.close)
    return Trainer(
        config,
        run,
        world,
        optimizer=optimizer,
        step=Eagle3Step(draft, head, optimizer, world, settings),
        batches=batches,
        feed=states,
        monitor=EngineMonitor(control, STALE_BEATS * config.control.heartbeat_s),
        checkpointer=checkpointer,
        progress=progress,
        num_steps=num_steps,
        sampler=sampler,
        evaluation=EvaluationSet(
            held_out[0],
            sources.evaluation(held_out[0]),
            world,
            settings,
            config.dataset.eval_max_tokens,
            window_tokens,
        )
        if held_out
        else None,
    )


def _open_held_out(config: Config, world: World) -> list[TokenDataset]:
    """The evaluation data, or nothing."""
    path = config.dataset.eval_data_path
    if not config.dataset.eval_interval or path is None:
        return []
    return [_open_dataset(config, world, path)]


def _open_dataset(config: Config, world: World, path: str) -> TokenDataset:
    """Tokenizes once, on the main rank; the others open what it made, without a tokenizer."""

    def prepare() -> Path:
        length = config.training.max_seq_length
        return prepare_dataset(path, config.dataset, config.model, length, cache_dir(config)).folder

    return TokenDataset(ask_main(world, prepare))


def _window_tokens(config: Config, token_bytes: int, lengths: list[NDArray[np.int32]]) -> int:
    """Tokens of each dataset whose hidden states fit into this rank's segment of the store.

    Raises:
        ConfigError: The longest micro-batch does not fit, or no micro-batch holds a sample.
    """
    segment_bytes = int(config.mooncake.global_segment_size)
    share = _SEGMENT_SHARE / len(lengths)
    window_tokens = int(share * segment_bytes) // token_bytes
    longest = max(longest_pack(each, config.training) for each in lengths)
    if longest > window_tokens:
        raise ConfigError(
            f"mooncake.global_segment_size = {segment_bytes} bytes cannot hold a micro-batch of "
            f"{longest} tokens with {token_bytes} bytes of hidden states each",
            allowed=f"at least {int(longest * token_bytes / share) + 1} bytes",
            hint="raise it, or lower training.micro_batch_tokens, or micro_batch_size if that is "
            "what you gave",
        )
    return window_tokens


def _describe(
    config: Config, world: World, dataset: TokenDataset, draft: dict[str, object]
) -> CheckpointMeta:
    """What every checkpoint of this run says of it."""
    return CheckpointMeta(
        step=0,
        cursor=0,
        draft=draft,
        target=config.model.target_model_path,
        stream={
            "dataset": dataset.key,
            "num_samples": len(dataset),
            "seed": config.training.seed,
            "shuffle": config.dataset.shuffle_dataset,
            "micro_batch_tokens": config.training.pack_tokens,
            "micro_batch_size": config.training.micro_batch_size,
        },
        world_size=world.size,
        versions={"torchspec_hpc": torchspec_hpc.__version__, "torch": torch.__version__},
    )


def _source(config: Config, run: RunDir) -> Path | None:
    """The checkpoint to go on from: the run's latest, else ``load_path``'s, else none."""
    latest, load_path = latest_checkpoint(run), config.training.load_path
    if latest is None and load_path is not None:
        return find_checkpoint(Path(load_path))
    return latest


def _load(config: Config, run: RunDir, checkpointer: Checkpointer, source: Path | None) -> Progress:
    """Goes on from there; of another run's checkpoint perhaps with its weights alone."""
    if source is None:
        return Progress()
    if config.training.continual_training and source.parent != run.checkpoints:
        checkpointer.load_weights(source)
        return Progress()
    return checkpointer.load(source)


def _connect(
    config: Config, run: RunDir, endpoints: Endpoints, world: World, stack: ExitStack
) -> tuple[ControlClient, HiddenStateFeed | None]:
    """Connections, closed in reverse order; no feed where there are no engines."""
    deadline_s = config.control.service_ready_s
    control = ControlClient(endpoints.control, read_secret(run), deadline_s)
    stack.callback(control.close)
    if not config.inference.num_engines:
        return control, None
    store = HiddenStateStore.open(
        config.mooncake,
        endpoints,
        segment_bytes=int(config.mooncake.global_segment_size),
        deadline_s=deadline_s,
    )
    stack.callback(store.close)
    feed = HiddenStateFeed(control, store, world.rank, config.control, endpoints.attempt_id)
    stack.callback(feed.close)
    return control, feed
