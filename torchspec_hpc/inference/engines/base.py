"""What every engine is: token ids in, hidden states in the store.

The states of a prompt of T tokens are one tensor ``[T, A + 1, H]``: the residual
stream after each of the A auxiliary layers, ascending, then after the last layer,
before the final norm.  An engine puts them into the store itself, wherever in it
the tensors come to be: vLLM's do in a worker process, and never travel from there
to the process that asked.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from torchspec_hpc.config import Config, RunDir
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.errors import ConfigError, TorchspecError
from torchspec_hpc.inference.placement import Placement
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.transfer.messages import Request

Device = Literal["cpu", "cuda"]


class PromptRefused(TorchspecError):
    """The engine cannot serve a prompt; asking again will not help."""


@dataclass(frozen=True)
class Finished:
    """An engine is through with a request: its states are captured, and on their way.

    Attributes:
        request: As it was admitted.
        num_answer_tokens: Tokens that were generated for it.
        problem: Why its states are not captured after all; None: they are.
    """

    request: Request
    num_answer_tokens: int = 0
    problem: str | None = None


class Engine(Protocol):
    """A target model that captures hidden states, and is fed while it runs.

    Whatever part of it holds the states puts them into the store and tells the requester
    (:mod:`torchspec_hpc.inference.delivery`), so that nothing waits for the engine's next step.

    Attributes:
        max_prompts: Open requests worth having: those that run, and as many that wait.
        max_tokens: The same in tokens; one prompt may have more.
    """

    max_prompts: int
    max_tokens: int

    def admit(self, request: Request) -> None:
        """Takes a request in, without computing anything.

        Raises:
            PromptRefused: It will never be served.
        """

    def step(self) -> Sequence[Finished]:
        """Computes for a while, at most one batch of the engine; there is an open request."""

    def close(self) -> None:
        """Gives memory, processes and connections back."""


@dataclass(frozen=True)
class EngineContext:
    """What an engine is built from.

    Attributes:
        config: The whole configuration.
        run: The run; a process that an engine starts finds everything there.
        endpoints: Where the services answer.
        spec: Shape of the target.
        rank: Inference rank, named in receipts.
        placement: Which engine this process is, or which part of it.
    """

    config: Config
    run: RunDir
    endpoints: Endpoints
    spec: TargetSpec
    rank: int
    placement: Placement

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """``A + 1`` layer indices, in the order of the states; ``l`` means after ``l`` layers."""
        aux = self.spec.aux_layers(self.config.inference.aux_hidden_states_layers)
        return (*aux, self.spec.num_layers)

    @cached_property
    def device(self) -> Device:
        """Where the target runs.

        Raises:
            ConfigError: On a GPU, says the configuration, and there is none.
        """
        import torch

        configured, found = self.config.inference.device, torch.cuda.is_available()
        if configured == "cuda" and not found:
            raise ConfigError(
                "inference.device is cuda and torch finds no GPU",
                hint="check the job's GPUs and the installed torch, or set inference.device=cpu",
            )
        return configured if configured != "auto" else "cuda" if found else "cpu"

    @property
    def dtype(self) -> str:
        """Of the target's weights and of the states."""
        return self.spec.states_dtype(self.config.inference.dtype, self.device)

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that is served."""
        return self.config.training.max_seq_length


def check_prompt(token_ids: npt.NDArray[np.int32], max_tokens: int, vocab_size: int) -> None:
    """Refuses a prompt that no engine could serve.

    Args:
        token_ids: ``int32 [T]``.
        max_tokens: Longest prompt that is served.
        vocab_size: Rows of the target's embedding.

    Raises:
        PromptRefused: It is empty, too long, or holds ids that the target does not know.
    """
    if token_ids.size == 0:
        raise PromptRefused("the prompt is empty")
    if token_ids.size > max_tokens:
        raise PromptRefused(
            f"the prompt has {token_ids.size} tokens and the engine serves at most {max_tokens} "
            "(training.max_seq_length)"
        )
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise PromptRefused(
            f"the prompt holds token id {bad}; the target's ids are 0 to {vocab_size - 1}"
        )


def check_arguments(
    engine: str, extra: Collection[str], managed: Mapping[str, str | None], known: Collection[str]
) -> None:
    """Refuses ``extra_args`` that are ours to set, or that the engine does not know.

    Args:
        engine: As its makers write it; its section of the configuration is in small letters.
        extra: Names that the user gives.
        managed: Names that are ours, and the key that sets each, if there is one.
        known: Names that the installed engine knows.

    Raises:
        ConfigError: Names the argument, and the key that sets it or the nearest name.
    """
    what = f"inference.{engine.lower()}.extra_args holds"
    for name in extra:
        if name in managed:
            key = managed[name]
            raise ConfigError(
                f"{what} {name}, which is set for you",
                hint=f"set {key} instead" if key else "remove it",
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{what} {name}, which this {engine} does not know"
                + (f"; did you mean {near[0]}?" if near else "")
            )
