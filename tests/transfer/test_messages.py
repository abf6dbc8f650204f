from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.services import SECRET
from torchspec_hpc.transfer.messages import (
    MAX_MESSAGE_BYTES,
    Codec,
    Heartbeat,
    Message,
    MessageError,
    Receipt,
    Refusal,
    Request,
    Taken,
    decode_tokens,
    encode_tokens,
)

CODEC = Codec(SECRET)
counts = st.integers(0, 2**31 - 1)
scalars = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(),
    st.booleans(),
    st.none(),
)
messages = st.one_of(
    st.builds(Request, st.text(), counts, counts, st.text(), st.text(), st.binary()),
    st.builds(
        Receipt,
        st.text(),
        st.text(),
        st.tuples(counts, counts, counts),
        st.text(),
        counts,
        st.one_of(st.none(), counts),
    ),
    st.builds(Taken, st.text(), counts, st.text()),
    st.builds(Refusal, st.text(), st.text(), st.text(), st.booleans()),
    st.builds(
        Heartbeat,
        st.text(),
        counts,
        st.floats(allow_nan=False),
        st.text(),
        st.dictionaries(st.text(), scalars),
    ),
)
REFUSAL = Refusal("t", "k", "no", permanent=True)


@settings(deadline=None)
@given(messages)
def test_decode_gives_back_what_was_encoded(message: Message) -> None:
    decoded = CODEC.decode(CODEC.encode(message))
    assert decoded == message
    assert type(decoded) is type(message)


@settings(deadline=None)
@given(messages, st.data())
def test_any_changed_byte_is_refused(message: Message, data: st.DataObject) -> None:
    wire = bytearray(CODEC.encode(message))
    position = data.draw(st.integers(0, len(wire) - 1))
    wire[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(MessageError, match="not authentic"):
        CODEC.decode(bytes(wire))


@settings(deadline=None)
@given(messages, st.data())
def test_a_cut_message_is_refused(message: Message, data: st.DataObject) -> None:
    wire = CODEC.encode(message)
    with pytest.raises(MessageError):
        CODEC.decode(wire[: data.draw(st.integers(0, len(wire) - 1))])


def test_another_runs_message_is_refused() -> None:
    with pytest.raises(MessageError, match="another run's secret"):
        CODEC.decode(Codec(bytes(32)).encode(REFUSAL))


@pytest.mark.parametrize(
    "payload",
    [
        b"\xc1",
        msgspec.msgpack.encode({"type": "order", "ticket": "t"}),
        msgspec.msgpack.encode({"type": "refusal", "ticket": "t"}),
        msgspec.msgpack.encode({**msgspec.to_builtins(REFUSAL), "extra": 1}),
        msgspec.msgpack.encode({**msgspec.to_builtins(REFUSAL), "permanent": "yes"}),
    ],
    ids=["not msgpack", "unknown type", "field missing", "unknown field", "wrong type"],
)
def test_authentic_nonsense_is_refused(payload: bytes) -> None:
    with pytest.raises(MessageError, match="malformed"):
        CODEC.decode(CODEC._mac(payload) + payload)


def test_a_message_over_the_limit_is_refused_on_both_sides() -> None:
    request = Request("t", 0, 0, "s", "k", bytes(MAX_MESSAGE_BYTES))
    with pytest.raises(MessageError, match=f"Request of .* the limit is {MAX_MESSAGE_BYTES}"):
        CODEC.encode(request)
    with pytest.raises(MessageError):
        CODEC.decode(bytes(MAX_MESSAGE_BYTES + 1))


def test_a_request_of_the_longest_context_fits() -> None:
    tokens = np.arange(1_000_000, dtype=np.int32)
    request = Request("t", 0, 0, "s", "k", encode_tokens(tokens))
    assert len(CODEC.encode(request)) < MAX_MESSAGE_BYTES
    np.testing.assert_array_equal(request.tokens, tokens)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, ">i4"])
def test_tokens_travel_as_little_endian_int32(dtype: str) -> None:
    tokens = np.array([0, 1, 49151, 2**31 - 1], dtype=dtype)
    wire = encode_tokens(tokens)
    assert wire[4:8] == b"\x01\x00\x00\x00"
    np.testing.assert_array_equal(decode_tokens(wire), tokens)


def test_half_a_token_is_refused() -> None:
    with pytest.raises(MessageError, match="5 bytes"):
        decode_tokens(bytes(5))


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="8 bytes"):
        Codec(bytes(8))
