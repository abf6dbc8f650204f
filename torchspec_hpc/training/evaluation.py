"""Held-out samples: their hidden states are asked for once and kept."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from torchspec_hpc.config.checkpoint_files import Progress
from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.data.dataset import TokenDataset
from torchspec_hpc.data.sampler import Sampler
from torchspec_hpc.drafts.batch import PackedBatch
from torchspec_hpc.training.batches import MicroBatches
from torchspec_hpc.training.parallel import World
from torchspec_hpc.training.prefetch import HiddenStates

#: Of all ranks together: their hidden states stay in memory.
MAX_TOKENS = 100_000

logger = logging.getLogger(__name__)


class EvaluationSet:
    """This rank's share of the held-out samples.

    Args:
        dataset: Its first samples are used, up to :data:`MAX_TOKENS`.
        states: Where hidden states are asked for.
        world: The training group.
        config: Of the training.
        window_tokens: See :class:`~torchspec_hpc.training.batches.MicroBatches`.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        states: HiddenStates,
        world: World,
        config: TrainingConfig,
        window_tokens: int,
    ) -> None:
        num_samples = max(1, int((dataset.lengths.cumsum(dtype=np.int64) <= MAX_TOKENS).sum()))
        if num_samples < len(dataset):
            logger.warning("evaluating on the first %d of %d samples", num_samples, len(dataset))
        sampler = Sampler(dataset.lengths[:num_samples], config, shuffle=False)
        num_packs = sampler.end_of(1)
        self._num_mine = len(range(world.rank, num_packs, world.size))
        self._num_steps = -(-num_packs // world.size)
        self._stream = MicroBatches(
            dataset,
            sampler,
            states,
            world,
            config.model_copy(update={"draft_accumulation_steps": 1}),
            Progress(),
            self._num_steps,
            window_tokens,
            name="eval",
        )
        self._batches: list[PackedBatch] = []

    def batches(self) -> list[PackedBatch]:
        """The micro-batches, as many on every rank; the first call waits for hidden states.

        A stop waits with it: ranks that gave up on their own would leave the others hanging.
        """
        if not self._batches:
            made = [
                batch for _ in range(self._num_steps) for batch in self._stream.next_step().batches
            ]
            # the stream begins again behind the last pack: that share only keeps ranks in step
            padding = map(_unsupervised, made[self._num_mine :])
            self._batches = [*made[: self._num_mine], *padding]
        return self._batches


def _unsupervised(batch: PackedBatch) -> PackedBatch:
    return replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
