"""The five libsodium functions that CurveZMQ needs, from the copy in pyzmq's wheels.

The wheels carry a whole libsodium (ISC licence), so a CURVE peer without libzmq needs no new
dependency. Without that copy and the system's, `MISSING` says so and the tests that need it are
skipped.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from pathlib import Path

import zmq

MAC_BYTES = 16


def _load() -> ctypes.CDLL | None:
    wheel = Path(zmq.__file__).parents[1] / "pyzmq.libs"
    names = [str(path) for path in sorted(wheel.glob("libsodium*"))]
    names += [found] if (found := ctypes.util.find_library("sodium")) else []
    for name in names:
        try:
            library = ctypes.CDLL(name)
            if library.sodium_init() >= 0 and library.crypto_box_easy_afternm:
                return library
        except (OSError, AttributeError):
            continue
    return None


_library = _load()
MISSING = None if _library else "no libsodium: neither pyzmq's wheel nor the system has one"


def keypair() -> tuple[bytes, bytes]:
    """A new (public, secret) pair, 32 bytes each."""
    public, secret = ctypes.create_string_buffer(32), ctypes.create_string_buffer(32)
    _call("crypto_box_keypair", public, secret)
    return public.raw, secret.raw


def shared(public: bytes, secret: bytes) -> bytes:
    """The shared key of the two pairs."""
    if len(public) != 32 or len(secret) != 32:
        raise ValueError("a CURVE key has 32 bytes")
    key = ctypes.create_string_buffer(32)
    _call("crypto_box_beforenm", key, public, secret)
    return key.raw


def box(plain: bytes, nonce: bytes, key: bytes) -> bytes:
    """Encrypt and authenticate `plain`. Adds 16 bytes. `nonce`: 24 bytes, never reused."""
    assert len(nonce) == 24
    out = ctypes.create_string_buffer(len(plain) + MAC_BYTES)
    _call("crypto_box_easy_afternm", out, plain, ctypes.c_ulonglong(len(plain)), nonce, key)
    return out.raw


def unbox(sealed: bytes, nonce: bytes, key: bytes) -> bytes:
    """Open a `box`.

    Raises:
        ValueError: another key, or altered data.
    """
    assert len(nonce) == 24
    if len(sealed) < MAC_BYTES:
        raise ValueError("shorter than its authenticator")
    out = ctypes.create_string_buffer(max(1, len(sealed) - MAC_BYTES))
    size = ctypes.c_ulonglong(len(sealed))
    _call("crypto_box_open_easy_afternm", out, sealed, size, nonce, key)
    return out.raw[: len(sealed) - MAC_BYTES]


def _call(name: str, *arguments: object) -> None:
    if _library is None:
        raise RuntimeError(MISSING)
    if getattr(_library, name)(*arguments) != 0:
        raise ValueError(f"{name} failed: not authentic, or an unfit key")
