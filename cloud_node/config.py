"""What a node is told at start, checked before anything slow or irreversible happens.

`load` puts together defaults, ``node.toml`` and the command line (which wins), and knows where each
value came from. `prepare` loads and verifies what they name (bundle, keys). Both promise that a
mistake is one message that mends it. What a setting may be is in `settings`; opening the engine and
the socket is left to `server`.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

from cloud_node.settings import BY_NAME, Setting, size_text, split_address
from edge_common.errors import BundleError, ConfigError
from edge_common.options import Invalid
from edge_common.permissions import why_untrusted
from edge_common.toml import read_toml, unknown_key
from engines.bundle import Bundle, Stage, shipped_bundle
from transport.auth import AllowList
from transport.keys import AUTHORIZED, KeyPair, load_secret
from transport.messages import StageLimits, stage_limits
from transport.sockets import check_endpoint

EDGE_SETTINGS = frozenset(("nodes", "secret", "deadline_s", "max_exposure", "fallback"))
"""Settings that only an edge's file has."""
_BASE_BYTES = 64 << 20
"""What the front process takes in any case, at the least."""


@dataclass(frozen=True)
class NodeConfig:
    """The settings of ``cloud-node serve``, as `settings.SETTINGS` explains them."""

    bundle: Path | None = None
    bind: str = "tcp://0.0.0.0:5555"
    keys: Path = Path("keys")
    secret_key: Path | None = None
    authorized: Path | None = None
    device: tuple[str, ...] = ("auto",)
    threads: int | None = None
    workers: Literal["local", "ray"] = "local"
    ray_address: str = "auto"
    ray_replicas: tuple[int, int] = (1, 1)
    max_batch: int | None = None
    max_wait_ms: float = 2.0
    queue_bytes: int = 256 << 20
    client_requests: int = 16
    memory_ceiling: int | None = None
    drain_s: float = 10.0
    metrics: str | None = None
    log_level: str = "info"
    log_format: str = "text"
    ready_file: Path | None = None

    @property
    def key_file(self) -> Path:
        """Where the node's secret key is."""
        return self.secret_key or self.keys / "node.key"

    @property
    def authorized_folder(self) -> Path:
        """Where the public keys of the edges that get in are."""
        return self.authorized or self.keys / AUTHORIZED


@dataclass(frozen=True)
class Loaded:
    """A configuration, and for each setting where it came from: ``default``, the file, or the
    option."""

    config: NodeConfig
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Prepared:
    """A checked configuration: everything a server needs but the engine and the socket."""

    config: NodeConfig
    bundle: Bundle
    stage: Stage
    limits: StageLimits
    keypair: KeyPair
    allowed: AllowList

    @property
    def label(self) -> str:
        """The bundle's name for people."""
        manifest = self.bundle.manifest
        head = "" if manifest.head_blocks is None else f" head {manifest.head_blocks}"
        return f"{manifest.model} {manifest.precision}{head}"


def load(file: Path | None = None, options: Mapping[str, Any] | None = None) -> Loaded:
    """Put a configuration together.

    Args:
        file: of settings in TOML. Relative paths in it are relative to its folder.
        options: settings by name that win over the file's. Paths are relative to the current
            folder.

    Raises:
        ConfigError: naming the setting at fault and what it should be.
    """
    values: dict[str, Any] = {}
    sources = {field.name: "default" for field in fields(NodeConfig)}
    if file is not None:
        values = _read(file)
        sources |= {name: str(file) for name in values}
        values.setdefault("keys", (file.parent / "keys").absolute())
    for name, value in (options or {}).items():
        setting = BY_NAME[name]
        try:
            if value is not None:
                setting.check(value)
        except Invalid as error:
            raise ConfigError(f"{setting.option} {_shown(setting, value)}: {error}") from None
        values[name] = value
        sources[name] = setting.option
    config = NodeConfig(**values)
    try:
        check_endpoint(config.bind, bind=True)
        _refuse_conflicts(config)
    except ConfigError as error:
        used = any(source == str(file) for source in sources.values())
        raise ConfigError(f"{file}: {error}" if used else str(error)) from None
    return Loaded(config, sources)


def prepare(config: NodeConfig) -> Prepared:
    """Load and check all that `config` names.

    Raises:
        EdgeRuntimeError: naming what is wrong and what mends it.
    """
    folder = config.ready_file.parent if config.ready_file else Path()
    if not folder.is_dir():
        raise ConfigError(f"cannot write the ready file: the folder {folder} does not exist")
    if config.ready_file and config.ready_file.is_dir():
        raise ConfigError(
            f"ready_file is {config.ready_file}, a folder; expected a file to write in one"
        )
    keypair = load_secret(config.key_file)
    allowed = AllowList(config.authorized_folder)
    bundle = Bundle.load(config.bundle or shipped_bundle())
    if not bundle.has("stack"):
        raise BundleError(
            f"{bundle.path} keeps the stock order of blocks, which cannot be cut into windows; a "
            "node serves a reordered bundle (`edge-runtime export --order reordered`)"
        )
    stage = bundle.stage("stack")
    windows = bundle.geometry.windows
    if config.max_batch is not None and config.max_batch < windows:
        raise ConfigError(
            f"max_batch is {config.max_batch}, expected at least {windows}, the windows of an "
            "image of this bundle; or leave it out"
        )
    # An edge sends each window of an image at most once, so a request never holds more.
    limits = stage_limits(stage.inputs, stage.outputs, windows)
    least = 2 * (limits.request.total_bytes + 4096)
    if config.queue_bytes < least:
        raise ConfigError(
            f"queue_bytes is {size_text(config.queue_bytes)}, expected at least "
            f"{size_text(-(-least // 1024) * 1024)}: room for two requests with all windows of an "
            "image of this bundle"
        )
    return Prepared(config, bundle, stage, limits, keypair, allowed)


def examine(prepared: Prepared) -> list[str]:
    """Check what `prepare` leaves to the start of the node because it is slow, or may change.

    Returns:
        what is allowed but may not be meant.

    Raises:
        EdgeRuntimeError: the bundle is damaged, or an address is not this machine's.
    """
    config = prepared.config
    prepared.bundle.verify_hashes(["stack"])
    host, port = _host_and_port(config.bind)
    notes = [_probe("bind", config.bind, host, port)]
    if config.metrics:
        host, port = split_address(config.metrics)
        notes.append(_probe("metrics", config.metrics, host, port))
        if not _is_loopback(host):
            notes.append(
                f"metrics is {config.metrics}: whoever can reach that address sees how busy this "
                "node is; 127.0.0.1 keeps it on this machine"
            )
    if not prepared.allowed:
        notes.append(
            f"no edge is authorised in {config.authorized_folder}: see `edge-runtime keys "
            "authorize --help`"
        )
    if config.threads is None and config.workers == "local" and {*config.device} <= {"auto", "cpu"}:
        notes.append(
            "on the CPU this node takes all cores; if several nodes share this machine, give each "
            "its part with threads"
        )
    if config.workers == "ray":
        notes.append(
            "the Ray cluster has not been asked; the start does, and refuses one that writes "
            "objects to disks. Whoever reaches its ports runs code: docs/ray.md"
        )
    return [note for note in notes if note]


def _read(file: Path) -> dict[str, Any]:
    values = {}
    table = read_toml(file, f"cloud-node init --out {file}")
    if EDGE_SETTINGS & table.keys():
        raise ConfigError(
            f"{file} holds the settings of an edge, which `edge-runtime nodes --config` reads; "
            "expected a node's, which `cloud-node init` writes"
        )
    if found := why_untrusted(file):
        raise ConfigError(found)
    for name, value in table.items():
        setting = BY_NAME.get(name)
        if isinstance(value, dict):
            raise ConfigError(
                f"{file}: [{name}] begins a table; settings stand by themselves, as NAME = VALUE, "
                "without any"
            )
        if not setting:
            raise ConfigError(f"{file}: {unknown_key(name, BY_NAME)}")
        try:
            found = setting.read(value)
            # The file says what holds wherever the node is started.
            values[name] = (file.parent / found).absolute() if setting.is_path else found
        except Invalid as error:
            shown = str(value).lower() if isinstance(value, bool) else repr(value)
            shown = shown if len(shown) < 80 else f"{shown[:76]}..."
            raise ConfigError(f"{file}: {name} is {shown}; {error}") from None
    return values


def _shown(setting: Setting, value: Any) -> str:
    return setting.show(value).strip('"')


def _refuse_conflicts(config: NodeConfig) -> None:
    for name in ("ray_address", "ray_replicas"):
        setting, value = BY_NAME[name], getattr(config, name)
        if value != setting.default and config.workers != "ray":
            raise ConfigError(
                f'{name} is {_shown(setting, value)}, but workers is "{config.workers}": set '
                f'workers = "ray" (--workers ray), or leave {name} out'
            )
    if config.workers == "ray" and (len(config.device) > 1 or ":" in config.device[0]):
        raise ConfigError(
            f"device is {','.join(config.device)} with workers on Ray, expected one without a "
            "number: Ray gives each worker a GPU, and ray_replicas is how many"
        )
    if config.memory_ceiling is not None:
        least = _BASE_BYTES + config.queue_bytes
        if config.memory_ceiling < least:
            raise ConfigError(
                f"memory_ceiling is {size_text(config.memory_ceiling)}, expected at least "
                f"{size_text(least)}: what may wait (queue_bytes, "
                f"{size_text(config.queue_bytes)}) and the process itself; or leave it out"
            )
    if config.metrics:
        host, port = _host_and_port(config.bind)
        other, other_port = split_address(config.metrics)
        if port and port == other_port and (host == other or _is_any(host) or _is_any(other)):
            raise ConfigError(
                f"bind is {config.bind} and metrics is {config.metrics}: they need different ports"
            )


def _host_and_port(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port) if port != "*" else 0


def _is_any(host: str) -> bool:
    return host in ("*", "0.0.0.0", "::")


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _probe(name: str, value: str, host: str, port: int) -> str | None:
    """Whether an address can be listened on: what to know about it, if anything."""
    if any(host == interface for _, interface in socket.if_nameindex()):
        return None
    try:
        found = socket.getaddrinfo(
            None if host == "*" else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise ConfigError(f"{name} is {value}: {host!r} is no address ({error.strerror})") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"{name} is {value}: something listens there; this node, if it runs already"
        text = os.strerror(cast(int, error.errno))
        raise ConfigError(
            f"{name} is {value}: this machine can't listen there ({text}); 0.0.0.0 is all its "
            "addresses, and ports below 1024 need a privilege"
        ) from None
    return None
