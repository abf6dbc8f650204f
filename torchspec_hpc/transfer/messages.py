"""Control messages: small, typed and authenticated. Tensors never travel in them.

A message on the wire is 32 bytes of HMAC-SHA256 over the payload, then the
payload: one msgpack map with a ``type`` tag.  Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import hmac

import msgspec
import numpy as np
import numpy.typing as npt

from torchspec_hpc.errors import TorchspecError

#: A million token ids.  The TCPStore server drops a connection that sends more than 8 MiB.
MAX_MESSAGE_BYTES = 4 * 1024**2
_MAC_BYTES = hashlib.sha256().digest_size
_MIN_SECRET_BYTES = 16
_TOKEN_DTYPE = np.dtype("<i4")
TOKEN_BYTES = _TOKEN_DTYPE.itemsize


Scalar = int | float | str | bool | None


class MessageError(TorchspecError):
    """A control message that must not be used: forged, damaged or too large."""


class Generation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the target continues a prompt before its states are captured.

    Attributes:
        max_tokens: Longest answer, end-of-turn token included.
        temperature: 0 is greedy.
        top_p: Share of probability that is sampled from.
        seed: Of this sample's own random numbers: they are nobody else's, on any engine.
        stop_token_ids: Ids that end the answer, besides those the target's files name.
    """

    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_token_ids: tuple[int, ...]


class Request(msgspec.Struct, frozen=True, tag="request", forbid_unknown_fields=True):
    """A trainer asks for the hidden states of one sample.

    Attributes:
        ticket: Names the sample; unique among the open requests of a trainer.
        attempt_no: 0 for the first try, one more for every further one.
        reply_to: Rank of the trainer.
        segment: Mooncake segment to put the object in, if there is room.
        key: Mooncake key of the object, unique to this try.
        token_ids: int32, little endian; see :func:`encode_tokens`.
        generation: How the target answers first; None: the states of these tokens are wanted.
    """

    ticket: str
    attempt_no: int
    reply_to: int
    segment: str
    key: str
    token_ids: bytes
    generation: Generation | None = None

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """Token ids, shape [T], read only."""
        return decode_tokens(self.token_ids)


class Receipt(msgspec.Struct, frozen=True, tag="receipt", forbid_unknown_fields=True):
    """The hidden states of a request are in the store.

    Attributes:
        ticket: Of the request.
        key: Where they are.
        shape: (T, A + 1, H): tokens, aux layers and the last one, hidden size.
        dtype: As torch calls it, without ``torch.``.
        engine: Inference rank that made them.
        checksum: What :meth:`HiddenStateStore.put` returned.
        answer: Tokens that the target generated, the last of the T; empty: none were asked for.
    """

    ticket: str
    key: str
    shape: tuple[int, int, int]
    dtype: str
    engine: int
    checksum: int | None = None
    answer: bytes = b""


class Taken(msgspec.Struct, frozen=True, tag="taken", forbid_unknown_fields=True):
    """An engine has taken a request from the queue.

    Attributes:
        key: Of the request.
        engine: Inference rank.
        session: Of the engine's process, as in its heartbeats.
    """

    key: str
    engine: int
    session: str


class Refusal(msgspec.Struct, frozen=True, tag="refusal", forbid_unknown_fields=True):
    """A request that was not served.

    Attributes:
        ticket: Of the request.
        key: Of the request: tells which try this is about.
        reason: One line for the user.
        permanent: Whether asking again is useless.
    """

    ticket: str
    key: str
    reason: str
    permanent: bool


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat", forbid_unknown_fields=True):
    """A process is alive, and how it fares.

    Attributes:
        role: ``training`` or ``inference``.
        rank: In its role.
        time: Seconds since the epoch, the sender's clock.
        session: Of the sender's process: another one after a restart.
        payload: What the role reports: plain numbers and strings.
    """

    role: str
    rank: int
    time: float
    session: str
    payload: dict[str, Scalar]


Message = Request | Taken | Receipt | Refusal | Heartbeat


class Codec:
    """Encodes and decodes messages with the secret of one run.

    Args:
        secret: At least 16 bytes that only the processes of the run know.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) < _MIN_SECRET_BYTES:
            raise ValueError(f"the secret has {len(secret)} bytes, needs {_MIN_SECRET_BYTES}")
        self._secret = secret
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Message)

    def encode(self, message: Message) -> bytes:
        """The bytes to send.

        Raises:
            MessageError: The message is larger than :data:`MAX_MESSAGE_BYTES`.
        """
        payload = self._encoder.encode(message)
        wire = self._mac(payload) + payload
        if len(wire) > MAX_MESSAGE_BYTES:
            raise MessageError(
                f"a {type(message).__name__} of {len(wire)} bytes does not fit a control message; "
                f"the limit is {MAX_MESSAGE_BYTES}"
            )
        return wire

    def decode(self, wire: bytes) -> Message:
        """The message in ``wire``, once it is known to come from this run.

        Raises:
            MessageError: It is too large, was not made with this secret, or is no message.
        """
        if not _MAC_BYTES < len(wire) <= MAX_MESSAGE_BYTES:
            raise MessageError(f"{len(wire)} bytes are no control message")
        mac, payload = wire[:_MAC_BYTES], wire[_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(payload)):
            raise MessageError(
                "a control message is not authentic: another run's secret, or tampered with"
            )
        try:
            message: Message = self._decoder.decode(payload)
        except msgspec.DecodeError as error:
            raise MessageError(f"a control message is malformed: {error}") from error
        return message

    def _mac(self, payload: bytes) -> bytes:
        return hmac.digest(self._secret, payload, "sha256")


def encode_tokens(token_ids: npt.NDArray[np.integer]) -> bytes:
    """Token ids [T] as a request carries them."""
    return token_ids.astype(_TOKEN_DTYPE, copy=False).tobytes()


def decode_tokens(data: bytes) -> npt.NDArray[np.int32]:
    """The int32 token ids [T] in ``data``; the array is read only."""
    if len(data) % TOKEN_BYTES:
        raise MessageError(f"{len(data)} bytes are no int32 token ids")
    return np.frombuffer(data, dtype=_TOKEN_DTYPE)
