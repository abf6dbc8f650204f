"""Where the answer of a sample comes from: its data set, or the target."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from torchspec_hpc.config import Config
from torchspec_hpc.config.inference_schema import GenerationConfig
from torchspec_hpc.data.sample import Sample
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.transfer.feed import HiddenStateFeed
from torchspec_hpc.transfer.messages import Generation

TokenIds = npt.NDArray[np.int32]


class Samples(Protocol):
    """What is trained on: :class:`torchspec_hpc.data.dataset.TokenDataset`."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int) -> Sample:
        """Token ids and loss mask."""


class HiddenStates(Protocol):
    """Where hidden states come from: :class:`torchspec_hpc.transfer.feed.HiddenStateFeed`."""

    def submit(self, ticket: str, token_ids: TokenIds) -> None:
        """Asks for the hidden states of token ids [T]."""

    def take(self, ticket: str, give_up: Callable[[], bool] | None = None) -> Tensor:
        """Waits for hidden states [T, A+1, H], or until `give_up` says to raise ``GaveUp``."""


class AnsweringStates(Protocol):
    """Hidden states of answers that the target makes: the feed, too."""

    def submit(self, ticket: str, token_ids: TokenIds, generation: Generation) -> None:
        """Asks for an answer to token ids [T], and for the hidden states of both."""

    def take_with_answer(
        self, ticket: str, give_up: Callable[[], bool] | None = None
    ) -> tuple[Tensor, TokenIds]:
        """Waits for hidden states [T + N, A+1, H] and the N tokens of the answer."""


class Answers(Protocol):
    """Asks for the hidden states of samples, and says what they have become."""

    def most_tokens(self, sample: Sample) -> int:
        """Of the sample that comes back."""

    def submit(self, ticket: str, sample: Sample) -> None:
        """Asks for a sample."""

    def take(
        self, ticket: str, sample: Sample, give_up: Callable[[], bool]
    ) -> tuple[Sample, Tensor]:
        """Waits for what is trained on: tokens [T] with their mask, and states [T, A+1, H]."""


class DatasetAnswers:
    """Samples as they are in the data set.

    Args:
        states: Where hidden states are asked for.
    """

    def __init__(self, states: HiddenStates) -> None:
        self._states = states

    def most_tokens(self, sample: Sample) -> int:
        """See :class:`Answers`."""
        return len(sample.input_ids)

    def submit(self, ticket: str, sample: Sample) -> None:
        """See :class:`Answers`."""
        self._states.submit(ticket, sample.input_ids)

    def take(
        self, ticket: str, sample: Sample, give_up: Callable[[], bool]
    ) -> tuple[Sample, Tensor]:
        """See :class:`Answers`."""
        return sample, self._states.take(ticket, give_up)


class TargetAnswers:
    """The target writes the last answer of each sample anew, and only that is trained on.

    What it writes is a function of the target, the settings and the sample's own seed, not of
    the engine, its batches or the order of samples, as far as the target's numbers are.

    Args:
        states: Where answers and hidden states are asked for.
        config: How the target answers.
        max_seq_length: Longest prompt and answer together, tokens.
    """

    def __init__(
        self, states: AnsweringStates, config: GenerationConfig, max_seq_length: int
    ) -> None:
        self._states, self._config, self._max_seq_length = states, config, max_seq_length

    def most_tokens(self, sample: Sample) -> int:
        """See :class:`Answers`."""
        return min(prompt_length(sample) + self._config.max_tokens, self._max_seq_length)

    def submit(self, ticket: str, sample: Sample) -> None:
        """See :class:`Answers`."""
        config = self._config
        generation = Generation(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=seed_of(config.seed, sample.index),
            stop_token_ids=config.stop_token_ids,
        )
        self._states.submit(ticket, sample.input_ids[: prompt_length(sample)], generation)

    def take(
        self, ticket: str, sample: Sample, give_up: Callable[[], bool]
    ) -> tuple[Sample, Tensor]:
        """See :class:`Answers`."""
        states, answer = self._states.take_with_answer(ticket, give_up)
        prompt = sample.input_ids[: prompt_length(sample)]
        mask = np.zeros(len(prompt) + len(answer), np.bool_)
        mask[len(prompt) :] = True
        return replace(sample, input_ids=np.concatenate([prompt, answer]), loss_mask=mask), states


def answers_of(states: HiddenStates, config: Config) -> DatasetAnswers | TargetAnswers:
    """What ``inference.respond`` asks for."""
    if config.inference.respond == "dataset":
        return DatasetAnswers(states)
    assert isinstance(states, HiddenStateFeed)  # answers are not kept: no cache
    return TargetAnswers(states, config.inference.generation, config.training.max_seq_length)


def check_prompts(dataset: Samples, config: Config) -> None:
    """Makes sure that the target has something to answer.

    Raises:
        ConfigError: Rows are supervised from their first token on, as plain text is.
    """
    if config.inference.respond == "dataset":
        return
    num_bad = sum(prompt_length(dataset[index]) == 0 for index in range(len(dataset)))
    if num_bad:
        raise ConfigError(
            f"{num_bad} of {len(dataset)} rows of {config.dataset.train_data_path} have no prompt, "
            "and inference.respond is target",
            allowed="conversations",
            hint="set inference.respond=dataset, or remove the rows of plain text",
        )


def most_tokens(lengths: TokenIds, config: Config) -> TokenIds:
    """Tokens that samples may have once they are answered; packs are filled accordingly."""
    if config.inference.respond == "dataset":
        return lengths
    longest = lengths + config.inference.generation.max_tokens
    return np.minimum(longest, config.training.max_seq_length).astype(np.int32)


def prompt_length(sample: Sample) -> int:
    """Tokens before the last answer: up to the last run of supervised ones."""
    supervised = np.flatnonzero(sample.loss_mask)
    breaks = np.flatnonzero(np.diff(supervised) > 1)
    return int(supervised[breaks[-1] + 1] if breaks.size else supervised[0])


def seed_of(seed: int, index: int) -> int:
    """The random seed of one sample: 31 bits that have nothing to do with its neighbours'."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
