"""Settings of an edge: the file `edge.toml`, read and checked.

Relative paths are relative to the file. Only :func:`load_nodes` reads key files.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

import msgspec

from edge_common.errors import ConfigError, KeyFileError
from edge_common.options import COUNT, SECONDS, SHARE, Invalid, Number
from edge_common.permissions import why_untrusted
from edge_common.toml import read_toml, unknown_key
from edge_runtime.exposure.placement import DEFAULT_MAX_EXPOSURE
from engines.engine import Device

if TYPE_CHECKING:
    from transport.keys import KeyPair

Fallback = Literal["error", "local"]
Mode = Literal["offload", "auto", "local"]
Budget = Literal["scene", "frame"]
Region = tuple[float, float, float, float]
"""A part of an image: x0, y0, x1, y1 in its pixels, right and bottom exclusive."""

DEFAULT_DEADLINE_S = 10.0
_DEFAULT_SECRET = "keys/edge.secret"
DEFAULT_EXPOSURE = "exposure"
_Z85 = re.compile(r"[0-9A-Za-z.:+=^!/*?&<>()\[\]{}@%$#-]{40}\Z")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\Z")
_WORDS = {
    str: "a text",
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    Region: "a list of regions, such as [[0, 0, 200, 100]]",
}
NODE_SETTINGS = frozenset(
    ("bind", "keys", "secret_key", "authorized", "threads", "workers", "queue_bytes", "metrics")
)
"""Settings that only a node's file has."""

_NUMBERS = {
    "deadline_s": SECONDS,
    "max_exposure": SHARE,
    "windows_per_request": COUNT,
    "recompute": Number(0, 1, "a share"),
    "reuse_tolerance": Number(0, 255, "levels of a pixel", whole=True),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "fallback": get_args(Fallback),
    "device": get_args(Device),
    "mode": get_args(Mode),
    "budget": get_args(Budget),
}


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ``[[nodes]]`` table.

    ``name``: yours, for messages and reports. ``endpoint``: ``tcp://HOST:PORT``. ``server_key``:
    the node's public key, a file or the 40 characters themselves. ``client_key``: the file of this
    edge's secret key for this node (default: ``keys/NAME.key``). ``provider``: who runs it. Nodes
    of one provider may share what they see, so they count as one *party* (default: its own name).
    """

    name: str
    endpoint: str
    server_key: str
    client_key: str = ""
    provider: str = ""

    @property
    def party(self) -> str:
        return self.provider or self.name


class EdgeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings in ``edge.toml``. Make one with :func:`load_config`, or directly in a program.

    Attributes:
        nodes: at least one.
        bundle: directory of the full bundle. None is the shipped bundle.
        secret: file that keys the placement of windows.
        deadline_s: seconds until all of an image's tokens must be back. With ``fallback = "local"``
            or ``strict`` nodes get half of it, and the edge the rest to compute windows itself.
        max_exposure: largest share of an image's or scene's area that one party may see, in (0, 1].
        fallback: ``error``, or ``local``: the edge computes what the nodes cannot or may not.
        windows_per_request: most windows in one message; None sends a node all of its windows at
            once.
        device: the engines on this machine, see :data:`engines.engine.Device`.
        mode: ``offload``; ``local``: nodes are sent nothing; ``auto``: whichever is faster.
        budget: what `max_exposure` limits in a stream of frames. ``scene``: all frames that show
            the same scene, together. ``frame``: each frame alone; over time a party may then see
            the whole scene.
        keep_local: regions whose windows never leave the edge.
        recompute: share of the windows returned by nodes that the edge computes again, to find
            wrong answers; None is 0.04 with ``fallback = "local"``, where the edge has the stack
            open anyway, and otherwise 0.
        strict: give no mask before every window was computed again.
        reuse_tolerance: a frame's window is not sent if no value of its pixels differs by more than
            this from a frame whose tokens are known, 0 to 255.
        exposure: folder of the record of what each party may have seen (default: ``exposure``
            beside the file). None: it is forgotten when the process ends.
        constant_rate: send every window of every frame, so that nodes cannot tell where something
            moves.
    """

    nodes: tuple[NodeConfig, ...]
    bundle: str | None = None
    secret: str = _DEFAULT_SECRET
    deadline_s: float = DEFAULT_DEADLINE_S
    max_exposure: float = DEFAULT_MAX_EXPOSURE
    fallback: Fallback = "error"
    windows_per_request: int | None = None
    device: Device = "auto"
    mode: Mode = "offload"
    budget: Budget = "scene"
    keep_local: tuple[Region, ...] = ()
    recompute: float | None = None
    strict: bool = False
    reuse_tolerance: int = 0
    constant_rate: bool = False
    exposure: str | None = None

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ConfigError("there are no nodes", mend="add a [[nodes]] table for each of yours")
        for name, bounds in _NUMBERS.items():
            value = getattr(self, name)
            try:
                if value is not None:
                    bounds.check(value)
            except Invalid as error:
                raise ConfigError(f"{name} is {value}; {error}") from None
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
        for region in self.keep_local:
            check_region(region)
        for node in self.nodes:
            for what, name in (("node name", node.name), ("provider", node.party)):
                if not _NAME.match(name):
                    raise ConfigError(
                        f"the {what} {name!r} cannot be used",
                        mend="use up to 64 letters, digits, '.', '_' and '-', the first a letter, "
                        "digit or '_'",
                    )
        # One machine under two names would see twice what the budget allows.
        for what in ("name", "endpoint", "server_key"):
            _refuse_shared(self.nodes, what)


@dataclass(frozen=True)
class Node:
    """A node with its keys, ready to connect to."""

    name: str
    endpoint: str
    server_key: str
    keypair: KeyPair


def load_config(path: str | os.PathLike[str]) -> EdgeConfig:
    """Read and check ``edge.toml``; all paths in the result are absolute.

    Raises:
        ConfigError: naming the file, the key at fault and what it should be.
    """
    file = Path(path)
    table = read_toml(file, f"edge-runtime init --out {file} --node ...")
    if NODE_SETTINGS & table.keys() or (not table and file.name == "node.toml"):
        raise ConfigError(
            f"{file} holds the settings of a node, expected those of an edge",
            mend="write one with `edge-runtime init`; `cloud-node serve --config` reads a node's",
        )
    if danger := why_untrusted(file):
        raise danger.error(ConfigError)
    try:
        _check_types(table, EdgeConfig, "")
        nodes = table.setdefault("nodes", [])
        if not isinstance(nodes, list):
            raise ConfigError(f"nodes is {_shown(nodes)}; expected a [[nodes]] table for each node")
        table["nodes"] = [_completed(node, i, file.parent) for i, node in enumerate(nodes, 1)]
        table.setdefault("secret", _DEFAULT_SECRET)
        table.setdefault("exposure", DEFAULT_EXPOSURE)
        for key in ("bundle", "secret", "exposure"):
            if key in table:
                table[key] = _absolute(table[key], file.parent)
        return msgspec.convert(table, EdgeConfig)
    except ConfigError as error:
        raise error.within(str(file)) from None


def load_nodes(config: EdgeConfig) -> list[Node]:
    """The nodes with their key files read.

    Raises:
        KeyFileError: a file is missing, malformed, or readable or replaceable by others.
        ConfigError: two nodes share a client key, so that they could find out that they serve one
            edge, or a server key, so that they are one machine; or a node has this edge's own key.
    """
    from transport.keys import check_public, load_public, load_secret
    from transport.sockets import check_endpoint

    nodes = []
    for node in config.nodes:
        key = node.server_key
        try:
            loaded = Node(
                name=node.name,
                endpoint=check_endpoint(node.endpoint),
                server_key=check_public(key) if is_key(key) else load_public(key),
                keypair=load_secret(node.client_key or f"keys/{node.name}.key"),
            )
        except (ConfigError, KeyFileError) as error:
            raise error.within(f"node {node.name}") from None
        nodes.append(loaded)
    refuse_own_keys(
        {loaded.name: loaded.server_key for loaded in nodes},
        {loaded.keypair.public for loaded in nodes},
    )
    refuse_shared_keys("server", {loaded.name: loaded.server_key for loaded in nodes})
    refuse_shared_keys("client", {loaded.name: loaded.keypair.public for loaded in nodes})
    return nodes


def check_region(region: Region) -> None:
    """Raise ConfigError unless the region holds pixels."""
    try:
        x0, y0, x1, y1 = map(float, region)
    except (TypeError, ValueError):
        raise ConfigError(
            f"keep_local holds {region!r}; expected regions of four numbers, x0, y0, x1, y1"
        ) from None
    if not (0 <= x0 < x1 and 0 <= y0 < y1 and math.isfinite(x1) and math.isfinite(y1)):
        raise ConfigError(
            f"keep_local holds {list(region)}; expected x0, y0, x1, y1 in pixels of the image, "
            "with 0 <= x0 < x1 and 0 <= y0 < y1"
        )


def refuse_own_keys(server_keys: dict[str, str], own: set[str]) -> None:
    """Raises ConfigError if the key of a node, by name, is one of this edge's own public keys."""
    for name, key in server_keys.items():
        if key in own:
            raise ConfigError(
                f"node {name}: its server_key is this edge's own key, expected the node's",
                mend="use the node.pub file that its operator sends",
            )


def refuse_shared_keys(kind: Literal["server", "client"], keys: dict[str, str]) -> None:
    """Raises ConfigError if two nodes, by name, have the same public key of that kind."""
    seen: dict[str, str] = {}
    for name, key in keys.items():
        if (other := seen.setdefault(key, name)) != name:
            mend = (
                "name each machine once: it must not count as two"
                if kind == "server"
                else "make one per node with `edge-runtime keys edge`"
            )
            raise ConfigError(f"nodes {other} and {name} have the same {kind} key", mend=mend)


def is_key(text: str) -> bool:
    """True if `text` is a public key itself (40 characters of Z85) and not its path."""
    return bool(_Z85.match(text)) and not text.endswith(".pub")


def _completed(node: Any, number: int, base: Path) -> Any:
    where = f" in [[nodes]] table {number}"
    if not isinstance(node, dict):
        raise ConfigError(f"[[nodes]] table {number} is {_shown(node)}; expected a table")
    if isinstance(node.get("name"), str):
        where += f" ({node['name']})"
    for key in sorted(node.keys() & EdgeConfig.__struct_fields__):
        raise ConfigError(f"{key} is{where}", mend="put it above the first [[nodes]] line")
    _check_types(node, NodeConfig, where)
    for required in ("name", "endpoint", "server_key"):
        if required not in node:
            raise ConfigError(f"[[nodes]] table {number} has no {required}")
    from transport.sockets import check_endpoint

    try:
        check_endpoint(node["endpoint"])
    except ConfigError:
        raise ConfigError(
            f"endpoint is {_shown(node['endpoint'])}{where}; expected tcp://HOST:PORT, such as "
            "tcp://node.example.org:5555"
        ) from None
    node.setdefault("client_key", f"keys/{node['name']}.key")
    for key in ("server_key", "client_key"):
        if not (key == "server_key" and is_key(node[key])):
            node[key] = _absolute(node[key], base)
    return node


def _absolute(path: str, base: Path) -> str:
    try:
        if "\0" in path:
            raise ValueError("it holds a NUL character")
        return str((base / Path(path).expanduser()).absolute())
    except (RuntimeError, ValueError) as error:  # RuntimeError: ~USER of an unknown user
        raise ConfigError(f"the path {path!r} cannot be used: {error}") from None


def _check_types(table: dict[str, Any], struct: type[msgspec.Struct], where: str) -> None:
    """Refuse keys that `struct` does not have, and values of another type."""
    hints = get_type_hints(struct)
    for key, value in table.items():
        if key not in hints:
            raise unknown_key(key, hints, where)
        try:
            if key != "nodes":
                msgspec.convert(value, hints[key])
        except msgspec.ValidationError:
            expected = _expected(key, hints[key], struct)
            raise ConfigError(f"{key} is {_shown(value)}{where}; expected {expected}") from None


def _expected(key: str, hint: Any, struct: type[msgspec.Struct]) -> str:
    kind, *others = get_args(hint) or (hint,)
    if isinstance(kind, str):  # a Literal
        *first, last = (f'"{choice}"' for choice in (kind, *others))
        return f"{', '.join(first)} or {last}"
    defaults = {field.name: field.default for field in msgspec.structs.fields(struct)}
    example = defaults[key] if isinstance(defaults[key], kind) else None
    return _WORDS[kind] + (f", such as {_shown(example)}" if example else "")


def _shown(value: Any) -> str:
    """A value, nearly as TOML writes it."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) < 80 else f"{text[:76]}..."


def _refuse_shared(nodes: tuple[NodeConfig, ...], what: str) -> None:
    seen: dict[str, str] = {}
    for node in nodes:
        value = getattr(node, what)
        if value in seen:
            raise ConfigError(
                f"nodes {seen[value]} and {node.name} have the same {what} {value!r}",
                mend="each [[nodes]] table must be another machine",
            )
        seen[value] = node.name
