"""Small JSON files that may come from anywhere: read within bounds and checked against a type."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edge_common.errors import EdgeRuntimeError

T = TypeVar("T")


class _SchemaOnly(msgspec.Struct):
    schema: int


def read_json(
    path: Path,
    kind: type[T],
    *,
    max_bytes: int,
    error: type[EdgeRuntimeError],
    remedy: str,
    schema: int | None = None,
) -> T:
    """Read the file as a ``kind``.

    Args:
        kind: a msgspec type.
        max_bytes: no more is read.
        error: class of the error to raise.
        remedy: the error's `mend`.
        schema: the number that the file's field ``schema`` must have; None: it has none.

    Raises:
        FileNotFoundError: nothing is at ``path``.
        error: the file cannot be read, is too large, of another schema, or no ``kind``.
    """

    def refuse(what: str) -> EdgeRuntimeError:
        return error(f"{path} {what}", mend=remedy)

    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise refuse("is not a file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise refuse(f"cannot be read: {problem.strerror}") from problem
    if len(data) > max_bytes:
        raise refuse(f"is larger than {max_bytes} bytes")
    try:
        if schema is not None:
            found = msgspec.json.decode(data, type=_SchemaOnly).schema
            if found != schema:
                age = "a newer" if found > schema else "an older"
                what = f"has schema {found}, expected {schema}"
                raise refuse(f"{what}: {age} version of edge-runtime wrote it")
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        raise refuse(f"is damaged: {problem}") from problem


def json_bytes(value: Any, indent: int = 2) -> bytes:
    """The content of a file for :func:`read_json`."""
    return msgspec.json.format(msgspec.json.encode(value), indent=indent) + b"\n"
