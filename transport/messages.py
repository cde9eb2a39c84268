"""The messages edge and node exchange, as typed structs with limits.

A message is a list of frames: a small header, then one raw frame per tensor. The header is the
magic ``ERT``, one version byte, and msgpack of one of the structs below. `decode` promises that
whatever bytes arrive, the outcome is a well-formed message whose tensors are zero-copy views, or
`ProtocolError`; it allocates nothing in proportion to what a header claims, only views of what
arrived. What a tensor means, and whether a stage wants it, is the receiver's business.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import msgspec
import numpy as np
from msgspec import Meta, Struct

from engines.errors import ProtocolError

MAGIC = b"ERT"
VERSION = 1
VERSIONS = (VERSION,)
"""Every version this software speaks, oldest first."""
NEGOTIATION = 0
"""Version byte of the one form that never changes: ``ERT 00`` followed by a byte per version
spoken."""

HEADER_BYTES = 16 * 1024
"""Largest header frame."""
MAX_TENSORS = 16
"""Most tensors any message may carry, whatever the stage."""
NO_ID = bytes(16)
"""Id in a `Refused` to a message whose own id could not be read."""

DTYPES: dict[str, np.dtype[Any]] = {
    "uint8": np.dtype("u1"),
    "int8": np.dtype("i1"),
    "uint16": np.dtype("<u2"),  # bfloat16 travels as its bits
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""The only dtypes on the wire (little-endian). No bool: its bytes can hold values that are
neither."""

Id = Annotated[bytes, Meta(min_length=16, max_length=16)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:/-]{1,64}\Z")]
# Printable ASCII: a peer's text ends up on terminals and in logs, where escapes could do harm.
Text = Annotated[str, Meta(pattern=r"^[ -~]{0,600}\Z")]
Code = Annotated[str, Meta(pattern=r"^[a-z_]{1,32}\Z")]
Dtype = Literal["uint8", "int8", "uint16", "int32", "int64", "float16", "float32"]
Micros = Annotated[int, Meta(ge=0, le=2**53)]
TEXT_LENGTH = 600


class TensorHeader(Struct, frozen=True, forbid_unknown_fields=True):
    """What the frame in the same position holds: row-major, little-endian, no padding."""

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
    """Edge to node: run `stage` on the tensors. `deadline_ms` is what remains, counted from
    arrival."""

    id: Id
    stage: Sha256
    deadline_ms: Annotated[int, Meta(ge=0, le=86_400_000)]
    tensors: Tensors = ()


class Accepted(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="accepted"):
    """Node to edge: the whole request has arrived and is queued.

    Its arrival ends the upload, so that the edge can time upload, compute and download with its own
    clock alone.
    """

    id: Id


class Result(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="result"):
    """Node to edge: the stage's outputs. `queue_us` from arrival to the engine's start,
    `compute_us` inside it."""

    id: Id
    queue_us: Micros
    compute_us: Micros
    tensors: Tensors = ()


class Refused(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="refused"):
    """Node to edge: no result will follow. Codes: see `docs/protocol.md`.

    `retry_ms`: the same request may do better after so long; 0 is no hint.
    """

    id: Id
    code: Code
    message: Text
    retry_ms: Annotated[int, Meta(ge=0, le=86_400_000)] = 0


class Cancel(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="cancel"):
    """Edge to node: forget the request of this id, nobody waits for it any more. Never answered,
    nor is an id refused that the node does not know: the result may have crossed it."""

    id: Id


class InfoRequest(
    Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="info_request"
):
    """Edge to node: what do you serve?"""

    id: Id


class Info(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="info"):
    """Node to edge: the answer to `InfoRequest`."""

    id: Id
    versions: Annotated[tuple[Annotated[int, Meta(ge=1, le=255)], ...], Meta(max_length=16)]
    stages: Annotated[tuple[StageInfo, ...], Meta(max_length=8)]
    software: Text


@dataclass(frozen=True)
class VersionsSpoken:
    """Either way: the peer did not know our version and speaks only these. Never answered."""

    versions: tuple[int, ...]


Message = Request | Accepted | Result | Refused | Cancel | InfoRequest | Info | VersionsSpoken


class UnknownVersionError(ProtocolError):
    """One of our messages, of a version this software does not speak; answer with
    `VersionsSpoken`."""


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
    """The most that one direction of a stage may carry in one message."""

    tensors: int
    part_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class StageLimits:
    """Both directions of a stage."""

    request: Limits
    result: Limits


def limits_of(specs: Iterable[Spec], batch: int) -> Limits:
    """Limits of a message holding these tensors with at most `batch` windows.

    Args:
        specs: tensors whose leading dimension may be a name (the batch); every other dimension is a
            number.
        batch: most windows in one request, at least 1.

    Raises:
        ProtocolError: a tensor can't travel (unknown dtype, another dimension open, too many
            tensors).
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
    return Limits(len(sizes), max(sizes), sum(sizes))


def stage_limits(inputs: Iterable[Spec], outputs: Iterable[Spec], batch: int) -> StageLimits:
    """`limits_of` for both directions of a stage."""
    return StageLimits(limits_of(inputs, batch), limits_of(outputs, batch))


def new_id() -> bytes:
    """A one-time message id: 16 random bytes, telling nothing and shared between no two nodes."""
    return secrets.token_bytes(16)


def refuse(id: bytes, code: str, message: str, retry_ms: int = 0) -> Refused:
    """A `Refused` whose text is cut and cleaned to what may travel."""
    clean = "".join(c if " " <= c <= "~" else "?" for c in message)
    if len(clean) > TEXT_LENGTH:
        clean = clean[: TEXT_LENGTH - 3] + "..."
    return Refused(id, code, clean, retry_ms)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(
    Request | Accepted | Result | Refused | Cancel | InfoRequest | Info
)


def encode(message: Message, arrays: Mapping[str, np.ndarray] | None = None) -> list[Any]:
    """Frames of a message, the header first.

    Args:
        message: for `Request` and `Result`, `tensors` is filled in from `arrays`; leave it out.
        arrays: tensors by name. Contiguous ones are not copied and must not change until sent.

    Raises:
        ProtocolError: an array can't travel or the header would be too large.
    """
    frames: list[Any] = []
    if isinstance(message, VersionsSpoken):
        return [MAGIC + bytes([NEGOTIATION]) + bytes(message.versions)]
    if arrays:
        if not isinstance(message, (Request, Result)):
            raise ProtocolError(f"a {type(message).__name__} carries no tensors")
        headers = []
        for name, array in arrays.items():
            dtype = DTYPES.get(array.dtype.name)
            if dtype is None or array.ndim == 0 or array.size == 0 or array.ndim > 8:
                raise ProtocolError(
                    f"tensor {name!r} ({array.dtype} {list(array.shape)}) cannot travel: expected "
                    f"1 to 8 dimensions, none empty, of {', '.join(DTYPES)}"
                )
            headers.append(TensorHeader(name, array.dtype.name, array.shape))  # type: ignore[arg-type]
            whole = np.ascontiguousarray(array, dtype=dtype)
            frames.append(whole.reshape(-1).view(np.uint8).data)
        message = msgspec.structs.replace(message, tensors=tuple(headers))
    header = MAGIC + bytes([VERSION]) + _encoder.encode(message)
    if len(header) > HEADER_BYTES:
        raise ProtocolError(f"header of {len(header)} bytes, the most is {HEADER_BYTES}")
    return [header, *frames]


def decode_header(frame: Any) -> Message:
    """The message in a header frame, without its tensors.

    Args:
        frame: bytes, or anything with their buffer interface such as `zmq.Frame`.

    Raises:
        UnknownVersionError: ours, but of another version.
        ProtocolError: anything else that is wrong.
    """
    header = memoryview(frame)
    if not 4 <= header.nbytes <= HEADER_BYTES:
        raise ProtocolError(f"header of {header.nbytes} bytes, expected 4 to {HEADER_BYTES}")
    if header[:3] != MAGIC:
        raise ProtocolError("not an edge-runtime message: the first bytes are not ERT")
    version = header[3]
    if version == NEGOTIATION:
        spoken = tuple(header[4:])
        if not 1 <= len(spoken) <= 255 or 0 in spoken:
            raise ProtocolError("malformed list of versions")
        return VersionsSpoken(spoken)
    if version not in VERSIONS:
        raise UnknownVersionError(
            f"message of protocol version {version}, this software speaks "
            f"{', '.join(map(str, VERSIONS))}: update the older side"
        )
    try:
        return _decoder.decode(header[4:])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolError(f"malformed header: {error}") from None


def decode_tensors(
    message: Message, frames: Sequence[Any], limits: Limits
) -> dict[str, np.ndarray]:
    """Tensors of a message as read-only views of its frames (those after the header).

    A view keeps its frame alive. Only a frame that does not lie on its dtype's alignment is copied.

    Args:
        message: from `decode_header`.
        frames: one per tensor the message declares.
        limits: of the direction this came from.

    Raises:
        ProtocolError: counts, sizes, names or lengths don't agree or pass the limits.
    """
    headers = message.tensors if isinstance(message, (Request, Result)) else ()
    if len(frames) != len(headers):
        raise ProtocolError(f"{len(frames)} tensor frames, the header declares {len(headers)}")
    if len(headers) > limits.tensors:
        raise ProtocolError(f"{len(headers)} tensors, the most here is {limits.tensors}")
    arrays: dict[str, np.ndarray] = {}
    total = 0
    for header, frame in zip(headers, frames, strict=True):
        view = memoryview(frame)
        total += view.nbytes
        if header.name in arrays:
            raise ProtocolError(f"tensor {header.name!r} appears twice")
        if view.nbytes != header.nbytes:
            raise ProtocolError(
                f"tensor {header.name!r}: {view.nbytes} bytes arrived, "
                f"{header.dtype} {list(header.shape)} takes {header.nbytes}"
            )
        if view.nbytes > limits.part_bytes or total > limits.total_bytes:
            raise ProtocolError(
                f"tensor {header.name!r} makes the message too large: the most is "
                f"{limits.part_bytes} bytes in one tensor and {limits.total_bytes} in all"
            )
        array = np.frombuffer(view, DTYPES[header.dtype]).reshape(header.shape)
        if not array.flags.aligned:
            array = array.copy()
        array.flags.writeable = False
        arrays[header.name] = array
    return arrays


def decode(frames: Sequence[Any], limits: Limits) -> tuple[Message, dict[str, np.ndarray]]:
    """A whole message: `decode_header`, then `decode_tensors`.

    Args:
        frames: header and tensor frames, as received (without a ROUTER's routing id).
        limits: of the direction this came from.

    Raises:
        ProtocolError: whatever is wrong with it.
    """
    if not 1 <= len(frames) <= 1 + MAX_TENSORS:
        raise ProtocolError(f"message of {len(frames)} frames, expected 1 to {1 + MAX_TENSORS}")
    message = decode_header(frames[0])
    return message, decode_tensors(message, frames[1:], limits)
