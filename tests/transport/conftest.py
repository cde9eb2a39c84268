"""Keys, limits and a bare server for tests of the secure sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from echo_node import EchoNode, Honest

from transport.keys import KeyPair, make_directory, write_public
from transport.messages import Limits, StageLimits


@pytest.fixture
def limits() -> StageLimits:
    return StageLimits(Limits(3, 3 << 20), Limits(2, 2 << 20))


@pytest.fixture
def new_pair() -> Callable[[str], KeyPair]:
    """Make key pairs in memory."""

    def make(name: str = "x") -> KeyPair:
        public, secret = zmq.curve_keypair()
        return KeyPair(name, public.decode(), secret.decode())

    return make


@pytest.fixture
def authorized(tmp_path: Path) -> Path:
    return make_directory(tmp_path / "authorized")


@pytest.fixture
def authorise(authorized: Path) -> Callable[[KeyPair], None]:
    def add(pair: KeyPair) -> None:
        write_public(authorized / f"{pair.name}.pub", pair.public, pair.name)

    return add


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., EchoNode]]:
    made: list[EchoNode] = []

    def make(**options: Any) -> EchoNode:
        made.append(EchoNode(tmp_path / f"node{len(made)}", **options))
        return made[-1]

    try:
        yield make
    finally:
        for node in made:
            node.close()


@pytest.fixture
def behave(start: Callable[..., EchoNode]) -> Iterator[Callable[..., Honest]]:
    """Well-behaved edges, stopped before their nodes."""
    made: list[Honest] = []

    def make(node: EchoNode) -> Honest:
        made.append(Honest(node))
        return made[-1]

    try:
        yield make
    finally:
        for edge in made:
            edge.stop()
