"""Real `cloud-node serve` processes with their own keys, and the configuration to reach them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from faults.nodes import NodeProcess

from edge_runtime.config import EdgeConfig, NodeConfig
from transport.keys import generate, generate_secret, write_public


@dataclass
class Fleet:
    """Nodes on this machine and one edge that may use them. Node keys are in ``keys/NAME.key``."""

    root: Path
    bundle: Path
    nodes: dict[str, NodeProcess] = field(default_factory=dict)

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    def start(self, *names: str, bundle: Path | None = None, authorise: bool = True) -> None:
        """Start nodes and wait until they listen."""
        secret = self.keys / "edge.secret"
        if not secret.exists():
            generate_secret(secret)
        for name in names:
            node = NodeProcess(bundle or self.bundle, self.root / name, wait=False)
            self.nodes[name] = node
            write_public(self.keys / f"{name}-node.pub", node.keypair.public, name)
            pair = generate(self.keys, name)
            if authorise:
                write_public(node.allowed / "edge.pub", pair.public, "edge")
        for name in names:
            self.nodes[name].wait_ready()

    def config(self, **changes: object) -> EdgeConfig:
        """A configuration of all nodes of the fleet."""
        settings: dict[str, object] = {
            "nodes": tuple(
                NodeConfig(
                    name=name,
                    endpoint=node.endpoint,
                    server_key=str(self.keys / f"{name}-node.pub"),
                    client_key=str(self.keys / f"{name}.key"),
                )
                for name, node in self.nodes.items()
            ),
            "bundle": str(self.bundle),
            "secret": str(self.keys / "edge.secret"),
            "deadline_s": 30.0,
        }
        return EdgeConfig(**{**settings, **changes})  # type: ignore[arg-type]

    def stop(self) -> None:
        for node in self.nodes.values():
            node.kill()


@pytest.fixture(scope="session")
def shared_fleet(tmp_path_factory: pytest.TempPathFactory, toy_bundle: Path) -> Iterator[Fleet]:
    """Three healthy nodes serving the toy bundle. Leave them healthy."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), toy_bundle)
    try:
        fleet.start("alpha", "beta", "gamma")
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture(scope="session")
def five_nodes(tmp_path_factory: pytest.TempPathFactory, toy_bundle: Path) -> Iterator[Fleet]:
    """Five, so that every window of a frame may leave under a budget of 0.5. Leave them healthy."""
    fleet = Fleet(tmp_path_factory.mktemp("five"), toy_bundle)
    try:
        fleet.start("alpha", "beta", "gamma", "delta", "epsilon")
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture
def make_fleet(tmp_path: Path, toy_bundle: Path) -> Iterator[Callable[..., Fleet]]:
    """Create a fleet of named nodes that a test may break."""
    made: list[Fleet] = []

    def make(*names: str, bundle: Path = toy_bundle) -> Fleet:
        fleet = Fleet(tmp_path / f"fleet{len(made)}", bundle)
        made.append(fleet)
        fleet.start(*names)
        return fleet

    try:
        yield make
    finally:
        for fleet in made:
            fleet.stop()


@pytest.fixture
def photo() -> np.ndarray:
    """A random image, uint8 ``[60, 90, 3]``. It covers two rows of the toy model's windows."""
    return np.random.default_rng(3).integers(0, 256, (60, 90, 3), dtype=np.uint8)
