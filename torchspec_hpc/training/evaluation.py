"""Held-out samples: their hidden states are asked for once and kept."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from torchspec_hpc.config.checkpoint_files import Progress
from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.data.dataset import TokenDataset
from torchspec_hpc.data.sample import Sample
from torchspec_hpc.data.sampler import Sampler
from torchspec_hpc.drafts.batch import PackedBatch
from torchspec_hpc.training.batches import HiddenStates, MicroBatches
from torchspec_hpc.training.parallel import World

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
        per_step = world.size * config.micro_batch_size
        self._num_steps = -(-num_samples // per_step)
        self._stream = MicroBatches(
            _Padded(dataset, num_samples),
            Sampler(self._num_steps * per_step, seed=0, shuffle=False),
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
            self._batches = [
                batch for _ in range(self._num_steps) for batch in self._stream.next_step().batches
            ]
        return self._batches


class _Padded:
    """Samples, and behind them as many without supervision as make all ranks' shares equal."""

    def __init__(self, dataset: TokenDataset, num_samples: int) -> None:
        self._dataset, self._num_samples = dataset, num_samples

    def __getitem__(self, index: int) -> Sample:
        if index < self._num_samples:
            return self._dataset[index]
        sample = self._dataset[0]
        return replace(sample, loss_mask=np.zeros_like(sample.loss_mask))
