"""Hidden states in Mooncake: put by engines, read and removed by trainers.

Mooncake answers with codes and guards nothing: a call on a closed client is a
SIGSEGV, unpinned objects vanish silently, and a full store fails at once.  This
wrapper turns codes into named errors and makes each of those impossible.

An object is the raw memory of one contiguous tensor [T, A + 1, H]; its shape,
type and checksum travel in the receipt.  Every object can be lost with its owner.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.config.transfer_schema import MooncakeConfig
from torchspec_hpc.errors import ConfigError, TorchspecError
from torchspec_hpc.transfer.checksum import checksum
from torchspec_hpc.transfer.mooncake_client import StoreUnavailable, open_client

_OK = 0
_NO_SPACE = -200
_INVALID = -600
_INCOMPLETE = -703
_NOT_FOUND = -704
_FIRST_PAUSE_S = 0.002
_LAST_PAUSE_S = 0.1
_NOTHING = nullcontext()


class ObjectGone(TorchspecError):
    """The object is not in the store, or was lost with the process that held it."""


class StoreFull(TorchspecError):
    """There was no room for an object until the deadline."""


class StoreError(TorchspecError):
    """Mooncake refused a call for a reason that is none of the others."""


#: Mooncake's return codes that mean something to us (mooncake-store/include/types.h)
_CODES: dict[int, tuple[type[TorchspecError], str]] = {
    _NO_SPACE: (StoreFull, "no room in any segment"),
    _INVALID: (StoreError, "invalid parameters: buffer too small, or memory registered twice"),
    _INCOMPLETE: (ObjectGone, "the object was never written to its end"),
    _NOT_FOUND: (ObjectGone, "there is no such object, or the segment it went to is gone"),
    -706: (StoreError, "the object has a lease"),
    -707: (ObjectGone, "reading took longer than mooncake.kv_lease_ttl_s"),
    -800: (ObjectGone, "the transfer failed: the process that holds the segment is gone"),
    -900: (StoreUnavailable, "the Mooncake master does not answer"),
    -901: (StoreUnavailable, "the Mooncake master does not answer in time"),
}


class _Calls:
    """Lends the client for one call: never after the end, and the end waits for the calls."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._num_calls = 0
        self._idle = threading.Condition(threading.Lock())
        self.ended = False

    def __enter__(self) -> Any:
        with self._idle:
            if self.ended:
                raise StoreUnavailable("this process has closed its Mooncake client")
            self._num_calls += 1
        return self._client

    def __exit__(self, *_: object) -> None:
        with self._idle:
            self._num_calls -= 1
            if self.ended:
                self._idle.notify_all()

    def end(self) -> bool:
        """Returns when no call is under way; False if it had ended before."""
        with self._idle:
            if self.ended:
                return False
            self.ended = True
            self._idle.wait_for(lambda: self._num_calls == 0)
        return True


class HiddenStateStore:
    """One process' client of the store; any number of threads may use it.

    Open it with :meth:`open`, close it with :meth:`close`.
    """

    def __init__(self, client: Any, config: MooncakeConfig) -> None:
        self._client = client
        self._config = config
        self._calling = _Calls(client)
        # by address, with its end; keeps the memory alive as long as the transport may touch it
        self._registered: dict[int, tuple[int, torch.Tensor]] = {}

    @classmethod
    def open(
        cls,
        mooncake: MooncakeConfig,
        endpoints: Endpoints,
        *,
        segment_bytes: int,
        deadline_s: float,
    ) -> HiddenStateStore:
        """Connects to the master and lends it memory.

        Args:
            mooncake: The run's settings.
            endpoints: Where the master is.
            segment_bytes: Memory that this process lends: trainers lend
                ``mooncake.global_segment_size``, engines 0.
            deadline_s: Longest wait for the master.

        Raises:
            StoreUnavailable: The master does not answer.
        """
        return cls(open_client(mooncake, endpoints, segment_bytes, deadline_s), mooncake)

    @property
    def segment(self) -> str:
        """Name of this process' segment, for requests to prefer."""
        with self._calling as client:
            return str(client.get_hostname())

    def put(self, key: str, tensor: torch.Tensor, segment: str) -> int | None:
        """Stores a tensor, pinned until it is removed; waits while the store is full.

        Args:
            key: New and unique: Mooncake keeps the old value of a key it knows.
            tensor: [T, A + 1, H], contiguous.
            segment: Segment to prefer; others are used when it is full or gone.

        Returns:
            Checksum of the tensor; None without ``mooncake.checksum``, or on a GPU.

        Raises:
            ConfigError: The tensor is larger than a whole segment.
            StoreFull: There was no room for ``mooncake.put_deadline_s`` seconds.
            ObjectGone: The process whose segment was chosen is gone.
            StoreUnavailable: The master does not answer.
        """
        pointer, num_bytes = _memory_of(tensor)
        limit = int(self._config.global_segment_size)
        if num_bytes > limit:
            raise ConfigError(
                f"the hidden states of {tensor.shape[0]} tokens take {num_bytes} bytes and "
                f"mooncake.global_segment_size is {limit}",
                allowed="a segment that holds at least one sample, better several",
                hint="raise mooncake.global_segment_size or lower training.max_seq_length",
            )
        found = checksum(tensor) if self._config.checksum and not tensor.is_cuda else None
        placement = _placement(segment)
        deadline = time.monotonic() + self._config.put_deadline_s
        pause_s = _FIRST_PAUSE_S
        with self._known(tensor):
            while True:
                with self._calling as client:
                    code = client.put_from(key, pointer, num_bytes, placement)
                if code != _NO_SPACE or time.monotonic() >= deadline:
                    break
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LAST_PAUSE_S)
        if code != _OK:
            raise self._error(code, f"put {key!r} of {num_bytes} bytes")
        return found

    def get_into(self, key: str, buffer: torch.Tensor, expected: int | None = None) -> None:
        """Fills a contiguous tensor with an object of exactly its size.

        Args:
            key: As put.
            buffer: On the CPU.
            expected: What :meth:`put` returned; None: its content is not checked.

        Raises:
            ObjectGone: The object is missing, lost, damaged, or of another size.
            StoreUnavailable: The master does not answer.
        """
        pointer, num_bytes = _memory_of(buffer)
        with self._known(buffer), self._calling as client:
            code = client.get_into(key, pointer, num_bytes)
        if code == _INVALID:  # registered it is: so it is too small
            raise ObjectGone(
                f"get {key!r}: the object has more than the expected {num_bytes} bytes"
            )
        if code < 0:
            raise self._error(code, f"get {key!r}")
        if code != num_bytes:
            raise ObjectGone(f"get {key!r}: {code} bytes came, {num_bytes} were expected")
        if expected is not None and (found := checksum(buffer)) != expected:
            raise ObjectGone(f"get {key!r}: its checksum is {found:08x}, expected {expected:08x}")

    def remove(self, key: str) -> None:
        """Removes an object at once; it is fine if there is none.

        One that is still being written stays: its writer tells of it, or, once that
        is dead, the master frees it after minutes (slurm/services.py).

        Raises:
            StoreUnavailable: The master does not answer.
        """
        with self._calling as client:
            code = client.remove(key, True)  # forced: reading it took a lease
        if code not in (_OK, _NOT_FOUND, _INCOMPLETE):
            raise self._error(code, f"remove {key!r}")

    def register(self, buffer: torch.Tensor) -> None:
        """Makes memory known to the transport, which pins it where RDMA moves the data.

        Other memory is registered for the length of each call: nearly free for
        tcp, costly for RDMA.  Register what is used again and again.
        """
        pointer, num_bytes = _memory_of(buffer)
        with self._calling as client:
            code = client.register_buffer(pointer, num_bytes)
        if code != _OK:
            raise self._error(code, f"register a buffer of {num_bytes} bytes")
        self._registered[pointer] = pointer + num_bytes, buffer

    def unregister(self, buffer: torch.Tensor) -> None:
        """Takes back :meth:`register`."""
        with self._calling as client:
            code = client.unregister_buffer(buffer.data_ptr())
        if code != _OK:
            raise self._error(code, "unregister a buffer")
        del self._registered[buffer.data_ptr()]

    def close(self) -> None:
        """Waits for the calls under way, then leaves; objects in this segment are lost."""
        if self._calling.end():
            self._client.close()
            self._registered.clear()

    def _known(self, tensor: torch.Tensor) -> AbstractContextManager[None]:
        """Registers memory for one call, unless it is a part of what is registered."""
        start = tensor.data_ptr()
        end = start + tensor.nbytes
        for at, (until, _) in tuple(self._registered.items()):
            if at <= start and end <= until:
                return _NOTHING
        return self._registered_for_a_call(tensor)

    @contextmanager
    def _registered_for_a_call(self, tensor: torch.Tensor) -> Iterator[None]:
        self.register(tensor)
        try:
            yield
        finally:
            if not self._calling.ended:  # closing has forgotten all memory
                self.unregister(tensor)

    def _error(self, code: int, doing: str) -> TorchspecError:
        kind, meaning = _CODES.get(code, (StoreError, "see mooncake-store/include/types.h"))
        if kind is StoreFull:
            meaning += (
                f" for {self._config.put_deadline_s:.0f} s, or no trainer has a segment; "
                f"mooncake.global_segment_size is {int(self._config.global_segment_size)}"
            )
        return kind(f"{doing}: {meaning} (code {code})")


def _placement(segment: str) -> Any:
    from mooncake.store import ReplicateConfig

    placement = ReplicateConfig()
    placement.with_hard_pin = True  # without it a filling store evicts what nobody has read
    placement.preferred_segment = segment
    return placement


def _memory_of(tensor: torch.Tensor) -> tuple[int, int]:
    if not tensor.is_contiguous() or tensor.nbytes == 0:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} cannot be "
            "transferred; allowed: contiguous and not empty"
        )
    return tensor.data_ptr(), tensor.nbytes
