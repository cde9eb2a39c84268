"""The wire format: golden bytes, round trips, limits, and nothing but ProtocolError for anything
else.
"""

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

from engines.errors import ProtocolError
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
WIDE = Limits(tensors=MAX_TENSORS, part_bytes=1 << 20, total_bytes=1 << 22)

MESSAGES: dict[str, tuple[Any, dict[str, np.ndarray]]] = {
    "Request": (Request(ID, "ab" * 32, 1500), {"pixels": PIXELS, "window": np.array([7])}),
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
# What peers of version 1 have on the wire. A change here is a new version of the protocol.
GOLDEN = {
    "Request": [
        "4552540185a474797065a772657175657374a26964c410000102030405060708090a0b0c0d0e0fa57374"
        "616765d94061626162616261626162616261626162616261626162616261626162616261626162616261"
        "626162616261626162616261626162616261626162616261626162ab646561646c696e655f6d73cd05dc"
        "a774656e736f72739283a46e616d65a6706978656c73a56474797065a575696e7438a573686170659401"
        "02020383a46e616d65a677696e646f77a56474797065a5696e743634a573686170659101",
        "000102030405060708090a0b",
        "0700000000000000",
    ],
    "Accepted": [
        "4552540182a474797065a86163636570746564a26964c410000102030405060708090a0b0c0d0e0f",
    ],
    "Result": [
        "4552540185a474797065a6726573756c74a26964c410000102030405060708090a0b0c0d0e0fa8717565"
        "75655f75730caa636f6d707574655f7573ce0005464ea774656e736f72739183a46e616d65a6746f6b65"
        "6e73a56474797065a7666c6f61743136a5736861706593010102",
        "003e00c0",
    ],
    "Refused": [
        "4552540185a474797065a772656675736564a26964c410000102030405060708090a0b0c0d0e0fa4636f"
        "6465aa6f7665726c6f61646564a76d657373616765a9747279206c61746572a872657472795f6d73ccfa",
    ],
    "Cancel": [
        "4552540182a474797065a663616e63656ca26964c410000102030405060708090a0b0c0d0e0f",
    ],
    "InfoRequest": [
        "4552540182a474797065ac696e666f5f72657175657374a26964c410000102030405060708090a0b0c0d0e0f",
    ],
    "Info": [
        "4552540185a474797065a4696e666fa26964c410000102030405060708090a0b0c0d0e0fa87665727369"
        "6f6e739101a67374616765739184a6736861323536d94063646364636463646364636463646364636463"
        "646364636463646364636463646364636463646364636463646364636463646364636463646364636463"
        "646364a56c6162656ca974696e792066703332a6696e707574739183a46e616d65a677696e646f77a564"
        "74797065a5696e743634a5736861706591a16ea76f7574707574739183a46e616d65a6746f6b656e73a5"
        "6474797065a7666c6f61743332a5736861706593a16e1008a8736f667477617265b0636c6f75642d6e6f"
        "646520302e312e30",
    ],
    "VersionsSpoken": [
        "4552540001",
    ],
}


def _golden(name: str) -> list[bytes]:
    return [bytes.fromhex(frame) for frame in GOLDEN[name]]


@pytest.mark.parametrize("name", MESSAGES)
def test_golden_bytes(name: str) -> None:
    message, arrays = MESSAGES[name]
    assert [bytes(frame) for frame in encode(message, arrays)] == _golden(name)


def test_limits_are_those_of_the_version() -> None:
    """What is longer on one side is refused by the other: a change is a new version too."""
    assert (HEADER_BYTES, MAX_TENSORS, TEXT_LENGTH) == (16 * 1024, 16, 600)


@pytest.mark.parametrize("name", MESSAGES)
def test_golden_bytes_decode(name: str) -> None:
    message, arrays = MESSAGES[name]
    found, tensors = decode(_golden(name), WIDE)
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
    frames = encode(Request(new_id(), "0" * 64, 1), {"a": array})
    _, arrays = decode([bytes(frame) for frame in frames], WIDE)
    assert arrays["a"].tobytes() == raw
    assert (arrays["a"].dtype, arrays["a"].shape) == (np.dtype(dtype), tuple(shape))


def test_no_copy_either_way() -> None:
    array = np.arange(4096, dtype=np.float32).reshape(4, -1)
    frames = encode(Result(ID, 1, 1), {"tokens": array})
    assert np.shares_memory(np.frombuffer(frames[1], np.uint8), array)
    received = np.frombuffer(bytes(frames[1]), np.uint8)
    _, arrays = decode([frames[0], received], WIDE)
    assert np.shares_memory(arrays["tokens"], received)
    assert not arrays["tokens"].flags.writeable


def test_arrays_that_are_not_contiguous_are_sent_in_order() -> None:
    array = np.arange(24, dtype=np.int64).reshape(4, 6).T[::2]
    frames = [bytes(frame) for frame in encode(Result(ID, 1, 1), {"a": array})]
    assert np.array_equal(decode(frames, WIDE)[1]["a"], array)


def test_frames_off_their_alignment_still_give_aligned_arrays() -> None:
    frames = encode(Result(ID, 1, 1), {"a": np.array([1, -2, 3])})
    shifted = memoryview(b"." + bytes(frames[1]))[1:]
    _, arrays = decode([frames[0], shifted], WIDE)
    assert arrays["a"].flags.aligned
    assert arrays["a"].tolist() == [1, -2, 3]


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
def test_arrays_that_cannot_travel(array: np.ndarray) -> None:
    with pytest.raises(ProtocolError, match="cannot travel"):
        encode(Request(ID, "0" * 64, 1), {"a": array})


def test_only_requests_and_results_carry_tensors() -> None:
    with pytest.raises(ProtocolError, match="carries no tensors"):
        encode(Accepted(ID), {"a": PIXELS})


def _header(**fields: Any) -> bytes:
    """A Request's header with fields changed or added; None leaves one out."""
    tensor = {"name": "pixels", "dtype": "uint8", "shape": [1, 2, 2, 3]}
    whole: dict[str, Any] = {
        "type": "request",
        "id": ID,
        "stage": "ab" * 32,
        "deadline_ms": 1500,
        "tensors": [tensor],
    }
    changed = {**whole, **fields}
    changed["tensors"] = [
        {**tensor, **t} if isinstance(t, dict) else t for t in changed["tensors"] or []
    ]
    return b"ERT\1" + msgspec.msgpack.encode({k: v for k, v in changed.items() if v is not None})


BODY = bytes(12)


def test_the_header_the_next_tests_break_is_sound() -> None:
    assert decode([_header(), BODY], WIDE)[1]["pixels"].shape == (1, 2, 2, 3)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"ERT"],
        [b"HTTP/1.1 400"],
        [b"ERT\1"],
        [b"ERT\0"],
        [b"ERT\0\0"],
        [b"ERT\0" + bytes(range(1, 256)) * 2],
        [_header(type="other"), BODY],
        [_header(type=None), BODY],
        [_header(id=b"short"), BODY],
        [_header(id=bytes(17)), BODY],
        [_header(id="text"), BODY],
        [_header(stage="AB" * 32), BODY],
        [_header(stage="ab" * 31), BODY],
        [_header(stage="ab" * 32 + "\n"), BODY],
        [_header(deadline_ms=-1), BODY],
        [_header(deadline_ms=1.5), BODY],
        [_header(deadline_ms=2**40), BODY],
        [_header(deadline_ms=None), BODY],
        [_header(extra=1), BODY],
        [_header() + b"\0", BODY],
        [_header()[:-1], BODY],
        [_header().ljust(HEADER_BYTES + 1, b"\0"), BODY],
        [_header(tensors=[{}, {}]), BODY, BODY],
        [_header(tensors=[{"name": f"t{i}"} for i in range(17)]), *[BODY] * 17],
        [_header(tensors=[{"name": "a b"}]), BODY],
        [_header(tensors=[{"name": "a\x1b[2J"}]), BODY],
        [_header(tensors=[{"name": ""}]), BODY],
        [_header(tensors=[{"name": "a" * 65}]), BODY],
        [_header(tensors=[{"dtype": "object"}]), BODY],
        [_header(tensors=[{"dtype": "float64"}]), BODY],
        [_header(tensors=[{"dtype": "bool"}]), BODY],
        [_header(tensors=[{"shape": []}]), BODY],
        [_header(tensors=[{"shape": [12, 0]}]), b""],
        [_header(tensors=[{"shape": [-3, -4]}]), BODY],
        [_header(tensors=[{"shape": [2**31] * 8}]), BODY],
        [_header(tensors=[{"shape": [2**63]}]), BODY],
        [_header(tensors=[{"shape": [1] * 9}]), BODY],
        [_header(tensors=[{"shape": [11]}]), BODY],
        [_header(tensors=[{"shape": [13]}]), BODY],
        [_header(tensors=[{"dtype": "int64"}]), BODY],
        [_header()],
        [_header(), BODY, BODY],
        [_header(), *[BODY] * 1000],
        [_header(tensors=None), BODY],
    ],
)
def test_defects_are_protocol_errors(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError) as info:
        decode(frames, WIDE)
    assert str(info.value)
    assert not isinstance(info.value, UnknownVersionError)


@pytest.mark.parametrize("version", [2, 7, 255])
def test_another_version_is_told_apart(version: int) -> None:
    header = b"ERT" + bytes([version]) + b"whatever the future holds"
    with pytest.raises(UnknownVersionError, match=f"version {version}.*speaks 1"):
        decode([header, b"and its frames"], WIDE)


@pytest.mark.parametrize(
    ("limits", "fits"),
    [
        (Limits(2, 12, 20), True),
        (Limits(1, 12, 20), False),
        (Limits(2, 11, 20), False),
        (Limits(2, 12, 19), False),
    ],
)
def test_limits(limits: Limits, fits: bool) -> None:
    frames = _golden("Request")  # 12 bytes of pixels, 8 of window
    if fits:
        decode(frames, limits)
        return
    with pytest.raises(ProtocolError, match="most"):
        decode(frames, limits)


def test_a_header_can_be_read_before_its_tensors() -> None:
    frames = _golden("Request")
    message = decode_header(frames[0])
    assert isinstance(message, Request)
    assert message.id == ID
    with pytest.raises(ProtocolError):
        decode_tensors(message, frames[1:2], WIDE)


@dataclass(frozen=True)
class Spec:
    name: str
    dtype: str
    shape: tuple[int | str, ...]


def test_limits_come_from_the_stage() -> None:
    specs = [Spec("pixels", "uint8", ("n", 8, 8, 3)), Spec("window", "int64", ("n",))]
    assert limits_of(specs, 9) == Limits(2, 9 * 192, 9 * 200)
    assert limits_of([Spec("tokens", "bfloat16", ("n", 4))], 3) == Limits(1, 24, 24)


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
def test_stages_that_cannot_travel(specs: list[Spec]) -> None:
    with pytest.raises(ProtocolError):
        limits_of(specs, 9)


def test_refusals_are_cut_and_cleaned_to_what_may_travel() -> None:
    message = refuse(ID, "engine", "bell \a, escape \x1b[2J, newline \n, é " + "x" * 1000)
    found, _ = decode(encode(message), WIDE)
    assert found == message
    assert message.message.isprintable()
    assert message.message.isascii()
    assert len(message.message) == 600


@pytest.mark.parametrize("retry_ms", [-1, 86_400_001, 1.5, "soon", None])
def test_retry_hints_out_of_range(retry_ms: Any) -> None:
    fields = {"type": "refused", "id": ID, "code": "overloaded", "message": "", "retry_ms": 1}
    decode_header(b"ERT\1" + msgspec.msgpack.encode(fields))
    with pytest.raises(ProtocolError, match="retry_ms"):
        decode_header(b"ERT\1" + msgspec.msgpack.encode({**fields, "retry_ms": retry_ms}))


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
@given(st.lists(st.binary(max_size=80), max_size=6), st.sampled_from([b"", b"ERT\1", b"ERT\0"]))
def test_fuzz_any_bytes(frames: list[bytes], prefix: bytes) -> None:
    if frames:
        frames[0] = prefix + frames[0]
    _only_protocol_errors(lambda: decode(frames, WIDE))


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
    _only_protocol_errors(lambda: decode([b"ERT\1" + body, BODY], WIDE))


def test_fuzz_mutations() -> None:
    rng = random.Random(0)
    goldens = [_golden(name) for name in MESSAGES]
    decoded = 0
    for _ in range(20_000):
        header, *rest = rng.choice(goldens)
        changed = bytearray(header)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(changed))
            changed[place] = rng.choice((rng.randrange(256), changed[place] ^ 1, 0xFF))
        if rng.random() < 0.2:
            changed = changed[: rng.randrange(len(changed))]
        try:
            decode([bytes(changed), *rest], WIDE)
            decoded += 1
        except ProtocolError:
            pass
    assert 0 < decoded < 20_000  # some changes are harmless: an id, a text


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\x85\xa4type\x91"])
def test_deep_nesting_does_not_exhaust_the_stack(opening: bytes) -> None:
    body = opening * (HEADER_BYTES // len(opening) - 2)
    with pytest.raises(ProtocolError):
        decode([b"ERT\1" + body], WIDE)


def test_lengths_a_header_claims_are_not_allocated() -> None:
    import tracemalloc

    claims = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
    tracemalloc.start()
    for claim in claims:
        for header in (claim, b"\x81\xa2id" + claim, b"\x82\xa4type\xa7request\xa7tensors" + claim):
            with pytest.raises(ProtocolError):
                decode([b"ERT\1" + header], WIDE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
