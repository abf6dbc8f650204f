"""Stands where the engines are: real queue, real store, hidden states made of token ids."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from tests.services import SECRET
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.config.transfer_schema import MooncakeConfig
from torchspec_hpc.errors import TorchspecError
from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.messages import Receipt, Refusal, Request, encode_tokens
from torchspec_hpc.transfer.store import HiddenStateStore


def hidden_states(token_ids: torch.Tensor, width: int, hidden: int) -> torch.Tensor:
    """A smooth function of a token and the one before it, [T, width, hidden] float32."""
    before = torch.cat([token_ids[:1], token_ids[:-1]])
    seeds = (token_ids + 0.37 * before + 1.0)[:, None]
    return torch.sin(seeds * torch.linspace(0.1, 2.0, width * hidden)).view(-1, width, hidden)


def answer_to(request: Request) -> np.ndarray:
    """Some of the tiny target's tokens; a function of the seed, and sometimes very short."""
    how = request.generation
    if how is None:
        return np.zeros(0, np.int32)
    generator = np.random.default_rng(how.seed)
    num_tokens = generator.integers(1, how.max_tokens, endpoint=True)
    return generator.integers(3, 40, num_tokens, dtype=np.int32)


@dataclass
class Producer:
    """Serves requests from a thread.

    Attributes:
        on_request: Called first with each request; what it returns is the reason to refuse it.
    """

    on_request: Callable[[Request], str | None]

    def serve(self, control: ControlClient, store: HiddenStateStore, stop: threading.Event) -> None:
        while not stop.is_set():
            request = control.pop_request(0.05)
            if request is None:
                continue
            if reason := self.on_request(request):
                refusal = Refusal(request.ticket, request.key, reason, permanent=True)
                control.push_reply(request.reply_to, refusal)
                continue
            answer = answer_to(request)
            token_ids = np.concatenate([request.tokens, answer]).astype(np.int64)
            states = hidden_states(torch.from_numpy(token_ids), 4, 64)
            try:
                store.put(request.key, states.contiguous(), request.segment)
            except TorchspecError:  # the trainer that asked is gone
                continue
            receipt = Receipt(
                request.ticket,
                request.key,
                tuple(states.shape),
                "float32",
                0,
                answer=encode_tokens(answer),
            )
            control.push_reply(request.reply_to, receipt)


@contextmanager
def producer(mooncake: MooncakeConfig, endpoints: Endpoints) -> Iterator[Producer]:
    """A running producer; set its `on_request` to interfere."""
    control = ControlClient(endpoints.control, SECRET, timeout_s=10)
    store = HiddenStateStore.open(mooncake, endpoints, segment_bytes=0, deadline_s=20)
    made, stop = Producer(lambda request: None), threading.Event()
    thread = threading.Thread(target=made.serve, args=(control, store, stop))
    thread.start()
    try:
        yield made
    finally:
        stop.set()
        thread.join()
        store.close()
        control.close()
