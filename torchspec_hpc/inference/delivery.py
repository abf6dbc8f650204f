"""Hands captured states over: into the store, and word of it to whoever asked.

One object of this kind lives in the very process that holds the states: this one for
Transformers, a worker process of its own for vLLM.  Writing overlaps with the engine's
next steps, and an engine that is ahead of a full store is held up here.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from torchspec_hpc.config import Config, RunDir
from torchspec_hpc.config.endpoints import Endpoints, read_secret
from torchspec_hpc.errors import ConfigError, TorchspecError, UserError
from torchspec_hpc.transfer.buffers import BufferPool
from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.messages import Receipt, Refusal, Request
from torchspec_hpc.transfer.store import HiddenStateStore

#: Writes at a time.  More than one, so that one trainer's full segment does not hold up
#: another trainer's data.
_NUM_THREADS = 4
#: Bytes that may wait to be written, besides one object of any size.
_MAX_WAITING_BYTES = 256 << 20


@dataclass(frozen=True)
class Destination:
    """Where the states of one request go, and who is told.

    Attributes:
        ticket: Of the request.
        key: Name of the object in the store.
        segment: The memory segment to prefer.
        reply_to: Rank of the trainer that asked.
        answer: Tokens that were generated for it, as a receipt carries them.
    """

    ticket: str
    key: str
    segment: str
    reply_to: int
    answer: bytes = b""

    @classmethod
    def of(cls, request: Request, answer: bytes = b"") -> Destination:
        """The destination that a request names."""
        return cls(request.ticket, request.key, request.segment, request.reply_to, answer)


class Delivery:
    """Writes states in the background and sends their receipts; for one submitting thread.

    Args:
        store: An open connection, closed by :meth:`close`.
        control: Likewise.
        rank: Inference rank, named in receipts.
        direct: Whether the store may read the memory of a GPU.
    """

    def __init__(
        self, store: HiddenStateStore, control: ControlClient, rank: int, *, direct: bool = False
    ) -> None:
        self._store, self._control, self._rank, self._direct = store, control, rank, direct
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="delivery")
        self._pool = BufferPool(store, pin=torch.cuda.is_available())
        self._copying: torch.cuda.Stream | None = None
        self._changed = threading.Condition()
        self._waiting_bytes = 0
        self._crash: BaseException | None = None

    @classmethod
    def open(cls, config: Config, run: RunDir, endpoints: Endpoints, rank: int) -> Delivery:
        """Connects to both services.

        Raises:
            StoreUnavailable: The Mooncake master does not answer.
            ControlLost: The control store does not answer.
        """
        ready_s = config.control.service_ready_s
        if config.mooncake.enable_gpu_direct and config.mooncake.protocol != "rdma":
            raise ConfigError(
                "mooncake.enable_gpu_direct is true and mooncake.protocol is "
                f"{config.mooncake.protocol}",
                allowed="protocol rdma, which reads a GPU's memory by itself",
                hint="set mooncake.protocol=rdma, or mooncake.enable_gpu_direct=false",
            )
        store = HiddenStateStore.open(
            config.mooncake, endpoints, segment_bytes=0, deadline_s=ready_s
        )
        try:
            control = ControlClient(endpoints.control, read_secret(run), timeout_s=ready_s)
        except TorchspecError:
            store.close()
            raise
        return cls(store, control, rank, direct=config.mooncake.enable_gpu_direct)

    def submit(self, destination: Destination, states: torch.Tensor) -> None:
        """Starts one delivery; waits while too much is waiting already.

        Args:
            destination: Where to.
            states: ``[T, A + 1, H]`` on any device.  It is copied before this returns, or,
                on a GPU, before what its stream does next.

        Raises:
            ControlLost: A receipt could not be sent: the control store is gone.
        """
        self._wait_for_room(states.nbytes)
        in_place = self._direct and states.is_cuda
        source, copied = _as_it_is(states) if in_place else self._to_host(states)
        future = self._threads.submit(self._deliver, destination, source, copied)
        future.add_done_callback(partial(self._done, source.nbytes))

    def close(self) -> None:
        """Closes both connections; a write that waits for room fails at its next try."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._store.close()
        self._control.close()

    def _wait_for_room(self, num_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._waiting_bytes == 0
                    or self._waiting_bytes + num_bytes <= _MAX_WAITING_BYTES
                    or self._crash
                )
            )
            self._waiting_bytes += num_bytes
        self._raise_crash()

    def _raise_crash(self) -> None:
        if self._crash is not None:
            raise self._crash

    def _to_host(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Into memory of ours, and the event after which it is there; None: it is."""
        host = self._pool.lend(tuple(states.shape), states.dtype)
        if not states.is_cuda:
            host.copy_(states)
            return host, None
        if self._copying is None:
            self._copying = torch.cuda.Stream(states.device)  # type: ignore[no-untyped-call]
        self._copying.wait_stream(torch.cuda.current_stream(states.device))
        with torch.cuda.stream(self._copying):  # beside the engine's next step
            host.copy_(states, non_blocking=True)
            states.record_stream(self._copying)
            return host, _recorded_event()

    def _deliver(
        self, to: Destination, states: torch.Tensor, copied: torch.cuda.Event | None
    ) -> None:
        if copied is not None:
            copied.synchronize()
        reply: Receipt | Refusal
        try:
            checksum = self._store.put(to.key, states, to.segment)
        except UserError as error:  # larger than a segment: it will never fit
            reply = Refusal(to.ticket, to.key, str(error), permanent=True)
        except TorchspecError as error:  # full or gone: the requester asks again
            reply = Refusal(to.ticket, to.key, str(error), permanent=False)
        else:
            shape = (states.shape[0], states.shape[1], states.shape[2])
            dtype = str(states.dtype).removeprefix("torch.")
            reply = Receipt(to.ticket, to.key, shape, dtype, self._rank, checksum, to.answer)
        self._control.push_reply(to.reply_to, reply)

    def _done(self, num_bytes: int, future: Future[None]) -> None:
        with self._changed:
            self._waiting_bytes -= num_bytes
            if not future.cancelled():
                self._crash = self._crash or future.exception()
            self._changed.notify_all()


def _as_it_is(states: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    return states.contiguous(), _recorded_event()


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
