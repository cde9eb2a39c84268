"""Real `cloud-node serve` processes with their own keys, and the configuration to reach them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.config import EdgeConfig, NodeConfig
from transport.keys import generate, generate_secret, make_directory, write_public


@dataclass
class Node:
    """A node process; the edge's key for it is ``keys/NAME.key`` of the fleet."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    endpoint: str = ""

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@dataclass
class Fleet:
    """Nodes on this machine and one edge that may use them."""

    root: Path
    bundle: Path
    nodes: dict[str, Node] = field(default_factory=dict)
    environment: dict[str, str] = field(
        default_factory=lambda: {**os.environ, "OMP_NUM_THREADS": "1"}
    )

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    def start(self, *names: str, bundle: Path | None = None, authorise: bool = True) -> None:
        """Start nodes and wait until they listen."""
        secret = self.keys / "edge.secret"
        if not secret.exists():
            generate_secret(secret)
        for name in names:
            folder = self.root / name
            allowed = make_directory(make_directory(folder) / "authorized")
            node_key, edge_key = generate(folder, "node"), generate(self.keys, name)
            write_public(self.keys / f"{name}-node.pub", node_key.public, name)
            if authorise:
                write_public(allowed / "edge.pub", edge_key.public, "edge")
            command = [sys.executable, "-m", "cloud_node.cli", "serve"]
            command += ["--bundle", str(bundle or self.bundle), "--keys", str(folder)]
            command += ["--bind", "tcp://127.0.0.1:0", "--threads", "1"]
            command += ["--ready-file", str(folder / "ready.json"), "--log-level", "debug"]
            with open(folder / "log", "wb") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)
            self.nodes[name] = Node(name, folder, process)
        for name in names:
            node = self.nodes[name]
            give_up = time.monotonic() + 60
            while not (node.folder / "ready.json").exists():
                assert node.process.poll() is None, node.log
                assert time.monotonic() < give_up, node.log
                time.sleep(0.02)
            node.endpoint = json.loads((node.folder / "ready.json").read_text())["endpoint"]

    def config(self, **changes: object) -> EdgeConfig:
        """A configuration of all nodes of the fleet."""
        settings: dict[str, object] = {
            "nodes": tuple(
                NodeConfig(
                    name=node.name,
                    endpoint=node.endpoint,
                    server_key=str(self.keys / f"{node.name}-node.pub"),
                    client_key=str(self.keys / f"{node.name}.key"),
                )
                for node in self.nodes.values()
            ),
            "bundle": str(self.bundle),
            "secret": str(self.keys / "edge.secret"),
            "deadline_s": 30.0,
        }
        return EdgeConfig(**{**settings, **changes})  # type: ignore[arg-type]

    def stop(self) -> None:
        for node in self.nodes.values():
            node.signal(signal.SIGCONT)
            node.process.kill()
        for node in self.nodes.values():
            node.process.wait()


@pytest.fixture(scope="session")
def shared_fleet(tmp_path_factory: pytest.TempPathFactory, toy_bundle: Path) -> Iterator[Fleet]:
    """Three healthy nodes serving the toy bundle. Leave them healthy."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"), toy_bundle)
    try:
        fleet.start("alpha", "beta", "gamma")
        yield fleet
    finally:
        fleet.stop()


@pytest.fixture
def make_fleet(tmp_path: Path, toy_bundle: Path) -> Iterator[Callable[..., Fleet]]:
    """Makes a fleet of named nodes to be maltreated."""
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
    """A random picture, uint8 ``[60, 90, 3]``: it covers two rows of the toy's windows."""
    return np.random.default_rng(3).integers(0, 256, (60, 90, 3), dtype=np.uint8)
