"""Messages made from a byte string, so that any fuzzing engine can drive them.

`Choices` reads numbers off the string. `message` builds a message of any type from them and damages
its structure: a field, a tensor's header, a length, the order of tensors. A result is sealed after
that, as a hostile node would do. One input in four is plain bytes. The same string always gives the
same message, and an empty string gives a valid one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from edge_runtime.config import Node
from engines.bundle import Stage, TensorSpec
from engines.geometry import Geometry
from transport.keys import KeyPair
from transport.messages import (
    Accepted,
    Cancel,
    Info,
    InfoRequest,
    Message,
    Refused,
    Request,
    Result,
    StageInfo,
    TensorInfo,
    VersionsSpoken,
    encode,
    stage_limits,
)

T = TypeVar("T")

ID = bytes(range(16))
SEAL = bytes(range(32))
GEOMETRY = Geometry(image_size=16, patch_size=4, window_size=2, embed_dim=4, out_chans=2)
STAGE = Stage(
    file="stack.onnx",
    files={"stack.onnx": "ab" * 32},
    sha256="ab" * 32,
    inputs=(
        TensorSpec("pixels", "uint8", ("n", 8, 8, 3)),
        TensorSpec("extent", "int64", ("n", 2)),
        TensorSpec("window", "int64", ("n",)),
    ),
    outputs=(TensorSpec("tokens", "float32", ("n", 4, 4)),),
)
LIMITS = stage_limits(STAGE.inputs, STAGE.outputs, GEOMETRY.windows)
NODE = Node("node", "tcp://127.0.0.1:5555", "a" * 40, KeyPair("edge", "b" * 40, "c" * 40))
WINDOWS = 2
"""The number of windows in the valid request and in the valid result."""

FEEDS = {
    "pixels": np.arange(WINDOWS * 192, dtype=np.uint8).reshape(WINDOWS, 8, 8, 3),
    "extent": np.full((WINDOWS, 2), 8, np.int64),
    "window": np.arange(WINDOWS),
}
TOKENS = {"tokens": np.arange(WINDOWS * 16, dtype=np.float32).reshape(WINDOWS, 4, 4)}
_SPECS = tuple(TensorInfo(spec.name, spec.dtype, spec.shape) for spec in STAGE.inputs)
MESSAGES: dict[str, tuple[Message, dict[str, np.ndarray] | None]] = {
    "request": (Request(ID, STAGE.sha256, 1500, SEAL), FEEDS),
    "result": (Result(ID, 12, 345678), TOKENS),
    "accepted": (Accepted(ID), None),
    "refused": (Refused(ID, "overloaded", "try later", 250), None),
    "cancel": (Cancel(ID), None),
    "info_request": (InfoRequest(ID), None),
    "info": (Info(ID, (1,), (StageInfo("cd" * 32, "tiny fp32", _SPECS, ()),), "node 1"), None),
    "versions": (VersionsSpoken((1, 2)), None),
}
KINDS = tuple(MESSAGES)


def _parts(made: Message, arrays: dict[str, np.ndarray] | None) -> list[bytes]:
    """Header and tensors of a valid message, one by one."""
    whole = bytes(encode(made, arrays, SEAL))
    if not arrays:
        return [whole]
    end = 8 + int.from_bytes(whole[4:8], "little")
    return [whole[:end], *(array.tobytes() for array in arrays.values())]


_SOUND = {name: _parts(*made) for name, made in MESSAGES.items()}
_FIELDS = ("type", "id", "stage", "deadline_ms", "tensors", "code", "retry_ms", "queue_us", "x")
_TENSOR_FIELDS = ("name", "dtype", "shape", "x")
_NUMBERS = (0, 1, -1, 2, 7, 8, 9, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**64 - 1)
_TYPES = ("uint8", "int8", "uint16", "int32", "int64", "float16", "float32", "float64", "object")
_CLAIMS = (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc1")


class Choices:
    """Decisions read from `data`. After its end, every decision is the first option."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, most: int) -> int:
        """A number from 0 to `most` - 1."""
        size = 1 if most <= 256 else 4
        piece = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(piece, "little") % most

    def of(self, things: Sequence[T]) -> T:
        return things[self.below(len(things))]

    def bytes(self, most: int = 64) -> bytes:
        size = self.below(most)
        piece = self._data[self._at : self._at + size]
        self._at += size
        return piece

    def value(self, depth: int = 0) -> Any:
        """Any value that msgpack can encode, mostly harmful ones."""
        kinds = (
            lambda: None,
            lambda: self.of(_NUMBERS),
            lambda: self.of((True, False, 0.5, float("nan"), float("inf"), -1e308)),
            lambda: self.bytes(),
            lambda: self.bytes().decode("utf-8", "replace"),
            lambda: self.of(_TYPES),
            lambda: msgspec.Raw(self.bytes(24) or b"\xc0"),
            lambda: msgspec.Raw(self.of(_CLAIMS)),
            lambda: [self.value(depth + 1) for _ in range(self.below(4))],
            lambda: {
                self.bytes(8).decode("utf-8", "replace"): self.value(depth + 1)
                for _ in range(self.below(3))
            },
        )
        return kinds[self.below(len(kinds) - 2 * (depth > 3))]()


def message(data: bytes, kinds: Sequence[str] = KINDS) -> bytes:
    """A message of one of `kinds`, damaged as `data` says."""
    choices = Choices(data)
    how = choices.below(4)
    kind = choices.of(kinds)
    sound = list(_SOUND[kind])
    if how == 3:
        prefix = choices.of((b"", b"ERT", b"ERT\0", b"ERT\1", b"ERT\2", b"ERT\2\x20\0\0\0"))
        return prefix + choices.bytes(200)
    if how in (0, 1):
        sound[0] = _structural(choices, sound[0], choices.below(3) + (how == 1))
    for _ in range(choices.below(3)):
        damage(choices, sound)
    if not sound:
        return b""
    header = sound[0]
    if header[3:4] == b"\2" and choices.below(8) != 7:
        header = header[:4] + (max(0, len(header) - 8)).to_bytes(4, "little") + header[8:]
    whole = header
    for index, part in enumerate(sound[1:]):
        if kind == "result":
            part = AESGCM(SEAL).encrypt(index.to_bytes(12, "little"), part, header)
        whole += bytes(-len(whole) % 64) + part
    if choices.below(8) == 7:
        last = [whole]
        damage(choices, last)
        whole = b"".join(last)
    return whole


def _structural(choices: Choices, header: bytes, changes: int) -> bytes:
    """The header with fields replaced, added or removed."""
    if not changes or header[3] == 0:
        return header
    fields: dict[str, Any] = msgspec.msgpack.decode(header[8:])
    for _ in range(changes):
        tensors = fields.get("tensors")
        if choices.below(2) and isinstance(tensors, list) and tensors:
            tensor = choices.of(tensors)
            name = choices.of(_TENSOR_FIELDS)
            if not isinstance(tensor, dict):
                continue
            if name == "shape":
                tensor[name] = [choices.of(_NUMBERS) for _ in range(choices.below(10))]
            elif name == "dtype":
                tensor[name] = choices.of(_TYPES)
            else:
                tensor[name] = choices.value()
            if not choices.below(4):
                tensors.append(choices.of(tensors))
        elif choices.below(4):
            fields[choices.of(_FIELDS)] = choices.value()
        else:
            fields.pop(choices.of(_FIELDS), None)
    try:
        return header[:8] + msgspec.msgpack.encode(fields)
    except (OverflowError, ValueError, msgspec.MsgspecError):  # of values that can't be encoded
        return header


def damage(choices: Choices, sound: list[bytes]) -> None:
    """Add one defect to the bytes or the frames."""
    if not sound:
        return
    place = choices.below(len(sound))
    part = bytearray(sound[place])
    at = choices.below(max(1, len(part)))
    what = choices.below(9)
    if what == 0 and part:
        part[at] ^= 1 << choices.below(8)
    elif what == 1 and part:
        part[at] = choices.below(256)
    elif what == 2:
        del part[at : at + 1 + choices.below(16)]
    elif what == 3:
        part[at:at] = choices.bytes()
    elif what == 4:
        del part[at:]
    elif what == 5 and len(sound) > 1:
        del sound[place]
        return
    elif what == 6:
        sound.insert(place, sound[choices.below(len(sound))])
        return
    elif what == 7 and place:  # NaN and infinity, and indices beyond every table
        size = struct.calcsize("<q")
        whole = struct.pack("<q", choices.of((-1, 1 << 40, 2**63 - 1, 0x7FC00000)))
        part[at : at + size] = whole[: max(0, len(part) - at)]
    else:
        sound.reverse()
        return
    sound[place] = bytes(part)
