"""Settings of an edge: the file ``edge.toml``, read, checked and made absolute.

Promises that an unknown or misspelt key, a value out of range, and two nodes that are one and the
same are refused with the line that mends them. Relative paths are relative to the file, not to
where the program was started. Key files are read by :func:`load_nodes` only, so that a
configuration can be looked at without having its secrets.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec

from edge_runtime.placement import DEFAULT_MAX_EXPOSURE
from engines.engine import Device
from engines.errors import ConfigError
from engines.toml import read_toml, unknown_key

if TYPE_CHECKING:
    from transport.keys import KeyPair

Fallback = Literal["error", "local"]

DEFAULT_DEADLINE_S = 10.0
_DEFAULT_SECRET = "keys/edge.secret"
_Z85 = re.compile(r"[0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]{40}\Z")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\Z")


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ``[[nodes]]`` table.

    ``name``: yours, for messages and reports. ``endpoint``: ``tcp://HOST:PORT``. ``server_key``:
    the node's public key, a file or the 40 characters themselves. ``client_key``: the file of this
    edge's secret key for this node (default: ``keys/NAME.key``).
    """

    name: str
    endpoint: str
    server_key: str
    client_key: str = ""


class EdgeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``edge.toml`` says. Make one with :func:`load_config`, or directly in a program.

    Attributes:
        nodes: at least one.
        bundle: directory of the full bundle; None is the one that comes with the package.
        secret: file that keys the placement of windows.
        deadline_s: seconds from an image's first window leaving home to all tokens being back. With
            ``fallback = "local"`` nodes get half of it, and the edge the rest for what they missed.
        max_exposure: largest share of an image's area one node may see, in (0, 1].
        fallback: ``error``, or ``local``: the edge computes what the nodes cannot or may not.
        windows_per_request: most windows in one message; None sends a node all of its at once.
        device: what computes on this machine, see :data:`engines.engine.Device`.
    """

    nodes: tuple[NodeConfig, ...]
    bundle: str | None = None
    secret: str = _DEFAULT_SECRET
    deadline_s: float = DEFAULT_DEADLINE_S
    max_exposure: float = DEFAULT_MAX_EXPOSURE
    fallback: Fallback = "error"
    windows_per_request: int | None = None
    device: Device = "auto"

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ConfigError("there are no nodes: add a [[nodes]] table for each of yours")
        if not 0 < self.deadline_s <= 86_400:
            raise ConfigError(
                f"deadline_s is {self.deadline_s}; expected seconds, above 0 and at most 86400"
            )
        if not 0 < self.max_exposure <= 1:
            raise ConfigError(
                f"max_exposure is {self.max_exposure}; expected a share above 0 and at most 1"
            )
        if self.fallback not in get_args(Fallback):
            raise ConfigError(f'fallback is {self.fallback!r}; expected "error" or "local"')
        if self.windows_per_request is not None and self.windows_per_request < 1:
            raise ConfigError(
                f"windows_per_request is {self.windows_per_request}; expected at least 1, or leave "
                "it out"
            )
        if self.device not in get_args(Device):
            raise ConfigError(
                f"device is {self.device!r}; expected one of {', '.join(get_args(Device))}"
            )
        for node in self.nodes:
            if not _NAME.match(node.name):
                raise ConfigError(
                    f"node name {node.name!r}: use up to 64 letters, digits, '.', '_' and '-', the "
                    "first a letter, digit or '_'"
                )
        # One machine under two names would be shown twice what the budget allows.
        for what in ("name", "endpoint", "server_key"):
            _refuse_shared(self.nodes, what)


@dataclass(frozen=True)
class Node:
    """A node with its keys read: what a client needs to connect."""

    name: str
    endpoint: str
    server_key: str
    keypair: KeyPair


def load_config(path: str | os.PathLike[str]) -> EdgeConfig:
    """Read and check ``edge.toml``; all paths in the result are absolute.

    Raises:
        ConfigError: naming the key at fault and what it should be.
    """
    file = Path(path)
    table = read_toml(file, f"edge-runtime init --out {file} --node ...")
    try:
        _refuse_unknown(table, EdgeConfig, "")
        nodes = table.get("nodes")
        if isinstance(nodes, list):
            table["nodes"] = [_completed(node, i, file.parent) for i, node in enumerate(nodes)]
        table.setdefault("nodes", [])
        table.setdefault("secret", _DEFAULT_SECRET)
        for key in ("bundle", "secret"):
            if isinstance(table.get(key), str):
                table[key] = _absolute(table[key], file.parent)
        return msgspec.convert(table, EdgeConfig)
    except msgspec.ValidationError as error:
        where = re.sub(r"\$\.?", "", str(error)).replace(" - at ``", "")
        raise ConfigError(f"{file}: {where}") from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def load_nodes(config: EdgeConfig) -> list[Node]:
    """The nodes with their key files read.

    Raises:
        KeyFileError: a file is missing, malformed or readable by others.
        ConfigError: two nodes share a key, by which they could tell that they serve one edge, or
            are one and the same.
    """
    from transport.keys import check_public, load_public, load_secret
    from transport.sockets import check_endpoint

    nodes = []
    for node in config.nodes:
        key = node.server_key
        nodes.append(
            Node(
                name=node.name,
                endpoint=check_endpoint(node.endpoint),
                server_key=check_public(key) if is_key(key) else load_public(key),
                keypair=load_secret(node.client_key or f"keys/{node.name}.key"),
            )
        )
    seen: dict[str, str] = {}
    for loaded in nodes:
        for kind, public in (("server", loaded.server_key), ("client", loaded.keypair.public)):
            if (other := seen.setdefault(public, loaded.name)) != loaded.name:
                mend = (
                    "it is one machine, which must not count as two"
                    if kind == "server"
                    else "make one per node with `edge-runtime keys edge`"
                )
                raise ConfigError(
                    f"nodes {other} and {loaded.name} have the same {kind} key: {mend}"
                )
    return nodes


def is_key(text: str) -> bool:
    """Whether ``text`` is a public key itself (40 characters of Z85) and not the path of one."""
    return bool(_Z85.match(text)) and not text.endswith(".pub")


def _completed(node: Any, number: int, base: Path) -> Any:
    if not isinstance(node, dict):
        return node  # msgspec says what is wrong with it
    _refuse_unknown(node, NodeConfig, f" in [[nodes]] table {number + 1}")
    for required in ("name", "endpoint", "server_key"):
        if required not in node:
            raise ConfigError(f"[[nodes]] table {number + 1} has no {required}")
    node.setdefault("client_key", f"keys/{node['name']}.key")
    for key in ("server_key", "client_key"):
        if isinstance(node[key], str) and not (key == "server_key" and is_key(node[key])):
            node[key] = _absolute(node[key], base)
    return node


def _absolute(path: str, base: Path) -> str:
    try:
        if "\0" in path:
            raise ValueError("it holds a NUL character")
        return str((base / Path(path).expanduser()).absolute())
    except (RuntimeError, ValueError) as error:  # RuntimeError: ~USER of a user there is not
        raise ConfigError(f"the path {path!r} cannot be used: {error}") from None


def _refuse_unknown(table: dict[str, Any], struct: type[msgspec.Struct], where: str) -> None:
    known = struct.__struct_fields__
    for key in table:
        if key not in known:
            raise ConfigError(unknown_key(key, known, where))


def _refuse_shared(nodes: tuple[NodeConfig, ...], what: str) -> None:
    seen: dict[str, str] = {}
    for node in nodes:
        value = getattr(node, what)
        if value in seen:
            raise ConfigError(
                f"nodes {seen[value]} and {node.name} have the same {what} {value!r}: each "
                "[[nodes]] table must be another machine"
            )
        seen[value] = node.name
