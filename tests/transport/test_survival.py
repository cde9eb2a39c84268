"""Peer behaviour that ends libzmq, and so the process, with an assertion unless its sockets have
the right options.

Each peer here does one thing that a hostile peer, or a flipped bit, can do after a valid handshake.
The process at the other end must then serve an honest peer, beyond its next heartbeats.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest
from echo_node import ENVIRONMENT, EchoNode, Honest
from faults.zmtp import Curve, Peer, command, frame

from transport.keys import KeyPair

pytestmark = pytest.mark.process

Spoil = Callable[[Peer], Awaitable[None]]
_HEARTBEAT_S = 1.5  # a server's heartbeat is due after one second
_MANY = 64


async def _flipped(peer: Peer) -> None:
    data = bytearray(peer.seal(b"1 10"))
    data[-1] ^= 1
    await peer.send(bytes(data))


async def _no_message(peer: Peer) -> None:
    await peer.send(frame(command(b"MESSAGE", b"x")))


async def _repeated(peer: Peer) -> None:
    data = peer.seal(b"1 10")
    await peer.send(data + data)


async def _burst(peer: Peer) -> None:
    """More messages than are read at once, with pings that must be answered."""
    ping = command(b"PING", b"\0\0")
    await peer.send(
        b"".join(peer.seal(b"1 10") + peer.seal(ping, is_command=True) for _ in range(_MANY))
    )


SPOILS = [_flipped, _no_message, _repeated, _burst]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_server_survives_a_damaged_connection(
    start: Callable[..., EchoNode], behave: Callable[..., Honest], spoil: Spoil
) -> None:
    node = start()
    pair = node.authorise("hostile")

    async def attack() -> None:
        for number in range(8):
            async with await node.peer(pair) as peer:
                # Separately, so that the server has nothing to report in between, or all at once.
                await asyncio.sleep(0.05 * (number % 2))
                await spoil(peer)
                await asyncio.sleep(0.05 * (number % 3))
                peer.abort()
        await asyncio.sleep(_HEARTBEAT_S)

    asyncio.run(attack())
    honest = behave(node)
    honest.more(1)
    honest.more(5)
    honest.close()


_EDGE = """
import asyncio, sys
import zmq.asyncio
from transport import link, sockets
from transport.dos_protection import Connections, connection_limits
from transport.keys import KeyPair
from transport.messages import Limits, StageLimits

some = Limits(1, 1 << 20)
endpoint, server_key, public, secret = sys.argv[1:]

async def main():
    ctx = zmq.asyncio.Context()
    pair, limits = KeyPair("edge", public, secret), StageLimits(some, some)
    socket = sockets.client(ctx, endpoint, server_key, pair, limits, connect=False)
    limits = connection_limits(some, some, backlog=sockets.BACKLOG)
    watching = link.watch(
        socket, endpoint, first_retry_s=0.05, connections=Connections(limits)
    )
    async for event in watching:
        print(event.state, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_client_survives_a_damaged_connection(
    spoil: Spoil, new_pair: Callable[[str], KeyPair]
) -> None:
    """It reconnects to the same server again and again, with heartbeats in between."""
    node, pair = new_pair("node"), new_pair("edge")

    async def serve() -> None:
        came: asyncio.Queue[Peer] = asyncio.Queue()

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = Peer(reader, writer)
            await peer.curve_server(Curve(node.public, node.secret, ""))
            came.put_nowait(peer)

        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        arguments = [f"tcp://{host}:{port}", node.public, pair.public, pair.secret]
        edge = subprocess.Popen(
            [sys.executable, "-c", _EDGE, *arguments],
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
        )
        try:
            for number in range(6):
                peer = await asyncio.wait_for(came.get(), 60)
                await asyncio.sleep(0.05)
                await spoil(peer)
                await asyncio.sleep(0.05 * (number % 3))
                peer.abort()
                await asyncio.sleep(_HEARTBEAT_S / 3)
            await asyncio.sleep(_HEARTBEAT_S)
            assert edge.poll() is None
        finally:
            edge.kill()
            edge.wait()
            server.close()

    asyncio.run(serve())
