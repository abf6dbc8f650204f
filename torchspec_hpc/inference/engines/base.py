"""What every engine is: token ids in, hidden states in the store.

The states of a prompt of T tokens are one tensor ``[T, A + 1, H]``: the residual
stream after each of the A auxiliary layers, ascending, then after the last layer,
before the final norm.  An engine puts them into the store itself, wherever in it
the tensors come to be: vLLM's do in a worker process, and never travel from there
to the process that asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from torchspec_hpc.config import Config, RunDir
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.spec import TargetSpec

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class EnginePrompt:
    """One prompt, and where its states go.

    Attributes:
        key: Name of the object in the store.
        segment: The memory segment to prefer, the requester's.
        token_ids: ``int32 [T]``.
    """

    key: str
    segment: str
    token_ids: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Captured:
    """The states of one prompt, in the store: ``put`` returned 0 before this was made.

    Attributes:
        key: Name of the object.
        shape: ``(T, A + 1, H)``.
        dtype: As torch spells it, ``bfloat16`` for instance.
    """

    key: str
    shape: tuple[int, int, int]
    dtype: str


@dataclass(frozen=True)
class Failed:
    """Why the states of one prompt are not in the store.

    Attributes:
        key: Name the object would have had.
        reason: One line.
        permanent: The prompt itself is unusable: asking again will not help.
    """

    key: str
    reason: str
    permanent: bool


Result = Captured | Failed


class Engine(Protocol):
    """A target model that captures hidden states.

    Attributes:
        max_prompts: Prompts worth handing over at once.
        max_tokens: Tokens worth handing over at once; one prompt may have more.
    """

    max_prompts: int
    max_tokens: int

    def prefill(self, prompts: Sequence[EnginePrompt]) -> list[Result]:
        """Computes the states and returns when they are in the store.

        Returns:
            One result for each prompt, in their order.  A prompt that cannot be
            served does not keep the others from being served.
        """

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
    """

    config: Config
    run: RunDir
    endpoints: Endpoints
    spec: TargetSpec

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
        """Of the target's weights and of the states.

        ``auto`` is the target's own dtype on a GPU and float32 on a CPU, where
        products in bfloat16 are up to 300 times slower than in float32.
        """
        configured = self.config.inference.dtype
        if configured != "auto":
            return configured
        return "float32" if self.device == "cpu" else self.spec.dtype

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that is served."""
        return self.config.training.max_seq_length


def sift(
    prompts: Sequence[EnginePrompt], max_tokens: int, vocab_size: int
) -> tuple[list[EnginePrompt], dict[str, Result]]:
    """Separates prompts that no engine could serve from the others.

    Args:
        prompts: Of one batch.
        max_tokens: Longest prompt that is served.
        vocab_size: Rows of the target's embedding.

    Returns:
        The usable prompts, and a permanent failure by key for each of the others.
    """
    usable: list[EnginePrompt] = []
    failures: dict[str, Result] = {}
    for prompt in prompts:
        reason = _unusable(prompt.token_ids, max_tokens, vocab_size)
        if reason is None:
            usable.append(prompt)
        else:
            failures[prompt.key] = Failed(prompt.key, reason, permanent=True)
    return usable, failures


def _unusable(ids: npt.NDArray[np.int32], max_tokens: int, vocab_size: int) -> str | None:
    if ids.size == 0:
        return "the prompt is empty"
    if ids.size > max_tokens:
        return (
            f"the prompt has {ids.size} tokens and the engine serves at most {max_tokens} "
            "(training.max_seq_length)"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        return f"the prompt holds token id {bad}; the target's ids are 0 to {vocab_size - 1}"
    return None
