"""The configuration of a node: read, checked, and everything it names loaded."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cloud_node.settings import SETTINGS, NodeConfig
from edge_common.errors import BundleError, ConfigError
from edge_common.settings import read_settings, size_text, split_address
from edge_common.toml import read_toml
from engines.bundle import Bundle, Stage, shipped_bundle
from transport.allow_list import AllowList
from transport.keys import KeyPair, load_secret
from transport.messages import StageLimits, stage_limits
from transport.sockets import check_endpoint

__all__ = ["Loaded", "NodeConfig", "Prepared", "examine", "load", "prepare"]

EDGE_SETTINGS = frozenset(("nodes", "secret", "deadline_s", "max_exposure", "fallback"))
"""Settings that only an edge's file has."""
_BASE_BYTES = 64 << 20
"""The front process takes at least this."""


@dataclass(frozen=True)
class Loaded:
    """A configuration, and where each setting comes from: ``default``, the file or the option."""

    config: NodeConfig
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Prepared:
    """A checked configuration: everything a server needs except the engine and the socket."""

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
    """Combine defaults, a TOML file and options; options win.

    Args:
        file: settings in TOML. Relative paths in it are relative to its folder.
        options: checked settings by name. Relative paths are relative to the current folder.

    Raises:
        ConfigError: naming the setting at fault and what was expected.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(SETTINGS, "default")
    if file is not None:
        table = read_toml(file, f"cloud-node init --out {file}")
        if EDGE_SETTINGS & table.keys():
            raise ConfigError(
                f"{file} holds the settings of an edge, expected those of a node",
                mend="write one with `cloud-node init`; `edge-runtime nodes --config` reads an "
                "edge's",
            )
        values = read_settings(file, table, SETTINGS)
        sources |= dict.fromkeys(values, str(file))
        values.setdefault("keys", (file.parent / "keys").absolute())
    for name, value in (options or {}).items():
        values[name] = value
        sources[name] = SETTINGS[name].option
    config = NodeConfig(**values)
    try:
        check_endpoint(config.bind, bind=True)
        _refuse_conflicts(config)
    except ConfigError as error:
        used = str(file) in sources.values()
        raise (error.within(str(file)) if used else error) from None
    return Loaded(config, sources)


def prepare(config: NodeConfig) -> Prepared:
    """Load and check everything that `config` names.

    Raises:
        EdgeRuntimeError: naming what is wrong and how to fix it.
    """
    folder = config.ready_file.parent if config.ready_file else Path()
    if not folder.is_dir():
        raise ConfigError(f"cannot write the ready file: the folder {folder} does not exist")
    if config.ready_file and config.ready_file.is_dir():
        raise ConfigError(
            f"ready_file is {config.ready_file}, which is a folder; expected a path for a file"
        )
    keypair = load_secret(config.key_file)
    allowed = AllowList(config.authorized_folder)
    bundle = Bundle.load(config.bundle or shipped_bundle())
    if not bundle.has("stack"):
        raise BundleError(
            f"{bundle.path} has its blocks in stock order, which cannot be cut into windows; "
            "expected a reordered bundle",
            mend="export one with `edge-runtime export --order reordered`",
        )
    stage = bundle.stage("stack")
    windows = bundle.geometry.windows
    if config.max_batch is not None and config.max_batch < windows:
        raise ConfigError(
            f"max_batch is {config.max_batch}, expected at least {windows}, the windows of an "
            "image of this bundle",
            mend="raise it, or leave it out",
        )
    # A request holds each window of one image at most once.
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
    """Check what is slow to check, or may change before the node starts.

    Returns:
        notes about settings that are allowed but may be unintended.

    Raises:
        EdgeRuntimeError: the bundle is damaged, or an address does not belong to this machine.
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
                f"metrics is {config.metrics}: everybody who can reach that address sees how "
                "busy this node is; 127.0.0.1 keeps it on this machine"
            )
    if not prepared.allowed:
        notes.append(
            f"no edge is authorised in {config.authorized_folder}: see `edge-runtime keys "
            "authorize --help`"
        )
    if takes_all_cores(config):
        notes.append(ALL_CORES)
    if config.workers == "ray":
        notes.append(
            "the Ray cluster is checked only at start. Everybody who can reach its ports can run "
            "code on it: docs/ray.md"
        )
    return [note for note in notes if note]


ALL_CORES = (
    "on the CPU this node takes all cores; if several nodes share this machine, give each its "
    "share with threads (--threads)"
)


def takes_all_cores(config: NodeConfig) -> bool:
    """True if workers of this machine compute with all its cores."""
    local = config.threads is None and config.workers == "local"
    return local and {*config.device} <= {"auto", "cpu"}


def _refuse_conflicts(config: NodeConfig) -> None:
    for name in ("ray_address", "ray_replicas"):
        setting, value = SETTINGS[name], getattr(config, name)
        if value != setting.default and config.workers != "ray":
            shown = setting.show(value).strip('"')
            raise ConfigError(
                f'{name} is {shown}, but workers is "{config.workers}"',
                mend=f'set workers = "ray" (--workers ray), or leave {name} out',
            )
    if config.workers == "ray" and (len(config.device) > 1 or ":" in config.device[0]):
        raise ConfigError(
            f"device is {','.join(config.device)} with workers on Ray, expected one without a "
            "number",
            mend="set the number of workers with ray_replicas: Ray gives each a GPU",
        )
    if config.memory_ceiling is not None:
        least = _BASE_BYTES + config.queue_bytes
        if config.memory_ceiling < least:
            raise ConfigError(
                f"memory_ceiling is {size_text(config.memory_ceiling)}, expected at least "
                f"{size_text(least)}: what may wait (queue_bytes, "
                f"{size_text(config.queue_bytes)}) and the process itself",
                mend="raise it, or leave it out",
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
    """Check that an address can be listened on; returns a note about it, if there is one."""
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
        text = f"{host!r} is not an address ({error.strerror})"
        raise ConfigError(f"{name} is {value}: {text}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"{name} is {value}: something listens there already, perhaps this node"
        text = os.strerror(cast(int, error.errno))
        raise ConfigError(
            f"{name} is {value}: this machine can't listen there ({text})",
            mend="use one of its addresses (0.0.0.0 is all of them) and a port above 1023",
        ) from None
    return None
