"""Held-out samples: their hidden states are asked for once and kept in memory, packed."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.data.dataset import TokenDataset
from torchspec_hpc.data.sample import Sample
from torchspec_hpc.data.sampler import Sampler
from torchspec_hpc.drafts.batch import PackedBatch, pack
from torchspec_hpc.errors import DeadlineExceeded, TorchspecError
from torchspec_hpc.training.answers import HiddenStates
from torchspec_hpc.training.parallel import World, sum_over_ranks
from torchspec_hpc.transfer.feed import GaveUp, SampleFailed

logger = logging.getLogger(__name__)


class EvaluationSet:
    """This rank's share of the held-out samples.

    Args:
        dataset: Its first samples are used.
        states: Where hidden states are asked for.
        world: The training group.
        config: How samples share micro-batches.
        max_tokens: Of the samples that are used, all ranks together.
        window_tokens: Never ask for more tokens than this at a time, beyond one sample, nor for
            more than training does.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        states: HiddenStates,
        world: World,
        config: TrainingConfig,
        max_tokens: int,
        window_tokens: int,
    ) -> None:
        num_samples = num_held_out(dataset, max_tokens)
        if num_samples < len(dataset):
            logger.warning(
                "evaluating on the first %d of %d samples: dataset.eval_max_tokens = %d",
                num_samples,
                len(dataset),
                max_tokens,
            )
        self._dataset, self._states, self._world = dataset, states, world
        self._packs = Sampler(dataset.lengths[:num_samples], config, shuffle=False)
        # answers lie in memory that the feed keeps for the rest of the run
        self._window_tokens = min(window_tokens, config.prefetch_depth * self._packs.longest_pack)
        self._batches: list[PackedBatch] = []

    def batches(self, give_up: Callable[[], bool]) -> list[PackedBatch]:
        """The micro-batches, as many on every rank, which all call it.

        Args:
            give_up: Asked while the first call waits for engines; True ends the wait.

        Raises:
            GaveUp: On all ranks, if `give_up` has said so on any; on the others where one raises
                what follows.
            DeadlineExceeded: No engine answers.
            SampleFailed: The engines cannot serve a sample.
        """
        if not self._batches:
            made: list[PackedBatch] = []
            failure: TorchspecError | None = None
            try:
                made = self._make(give_up)
            except GaveUp as gave_up:
                logger.info("%s", gave_up)
            except (DeadlineExceeded, SampleFailed) as error:
                failure = error
            # a rank that went on, or left, alone would hang in the next collective
            num_waiting = torch.tensor([not made], dtype=torch.int64, device=self._world.device)
            if int(sum_over_ranks(num_waiting)):
                raise failure or GaveUp("not all held-out samples came before the end")
            self._batches = made
        return self._batches

    def _make(self, give_up: Callable[[], bool]) -> list[PackedBatch]:
        num_packs, size = self._packs.end_of(1), self._world.size
        mine = range(self._world.rank, num_packs, size)
        # a rank without a pack takes the first; without supervision it only keeps ranks in step
        packs = [self._samples_at(position) for position in mine or range(1)]
        states = self._states_of([sample for samples in packs for sample in samples], give_up)
        # each is packed, which copies it, as soon as it is complete: the feed lends its memory
        batches = [
            pack([(s.input_ids, s.loss_mask, next(states)) for s in samples]) for samples in packs
        ]
        empty = replace(batches[-1], loss_mask=torch.zeros_like(batches[-1].loss_mask))
        supervised = batches[: len(mine)]
        return supervised + [empty] * (-(-num_packs // size) - len(supervised))

    def _samples_at(self, position: int) -> list[Sample]:
        return [self._dataset[int(index)] for index in self._packs.samples_at(position)]

    def _states_of(
        self, samples: Sequence[Sample], give_up: Callable[[], bool]
    ) -> Iterator[Tensor]:
        """Hidden states of each sample, asked for as far ahead as the window allows."""
        coming: deque[Sample] = deque()
        num_tokens = 0
        for sample in samples:
            while coming and num_tokens + len(sample.input_ids) > self._window_tokens:
                num_tokens -= len(coming[0].input_ids)
                yield self._states.take(_ticket(coming.popleft()), give_up)
            self._states.submit(_ticket(sample), sample.input_ids)
            num_tokens += len(sample.input_ids)
            coming.append(sample)
        while coming:
            yield self._states.take(_ticket(coming.popleft()), give_up)


def num_held_out(dataset: TokenDataset, max_tokens: int) -> int:
    """Samples at the beginning of the data that have so many tokens together; at least one."""
    return max(1, int((dataset.lengths.cumsum(dtype=np.int64) <= max_tokens).sum()))


def _ticket(sample: Sample) -> str:
    return f"eval-{sample.index}"
