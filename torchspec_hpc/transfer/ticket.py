"""What a trainer knows of a sample it has asked for."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch

from torchspec_hpc.errors import DeadlineExceeded
from torchspec_hpc.transfer.messages import Generation

_RETRY_PAUSE_S = 0.1  # after the first failure, four times as long after each further one


@dataclass
class Ticket:
    """A sample that was asked for and is not yet taken.

    Attributes:
        name: As the trainer calls it.
        token_ids: int32, little endian.
        generation: How the target answers first; None: it does not.
        submitted: Clock of the first request.
        due: Clock at which to look after it.
        place: Requests ever pushed when the last one was, itself included; 0 once
            that one has failed.
        keys: Of every request sent; the last one is current.
        status: For the user, should it never arrive.
        states: [T, A + 1, H], once here.
        answer: What the target generated, the last of the T tokens; int32, little endian.
        error: What taking it raises instead.
    """

    name: str
    token_ids: bytes
    generation: Generation | None = None
    submitted: float = field(default_factory=time.monotonic)
    due: float = 0.0
    place: int = 0
    keys: list[str] = field(default_factory=list)
    status: str = "not sent yet"
    states: torch.Tensor | None = None
    answer: bytes = b""
    error: Exception | None = None

    @property
    def settled(self) -> bool:
        """Whether nothing more is to be done for it."""
        return self.states is not None or self.error is not None

    def postpone(self, status: str, limit_s: float = math.inf) -> None:
        """Has a failed request sent again after a pause: what broke may need a moment."""
        self.status, self.place = status, 0
        pause_s = _RETRY_PAUSE_S * 4 ** (len(self.keys) - 1)
        self.due = time.monotonic() + min(pause_s, limit_s)

    def too_late(self) -> DeadlineExceeded:
        """The error that says what was waited for, and what became of it."""
        return DeadlineExceeded(
            f"the hidden states of sample {self.name!r} "
            f"({len(self.keys)} requests; last known: {self.status})",
            time.monotonic() - self.submitted,
            hint="see the inference logs; control.{request_deadline_s,request_max_tries}",
        )
