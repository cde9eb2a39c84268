"""Fuzz targets: every function that reads a peer's bytes, each as a function of one string.

A target lets only unexpected errors through. It returns ``ok`` or the name of the typed error. Both
roles run their real code: at the node, header, tensors and admission; at the edge,
`Connection._handle` and the part of `infer` that handles a result. ``zap`` is the authenticator,
``keys`` the key files that people send one another.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloud_node.admission import Refusal, check_stage, check_windows
from edge_common.errors import KeyFileError, OffloadError, ProtocolError
from edge_runtime.offload.connection import Connection, _Pending
from edge_runtime.offload.integrity import check_reply
from fuzz.messages import (
    FEEDS,
    GEOMETRY,
    ID,
    LIMITS,
    NODE,
    SEAL,
    STAGE,
    TOKENS,
    WINDOWS,
    Choices,
    damage,
    message,
)
from transport import keys
from transport.allow_list import AllowList
from transport.auth import Authenticator
from transport.messages import Request, Result, decode, decode_header, decode_tensors

Target = Callable[[bytes], str]


def decoding(data: bytes) -> str:
    """`decode`, with the limits of either direction."""
    limits = LIMITS.result if data[-1:] > b"\x7f" else LIMITS.request
    made = message(data)
    try:
        _, arrays = decode(made, limits, SEAL)
    except ProtocolError as error:
        return type(error).__name__
    # Decoded data is never larger than the received bytes.
    assert sum(array.nbytes for array in arrays.values()) <= len(made)
    return "ok"


def node(data: bytes) -> str:
    """The node's handling of a message before it computes."""
    made = message(data)
    try:
        request = decode_header(made)
        if not isinstance(request, Request):
            return "ok"
        check_stage(request.stage, STAGE, "the stage")
        feeds = decode_tensors(request, made, LIMITS.request)
        windows = check_windows(feeds, STAGE, GEOMETRY)
    except (ProtocolError, Refusal) as error:
        return type(error).__name__
    # An engine uses these as indices: here they must be within its tables.
    assert feeds.keys() == FEEDS.keys()
    assert 1 <= windows <= GEOMETRY.windows
    assert 0 <= feeds["window"].min() <= feeds["window"].max() < GEOMETRY.windows
    assert 1 <= feeds["extent"].min() <= feeds["extent"].max() <= GEOMETRY.window_pixels
    return "ok"


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def edge(data: bytes) -> str:
    """The edge's handling of a message while it waits for a result."""
    made: Any = message(data)

    async def work() -> str:
        client = Connection(None, NODE, STAGE, LIMITS)  # type: ignore[arg-type]
        client._pending[ID] = pending = _Pending()
        try:
            client._handle(made, 0.0)
            if not pending.answer.done():
                return "waits"
            answer, frame = pending.answer.result()
            if not isinstance(answer, Result):
                return type(answer).__name__
            outputs = decode_tensors(answer, frame, LIMITS.result, SEAL)
            check_reply(outputs, STAGE.outputs, WINDOWS)
        except (ProtocolError, OffloadError) as error:
            return type(error).__name__
        assert outputs.keys() == TOKENS.keys()
        assert outputs["tokens"].shape == TOKENS["tokens"].shape
        return "ok"

    return _loop().run_until_complete(work())


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fuzz-")


def _folder() -> Path:
    return Path(_scratch().name)


@functools.cache
def _authenticator() -> Authenticator:
    logging.disable(logging.CRITICAL)
    folder = keys.make_directory(_folder() / "authorized")
    return Authenticator(None, AllowList(folder))  # type: ignore[arg-type]


def zap(data: bytes) -> str:
    """The authenticator's answer to any question. It is never yes, because no key is authorised."""
    choices = Choices(data)
    sound = [b"1.0", b"7", b"edge-runtime", b"127.0.0.1", b"", b"CURVE", bytes(32)]
    for _ in range(choices.below(4)):
        sound[choices.below(len(sound))] = choices.bytes(40)
    if choices.below(4) == 3:
        sound = [choices.bytes() for _ in range(choices.below(12))]
    _, _, status, text, user, properties = _authenticator()._answer(sound)
    assert status in (b"400", b"500")
    assert not user
    assert not properties
    return text.decode()


def key_files(data: bytes) -> str:
    """Key files, private and public, made by damaging a valid pair: the result is a key or a
    `KeyFileError`."""
    choices = Choices(data)
    name = choices.of(("some.pub", "some.key"))
    body = [_sound_pair()[name]]
    if choices.below(4) == 3:
        body = [choices.bytes(200)]
    for _ in range(choices.below(3)):
        damage(choices, body)
    path = _folder() / name
    path.write_bytes(b"".join(body))
    path.chmod(0o600)
    try:
        keys.load_public(path) if name == "some.pub" else keys.load_secret(path)
    except KeyFileError as error:
        return type(error).__name__
    return "ok"


@functools.cache
def _sound_pair() -> dict[str, bytes]:
    keys.generate(_folder() / "sound", "some")
    return {name: (_folder() / "sound" / name).read_bytes() for name in ("some.pub", "some.key")}


TARGETS: dict[str, Target] = {
    "decode": decoding,
    "node": node,
    "edge": edge,
    "zap": zap,
    "keys": key_files,
}
