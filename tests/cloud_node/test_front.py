"""A live node under stress: many clients, floods, cancelled requests, killed workers, hostile
edges.

Tests stop the worker process when they need a request that is certainly running or waiting.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import sodium
from faults.edges import FORGETFUL, HostileEdge
from faults.zmtp import Budget

from edge_common.errors import ProtocolError
from transport import messages
from transport.messages import (
    Accepted,
    Cancel,
    Info,
    InfoRequest,
    Refused,
    Result,
    decode_header,
    decode_tensors,
    encode,
)

Feeds = dict[str, np.ndarray]
needs_sodium = pytest.mark.skipif(sodium.MISSING is not None, reason=str(sodium.MISSING))


def until(what: Callable[[], Any]) -> Any:
    give_up = time.monotonic() + 60
    while not (found := what()):
        assert time.monotonic() < give_up
        time.sleep(0.01)
    return found


def kill_worker(node: Any, pid: int) -> None:
    """Kill the process and wait for its replacement."""
    before = node.logged().count("ready on")
    os.kill(pid, signal.SIGKILL)
    until(lambda: node.logged().count("ready on") > before)


def accepted(edge: Any, feeds: Feeds, **options: Any) -> bytes:
    sent: bytes = edge.request(feeds, **options)
    assert edge.receive()[0] == Accepted(sent)
    return sent


def computing(edge: Any, nine: Feeds) -> bytes:
    """Send a request that fills a batch and wait until the worker has it."""
    sent = accepted(edge, nine)
    for _ in range(3):  # each round takes several turns of the node's loop; handing over takes two
        ask_info(edge)
    return sent


def computed(node: Any, edge: Any) -> int:
    """The number of this edge's computed requests in the log. The node logs after the reply has
    left."""
    return len(re.findall(rf"\d windows for {edge.name}: queued", node.logged()))


def ask_info(edge: Any) -> None:
    edge.send(encode(InfoRequest(messages.new_id())))
    assert isinstance(edge.receive()[0], Info)


def same(node: Any, local: Any, feeds: Feeds, outputs: Any) -> bool:
    return bool(outputs["tokens"].tobytes() == local(node, feeds)["tokens"].tobytes())


def some(feeds: Feeds, count: int, seed: int) -> Feeds:
    """`count` windows of other pixels."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, *feeds["pixels"].shape[1:]), dtype=np.uint8)
    return {"pixels": pixels, "extent": np.full((count, 2), 8), "window": np.arange(count)}


@pytest.fixture
def shared(node: Any) -> Any:
    """The node that most tests share, with an empty log."""
    node.forget_log()
    return node


@pytest.fixture
def mine(start_node: Any) -> Iterator[Any]:
    """A node for this test alone."""
    node = start_node()
    yield node
    node.end(signal.SIGKILL)


@pytest.mark.process
def test_requests_that_waited_are_computed_together(
    shared: Any, connect: Any, feeds: Feeds, local: Any
) -> None:
    edges = [connect(shared) for _ in range(3)]
    work = [some(feeds, count, count) for count in (2, 3, 4)]
    with shared.stopped():
        first = computing(edges[0], some(feeds, 9, 0))
        sent = [accepted(edge, fed) for edge, fed in zip(edges, work, strict=True)]
    assert first in edges[0].replies([first], final=True)
    for edge, fed, id in zip(edges, work, sent, strict=True):
        message, outputs = edge.receive()
        assert isinstance(message, Result)
        assert message.id == id
        assert same(shared, local, fed, outputs)
    until(lambda: shared.logged().count("in a batch of 9") == 4)


@pytest.mark.process
def test_a_modest_client_does_not_wait_behind_a_flooder(
    shared: Any, connect: Any, five: Feeds
) -> None:
    flooder, modest = connect(shared), connect(shared)
    ask_info(modest)
    with shared.stopped():
        flood = [flooder.request(five) for _ in range(40)]
        first = flooder.replies(flood, final=False)
        let_in = [id for id in flood if isinstance(first[id], Accepted)]
        assert len(let_in) == 16
        sent = accepted(modest, five)
    answer, _ = modest.receive()
    assert isinstance(answer, Result)
    assert answer.id == sent
    flooder.replies(let_in, final=True)

    def computed() -> list[str]:
        return re.findall(r"5 windows for (edge-\w+): queued", shared.logged())

    until(lambda: len(computed()) == 17)  # the node logs after the reply has left
    order = computed()
    # One batch was running and one more may come before the modest client's request.
    assert [order.count(name) for name in order].index(1) <= 2


@pytest.mark.process
def test_a_busy_node_answers_what_costs_nothing(shared: Any, connect: Any, five: Feeds) -> None:
    edge, other = connect(shared), connect(shared)
    with shared.stopped():
        sent = [accepted(edge, five) for _ in range(16)]
        ask_info(edge)
        refused = edge.ask(five)
        assert isinstance(refused, Refused)
        assert refused.code == "overloaded"
        assert refused.retry_ms > 0
        duplicate = messages.Request(sent[3], shared.stage.sha256, 60_000, messages.new_seal())
        edge.send(encode(duplicate, five))
        message, _ = edge.receive()
        assert isinstance(message, Refused)
        assert (message.id, message.code) == (sent[3], "duplicate")
        late = other.request(five, deadline_ms=30)
        assert other.receive()[0] == Accepted(late)
        # the node answers now: the request's turn in the queue never comes
        message, _ = other.receive()
        assert isinstance(message, Refused)
        assert (message.id, message.code) == (late, "deadline")
    replies = edge.replies(sent, final=True)
    assert {type(message) for message in replies.values()} == {Result}


@pytest.mark.process
def test_cancelled_requests_are_not_computed_or_not_answered(
    shared: Any, connect: Any, five: Feeds
) -> None:
    edge = connect(shared)
    with shared.stopped():
        running = computing(edge, some(five, 9, 0))
        waiting, last = accepted(edge, five), accepted(edge, five)
        for id in (running, waiting, messages.new_id()):
            edge.send(encode(Cancel(id)))
        ask_info(edge)  # the node has read all earlier messages
    message, _ = edge.receive()
    assert isinstance(message, Result)
    assert message.id == last
    assert not edge.socket.poll(300)
    until(lambda: computed(shared, edge) == 1)
    again = encode(
        messages.Request(waiting, shared.stage.sha256, 60_000, messages.new_seal()), five
    )
    edge.send(again)  # their ids are free again
    assert edge.receive()[0] == Accepted(waiting)
    assert isinstance(edge.receive(tensors=False)[0], Result)


@pytest.mark.process
def test_requests_of_an_ended_connection_are_not_computed(
    shared: Any, connect: Any, five: Feeds
) -> None:
    left, other = connect(shared), connect(shared)
    with shared.stopped():
        computing(left, some(five, 9, 0))
        accepted(left, five)
        sent = accepted(other, five)
        left.socket.close(linger=0)
        until(lambda: "has ended with 1 waiting requests" in shared.logged())
    message, _ = other.receive()
    assert isinstance(message, Result)
    assert message.id == sent
    until(lambda: computed(shared, other) == 1)
    assert computed(shared, left) == 0


@pytest.mark.process
def test_requests_of_another_connection_of_the_same_edge_are_computed(
    shared: Any, connect: Any, five: Feeds
) -> None:
    """An edge may run several processes; the end of one is not the end of the others."""
    pair = shared.authorise("two-processes")
    left, other = connect(shared, pair), connect(shared, pair)
    with shared.stopped():
        computing(left, some(five, 9, 0))
        accepted(left, five)
        sent = accepted(other, five)
        left.socket.close(linger=0)
        until(lambda: "a connection of two-processes has ended with" in shared.logged())
    assert isinstance(other.replies([sent], final=True)[sent], Result)


@pytest.mark.process
def test_a_bad_request_fails_alone_in_a_shared_batch(
    start_node: Any, connect: Any, local: Any
) -> None:
    node = start_node("broken")
    edges = [connect(node) for _ in range(3)]
    good = {
        "pixels": np.zeros((1, 8, 8, 3), np.uint8),
        "extent": np.full((1, 2), 8),
        "window": np.array([0]),
    }
    bad = {**good, "window": np.array([8])}  # legal, but the graph's table is one row short
    with node.stopped():
        before = computing(edges[0], {name: np.repeat(a, 9, 0) for name, a in good.items()})
        sent = [accepted(edge, fed) for edge, fed in zip(edges, (good, bad, good), strict=True)]
    assert isinstance(edges[0].replies([before], final=True)[before], Result)
    message, outputs = edges[0].receive()
    assert isinstance(message, Result)
    assert same(node, local, good, outputs)
    message, _ = edges[1].receive()
    assert isinstance(message, Refused)
    assert (message.id, message.code, message.retry_ms) == (sent[1], "engine", 0)
    message, outputs = edges[2].receive()
    assert isinstance(message, Result)
    assert same(node, local, good, outputs)
    until(lambda: "a batch of 3 requests failed" in node.logged())


@pytest.mark.process
def test_a_killed_worker_costs_only_the_requests_it_was_running(
    mine: Any, connect: Any, feeds: Feeds, local: Any
) -> None:
    edge, other = connect(mine), connect(mine)
    lost, kept = some(feeds, 9, 0), some(feeds, 9, 1)
    for _ in range(2):
        with mine.stopped() as pid:
            running, waiting = computing(edge, lost), accepted(other, kept)
            kill_worker(mine, pid)
        message, _ = edge.receive()
        assert isinstance(message, Refused)
        assert (message.id, message.code) == (running, "worker_died")
        assert message.retry_ms > 0
        message, outputs = other.receive()
        assert isinstance(message, Result)
        assert message.id == waiting
        assert same(mine, local, kept, outputs)
        assert same(mine, local, lost, edge.ask(lost))  # this success clears it of suspicion


@pytest.mark.process
def test_a_request_that_killed_two_workers_is_refused_for_good(
    mine: Any, connect: Any, feeds: Feeds, local: Any
) -> None:
    edge, other = connect(mine), connect(mine)
    nine = some(feeds, 9, 0)
    for code in ("worker_died", "engine"):
        with mine.stopped() as pid:
            running = computing(edge, nine)
            kill_worker(mine, pid)
        refused = edge.replies([running], final=True)[running]
        assert isinstance(refused, Refused)
        assert refused.code == code
    assert refused.retry_ms == 0
    assert edge.ask(nine).code == "engine"
    for asking, fed in ((edge, some(feeds, 9, 1)), (other, nine)):
        assert same(mine, local, fed, asking.ask(fed))


@pytest.mark.process
def test_revoked_edges_lose_their_connection_their_place_and_their_replies(
    shared: Any, connect: Any, five: Feeds, local: Any
) -> None:
    revoked, other = connect(shared, shared.authorise("mallory")), connect(shared)
    with shared.stopped():
        computing(revoked, some(five, 9, 0))
        accepted(revoked, five)
        sent = accepted(other, five)
        (shared.allowed / "mallory.pub").unlink()
        until(lambda: "no longer authorised: mallory" in shared.logged())
    message, outputs = other.receive()
    assert isinstance(message, Result)
    assert message.id == sent
    assert same(shared, local, five, outputs)
    assert not revoked.socket.poll(500)
    assert "windows for mallory" not in shared.logged()


@pytest.mark.process
def test_sixteen_clients_get_their_own_answers(shared: Any, connect: Any, local: Any) -> None:
    edges = [connect(shared) for _ in range(16)]
    rng = np.random.default_rng(0)
    asked: list[dict[bytes, Feeds]] = [{} for _ in edges]
    base = {"pixels": np.zeros((1, 8, 8, 3), np.uint8)}
    for turn in range(8):
        for number, edge in enumerate(edges):
            fed = some(base, int(rng.integers(1, 10)), 100 * turn + number)
            asked[number][edge.request(fed)] = fed
    for edge, sent in zip(edges, asked, strict=True):
        while sent:
            message, outputs = edge.receive()
            if not isinstance(message, Accepted):
                assert isinstance(message, Result), message
                assert same(shared, local, sent.pop(message.id), outputs)


@pytest.mark.process
def test_a_stop_ends_within_the_drain_limit(start_node: Any, connect: Any, five: Feeds) -> None:
    node = start_node("pixels", "--drain-s", "1")
    edge = connect(node)
    with node.stopped():  # no request will ever finish
        sent = [accepted(edge, five) for _ in range(3)]
        node.term()
        replies = edge.replies(sent, final=True)
        assert {getattr(message, "code", "") for message in replies.values()} == {"shutdown"}
        assert node.process.wait(timeout=60) == 0


# -- hostile edges -----------------------------------------------------------------------------


def hostile(node: Any, name: str) -> HostileEdge:
    pair = node.authorise(name)
    return HostileEdge(node.endpoint, str(node.ready["public_key"]), pair, node.stage.sha256)


@pytest.mark.process
@needs_sodium
def test_an_edge_that_never_reads_does_not_disturb_others(
    mine: Any, connect: Any, five: Feeds, local: Any
) -> None:
    edge = connect(mine)
    ask_info(edge)

    async def work() -> int:
        attack = hostile(mine, "deaf").never_read(five, budget=Budget(count=3000, seconds=20))
        attacking = asyncio.create_task(attack)
        asked = 0
        while not attacking.done():
            assert same(mine, local, five, await asyncio.to_thread(edge.ask, five))
            asked += 1
        return asked + (await attacking).messages

    assert asyncio.run(work()) > 100


@pytest.mark.process
@needs_sodium
def test_an_edge_that_takes_another_ones_routing_id_cannot_read_its_results(
    start_node: Any, connect: Any, feeds: Feeds, local: Any
) -> None:
    """Even if the node notices nothing and sends all of them."""
    node = start_node(program=[sys.executable, "-c", FORGETFUL])
    victim, thief = hostile(node, "victim"), hostile(node, "thief")
    other = connect(node)
    expected = local(node, feeds)["tokens"]

    async def work() -> list[bytes]:
        await asyncio.sleep(0.5)  # the node has read the new keys
        thefts = []
        stolen: list[bytes] = []
        for attempt in range(10):  # on a busy machine the thief may come too late each time
            with node.stopped():
                for number in range(20 * attempt, 20 * attempt + 20):
                    thefts.append(asyncio.create_task(victim.stolen_by(thief, feeds, number)))
                    await asyncio.sleep(0.03)
            await asyncio.to_thread(other.ask, feeds)
            stolen += [frame for found in await asyncio.gather(*thefts) for frame in found]
            thefts.clear()
            if stolen:
                break
        return stolen

    stolen = asyncio.run(asyncio.wait_for(work(), 120))
    assert stolen
    for frame in stolen:
        message = decode_header(frame)
        assert isinstance(message, Result)
        for seal in other.seals.values():
            with pytest.raises(ProtocolError, match="not sealed"):
                decode_tensors(message, frame, node.limits.result, seal)
        for window in expected:
            assert window.tobytes()[:16] not in frame


@pytest.mark.process
@needs_sodium
def test_a_message_of_many_frames_closes_the_connection(
    mine: Any, connect: Any, five: Feeds, local: Any
) -> None:
    edge, attacker = connect(mine), hostile(mine, "frames")

    async def work() -> None:
        peer = await attacker.connect()
        await peer.send_message([b""] * 1000)
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(peer.read_message(), 30)
        await peer.close()

    asyncio.run(work())
    until(lambda: "several frames" in mine.logged())
    assert same(mine, local, five, edge.ask(five))


@pytest.mark.process
def test_refused_requests_do_not_fill_the_log(shared: Any, connect: Any, five: Feeds) -> None:
    edge = connect(shared)
    bad = {**five, "window": five["window"] * 0 - 1}
    for _ in range(500):
        refused = edge.ask(bad)
        assert refused.code == "invalid"
    assert shared.logged().count("(invalid)") < 20


_UNMETERED = """
import sys
from transport.dos_protection import tcp
tcp.AVAILABLE = False  # as where the kernel doesn't tell
from cloud_node import server
server.Server._ceiling = lambda self: self._held() + (64 << 20)
from cloud_node.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.process
@needs_sodium
def test_a_node_that_holds_too_much_drops_all_connections_and_goes_on(
    start_node: Any, connect: Any, five: Feeds, local: Any
) -> None:
    node = start_node(program=[sys.executable, "-c", _UNMETERED])
    edge = connect(node)
    assert same(node, local, five, edge.ask(five))
    before = _resident(node.process.pid)
    attack = hostile(node, "endless").endless_multipart(
        five, part_bytes=1000, budget=Budget(bytes=400 << 20, seconds=30)
    )
    tally = asyncio.run(attack)
    assert tally.sent > 16 << 20
    until(lambda: "bound anew" in node.logged())
    # A bare socket gives up for good if the drop meets its handshake. The product's edges reconnect
    # (`link.watch`, and the row "endless multipart").
    assert same(node, local, five, connect(node).ask(five))
    assert node.process.poll() is None
    assert _resident(node.process.pid) < before + (64 << 20)


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
