"""Attacks by authenticated peers, and floods of half-open connections, on a real process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import zmq
from echo_node import ENVIRONMENT, LIMITS, EchoNode, Honest
from faults import zmtp
from faults.zmtp import Budget

from transport import sockets
from transport.dos_protection import connection_limits

MIB = 1 << 20

linux = pytest.mark.skipif(sys.platform != "linux", reason="bytes are counted by Linux's TCP_INFO")

FLOOD = """
import asyncio, resource
from faults.zmtp import Budget, half_open
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
asyncio.run(half_open({}, hold_s=120, budget=Budget(count=2000, seconds=120)))
"""


@pytest.mark.process
@linux
@pytest.mark.parametrize("part", [MIB, 64])
def test_an_endless_message_ends_its_sender_s_connection(
    start: Callable[..., EchoNode], behave: Callable[..., Honest], part: int
) -> None:
    node = start()
    honest = behave(node)
    honest.more(1)
    honest.more(20)
    before = node.stats()

    async def attack() -> zmtp.Tally:
        peer = await node.peer(node.authorise("hostile"))
        budget = Budget(bytes=1 << 30, count=10**7, seconds=60)
        async with peer:
            return await zmtp.endless_multipart(peer, part_bytes=part, budget=budget)

    tally = asyncio.run(attack())
    assert tally.closed == 1, "the connection was not closed"
    stats = node.wait_for(lambda s: s["dropped"].get("endless"))
    most = connection_limits(LIMITS.request, LIMITS.result, backlog=sockets.BACKLOG)
    allowed = most.undelivered
    assert allowed < 30 * MIB
    # a busy machine may accept this much between two checks
    assert tally.sent < allowed + 256 * MIB
    honest.more(20)
    after = node.wait_for(lambda s: s["connections"] == 1)
    # The allocator may keep freed memory. Small frames take twice their size on the wire.
    assert after["rss"] < before["rss"] + 3 * allowed
    assert stats["dropped"] == {"endless": 1}
    assert "without ending a message" in node.log
    honest.close()


@pytest.mark.process
@linux
def test_without_byte_accounting_the_same_attack_fills_the_memory(
    start: Callable[..., EchoNode],
) -> None:
    """Otherwise the test before this one would prove nothing."""
    node = start(metered=False)
    before = node.stats()["rss"]

    async def attack() -> None:
        async with await node.peer(node.authorise("hostile")) as peer:
            tally = await zmtp.endless_multipart(
                peer, part_bytes=MIB, budget=Budget(bytes=256 * MIB, seconds=60)
            )
            assert not tally.closed
            node.wait_for(lambda s: s["rss"] > before + 200 * MIB)

    asyncio.run(attack())


@pytest.mark.process
@linux
def test_a_connection_that_breaks_with_a_full_inbox_stops_nothing(
    start: Callable[..., EchoNode],
) -> None:
    """With a receive high-water mark, libzmq would abort at the next heartbeat."""
    node = start(deaf=True, limits={"undelivered": 1 << 30})
    mark = 4
    with zmq.Context() as ctx:
        pair = node.authorise("hostile")
        client = sockets.client(ctx, node.endpoint, node.key.public, pair, LIMITS)
        client.sndtimeo = 30_000
        for _ in range(mark + 2):
            client.send(bytes(3 * MIB))
        node.wait_for(lambda s: s["held"] > (mark - 1) * 3 * MIB)
        client.close()
    time.sleep(3.5)  # long enough for some heartbeats
    node.stats()


FROZEN = """
import json, sys, time, zmq
from echo_node import LIMITS
from transport import sockets
from transport.keys import KeyPair
endpoint, key, public, secret = json.loads(sys.argv[1])
client = sockets.client(zmq.Context(), endpoint, key, KeyPair("edge", public, secret), LIMITS)
client.send(b"1 10")
client.recv()
print(flush=True)
time.sleep(60)
"""


@pytest.mark.process
@linux
def test_an_edge_that_freezes_loses_its_connection(start: Callable[..., EchoNode]) -> None:
    node = start()
    pair = node.authorise("edge")
    told = json.dumps([node.endpoint, node.key.public, pair.public, pair.secret])
    folder = os.path.dirname(__file__)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}{os.pathsep}{folder}"}
    with subprocess.Popen(
        [sys.executable, "-c", FROZEN, told], stdout=subprocess.PIPE, env=environment
    ) as edge:
        try:
            assert edge.stdout
            assert edge.stdout.readline() == b"\n"
            time.sleep(1.5)  # long enough for a heartbeat
            assert node.stats()["connections"] == 1
            edge.send_signal(signal.SIGSTOP)
            node.wait_for(lambda s: s["connections"] == 0)
        finally:
            edge.kill()


@pytest.mark.process
@linux
def test_many_endless_messages_together_are_bounded(
    start: Callable[..., EchoNode], behave: Callable[..., Honest]
) -> None:
    node = start(limits={"total": 64 * MIB})
    honest = behave(node)
    honest.more(1)
    hostile = node.authorise("hostile")

    async def attack() -> list[zmtp.Tally]:
        peers = [await node.peer(hostile) for _ in range(8)]
        budget = Budget(bytes=20 * MIB, seconds=60)  # each alone is within its limit
        tallies = await asyncio.gather(
            *(zmtp.endless_multipart(peer, part_bytes=MIB // 2, budget=budget) for peer in peers)
        )
        node.wait_for(lambda s: s["dropped"].get("total", 0) >= 4)
        honest.more(10)
        for peer in peers:
            await peer.close()
        return list(tallies)

    asyncio.run(attack())
    assert set(node.stats()["dropped"]) == {"total"}
    assert "all connections together" in node.log
    honest.close()


@pytest.mark.process
@linux
def test_a_peer_that_does_not_read_loses_its_connection(
    start: Callable[..., EchoNode], behave: Callable[..., Honest]
) -> None:
    node = start()
    honest = behave(node)
    honest.more(1)
    honest.more(5)

    async def attack() -> None:
        peer = await node.peer(node.authorise("hostile"), receive_buffer=4096)
        async with peer:
            give_up = time.monotonic() + 60
            with contextlib.suppress(OSError):
                while time.monotonic() < give_up:
                    await peer.send_message([b"4 1000000"])
                    await asyncio.sleep(0.02)
                pytest.fail("the connection was not closed")

    asyncio.run(attack())
    stats = node.wait_for(lambda s: s["dropped"].get("slow"))
    assert stats["peak"] < 64 * MIB
    assert "does not read its replies" in node.log
    honest.more(10)
    honest.close()


@pytest.mark.process
@linux
def test_a_peer_that_stops_reading_is_dropped_in_time(
    start: Callable[..., EchoNode], behave: Callable[..., Honest]
) -> None:
    node = start(limits={"stall_s": 1.0})
    honest = behave(node)
    honest.more(1)

    async def attack() -> None:
        peer = await node.peer(node.authorise("hostile"), receive_buffer=4096)
        async with peer:
            await peer.send_message([b"8 1000000"])  # within all limits, but never read
            while not node.stats()["dropped"].get("slow"):
                await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(attack(), 60))
    honest.more(10)
    honest.close()


@pytest.mark.process
@linux
def test_a_flood_of_half_open_connections_locks_out_no_edge(
    start: Callable[..., EchoNode],
) -> None:
    node = start(files=1024)
    pair = node.authorise("honest")

    def ask() -> None:
        with zmq.Context() as ctx:
            client = sockets.client(ctx, node.endpoint, node.key.public, pair, LIMITS)
            client.rcvtimeo, client.sndtimeo = 5_000, 60_000
            for _ in range(12):  # a closed connection loses its messages
                client.send(b"1 1000")
                with contextlib.suppress(zmq.Again):
                    client.recv()
                    break
            else:
                pytest.fail("no edge was served within a minute")
            client.close()

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 4096:
        pytest.skip(f"a flood needs 2000 descriptors of its own; the limit is {hard}")
    flood = subprocess.Popen([sys.executable, "-c", FLOOD.format(node.address)], env=ENVIRONMENT)
    try:
        node.wait_for(lambda s: s["dropped"].get("crowd", 0) >= 2000)
        for _ in range(3):
            ask()
            assert flood.poll() is None, "the flood ended before any edge was served"
    finally:
        flood.kill()
        flood.wait()
    node.wait_for(lambda s: s["connections"] == 0)


@pytest.mark.process
@linux
def test_an_honest_edge_is_not_charged(
    start: Callable[..., EchoNode], behave: Callable[..., Honest]
) -> None:
    """After hundreds of messages, the counted bytes agree with the delivered ones."""
    node = start()
    honest = behave(node)
    honest.more(1)
    honest.more(300)
    stats = node.stats()
    assert not stats["dropped"]
    assert stats["peak"] < 16 * MIB
    honest.close()
    node.wait_for(lambda s: s["connections"] == 0 and s["held"] == 0)


@pytest.mark.process
@linux
def test_the_connections_of_one_key_are_limited(
    start: Callable[..., EchoNode], behave: Callable[..., Honest]
) -> None:
    node = start()
    honest = behave(node)
    honest.more(1)
    pair = node.authorise("many")

    async def scene() -> None:
        peers = [await node.peer(pair) for _ in range(70)]  # none of them sends anything
        node.wait_for(lambda s: s["dropped"].get("crowd", 0) >= 6 and s["connections"] == 1 + 64)
        for peer in peers[-64:]:
            await peer.send_message([b"1 10"])
            assert await asyncio.wait_for(peer.read_message(), 60)
        for _ in range(6):
            peers.append(await node.peer(pair))
            await peers[-1].send_message([b"1 10"])
        node.wait_for(lambda s: s["dropped"].get("crowd", 0) >= 12 and s["connections"] == 1 + 64)
        for peer in peers:
            await peer.close()

    asyncio.run(asyncio.wait_for(scene(), 120))
    assert node.stats()["dropped"] == {"crowd": 12}
    honest.more(10)
    honest.close()
