"""A client under long or heavy use: its counts stay right and it ends properly."""

from __future__ import annotations

import asyncio
from pathlib import Path
from unittest.mock import Mock

import pytest
from faults.asking import ask, connected, feeds
from faults.nodes import FaultyNode

from engines.bundle import Bundle


@pytest.fixture
def bundle(toy_bundle: Path) -> Bundle:
    return Bundle.load(toy_bundle)


def test_an_honest_node_is_never_quarantined_for_flooding(bundle: Bundle, tmp_path: Path) -> None:
    """Bytes that were delivered do not add up to a flood."""

    async def work() -> None:
        node = FaultyNode(bundle, tmp_path)
        async with node, connected(node.node(node.authorise()), bundle) as client:
            fed = feeds(bundle)
            for _ in range(100):
                await ask(client, fed)
            (account,) = client._connections._open.values()
            client._connections.check(asyncio.get_running_loop().time())
            assert account.received > 100_000
            assert account.undelivered < 10_000
            assert client.quarantine is None

    asyncio.run(work())


def test_cancelling_a_send_while_others_wait(bundle: Bundle, tmp_path: Path) -> None:
    """pyzmq queues even a message that should be sent at once or not at all. Once cancelled, it is
    not sent."""

    async def work() -> None:
        node = FaultyNode(bundle, tmp_path)
        async with node, connected(node.node(node.authorise()), bundle) as client:
            loop = asyncio.get_running_loop()
            waits = loop.create_future()
            real, client._socket = client._socket, Mock(send=lambda *_, **__: waits)
            assert not client._send_now(memoryview(b"x"))
            client._socket = real
            assert waits.cancelled()

    asyncio.run(work())
