"""Raw peers against real libzmq: the handshakes are correct, and every attack arrives."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio

from engines.bundle import Bundle
from faults import sodium, zmtp
from faults.edges import HostileEdge, info_request
from faults.nodes import FaultyNode, NodeProcess
from faults.processes import sample
from faults.zmtp import Budget, Curve, Peer, PeerError
from transport.messages import Info

pytestmark = pytest.mark.skipif(sodium.MISSING is not None, reason=str(sodium.MISSING))


def alive(hostile: HostileEdge) -> None:
    """Check that a legitimate client gets an answer."""
    assert isinstance(asyncio.run(hostile.answer_to(info_request())), Info)


def test_boxes_open_only_with_the_right_key_and_unaltered() -> None:
    (mine, my_secret), (theirs, their_secret) = sodium.keypair(), sodium.keypair()
    key = sodium.shared(theirs, my_secret)
    sealed = sodium.box(b"window", bytes(24), key)
    assert sodium.unbox(sealed, bytes(24), sodium.shared(mine, their_secret)) == b"window"
    for bad in (sealed[:-1], bytes([sealed[0] ^ 1]) + sealed[1:], b""):
        with pytest.raises(ValueError, match=r"authentic|shorter"):
            sodium.unbox(bad, bytes(24), key)


def test_frames_have_the_requested_fields() -> None:
    assert zmtp.frame(b"ab", more=True) == b"\x01\x02ab"
    assert zmtp.frame(b"", command=True, declared=1 << 63) == b"\x06" + struct.pack(">Q", 1 << 63)
    assert zmtp.frame(bytes(300))[:9] == b"\x02" + struct.pack(">Q", 300)
    assert len(zmtp.greeting("PLAIN")) == zmtp.GREETING_BYTES
    assert zmtp.ping(0x1234, b"c") == b"\x04PING\x12\x34c"


def test_broken_openings_follow_from_the_seed() -> None:
    data = zmtp.greeting()
    kinds = set()
    for number in range(200):
        once, again = (zmtp.mutate(random.Random(number), data) for _ in range(2))
        assert once == again
        keys = Curve.throwaway(Curve.throwaway().public)
        kind, writes = zmtp.broken_opening(random.Random(number), keys)
        assert kind == zmtp.broken_opening(random.Random(number), keys)[0]
        assert writes
        kinds.add(kind)
    assert len(kinds) == 10


@pytest.mark.process
@pytest.mark.parametrize("keys", ["good", "unknown", "wrong server"])
def test_a_curve_client_is_admitted_only_with_the_right_keys(
    keys: str, hostile: HostileEdge, victim: NodeProcess
) -> None:
    used = {
        "good": hostile.keys,
        "unknown": Curve.throwaway(victim.keypair.public),
        "wrong server": Curve(hostile.keys.public, hostile.keys.secret, hostile.keys.public),
    }[keys]

    async def work() -> None:
        async with await Peer.connect(hostile.address) as peer:
            await peer.curve_client(used)
            await peer.send_message(info_request())
            assert (await peer.read_message())[0][:3] == b"ERT"

    if keys == "good":
        asyncio.run(work())
    else:
        with pytest.raises(PeerError, match="400" if keys == "unknown" else "refused"):
            asyncio.run(work())


@pytest.mark.process
@pytest.mark.parametrize("mechanism", ["NULL", "PLAIN"])
def test_other_mechanisms_are_refused(mechanism: Any, hostile: HostileEdge) -> None:
    async def work() -> bool:
        async with await Peer.connect(hostile.address) as peer:
            try:
                await peer.greet(mechanism)
            except asyncio.IncompleteReadError:
                return True
            data = zmtp.command(b"READY", zmtp.metadata())
            await peer.send(zmtp.frame(data, command=True))
            return await peer.wait_closed(5)

    assert asyncio.run(work())


def test_null_peers_talk_to_a_null_socket() -> None:
    async def work() -> None:
        with zmq.asyncio.Context() as ctx, ctx.socket(zmq.ROUTER) as router:
            port = router.bind_to_random_port("tcp://127.0.0.1")
            async with await Peer.connect(("127.0.0.1", port)) as peer:
                await peer.greet("NULL")
                ready = zmtp.command(b"READY", zmtp.metadata())
                await peer.send(zmtp.frame(ready, command=True))
                await peer.send_message([b"a", bytes(1000)])
                assert (await router.recv_multipart())[1:] == [b"a", bytes(1000)]
                # The node returns the heartbeat's context.
                await peer.read_frame()
                await peer.send_part(zmtp.ping(100, b"context"), is_command=True)
                assert await peer.read_frame() == (zmtp.COMMAND, b"\x04PONGcontext")

    asyncio.run(work())


@pytest.mark.process
def test_broken_openings_reach_the_victim(victim: NodeProcess, hostile: HostileEdge) -> None:
    budget = Budget(count=200, seconds=10)
    key = victim.keypair.public
    tally = asyncio.run(
        zmtp.broken_openings(hostile.address, key, seed=1, linger_s=0.02, budget=budget)
    )
    assert (tally.messages, tally.connections, sum(tally.notes.values())) == (200, 200, 200)
    assert tally.closed > 50
    alive(hostile)


@pytest.mark.process
def test_the_reaction_to_commands_out_of_order_is_recorded(
    victim: NodeProcess, hostile: HostileEdge
) -> None:
    tally = asyncio.run(zmtp.wrong_order(hostile.address, victim.keypair.public, wait_s=0.3))
    assert tally.messages == sum(tally.notes.values()) == 13
    assert tally.notes["closed initiate first"] == tally.notes["closed hello twice"] == 1
    alive(hostile)


@pytest.mark.process
def test_half_open_and_slow_connections_are_held(victim: NodeProcess, hostile: HostileEdge) -> None:
    before = sample(victim.pid).fds

    async def work() -> tuple[zmtp.Tally, int]:
        held = asyncio.gather(
            zmtp.half_open(hostile.address, hold_s=0.6, budget=Budget(count=60)),
            zmtp.slow_loris(hostile.address, every_s=0.05, budget=Budget(count=20, seconds=0.6)),
        )
        most = 0
        while not held.done():
            most = max(most, sample(victim.pid).fds - before)
            await asyncio.sleep(0.02)
        total = zmtp.Tally()
        for tally in await held:
            total.add(tally)
        return total, most

    tally, most = asyncio.run(work())
    assert tally.connections == 80
    assert most >= 80
    assert tally.sent > 20
    alive(hostile)


@pytest.mark.process
def test_giant_frames_before_authentication_are_cut(hostile: HostileEdge) -> None:
    tally = asyncio.run(zmtp.giant_frames(hostile.address, budget=Budget(count=20)))
    assert tally.connections == tally.closed == 20
    alive(hostile)


@pytest.mark.process
def test_an_endless_message_reaches_the_node_and_is_cut_off(bundle: Bundle, tmp_path: Path) -> None:
    """``tests/transport`` shows that the message would fill a node without byte accounting."""
    size = 48 << 20
    with NodeProcess(Path(bundle.path), tmp_path / "node") as victim:
        pair, stage = victim.authorise(), bundle.stage("stack").sha256
        hostile = HostileEdge(victim.endpoint, victim.keypair.public, pair, stage)

        async def work() -> tuple[zmtp.Tally, int]:
            async with await hostile.connect() as peer:
                before = sample(victim.pid).rss
                tally = await zmtp.endless_multipart(
                    peer, part_bytes=8192, budget=Budget(bytes=size, seconds=20)
                )
                return tally, sample(victim.pid).rss - before

        tally, grown = asyncio.run(asyncio.wait_for(work(), 30))
        assert tally.closed == 1
        assert 8192 < tally.sent < size
        assert grown < size // 2
        alive(hostile)


@pytest.mark.process
def test_giant_parts_and_heartbeats_after_the_handshake(hostile: HostileEdge) -> None:
    tally = asyncio.run(hostile.giant_part(declared=1 << 40))
    assert tally.closed == 1
    assert tally.sent < 8 << 20
    tally = asyncio.run(hostile.heartbeat_abuse(budget=Budget(count=500, seconds=5)))
    assert tally.messages == 500
    alive(hostile)


@pytest.mark.process
def test_attacks_end_with_their_budget(hostile: HostileEdge) -> None:
    async def work() -> zmtp.Tally:
        limits = {"bytes": 100_000, "count": 10, "seconds": 0.2}
        budgets = [Budget(**{name: value}) for name, value in limits.items()]  # type: ignore[arg-type]
        return await zmtp.in_parallel(
            hostile.endless_multipart(part_bytes=5000, budget=budget) for budget in budgets
        )

    tally = asyncio.run(asyncio.wait_for(work(), 10))
    assert tally.messages >= 10 + 19
    alive(hostile)


def test_a_victim_that_reads_nothing_holds_an_attack_only_for_its_time(
    faulty: Callable[..., FaultyNode],
) -> None:
    with faulty("never_read") as node:
        pair = node.authorise()
        hostile = HostileEdge(node.endpoint, node.keypair.public, pair, node.stage.sha256)

        async def work() -> zmtp.Tally:
            async with await hostile.connect() as peer:
                return await zmtp.endless_multipart(
                    peer, part_bytes=1000, budget=Budget(bytes=4 << 20, seconds=5)
                )

        assert asyncio.run(asyncio.wait_for(work(), 10)).sent > 0
