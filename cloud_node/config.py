"""What a node is told at start, checked before anything slow or irreversible happens.

`prepare` loads and verifies what the configuration names (bundle, keys, address) and promises that
a mistake is one message that mends it. Opening the engine and the socket is left to `server`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engines.bundle import Bundle, Stage
from engines.engine import Device
from engines.errors import BundleError, ConfigError
from transport.auth import AllowList
from transport.keys import AUTHORIZED, KeyPair, load_secret
from transport.messages import StageLimits, stage_limits
from transport.sockets import check_endpoint


@dataclass(frozen=True)
class NodeConfig:
    """The settings of ``cloud-node serve``.

    `threads`: CPU threads of the engine, None for all cores. `max_batch`: most windows computed at
    once, None for those of an image. `max_wait_ms`: how long a batch may wait to be filled while a
    worker is free. `queue_bytes`: most that may wait for a worker, and most on its way in libzmq.
    `client_requests`: most of one client, waiting and running. `memory_ceiling`: bytes of the front
    process beyond which it drops all connections. `drain_s`: how long a node told to stop goes on
    with what it has admitted. `ready_file`: where to tell scripts the bound endpoint.
    """

    bundle: Path
    bind: str
    keys: Path
    threads: int | None = None
    device: Device = "auto"
    max_batch: int | None = None
    max_wait_ms: float = 2.0
    queue_bytes: int = 256 << 20
    client_requests: int = 16
    memory_ceiling: int | None = None
    drain_s: float = 10.0
    ready_file: Path | None = None


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


def prepare(config: NodeConfig) -> Prepared:
    """Load and check all that `config` names.

    Raises:
        EdgeRuntimeError: naming what is wrong and what mends it.
    """
    check_endpoint(config.bind, bind=True)
    if config.threads is not None and config.threads < 1:
        raise ConfigError(f"--threads {config.threads}: expected at least 1; leave it out for all")
    keypair = load_secret(config.keys / "node.key")
    allowed = AllowList(config.keys / AUTHORIZED)
    bundle = Bundle.load(config.bundle)
    if not bundle.has("stack"):
        raise BundleError(
            f"{bundle.path} keeps the stock order of blocks, which cannot be cut into windows; a "
            "node serves a reordered bundle (`edge-runtime export --order reordered`)"
        )
    stage = bundle.stage("stack")
    # An edge sends each window of an image at most once, so a request never holds more.
    limits = stage_limits(stage.inputs, stage.outputs, bundle.geometry.windows)
    return Prepared(config, bundle, stage, limits, keypair, allowed)
