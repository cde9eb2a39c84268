"""A client that is used for long, or hard: what it counts stays right, and it ends as it says."""

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


def test_an_honest_node_is_never_taken_for_an_endless_one(bundle: Bundle, tmp_path: Path) -> None:
    """What has been delivered does not add up to what was sent without end."""

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


def test_giving_up_while_others_wait_to_be_sent(bundle: Bundle, tmp_path: Path) -> None:
    """pyzmq lets even a message sent at once or not at all wait behind others: then it is not."""

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
