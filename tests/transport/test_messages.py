"""The wire format: golden bytes, round trips, limits, and ProtocolError for everything else."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_common.errors import ProtocolError
from transport.messages import (
    DTYPES,
    HEADER_BYTES,
    MAX_TENSORS,
    TEXT_LENGTH,
    Accepted,
    Cancel,
    Info,
    InfoRequest,
    Limits,
    Refused,
    Request,
    Result,
    StageInfo,
    TensorHeader,
    TensorInfo,
    UnknownVersionError,
    VersionsSpoken,
    decode,
    decode_header,
    decode_tensors,
    encode,
    limits_of,
    new_id,
    refuse,
)

ID = bytes(range(16))
PIXELS = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
SEAL = bytes(range(32))
WIDE = Limits(tensors=MAX_TENSORS, total_bytes=1 << 22)

MESSAGES: dict[str, tuple[Any, dict[str, np.ndarray]]] = {
    "Request": (Request(ID, "ab" * 32, 1500, SEAL), {"pixels": PIXELS, "window": np.array([7])}),
    "Accepted": (Accepted(ID), {}),
    "Result": (Result(ID, 12, 345678), {"tokens": np.array([[[1.5, -2.0]]], np.float16)}),
    "Refused": (Refused(ID, "overloaded", "try later", 250), {}),
    "Cancel": (Cancel(ID), {}),
    "InfoRequest": (InfoRequest(ID), {}),
    "Info": (
        Info(
            ID,
            (1,),
            (
                StageInfo(
                    "cd" * 32,
                    "tiny fp32",
                    (TensorInfo("window", "int64", ("n",)),),
                    (TensorInfo("tokens", "float32", ("n", 16, 8)),),
                ),
            ),
            "cloud-node 0.1.0",
        ),
        {},
    ),
    "VersionsSpoken": (VersionsSpoken((1,)), {}),
}
# The bytes that peers of version 2 exchange. A change here is a new version of the protocol.
GOLDEN = {
    "Request": (
        "45525402ef00000086a474797065a772657175657374a26964c410000102030405060708090a0b0c0d0e0f"
        "a57374616765d9406162616261626162616261626162616261626162616261626162616261626162616261"
        "6261626162616261626162616261626162616261626162616261626162ab646561646c696e655f6d73cd05"
        "dca47365616cc420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fa77465"
        "6e736f72739283a46e616d65a6706978656c73a56474797065a575696e7438a57368617065940102020383"
        "a46e616d65a677696e646f77a56474797065a5696e743634a5736861706591010000000000000000000001"
        "02030405060708090a0b000000000000000000000000000000000000000000000000000000000000000000"
        "000000000000000000000000000000000000000700000000000000"
    ),
    "Accepted": (
        "455254022400000082a474797065a86163636570746564a26964c410000102030405060708090a0b0c0d0e0f"
    ),
    "Result": (
        "455254026a00000085a474797065a6726573756c74a26964c410000102030405060708090a0b0c0d0e0fa8"
        "71756575655f75730caa636f6d707574655f7573ce0005464ea774656e736f72739183a46e616d65a6746f"
        "6b656e73a56474797065a7666c6f61743136a573686170659301010200000000000000000000000000000e"
        "82b51e0af1b18e54c1d3371afdc8f6a74c8fcd"
    ),
    "Refused": (
        "455254025000000085a474797065a772656675736564a26964c410000102030405060708090a0b0c0d0e0f"
        "a4636f6465aa6f7665726c6f61646564a76d657373616765a9747279206c61746572a872657472795f6d73"
        "ccfa"
    ),
    "Cancel": (
        "455254022200000082a474797065a663616e63656ca26964c410000102030405060708090a0b0c0d0e0f"
    ),
    "InfoRequest": (
        "455254022800000082a474797065ac696e666f5f72657175657374a26964c410000102030405060708090a"
        "0b0c0d0e0f"
    ),
    "Info": (
        "455254020001000085a474797065a4696e666fa26964c410000102030405060708090a0b0c0d0e0fa87665"
        "7273696f6e739101a67374616765739184a6736861323536d9406364636463646364636463646364636463"
        "64636463646364636463646364636463646364636463646364636463646364636463646364636463646364"
        "63646364a56c6162656ca974696e792066703332a6696e707574739183a46e616d65a677696e646f77a564"
        "74797065a5696e743634a5736861706591a16ea76f7574707574739183a46e616d65a6746f6b656e73a564"
        "74797065a7666c6f61743332a5736861706593a16e1008a8736f667477617265b0636c6f75642d6e6f6465"
        "20302e312e30"
    ),
    "VersionsSpoken": ("4552540001"),
}


def _golden(name: str) -> bytes:
    return bytes.fromhex(GOLDEN[name])


@pytest.mark.parametrize("name", MESSAGES)
def test_golden_bytes(name: str) -> None:
    message, arrays = MESSAGES[name]
    assert bytes(encode(message, arrays, SEAL)) == _golden(name)


def test_limits_belong_to_the_protocol_version() -> None:
    """The other side would refuse a longer message, so a change is a new version too."""
    assert (HEADER_BYTES, MAX_TENSORS, TEXT_LENGTH) == (16 * 1024, 16, 600)


@pytest.mark.parametrize("name", MESSAGES)
def test_golden_bytes_decode(name: str) -> None:
    message, arrays = MESSAGES[name]
    found, tensors = decode(_golden(name), WIDE, SEAL)
    if arrays:
        headers = tuple(
            msgspec.convert({"name": k, "dtype": str(a.dtype), "shape": a.shape}, TensorHeader)
            for k, a in arrays.items()
        )
        message = msgspec.structs.replace(message, tensors=headers)
    assert found == message
    assert tensors.keys() == arrays.keys()
    for key, array in arrays.items():
        assert tensors[key].dtype == array.dtype
        assert np.array_equal(tensors[key], array)


@settings(max_examples=50, deadline=None)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    data=st.data(),
)
def test_arrays_survive_bit_for_bit(dtype: str, shape: list[int], data: st.DataObject) -> None:
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = data.draw(st.binary(min_size=count, max_size=count))
    array = np.frombuffer(raw, dtype).reshape(shape)
    for message in (Request(new_id(), "0" * 64, 1, SEAL), Result(new_id(), 1, 1)):
        _, arrays = decode(bytes(encode(message, {"a": array}, SEAL)), WIDE, SEAL)
        assert arrays["a"].tobytes() == raw
        assert (arrays["a"].dtype, arrays["a"].shape) == (np.dtype(dtype), tuple(shape))
        assert not arrays["a"].flags.writeable


def test_a_request_is_read_without_a_copy() -> None:
    array = np.arange(4096, dtype=np.float32).reshape(4, -1)
    frame = encode(Request(ID, "0" * 64, 1, SEAL), {"pixels": array, "window": np.array([7])})
    received = np.frombuffer(frame, np.uint8)
    _, arrays = decode(received, WIDE)
    assert all(np.shares_memory(found, received) for found in arrays.values())


def test_a_result_opens_only_with_its_request_s_key() -> None:
    tokens = np.arange(4096, dtype=np.float32).reshape(4, -1)
    other = np.arange(64, dtype=np.float32)
    frame = bytes(encode(Result(ID, 1, 1), {"tokens": tokens, "scales": other}, SEAL))
    assert tokens[1:].tobytes()[:64] not in frame
    found = decode(frame, WIDE, SEAL)[1]
    assert np.array_equal(found["tokens"], tokens)
    assert np.array_equal(found["scales"], other)
    for seal in (bytes(32), SEAL[:16], SEAL[::-1], b""):
        with pytest.raises(ProtocolError, match="not sealed with its request's key"):
            decode(frame, WIDE, seal)


def test_a_sealed_result_cannot_be_changed() -> None:
    """Header and tensors belong together: changing an id, a shape or one bit of a value is
    noticed."""
    arrays = {"a": np.zeros((2, 3), np.float32), "b": np.zeros((2, 3), np.float32)}
    frame = bytes(encode(Result(ID, 1, 1), arrays, SEAL))
    other_id = frame.replace(ID, bytes(16))
    assert other_id != frame
    end = 8 + int.from_bytes(frame[4:8], "little")
    first = -(-end // 64) * 64
    for changed in (
        other_id,
        frame[:-1] + bytes([frame[-1] ^ 1]),
        frame[:first] + bytes([frame[first] ^ 1]) + frame[first + 1 :],
        frame[: first - 1] + b"\1" + frame[first:],
    ):
        with pytest.raises(ProtocolError):
            decode(changed, WIDE, SEAL)


def test_each_tensor_of_a_result_has_its_own_nonce() -> None:
    """AES-GCM is broken by two messages under the same key and nonce."""
    array = np.zeros(64, np.uint8)
    frame = bytes(encode(Result(ID, 1, 1), {"a": array, "b": array}, SEAL))
    first, second = frame[-208:-128], frame[-80:]  # with their tags; 48 zeros are between them
    assert frame[-128:-80] == bytes(48)
    assert first != second


def test_arrays_that_are_not_contiguous_are_sent_in_order() -> None:
    array = np.arange(24, dtype=np.int64).reshape(4, 6).T[::2]
    for message in (Request(ID, "0" * 64, 1, SEAL), Result(ID, 1, 1)):
        frame = encode(message, {"a": array}, SEAL)
        assert np.array_equal(decode(frame, WIDE, SEAL)[1]["a"], array)


def test_a_frame_without_alignment_still_gives_aligned_arrays() -> None:
    frame = encode(Request(ID, "0" * 64, 1, SEAL), {"a": np.array([1, -2, 3])})
    shifted = memoryview(b"." + bytes(frame))[1:]
    _, arrays = decode(shifted, WIDE)
    assert arrays["a"].flags.aligned
    assert arrays["a"].tolist() == [1, -2, 3]


def test_messages_contain_no_bytes_of_earlier_memory() -> None:
    """The gaps between header and tensors are zeros. That memory may have held another edge's
    windows."""
    for size in range(1, 300):
        np.full(8 << 10, 0xA5, np.uint8)  # freed at once, so that the message reuses its memory
        array = np.full(size, 0xFF, np.uint8)
        frame = bytes(encode(Request(ID, "0" * 64, 1, SEAL), {"a": array, "b": array}))
        end = 8 + int.from_bytes(frame[4:8], "little")
        first = -(-end // 64) * 64
        second = -(-(first + size) // 64) * 64
        assert not any(frame[end:first] + frame[first + size : second])
        assert len(frame) == second + size


@pytest.mark.parametrize(
    "array",
    [
        np.array([True]),
        np.array(["text"]),
        np.array([object()]),
        np.array([1.0]),
        np.array([1j]),
        np.zeros((), np.uint8),
        np.zeros((0, 3), np.uint8),
        np.zeros((1,) * 9, np.uint8),
    ],
)
def test_arrays_that_cannot_be_sent_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ProtocolError, match="cannot travel"):
        encode(Request(ID, "0" * 64, 1, SEAL), {"a": array})


def test_only_requests_and_results_carry_tensors() -> None:
    with pytest.raises(ProtocolError, match="carries no tensors"):
        encode(Accepted(ID), {"a": PIXELS})


def _whole(fields: bytes, *body: bytes) -> bytes:
    """A message with this msgpack and these tensors."""
    whole = b"ERT\2" + len(fields).to_bytes(4, "little") + fields
    for tensor in body:
        whole += bytes(-len(whole) % 64) + tensor
    return whole


def _request(*body: bytes, **fields: Any) -> bytes:
    """A Request with fields changed or added. None removes one."""
    tensor = {"name": "pixels", "dtype": "uint8", "shape": [1, 2, 2, 3]}
    whole: dict[str, Any] = {
        "type": "request",
        "id": ID,
        "stage": "ab" * 32,
        "seal": SEAL,
        "deadline_ms": 1500,
        "tensors": [tensor],
    }
    changed = {**whole, **fields}
    changed["tensors"] = [
        {**tensor, **t} if isinstance(t, dict) else t for t in changed["tensors"] or []
    ]
    packed = msgspec.msgpack.encode({k: v for k, v in changed.items() if v is not None})
    return _whole(packed, *body)


BODY = bytes(12)


def test_the_header_used_by_the_next_tests_is_valid() -> None:
    assert decode(_request(BODY), WIDE)[1]["pixels"].shape == (1, 2, 2, 3)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"ERT",
        b"HTTP/1.1 400",
        b"ERT\2",
        b"ERT\2\0\0\0",
        b"ERT\2\0\0\0\0",
        b"ERT\2\xff\xff\xff\xff",
        b"ERT\0",
        b"ERT\0\0",
        b"ERT\0" + bytes(range(1, 256)) * 2,
        _whole(msgspec.msgpack.encode({"type": "cancel", "id": ID}), b"surplus"),
        _whole(msgspec.msgpack.encode({"type": "cancel", "id": ID, "why": 1})),
        _whole(msgspec.msgpack.encode({"type": "info_request", "id": ID})) + b"\0",
        _whole(msgspec.msgpack.encode({"type": "info_request", "id": ID, "tensors": []})),
        _request(BODY) + b"\0",
        _request(BODY)[:-1],
        _request(BODY, seal=None),
        _request(BODY, seal=bytes(31)),
        _request(BODY, type="other"),
        _request(BODY, type=None),
        _request(BODY, id=b"short"),
        _request(BODY, id=bytes(17)),
        _request(BODY, id="text"),
        _request(BODY, stage="AB" * 32),
        _request(BODY, stage="ab" * 31),
        _request(BODY, stage="ab" * 32 + "\n"),
        _request(BODY, deadline_ms=-1),
        _request(BODY, deadline_ms=1.5),
        _request(BODY, deadline_ms=2**40),
        _request(BODY, deadline_ms=None),
        _request(BODY, extra=1),
        _request(BODY, stage="a" * HEADER_BYTES),
        _request(BODY, BODY, tensors=[{}, {}]),
        _request(*[BODY] * 17, tensors=[{"name": f"t{i}"} for i in range(17)]),
        _request(BODY, tensors=[{"name": "a b"}]),
        _request(BODY, tensors=[{"name": "a\x1b[2J"}]),
        _request(BODY, tensors=[{"name": ""}]),
        _request(BODY, tensors=[{"name": "a" * 65}]),
        _request(BODY, tensors=[{"dtype": "object"}]),
        _request(BODY, tensors=[{"dtype": "float64"}]),
        _request(BODY, tensors=[{"dtype": "bool"}]),
        _request(BODY, tensors=[{"shape": []}]),
        _request(b"", tensors=[{"shape": [12, 0]}]),
        _request(BODY, tensors=[{"shape": [-3, -4]}]),
        _request(BODY, tensors=[{"shape": [2**31] * 8}]),
        _request(BODY, tensors=[{"shape": [2**63]}]),
        _request(BODY, tensors=[{"shape": [1] * 9}]),
        _request(BODY, tensors=[{"shape": [11]}]),
        _request(BODY, tensors=[{"shape": [13]}]),
        _request(BODY, tensors=[{"dtype": "int64"}]),
        _request(),
        _request(BODY, BODY),
        _request(*[BODY] * 1000),
        _request(BODY, tensors=None),
    ],
)
def test_defects_are_protocol_errors(frame: bytes) -> None:
    with pytest.raises(ProtocolError) as info:
        decode(frame, WIDE)
    assert str(info.value)
    assert not isinstance(info.value, UnknownVersionError)


@pytest.mark.parametrize(("times", "fits"), [(10, True), (HEADER_BYTES // 21, False)])
def test_a_header_above_its_limit_is_refused(times: int, fits: bool) -> None:
    """A field may be repeated, so a header of any length can be well-formed."""
    field = msgspec.msgpack.encode("id") + msgspec.msgpack.encode(ID)
    kind = msgspec.msgpack.encode("type") + msgspec.msgpack.encode("cancel")
    frame = _whole(b"\xde" + (times + 1).to_bytes(2, "big") + kind + times * field)
    assert (len(frame) <= HEADER_BYTES) is fits
    if fits:
        assert decode_header(frame) == Cancel(ID)
        return
    with pytest.raises(ProtocolError, match=r"header of \d+ bytes"):
        decode_header(frame)


@pytest.mark.parametrize("version", [1, 3, 7, 255])
def test_another_version_raises_its_own_error(version: int) -> None:
    header = b"ERT" + bytes([version]) + b"whatever the future holds"
    with pytest.raises(UnknownVersionError, match=f"version {version}.*speaks 2"):
        decode(header, WIDE)


@pytest.mark.parametrize(
    ("limits", "fits"),
    [
        (Limits(2, 20), True),
        (Limits(1, 20), False),
        (Limits(2, 19), False),
    ],
)
def test_frame_limits_are_enforced(limits: Limits, fits: bool) -> None:
    frame = _golden("Request")  # 12 bytes of pixels, 8 of window
    if fits:
        decode(frame, limits)
        return
    with pytest.raises(ProtocolError, match="most"):
        decode(frame, limits)


def test_a_header_can_be_read_before_its_tensors() -> None:
    frame = _golden("Request")
    message = decode_header(frame)
    assert isinstance(message, Request)
    assert message.id == ID
    with pytest.raises(ProtocolError):
        decode_tensors(message, frame[:-1], WIDE)


def test_the_largest_legal_message_is_within_its_limit() -> None:
    arrays = {f"t{i}": np.ones(100 + i, np.uint8) for i in range(MAX_TENSORS)}
    limits = Limits(MAX_TENSORS, sum(array.nbytes for array in arrays.values()))
    for message in (Request(ID, "0" * 64, 1, SEAL), Result(ID, 1, 1)):
        frame = encode(message, arrays, SEAL)
        assert frame.nbytes <= limits.message_bytes
        assert decode(frame, limits, SEAL)[1].keys() == arrays.keys()


@dataclass(frozen=True)
class Spec:
    name: str
    dtype: str
    shape: tuple[int | str, ...]


def test_limits_follow_from_the_stage() -> None:
    specs = [Spec("pixels", "uint8", ("n", 8, 8, 3)), Spec("window", "int64", ("n",))]
    assert limits_of(specs, 9) == Limits(2, 9 * 200)
    assert limits_of([Spec("tokens", "bfloat16", ("n", 4))], 3) == Limits(1, 24)


@pytest.mark.parametrize(
    "specs",
    [
        [],
        [Spec("a", "float64", ("n",))],
        [Spec("a", "uint8", ("n", "k"))],
        [Spec("a", "uint8", ("n", 0))],
        [Spec(f"a{i}", "uint8", ("n",)) for i in range(MAX_TENSORS + 1)],
    ],
)
def test_stages_that_cannot_be_sent_are_refused(specs: list[Spec]) -> None:
    with pytest.raises(ProtocolError):
        limits_of(specs, 9)


def test_refusal_texts_are_truncated_and_cleaned() -> None:
    message = refuse(ID, "engine", "bell \a, escape \x1b[2J, newline \n, é " + "x" * 1000)
    found, _ = decode(encode(message), WIDE)
    assert found == message
    assert message.message.isprintable()
    assert message.message.isascii()
    assert len(message.message) == 600


@pytest.mark.parametrize("retry_ms", [-1, 86_400_001, 1.5, "soon", None])
def test_retry_hints_out_of_range_are_refused(retry_ms: Any) -> None:
    fields = {"type": "refused", "id": ID, "code": "overloaded", "message": "", "retry_ms": 1}
    decode_header(_whole(msgspec.msgpack.encode(fields)))
    with pytest.raises(ProtocolError, match="retry_ms"):
        decode_header(_whole(msgspec.msgpack.encode({**fields, "retry_ms": retry_ms})))


def test_ids_are_not_repeated() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert {len(id) for id in ids} == {16}


def _only_protocol_errors(call: Callable[[], Any]) -> None:
    try:
        call()
    except ProtocolError:
        return


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", b"ERT\2", b"ERT\2\x10\0\0\0", b"ERT\0"]))
def test_fuzz_any_bytes(frame: bytes, prefix: bytes) -> None:
    _only_protocol_errors(lambda: decode(prefix + frame, WIDE))


_PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
_TREES = st.recursive(
    _PLAIN | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["id", "stage", "deadline_ms", "tensors", "x"]), _TREES),
    st.sampled_from([name.lower() for name in MESSAGES] + ["info_request"]),
)
def test_fuzz_any_msgpack(fields: dict[str, Any], tag: str) -> None:
    body = msgspec.msgpack.encode({"type": tag, **fields})
    _only_protocol_errors(lambda: decode(_whole(body, BODY), WIDE))


def test_fuzz_mutations() -> None:
    rng = random.Random(0)
    goldens = [_golden(name) for name in MESSAGES]
    decoded = 0
    for _ in range(20_000):
        changed = bytearray(rng.choice(goldens))
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(changed))
            changed[place] = rng.choice((rng.randrange(256), changed[place] ^ 1, 0xFF))
        if rng.random() < 0.2:
            changed = changed[: rng.randrange(len(changed))]
        try:
            decode(bytes(changed), WIDE, SEAL)
            decoded += 1
        except ProtocolError:
            pass
    assert 0 < decoded < 20_000  # some changes are harmless: an id, a text


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\x85\xa4type\x91"])
def test_deep_nesting_does_not_exhaust_the_stack(opening: bytes) -> None:
    body = opening * (HEADER_BYTES // len(opening) - 2)
    with pytest.raises(ProtocolError):
        decode(_whole(body), WIDE)


def test_no_memory_is_allocated_for_lengths_that_a_header_claims() -> None:
    import tracemalloc

    claims = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
    tracemalloc.start()
    for claim in claims:
        for header in (claim, b"\x81\xa2id" + claim, b"\x82\xa4type\xa7request\xa7tensors" + claim):
            with pytest.raises(ProtocolError):
                decode(_whole(header), WIDE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
