"""Key files: CURVE key pairs of nodes and of edges (one for each node), placement secrets.

A secret file is 0600 from its creation, under any umask. A secret key that others may read, and any
key that others may replace, is refused with the command that repairs it.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from edge_common.errors import KeyFileError
from edge_common.files import refuse_existing, write_atomically
from edge_common.permissions import why_entry_untrusted, why_untrusted

SECRET_BYTES = 32
AUTHORIZED = "authorized"
"""Folder of the public keys that a node lets in."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\Z")
_FILE_BYTES = 4096
_INSTEAD = "choose another name"


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair. `public` and `secret` are Z85 text (40 characters); `secret` stays out of
    `repr`."""

    name: str
    public: str
    secret: str = field(repr=False)


def generate(directory: Path | str, name: str) -> KeyPair:
    """Make a key pair and write ``NAME.key`` (secret, 0600) and ``NAME.pub`` into `directory`.

    Raises:
        KeyFileError: one of the files exists, the name is unfit for a file, others may write to the
            folder, or writing fails.
    """
    folder = make_directory(directory)
    secret_path, public_path = check_new(folder, name)
    public, secret = (part.decode() for part in zmq.curve_keypair())
    _write_new(
        secret_path,
        f"# Secret key of {name}. Never send or copy this file.\n"
        f"public-key {public}\nsecret-key {secret}\n",
        0o600,
    )
    try:
        write_public(public_path, public, name)
    except KeyFileError:
        secret_path.unlink(missing_ok=True)
        raise
    return KeyPair(name, public, secret)


def check_new(directory: Path | str, name: str) -> tuple[Path, Path]:
    """Paths of the secret and the public file that `generate` would make.

    Raises:
        KeyFileError: one of them exists or the name is unfit for a file.
    """
    folder = Path(directory)
    paths = folder / f"{check_name(name)}.key", folder / f"{name}.pub"
    for path in paths:
        refuse_existing(path, KeyFileError, _INSTEAD)
    return paths


def load_secret(path: Path | str) -> KeyPair:
    """Read a ``.key`` file.

    Raises:
        KeyFileError: missing, readable or replaceable by others, malformed, or its public key does
            not belong to the secret key.
    """
    path = Path(path)
    fields = _fields(path, _read(path, private=True), ("public-key", "secret-key"))
    public, secret = (_z85(path, fields[word]) for word in ("public-key", "secret-key"))
    if zmq.curve_public(secret.encode()).decode() != public:
        raise KeyFileError(f"{path}: the public key in it does not belong to the secret key")
    return KeyPair(path.stem, public, secret)


def load_public(path: Path | str) -> str:
    """Read the Z85 public key of a ``.pub`` file that is going to be trusted.

    Raises:
        KeyFileError: missing, malformed, a secret key file, or one that others could replace.
    """
    public = read_public(path)
    _refuse_danger(Path(path))
    return public


def read_public(path: Path | str) -> str:
    """Read the Z85 public key of a ``.pub`` file. Its permissions are not checked.

    Raises:
        KeyFileError: missing, malformed, or a secret key file.
    """
    path = Path(path)
    text = _read(path, private=False)
    if re.search(r"^secret-key ", text, re.MULTILINE):
        raise KeyFileError(f"{path} holds a secret key; a public key (.pub) is expected here")
    return _z85(path, _fields(path, text, ("public-key",))["public-key"])


def write_public(path: Path | str, public: str, name: str) -> None:
    """Write a ``.pub`` file that must not exist yet.

    Raises:
        KeyFileError: it exists or can't be written.
    """
    text = f"# Public key of {name}. Safe to send.\npublic-key {public}\n"
    _write_new(Path(path), text, 0o644)


def generate_secret(path: Path | str) -> bytes:
    """Make the edge's placement secret (32 random bytes) and write it, 0600.

    Raises:
        KeyFileError: the file exists or can't be written.
    """
    path = Path(path)
    make_directory(path.parent)
    secret = secrets.token_bytes(SECRET_BYTES)
    text = (
        "# Placement secret of this edge. Never send or copy this file.\n"
        f"placement-secret {secret.hex()}\n"
    )
    _write_new(path, text, 0o600)
    return secret


def load_secret_bytes(path: Path | str) -> bytes:
    """Read a placement secret: 32 bytes.

    Raises:
        KeyFileError: missing, readable or replaceable by others, or malformed.
    """
    path = Path(path)
    value = _fields(path, _read(path, private=True), ("placement-secret",))["placement-secret"]
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise KeyFileError(f"{path}: expected 64 hexadecimal digits after placement-secret")
    return bytes.fromhex(value)


def check_public(text: str) -> str:
    """Check that `text` is a Z85 CURVE key (40 characters, 32 bytes), and return it.

    Raises:
        KeyFileError: it is none.
    """
    return _z85(None, text)


def check_name(name: str) -> str:
    """Check that `name` can name a file, and return it.

    Raises:
        KeyFileError: it can't.
    """
    if not _NAME.match(name):
        raise KeyFileError(
            f"{name!r} cannot name a key",
            mend="use up to 64 letters, digits, '.', '_' and '-', the first a letter, digit or '_'",
        )
    return name


def make_directory(directory: Path | str) -> Path:
    """Make a folder for keys (0700) unless it is there.

    It may be another user's: root makes keys for containers and services. Loading checks more.

    Raises:
        KeyFileError: it can't be made, or others may write to it.
    """
    folder = Path(directory)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise KeyFileError(f"cannot make the folder {folder}: {error.strerror}") from None
    if danger := why_entry_untrusted(folder, status, status.st_uid):
        raise danger.error(KeyFileError)
    return folder


def _refuse_danger(path: Path) -> None:
    try:
        danger = why_untrusted(path)
    except OSError as error:
        raise KeyFileError(f"cannot look at {path}: {error.strerror}") from None
    if danger:
        raise danger.error(KeyFileError)


def _write_new(path: Path, text: str, mode: int) -> None:
    write_atomically(
        path, text.encode("ascii"), mode=mode, replace=False, error=KeyFileError, instead=_INSTEAD
    )


def _read(path: Path, *, private: bool) -> str:
    try:
        # Non-blocking: a pipe in place of a key file must not hang the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        found = f"cannot read the key file {path}: {error.strerror}"
        if not isinstance(error, FileNotFoundError):
            raise KeyFileError(found) from error
        ask = "ask the owner of that key for it"
        mend = "make one with `edge-runtime keys`" if private else ask
        raise KeyFileError(found, mend=mend, code="missing") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise KeyFileError(f"{path} is not a regular file")
        mode = stat.S_IMODE(status.st_mode)
        if private and mode & (0o037 if _is_credential(path) else 0o077):
            raise KeyFileError(
                f"{path} is open to others (mode {mode:04o})",
                mend=f"run `chmod 600 {shlex.quote(str(path))}`; if others use this machine, make "
                "a new key instead",
                code="untrusted",
            )
        data = os.read(descriptor, _FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > _FILE_BYTES:
        raise KeyFileError(f"{path} is no key file: larger than {_FILE_BYTES} bytes")
    if private:
        _refuse_danger(path)
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise KeyFileError(f"{path} is no key file: not plain text") from None


def _is_credential(path: Path) -> bool:
    """True if systemd made this file for this service alone. Its access control list shows as read
    permission of the group."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return folder is not None and path.parent == Path(folder)


def _fields(path: Path, text: str, words: tuple[str, ...]) -> dict[str, str]:
    """The ``word value`` lines of a key file: each of `words` once. ``#`` starts a comment line."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, value = line.strip().partition(" ")
        if word in fields or word not in words:
            break
        fields[word] = value.strip()
    else:
        if len(fields) == len(words):
            return fields
    raise KeyFileError(f"{path} is no key file: expected one line each of {', '.join(words)}")


def _z85(path: Path | None, text: str) -> str:
    where = f"{path}: " if path else ""
    try:
        fit = len(text) == 40 and len(z85.decode(text)) == 32
        fit = fit and z85.encode(z85.decode(text)).decode() == text
    except Exception:  # the decoder fails in several ways on text that is not Z85
        fit = False
    if not fit:
        raise KeyFileError(f"{where}malformed key: expected 40 characters of Z85")
    return text
