"""Fixtures of the fault kit's own tests: victims, and an edge that attacks them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.bundle import Bundle
from faults.edges import HostileEdge
from faults.nodes import FaultyNode, NodeProcess


@pytest.fixture(scope="session")
def bundle(toy_bundle: Path) -> Bundle:
    return Bundle.load(toy_bundle)


@pytest.fixture
def faulty(bundle: Bundle, tmp_path: Path) -> Callable[..., FaultyNode]:
    """Faulty nodes, each with its own folder. Start them with ``with``."""
    names = iter(range(99))

    def make(*arguments: Any, **options: Any) -> FaultyNode:
        return FaultyNode(bundle, tmp_path / f"node{next(names)}", *arguments, **options)

    return make


@pytest.fixture(scope="module")
def victim(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A real ``cloud-node serve``."""
    with NodeProcess(toy_bundle, tmp_path_factory.mktemp("victim") / "node") as process:
        yield process


@pytest.fixture
def hostile(victim: NodeProcess) -> HostileEdge:
    """An edge that the victim has authorised."""
    pair = victim.authorise(f"edge-{os.urandom(4).hex()}")
    stage = victim.bundle.stage("stack").sha256
    return HostileEdge(victim.endpoint, victim.keypair.public, pair, stage)
