"""The messages of edge and node: typed structs with limits, one ZeroMQ frame each.

Decoding gives a well-formed message or a `ProtocolError` for any input, and allocates nothing
because a header claims a size. `docs/protocol.md` describes the bytes.
"""

from __future__ import annotations

import math
import secrets
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import msgspec
import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec import Meta, Struct

from edge_common.errors import ProtocolError

MAGIC = b"ERT"
VERSION = 2
VERSIONS = (VERSION,)
"""Every version this software speaks, oldest first."""
NEGOTIATION = 0
"""Version byte of the form that never changes: ``ERT 00`` and a byte for each version spoken."""

HEADER_BYTES = 16 * 1024
"""Largest header, prefix included."""
MAX_TENSORS = 16
"""The limit on tensors in a message, for any stage."""
NO_ID = bytes(16)
"""Id in a `Refused` when the message's own id could not be read."""
SEAL_BYTES = 32
"""Length of the one-time key that seals a result."""
_ALIGNMENT = 64  # of the tensors in a message
_TAG_BYTES = 16  # of AES-GCM
_PREFIX = struct.Struct("<3sBI")  # magic, version, length of the msgpack map

DTYPES: dict[str, np.dtype[Any]] = {
    "uint8": np.dtype("u1"),
    "int8": np.dtype("i1"),
    "uint16": np.dtype("<u2"),  # bfloat16 travels as its bits
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""The only dtypes on the wire (little-endian). No bool: its byte can hold values other than 0 and
1."""

Id = Annotated[bytes, Meta(min_length=16, max_length=16)]
Seal = Annotated[bytes, Meta(min_length=SEAL_BYTES, max_length=SEAL_BYTES)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:/-]{1,64}\Z")]
# Printable ASCII: a peer's text is shown on terminals and in logs, where escapes could do harm.
Text = Annotated[str, Meta(pattern=r"^[ -~]{0,600}\Z")]
Code = Annotated[str, Meta(pattern=r"^[a-z_]{1,32}\Z")]
Dtype = Literal["uint8", "int8", "uint16", "int32", "int64", "float16", "float32"]
Micros = Annotated[int, Meta(ge=0, le=86_400_000_000)]
TEXT_LENGTH = 600


class TensorHeader(Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor of the message: row-major, little-endian, no padding inside."""

    name: Name
    dtype: Dtype
    shape: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=2**31)], ...], Meta(min_length=1, max_length=8)
    ]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


Tensors = Annotated[tuple[TensorHeader, ...], Meta(max_length=MAX_TENSORS)]


class TensorInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output of a stage; a dimension that varies is a name."""

    name: Name
    dtype: Name
    shape: Annotated[tuple[int | Name, ...], Meta(max_length=8)]


class StageInfo(Struct, frozen=True, forbid_unknown_fields=True):
    """A stage a node serves. `label` is for people, such as ``tiny fp32``."""

    sha256: Sha256
    label: Text
    inputs: Annotated[tuple[TensorInfo, ...], Meta(max_length=MAX_TENSORS)]
    outputs: Annotated[tuple[TensorInfo, ...], Meta(max_length=MAX_TENSORS)]


class Request(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="request"):
    """Edge to node: run `stage` on the tensors. `deadline_ms` is the time left, counted from
    arrival. `seal` is the key for the tensors of the result; it is used once."""

    id: Id
    stage: Sha256
    deadline_ms: Annotated[int, Meta(ge=0, le=86_400_000)]
    seal: Seal
    tensors: Tensors = ()


class Accepted(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="accepted"):
    """Node to edge: the whole request has arrived and is queued. It ends the upload, so that the
    edge can time upload, compute and download by its own clock."""

    id: Id


class Result(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="result"):
    """Node to edge: the stage's outputs, sealed with the request's key, so that only its edge can
    read them. `queue_us`: from arrival to the engine's start. `compute_us`: inside the engine."""

    id: Id
    queue_us: Micros
    compute_us: Micros
    tensors: Tensors = ()


class Refused(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="refused"):
    """Node to edge: no result will follow. Codes: see `docs/protocol.md`. `retry_ms`: when the same
    request may succeed; 0 is no hint."""

    id: Id
    code: Code
    message: Text
    retry_ms: Annotated[int, Meta(ge=0, le=86_400_000)] = 0


class Cancel(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="cancel"):
    """Edge to node: forget the request of this id. Never answered. Unknown ids are ignored: the
    result may have been on its way."""

    id: Id


class InfoRequest(
    Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="info_request"
):
    """Edge to node: asks which stages it serves."""

    id: Id


class Info(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="info"):
    """Node to edge: the answer to `InfoRequest`."""

    id: Id
    versions: Annotated[tuple[Annotated[int, Meta(ge=1, le=255)], ...], Meta(max_length=16)]
    stages: Annotated[tuple[StageInfo, ...], Meta(max_length=8)]
    software: Text


@dataclass(frozen=True)
class VersionsSpoken:
    """Either way: the sender does not know our version and speaks only these. Never answered."""

    versions: tuple[int, ...]


Message = Request | Accepted | Result | Refused | Cancel | InfoRequest | Info | VersionsSpoken


UPDATE = "update the older side"


class UnknownVersionError(ProtocolError):
    """A message of a version that this software does not speak. Answer with `VersionsSpoken`."""

    code = "wrong_version"


class Spec(Protocol):
    """A tensor of a stage as the bundle describes it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int | str, ...]: ...


@dataclass(frozen=True)
class Limits:
    """Most tensors, and most bytes of all tensors, in one message of one direction of a stage."""

    tensors: int
    total_bytes: int

    @property
    def message_bytes(self) -> int:
        """The largest legal message."""
        return HEADER_BYTES + self.total_bytes + self.tensors * (_TAG_BYTES + _ALIGNMENT)


@dataclass(frozen=True)
class StageLimits:
    """Both directions of a stage."""

    request: Limits
    result: Limits


def limits_of(specs: Iterable[Spec], batch: int) -> Limits:
    """Limits of a message holding these tensors with at most `batch` windows.

    Args:
        specs: tensors whose first dimension may be a name (the batch). All others are numbers.
        batch: most windows in one request, at least 1.

    Raises:
        ProtocolError: a tensor can't travel: unknown dtype, another open dimension, too many.
    """
    sizes = []
    for spec in specs:
        dims = [batch if i == 0 and isinstance(d, str) else d for i, d in enumerate(spec.shape)]
        dtype = DTYPES.get("uint16" if spec.dtype == "bfloat16" else spec.dtype)
        if dtype is None or not all(isinstance(d, int) and d > 0 for d in dims):
            raise ProtocolError(
                f"tensor {spec.name!r} ({spec.dtype} {spec.shape}) cannot travel: expected one of "
                f"{', '.join(DTYPES)} and no open dimension but the first"
            )
        sizes.append(math.prod(int(d) for d in dims) * dtype.itemsize)
    if not 0 < len(sizes) <= MAX_TENSORS:
        raise ProtocolError(f"a stage must carry 1 to {MAX_TENSORS} tensors, found {len(sizes)}")
    return Limits(len(sizes), sum(sizes))


def stage_limits(inputs: Iterable[Spec], outputs: Iterable[Spec], batch: int) -> StageLimits:
    """`limits_of` for both directions of a stage."""
    return StageLimits(limits_of(inputs, batch), limits_of(outputs, batch))


def new_seal() -> bytes:
    """A key for one result."""
    return secrets.token_bytes(SEAL_BYTES)


def new_id() -> bytes:
    """A message id: 16 random bytes, used once and for one node."""
    return secrets.token_bytes(16)


def refuse(id: bytes, code: str, message: str, retry_ms: int = 0) -> Refused:
    """A `Refused` whose text is shortened and reduced to printable ASCII."""
    clean = "".join(c if " " <= c <= "~" else "?" for c in message)
    if len(clean) > TEXT_LENGTH:
        clean = clean[: TEXT_LENGTH - 3] + "..."
    return Refused(id, code, clean, retry_ms)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(
    Request | Accepted | Result | Refused | Cancel | InfoRequest | Info
)


def encode(
    message: Message, arrays: Mapping[str, np.ndarray] | None = None, seal: bytes = b""
) -> memoryview:
    """The one frame of a message.

    Args:
        message: leave out `tensors` of a `Request` or `Result`: they are filled in from `arrays`.
        arrays: tensors by name; copied.
        seal: for a `Result`, the key from its request. Never seal two results with one key: AES-GCM
            is broken by a second message under the same key and nonce.

    Raises:
        ProtocolError: an array can't travel or the header would be too large.
    """
    if isinstance(message, VersionsSpoken):
        return memoryview(MAGIC + bytes([NEGOTIATION]) + bytes(message.versions))
    tensors = []
    if arrays:
        if not isinstance(message, (Request, Result)):
            raise ProtocolError(f"a {type(message).__name__} carries no tensors")
        for name, array in arrays.items():
            dtype = DTYPES.get(array.dtype.name)
            if dtype is None or array.ndim == 0 or array.size == 0 or array.ndim > 8:
                raise ProtocolError(
                    f"tensor {name!r} ({array.dtype} {list(array.shape)}) cannot travel: expected "
                    f"1 to 8 dimensions, none empty, of {', '.join(DTYPES)}"
                )
            described = TensorHeader(name, array.dtype.name, array.shape)  # type: ignore[arg-type]
            tensors.append((described, np.ascontiguousarray(array, dtype=dtype)))
        message = msgspec.structs.replace(
            message, tensors=tuple(described for described, _ in tensors)
        )
    fields = _encoder.encode(message)
    header = _PREFIX.pack(MAGIC, VERSION, len(fields)) + fields
    if len(header) > HEADER_BYTES:
        raise ProtocolError(f"header of {len(header)} bytes, the most is {HEADER_BYTES}")
    places, size = _layout(message, len(header))
    # Not zeroed: results are large.
    frame = np.empty(size, np.uint8).data
    frame[: len(header)] = header
    end = len(header)
    for index, ((_, array), (start, stop)) in enumerate(zip(tensors, places, strict=True)):
        frame[end:start] = bytes(start - end)
        raw = array.reshape(-1).view(np.uint8).data
        if isinstance(message, Result):
            AESGCM(seal).encrypt_into(_nonce(index), raw, header, frame[start:stop])
        else:
            frame[start:stop] = raw
        end = stop
    return frame


def _layout(message: Message, header: int) -> tuple[list[tuple[int, int]], int]:
    """The start and end of each tensor of a message in its frame, and the frame's length.

    Args:
        message: with its `tensors`. header: bytes before the tensors.
    """
    places, end = [], header
    if isinstance(message, (Request, Result)):
        tag = _TAG_BYTES if isinstance(message, Result) else 0
        for tensor in message.tensors:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + tensor.nbytes + tag
            places.append((start, end))
    return places, end


def _nonce(index: int) -> bytes:
    """The nonce of a sealed tensor: its place in the message. The key serves one message."""
    return index.to_bytes(12, "little")


def _split(frame: Any) -> tuple[memoryview, memoryview]:
    """A frame, and the header in it with its prefix.

    Raises:
        UnknownVersionError, ProtocolError: as `decode_header`.
    """
    view = memoryview(frame)
    if view.nbytes < 4 or view[:3] != MAGIC:
        raise ProtocolError("not an edge-runtime message: the first bytes are not ERT")
    if view[3] == NEGOTIATION:
        return view, view
    if view[3] not in VERSIONS:
        raise UnknownVersionError(
            f"message of protocol version {view[3]}, this software speaks "
            f"{', '.join(map(str, VERSIONS))}",
            mend=UPDATE,
        )
    length = _PREFIX.unpack_from(view)[2] if view.nbytes >= _PREFIX.size else 0
    header = view[: _PREFIX.size + length]
    if not _PREFIX.size + length <= min(view.nbytes, HEADER_BYTES):
        raise ProtocolError(f"header of {length} bytes in a message of {view.nbytes}")
    return view, header


def decode_header(frame: Any) -> Message:
    """The message in a frame, without its tensors.

    Args:
        frame: bytes, or anything with their buffer interface such as `zmq.Frame`.

    Raises:
        UnknownVersionError: it has another version.
        ProtocolError: it is malformed in another way, or has surplus bytes.
    """
    view, header = _split(frame)
    if header[3] == NEGOTIATION:
        spoken = tuple(header[4:260])
        if not 1 <= len(spoken) == view.nbytes - 4 <= 255 or 0 in spoken:
            raise ProtocolError("malformed list of versions")
        return VersionsSpoken(spoken)
    try:
        message: Message = _decoder.decode(header[_PREFIX.size :])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"malformed header: {error}") from None
    _, size = _layout(message, header.nbytes)
    if view.nbytes != size:
        raise ProtocolError(f"message of {view.nbytes} bytes, its header describes {size}")
    return message


def decode_tensors(
    message: Message, frame: Any, limits: Limits, seal: bytes = b""
) -> dict[str, np.ndarray]:
    """Tensors of a message, read-only.

    Those of a request are views of the frame and keep it alive (misaligned ones are copied). Those
    of a result are decrypted into new memory.

    Args:
        message: from `decode_header` of this frame.
        frame: as it arrived.
        limits: of this direction.
        seal: for a `Result`, the key from its request.

    Raises:
        ProtocolError: counts, sizes or names don't match or exceed the limits, or the result was
            not sealed with this key.
    """
    tensors = message.tensors if isinstance(message, (Request, Result)) else ()
    if len(tensors) > limits.tensors:
        raise ProtocolError(f"{len(tensors)} tensors, the most here is {limits.tensors}")
    total = sum(tensor.nbytes for tensor in tensors)
    if total > limits.total_bytes:
        raise ProtocolError(f"tensors of {total} bytes, the most here is {limits.total_bytes}")
    view, header = _split(frame)
    places, size = _layout(message, header.nbytes)
    if view.nbytes != size:
        raise ProtocolError(f"message of {view.nbytes} bytes, its header describes {size}")
    arrays: dict[str, np.ndarray] = {}
    end = header.nbytes
    for index, (tensor, (start, stop)) in enumerate(zip(tensors, places, strict=True)):
        if tensor.name in arrays:
            raise ProtocolError(f"tensor {tensor.name!r} appears twice")
        if any(view[end:start]):
            raise ProtocolError(f"the bytes before tensor {tensor.name!r} are not zeros")
        end = stop
        raw: Any = view[start:stop]
        if isinstance(message, Result):
            sealed, raw = raw, np.empty(tensor.nbytes, np.uint8)
            try:
                AESGCM(seal).decrypt_into(_nonce(index), sealed, header, raw.data)
            except (InvalidTag, ValueError):
                raise ProtocolError("the result is not sealed with its request's key") from None
        array = np.frombuffer(raw, DTYPES[tensor.dtype]).reshape(tensor.shape)
        if not array.flags.aligned:
            array = array.copy()
        array.flags.writeable = False
        arrays[tensor.name] = array
    return arrays


def decode(frame: Any, limits: Limits, seal: bytes = b"") -> tuple[Message, dict[str, np.ndarray]]:
    """A whole message: `decode_header`, then `decode_tensors`.

    Raises:
        ProtocolError: it is malformed or exceeds the limits.
    """
    message = decode_header(frame)
    return message, decode_tensors(message, frame, limits, seal)
