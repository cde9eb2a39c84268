"""One client against a scripted node that speaks the real protocol and then misbehaves."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.asyncio
from faults import asking
from faults.nodes import Act, FaultyNode

from edge_common.errors import OffloadError, PlacementError
from edge_common.memory_limits import MemoryLimits
from edge_runtime.config import Node
from edge_runtime.exposure.ledger import ExposureLedger
from edge_runtime.exposure.placement import place
from edge_runtime.offload import connection as client_module
from edge_runtime.offload.connection import Connection, NodeError, NodeRefusedError, Reply
from engines.bundle import Bundle
from transport.allow_list import AllowList
from transport.auth import Authenticator
from transport.keys import generate
from transport.link import LinkEvent
from transport.messages import (
    NO_ID,
    VERSIONS,
    Accepted,
    Cancel,
    Info,
    InfoRequest,
    Request,
    Result,
    StageInfo,
    VersionsSpoken,
    decode_header,
    encode,
    new_id,
    refuse,
    stage_limits,
)
from transport.sockets import server

WINDOWS = [0, 4]
Say = Callable[..., Awaitable[None]]
Behaviour = Callable[[Request, Say], Awaitable[None]]


def tokens(n: int = 2) -> dict[str, np.ndarray]:
    return {"tokens": np.arange(n * 16 * 8, dtype=np.float32).reshape(n, 16, 8)}


def feeds(bundle: Bundle) -> dict[str, np.ndarray]:
    w = bundle.geometry.window_pixels
    return {
        "pixels": np.zeros((2, w, w, 3), np.uint8),
        "extent": np.full((2, 2), w, np.int64),
        "window": np.array(WINDOWS),
    }


def ledger() -> ExposureLedger:
    """A ledger that grants everything to the only node."""
    return ExposureLedger(place([1] * 9, range(9), 3, ["alpha"], 1.0, bytes(32), b""))


class Case:
    """A client connected to a scripted node, in one event loop."""

    def __init__(self, client: Connection, bundle: Bundle) -> None:
        self.client = client
        self.bundle = bundle
        self.requests: list[Request] = []
        self.cancelled: list[bytes] = []
        self.infos = 0
        self.serves = [bundle.stage("stack").sha256]
        self.informing = asyncio.Event()  # whether the node answers InfoRequest
        self.informing.set()

    async def infer(self, seconds: float = 20.0) -> Reply:
        until = asyncio.get_running_loop().time() + seconds
        self.permit = ledger().reserve("alpha", WINDOWS)
        return await self.client.infer(feeds(self.bundle), self.permit, until)

    async def up(self) -> None:
        """Wait for the connection, which may take long on a busy machine."""
        while self.client.link is None or self.client.link.state != "up":
            await asyncio.sleep(0.01)


@asynccontextmanager
async def connected(folder: Path, bundle_path: Path, behaviour: Behaviour) -> AsyncIterator[Case]:
    bundle = Bundle.load(bundle_path)
    stage = bundle.stage("stack")
    limits = stage_limits(stage.inputs, stage.outputs, bundle.geometry.windows)
    node_key, edge_key = generate(folder / "node", "node"), generate(folder / "authorized", "edge")
    ctx = zmq.asyncio.Context()
    authenticator = Authenticator(ctx, AllowList(folder / "authorized"))
    authenticator.start()
    router: Any = server(ctx, "tcp://127.0.0.1:0", node_key, limits)
    endpoint = router.last_endpoint.decode()
    client = Connection(ctx, Node("alpha", endpoint, node_key.public, edge_key), stage, limits)
    case = Case(client, bundle)

    async def serve() -> None:
        while True:
            peer, frame = await router.recv_multipart()
            request = decode_header(frame)

            async def say(
                message: Any,
                arrays: Any = None,
                raw: list[bytes] | None = None,
                seal: bytes = getattr(request, "seal", b""),
                peer: bytes = peer,
            ) -> None:
                frames = raw if raw is not None else [encode(message, arrays, seal)]
                await router.send_multipart([peer, *frames])

            if isinstance(request, InfoRequest):
                case.infos += 1
                await case.informing.wait()
                served = tuple(StageInfo(digest, "toy", (), ()) for digest in case.serves)
                await say(Info(request.id, VERSIONS, served, "node 1"))
                continue
            if isinstance(request, Cancel):
                case.cancelled.append(request.id)
                continue
            case.requests.append(request)  # type: ignore[arg-type]
            await behaviour(request, say)  # type: ignore[arg-type]

    serving = asyncio.create_task(serve())
    client.start()
    try:
        yield case
    finally:
        await client.close()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        router.close(linger=0)
        await authenticator.stop()
        ctx.destroy(linger=0)


async def honest(request: Request, say: Say) -> None:
    await say(Accepted(request.id))
    await asyncio.sleep(0.003)  # as long as the reply claims
    await say(Result(request.id, 1000, 2000), tokens())


@pytest.fixture
def run(tmp_path: Path, toy_bundle: Path) -> Callable[..., Any]:
    """Run ``work(case)`` against a node that follows ``behaviour``."""

    def run(behaviour: Behaviour, work: Callable[[Case], Awaitable[Any]]) -> Any:
        async def all_of_it() -> Any:
            async with connected(tmp_path, toy_bundle, behaviour) as case:
                return await work(case)

        # a fault must fail the test, not hang it
        return asyncio.run(asyncio.wait_for(all_of_it(), 90))

    return run


def test_a_result_carries_its_times_and_sizes(run: Callable[..., Any]) -> None:
    async def work(case: Case) -> Reply:
        reply = await case.infer()
        assert case.requests[0].stage == case.bundle.stage("stack").sha256
        assert 0 < case.requests[0].deadline_ms <= 20_000
        pixels = 2 * 16 * 16 * 3
        assert pixels < case.permit.bytes < pixels + 500
        return reply

    reply = run(honest, work)
    np.testing.assert_array_equal(reply.outputs["tokens"], tokens()["tokens"])
    assert (reply.queue_ms, reply.compute_ms) == (1.0, 2.0)
    assert reply.upload_ms > 0
    assert reply.download_ms >= 0
    size = tokens()["tokens"].nbytes
    assert size < reply.bytes_down < size + 500


def test_a_node_cannot_claim_more_time_than_has_passed(run: Callable[..., Any]) -> None:
    async def boaster(request: Request, say: Say) -> None:
        await say(Result(request.id, 86_400_000_000, 86_400_000_000), tokens())

    async def work(case: Case) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        reply = await case.infer()
        assert reply.queue_ms >= 0
        assert reply.download_ms >= 0
        assert reply.queue_ms + reply.compute_ms <= (loop.time() - begun) * 1000

    run(boaster, work)


def test_a_node_that_sends_a_message_of_several_frames_is_quarantined(
    run: Callable[..., Any],
) -> None:
    async def many(request: Request, say: Say) -> None:
        await say(None, raw=[b""] * 1000)

    async def work(case: Case) -> None:
        with pytest.raises(OffloadError, match="message of 1000 frames"):
            await case.infer(seconds=60)
        with pytest.raises(OffloadError, match="in quarantine"):
            await case.infer(seconds=60)

    run(many, work)


def test_a_result_sealed_with_another_key_is_refused(run: Callable[..., Any]) -> None:
    async def wrong(request: Request, say: Say) -> None:
        await say(result(request), tokens(), seal=bytes(32))

    async def work(case: Case) -> None:
        with pytest.raises(OffloadError, match="not sealed with its request's key"):
            await case.infer(seconds=60)

    run(wrong, work)


def test_two_requests_at_once_get_their_own_answers(run: Callable[..., Any]) -> None:
    waiting: list[tuple[Request, Say]] = []

    async def backwards(request: Request, say: Say) -> None:
        waiting.append((request, say))
        if len(waiting) == 2:
            for number, (earlier, answer) in reversed(list(enumerate(waiting))):
                outputs = {"tokens": tokens()["tokens"] + number}
                await answer(Result(earlier.id, 0, 0), outputs)

    async def work(case: Case) -> None:
        first = asyncio.create_task(case.infer())
        await asyncio.sleep(0)
        second = asyncio.create_task(case.infer())
        offset = (await second).outputs["tokens"] - (await first).outputs["tokens"]
        assert abs(offset).min() == abs(offset).max() == 1

    run(backwards, work)


def test_unexpected_and_duplicate_messages_are_ignored_and_counted(run: Callable[..., Any]) -> None:
    async def noisy(request: Request, say: Say) -> None:
        await say(Accepted(new_id()))
        await say(Result(new_id(), 0, 0), tokens())
        await say(Result(request.id, 0, 0), tokens())
        await say(Result(request.id, 0, 0), {"tokens": -tokens()["tokens"]})

    async def work(case: Case) -> None:
        for count in (1, 2):
            reply = await case.infer()
            np.testing.assert_array_equal(reply.outputs["tokens"], tokens()["tokens"])
            while case.client.strays < 3 * count:
                await asyncio.sleep(0.01)
            assert case.client.strays == 3 * count

    run(noisy, work)


NAN = {"tokens": np.full((2, 16, 8), np.nan, np.float32)}


def answering(message: Callable[[Request], Any], arrays: Any = None) -> Behaviour:
    async def behaviour(request: Request, say: Say) -> None:
        await say(message(request), arrays)

    return behaviour


async def garbage(request: Request, say: Say) -> None:
    await say(None, raw=[b"\x80\x04garbage" + b"\x00" * 100])


async def short_frame(request: Request, say: Say) -> None:
    await say(None, raw=[bytes(encode(Result(request.id, 0, 0), tokens(), request.seal))[:-4]])


def result(request: Request) -> Result:
    return Result(request.id, 0, 0)


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        (answering(result, NAN), "not finite"),
        (answering(result, tokens(3)), r"\[3, 16, 8\]; expected float32 \[2, 16, 8\]"),
        (answering(result, {"other": np.ones(2, np.float32)}), "returned tensors other"),
        (answering(result), "returned tensors none"),
        (garbage, "not an edge-runtime message"),
        (short_frame, "its header describes"),
        (answering(lambda r: refuse(r.id, "engine", "it broke")), r"refused \(engine\): it broke"),
        (answering(lambda r: refuse(NO_ID, "malformed", "what?")), r"refused \(malformed\)"),
        (answering(lambda r: VersionsSpoken((9,))), "versions 9: update the older side"),
        (answering(lambda r: Info(r.id, VERSIONS, (), "x")), "answered with Info"),
    ],
)
def test_invalid_results_fail_at_once_and_name_the_node(
    behaviour: Behaviour, says: str, run: Callable[..., Any]
) -> None:
    async def work(case: Case) -> None:
        with pytest.raises(OffloadError, match=says) as caught:
            await case.infer(seconds=60)
        assert str(caught.value).startswith(f"node alpha ({case.client.node.endpoint}): ")

    run(behaviour, work)


async def silence(request: Request, say: Say) -> None:
    pass


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        (silence, "no answer within .* frozen"),
        (answering(lambda r: Accepted(r.id)), "no result within .* overloaded"),
    ],
)
def test_a_silent_node_fails_at_the_deadline(
    behaviour: Behaviour, says: str, run: Callable[..., Any]
) -> None:
    async def work(case: Case) -> None:
        await case.up()
        with pytest.raises(OffloadError, match=says):
            await case.infer(seconds=1.5)
        assert case.client._pending == {}
        assert case.permit.state == "committed"  # the node may have seen the windows

    run(behaviour, work)


def test_a_result_after_the_deadline_counts_as_unexpected(run: Callable[..., Any]) -> None:
    late: list[Callable[[], Awaitable[None]]] = []

    async def slow(request: Request, say: Say) -> None:
        if not late:
            late.append(lambda: say(result(request), {"tokens": -tokens()["tokens"]}))
        else:
            await late[0]()
            await say(result(request), tokens())

    async def work(case: Case) -> None:
        await case.up()
        with pytest.raises(OffloadError, match="no answer"):
            await case.infer(seconds=1.5)
        reply = await case.infer()
        np.testing.assert_array_equal(reply.outputs["tokens"], tokens()["tokens"])
        assert case.client.strays == 1

    run(slow, work)


def test_a_defect_in_handling_a_message_fails_the_request_not_the_reader(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Connection._handle, []

    def defective(self: Connection, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("odd")
        real(self, *arguments)

    monkeypatch.setattr(Connection, "_handle", defective)

    async def work(case: Case) -> None:
        with pytest.raises(OffloadError, match=r"could not be read \(ValueError\)"):
            await case.infer(seconds=60)
        await case.infer()

    run(answering(result, tokens()), work)


def test_a_flood_of_messages_does_not_block_the_loop(toy_bundle: Path, tmp_path: Path) -> None:
    async def work() -> int:
        stage = Bundle.load(toy_bundle).stage("stack")
        limits = stage_limits(stage.inputs, stage.outputs, 9)
        keypair = generate(tmp_path, "edge")
        node = Node("alpha", "tcp://127.0.0.1:1", keypair.public, keypair)
        ctx = zmq.asyncio.Context()
        client = Connection(ctx, node, stage, limits)
        plain = zmq.Context.shadow(ctx.underlying).socket(zmq.PAIR)
        plain.bind("inproc://flood")
        client._socket = ctx.socket(zmq.PAIR)
        client._socket.connect("inproc://flood")
        for _ in range(1000):
            plain.send(encode(Accepted(new_id())))
        reading = asyncio.create_task(client._read())
        while not client.strays:
            await asyncio.sleep(0)
        first = client.strays
        while client.strays < 1000:
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        plain.close()
        ctx.destroy(linger=0)
        return first

    assert asyncio.run(work()) < 10


def test_an_unreachable_node_costs_no_exposure(toy_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(toy_bundle)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    keypair = generate(tmp_path, "edge")

    async def work() -> None:
        ctx, stage = zmq.asyncio.Context(), bundle.stage("stack")
        limits = stage_limits(stage.inputs, stage.outputs, 9)
        client = Connection(ctx, Node("alpha", endpoint, keypair.public, keypair), stage, limits)
        client.start()
        try:
            book = ledger()
            until = asyncio.get_running_loop().time() + 60
            with pytest.raises(NodeError) as caught:
                await client.infer(feeds(bundle), book.reserve("alpha", WINDOWS), until)
            assert (caught.value.code, caught.value.node) == ("unreachable", "alpha")
            assert caught.value.reason.startswith("unreachable: ")
            assert book.exposure() == {"alpha": 0}
            assert [entry.event for entry in book.entries] == ["reserved", "released"]
        finally:
            await client.close()
            ctx.destroy(linger=0)

    asyncio.run(work())


@pytest.mark.parametrize(
    ("act", "code"),
    [
        ("close_mid", "connection_lost"),
        ("stall", "late"),
        ("refuse", "refused"),
        ("nan", "wrong_answer"),
        ("honest", None),
    ],
)
def test_a_node_that_received_bytes_counts_as_having_seen_the_windows(
    toy_bundle: Path, tmp_path: Path, act: Any, code: str | None
) -> None:
    bundle = Bundle.load(toy_bundle)

    async def work(node: FaultyNode) -> None:
        async with asking.connected(node.node(node.authorise()), bundle) as client:
            book = ExposureLedger(place([1] * 9, range(9), 3, [client.name], 1.0, bytes(32), b""))
            permit = book.reserve(client.name, WINDOWS)
            until = asyncio.get_running_loop().time() + (2 if act == "stall" else 60)
            asked = client.infer(feeds(bundle), permit, until)
            (answer,) = await asyncio.gather(asked, return_exceptions=True)
            assert getattr(answer, "code", None) == code
            assert book.seen(client.name) == set(WINDOWS)
            assert book.exposure()[client.name] == pytest.approx(2 / 9)
            assert book.bytes_sent(client.name) > 2 * 16 * 16 * 3

    with FaultyNode(bundle, tmp_path, Act(act), wire="raw") as node:
        asyncio.run(asyncio.wait_for(work(node), 120))


def test_a_cancelled_waiting_send_shows_nothing(run: Callable[..., Any]) -> None:
    """pyzmq keeps a message that libzmq does not take yet. Once cancelled, it is never sent."""

    class Full:
        def __init__(self, real: Any) -> None:
            self.real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def send(self, *_: Any, **__: Any) -> Any:
            return asyncio.get_running_loop().create_future()

    async def work(case: Case) -> None:
        await case.infer()
        client = case.client
        client._socket, real = Full(client._socket), client._socket
        with pytest.raises(NodeError, match="no answer"):
            await case.infer(seconds=0.3)
        client._socket = real
        assert case.permit.state == "released"
        assert (len(case.requests), client.cancelled) == (1, 0)

    run(honest, work)


def test_the_node_s_deadline_is_the_time_left_after_connecting(run: Callable[..., Any]) -> None:
    async def work(case: Case) -> None:
        case.informing.clear()
        task = asyncio.create_task(case.infer(seconds=60))
        await asyncio.sleep(0.5)
        case.informing.set()
        await task
        assert 0 < case.requests[0].deadline_ms <= 59_600

    run(honest, work)


def test_a_client_in_quarantine_does_not_start(toy_bundle: Path, tmp_path: Path) -> None:
    stage = Bundle.load(toy_bundle).stage("stack")
    limits = stage_limits(stage.inputs, stage.outputs, 9)
    keypair = generate(tmp_path, "edge")
    node = Node("alpha", "tcp://127.0.0.1:1", keypair.public, keypair)

    async def work() -> None:
        ctx = zmq.asyncio.Context()
        client = Connection(ctx, node, stage, limits)
        client.quarantine = "it sent without end"
        client.start()
        assert (client._tasks, client._socket) == ([], None)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        with pytest.raises(NodeError) as caught:
            await client.info(asyncio.get_running_loop().time() + 60)
        assert caught.value.code == "quarantined"
        ctx.destroy(linger=0)

    asyncio.run(work())


def test_nothing_is_sent_without_the_right_permit(run: Callable[..., Any]) -> None:
    async def work(case: Case) -> None:
        until = asyncio.get_running_loop().time() + 20
        permit = ledger().reserve("alpha", [1, 2])
        with pytest.raises(PlacementError, match="no permit"):
            await case.client.infer(feeds(case.bundle), permit, until)
        assert permit.state == "reserved"  # it is still valid for windows 1 and 2
        permit = ledger().reserve("alpha", WINDOWS)
        await case.client.infer(feeds(case.bundle), permit, until)
        with pytest.raises(PlacementError, match="no permit"):
            await case.client.infer(feeds(case.bundle), permit, until)
        assert len(case.requests) == 1

    run(honest, work)


def test_cancelling_a_request_leaves_the_connection_usable(run: Callable[..., Any]) -> None:
    async def on_second(request: Request, say: Say) -> None:
        if len(seen) < 5:
            seen.append(request)
        else:
            await say(result(request), tokens())

    seen: list[Request] = []

    async def work(case: Case) -> None:
        for steps in range(5):
            task = asyncio.create_task(case.infer())
            while len(seen) < steps + 1:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert case.client._pending == {}
        await case.infer()

    run(on_second, work)


def test_closing_ends_running_requests(run: Callable[..., Any]) -> None:
    async def work(case: Case) -> None:
        task = asyncio.create_task(case.infer())
        while not case.requests:
            await asyncio.sleep(0.01)
        await case.client.close()
        with pytest.raises(OffloadError, match="closed"):
            await task

    run(silence, work)


def test_info_gives_the_served_stage_and_the_round_trip(run: Callable[..., Any]) -> None:
    async def work(case: Case) -> None:
        until = asyncio.get_running_loop().time() + 20
        info, round_trip = await case.client.info(until)
        assert info.stages[0].label == "toy"
        assert 0 < round_trip < 20_000

    run(honest, work)


def test_a_node_is_asked_what_it_serves_once_per_connection(run: Callable[..., Any]) -> None:
    async def work(case: Case) -> None:
        for connection in (1, 2):
            await asyncio.gather(case.infer(), case.infer())
            await case.infer()
            assert case.infos == connection
            await case.client.close()
            case.client.start()

    run(honest, work)


@pytest.mark.parametrize("serves", [[], ["0" * 64, "1" * 64]])
def test_a_node_with_another_bundle_is_sent_no_windows(
    run: Callable[..., Any], serves: list[str]
) -> None:
    async def work(case: Case) -> None:
        case.serves = serves
        ours = case.bundle.stage("stack").sha256[:12]
        theirs = r"toy \(stack 000000000000\)" if serves else "nothing"
        for _ in range(2):
            with pytest.raises(OffloadError, match=rf"serves {theirs}.*this edge has stack {ours}"):
                await case.infer(seconds=60)
            assert case.permit.state == "released"
        assert (case.requests, case.infos) == ([], 1)

    run(honest, work)


def test_a_node_that_does_not_answer_info_is_sent_no_windows(
    run: Callable[..., Any],
) -> None:
    async def work(case: Case) -> None:
        case.informing.clear()
        await case.up()
        with pytest.raises(OffloadError, match=r"not said .* what it serves"):
            await case.infer(seconds=0.5)
        assert (case.requests, case.permit.state) == ([], "released")
        case.informing.set()
        await case.infer()  # the client asks again

    run(honest, work)


def read_no_more(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(*arguments: Any) -> None:
        monkeypatch.undo()
        raise ValueError("odd")

    monkeypatch.setattr(case.client._connections, "received", defective)


def meter_no_more(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(now: float) -> list[Any]:
        monkeypatch.undo()
        raise ValueError("odd")

    monkeypatch.setattr(case.client._connections, "check", defective)


def cancelled(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises CancelledError, like a library that cancels a future the task awaits."""
    case.client._tasks[0].cancel()


@pytest.mark.parametrize("defect", [read_no_more, meter_no_more, cancelled])
def test_a_dead_task_fails_the_running_requests_and_is_replaced(
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    defect: Callable[[Case, pytest.MonkeyPatch], None],
) -> None:
    cases: list[Case] = []

    async def behaviour(request: Request, say: Say) -> None:
        if len(cases[0].requests) == 1:
            defect(cases[0], monkeypatch)
            await say(Accepted(request.id))
        else:
            await honest(request, say)

    async def work(case: Case) -> None:
        cases.append(case)
        with pytest.raises(OffloadError, match=r"defect of edge-runtime.*not the node's"):
            await case.infer(seconds=3600)
        reply = await case.infer()
        np.testing.assert_array_equal(reply.outputs["tokens"], tokens()["tokens"])
        assert case.infos == 2  # on a new connection

    run(behaviour, work)
    (told,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert "connection to node alpha" in told.message
    assert defect is cancelled or "ValueError: odd" in caplog.text


def test_rebuilding_is_tried_again(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_socket(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        raise zmq.ZMQError(errno.EMFILE)

    async def work(case: Case) -> None:
        await case.infer()
        monkeypatch.setattr(client_module, "client", no_socket)
        cancelled(case, monkeypatch)
        while case.client.link and case.client.link.state == "up":
            await asyncio.sleep(0)
        await case.infer()

    run(honest, work)
    assert "could not be rebuilt yet" in caplog.text


def test_closing_ends_the_reconnection_too(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(case: Case) -> None:
        await case.infer()
        before = asyncio.all_tasks()
        cancelled(case, monkeypatch)
        while case.client.link and case.client.link.state == "up":
            await asyncio.sleep(0)
        await case.client.close()
        assert asyncio.all_tasks() < before
        with pytest.raises(OffloadError):
            await case.infer(seconds=0.5)
        case.client.start()
        await case.infer()

    run(honest, work)


def test_an_outage_has_one_grace_period_even_if_its_reason_changes(run: Callable[..., Any]) -> None:
    async def work(case: Case) -> None:
        await case.infer()
        loop = asyncio.get_running_loop()
        far = loop.time() + 3600
        case.client._turn(LinkEvent("down", "lost"))
        limit = case.client._patience(far)
        assert loop.time() < limit < far
        await asyncio.sleep(0.01)
        case.client._turn(LinkEvent("unreachable", "gone"))
        assert case.client._patience(far) == limit
        assert case.client._patience(limit - 1) == limit - 1
        case.client._turn(LinkEvent("up", "back"))
        await asyncio.sleep(0.01)
        case.client._turn(LinkEvent("down", "lost again"))
        assert case.client._patience(far) > limit

    run(honest, work)


def cancels(case: Case, count: int) -> Callable[[], Awaitable[None]]:
    async def wait() -> None:
        while len(case.cancelled) < count:
            await asyncio.sleep(0.01)

    return wait


def test_an_abandoned_request_is_cancelled_on_the_node(run: Callable[..., Any]) -> None:
    async def work(case: Case) -> None:
        await case.up()
        with pytest.raises(OffloadError, match="no answer"):
            await case.infer(seconds=1.0)
        await cancels(case, 1)()
        task = asyncio.create_task(case.infer())
        while len(case.requests) < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await cancels(case, 2)()
        assert case.cancelled == [request.id for request in case.requests]
        assert case.client.cancelled == 2

    run(silence, work)


def test_an_answered_request_is_not_cancelled(run: Callable[..., Any]) -> None:
    async def work(case: Case) -> None:
        await case.infer()
        with pytest.raises(OffloadError):
            await case.infer()
        assert case.client.cancelled == 0

    async def once(request: Request, say: Say) -> None:
        if not done:
            done.append(request)
            await honest(request, say)
        else:
            await say(refuse(request.id, "engine", "it broke"))

    done: list[Request] = []
    run(once, work)


def test_a_refusal_carries_code_and_hint(run: Callable[..., Any]) -> None:
    async def work(case: Case) -> None:
        with pytest.raises(NodeRefusedError, match=r"refused \(overloaded\): busy") as caught:
            await case.infer()
        assert (caught.value.code, caught.value.refusal) == ("refused", "overloaded")
        assert caught.value.retry_ms == 250

    run(answering(lambda r: refuse(r.id, "overloaded", "busy", 250)), work)


MIB = 1 << 20


def resident() -> int:
    held = MemoryLimits(group="").resident()
    assert held
    return held


@pytest.mark.skipif(sys.platform != "linux", reason="metering is by Linux's TCP_INFO")
def test_a_node_that_floods_the_edge_is_quarantined_for_good(
    toy_bundle: Path, tmp_path: Path
) -> None:
    bundle = Bundle.load(toy_bundle)
    before = resident()

    async def scene(node: FaultyNode, other: FaultyNode) -> None:
        ctx = zmq.asyncio.Context()
        bad, good = (
            Connection(ctx, each.node(each.authorise()), each.stage, each.limits)
            for each in (node, other)
        )
        for client in (bad, good):
            client.start()

        async def ask(client: Connection) -> Reply:
            until = asyncio.get_running_loop().time() + 60
            placement = place([1] * 9, range(9), 3, [client.name], 1.0, bytes(32), b"")
            permit = ExposureLedger(placement).reserve(client.name, WINDOWS)
            return await client.infer(feeds(bundle), permit, until)

        try:
            await ask(good)
            with pytest.raises(OffloadError, match="without ending a message"):
                await ask(bad)
            assert bad.quarantine
            assert resident() < before + 128 * MIB
            asked, connections = node.requests, node.connections
            for _ in range(3):
                with pytest.raises(OffloadError, match="quarantine"):
                    await ask(bad)
                with pytest.raises(OffloadError, match="quarantine"):
                    await bad.info(asyncio.get_running_loop().time() + 60)
                await ask(good)
            bad.start()  # starting it again does not help
            with pytest.raises(OffloadError, match="quarantine"):
                await ask(bad)
            assert (node.requests, node.connections) == (asked, connections)
            assert good.quarantine is None
        finally:
            for client in (bad, good):
                await client.close()
            ctx.destroy(linger=0)

    endless = Act("endless", size=1 << 30)
    with (
        FaultyNode(bundle, tmp_path / "bad", endless, wire="raw") as node,
        FaultyNode(bundle, tmp_path / "good", name="good", wire="raw") as other,
    ):
        asyncio.run(scene(node, other))


@pytest.mark.parametrize("wire", ["router", "raw"])
def test_a_node_of_another_version_is_sent_our_versions_once_per_connection(
    toy_bundle: Path, tmp_path: Path, wire: Any
) -> None:
    bundle = Bundle.load(toy_bundle)

    async def scene(node: FaultyNode) -> None:
        async with asking.connected(node.node(node.authorise()), bundle) as client:
            for connection in (1, 2):
                for _ in range(3):
                    with pytest.raises(OffloadError, match=r"version 254") as caught:
                        await asking.ask(client, feeds(bundle), 60)
                    assert caught.value.code == "wrong_version"
                    assert caught.value.mend == "update the older side"
                    # What it had been told before, it has read when it answers this.
                    await client.info(asyncio.get_running_loop().time() + 60)
                    assert node.told == connection
                await client.close()
                client.start()

    with FaultyNode(bundle, tmp_path, Act("version"), wire=wire) as node:
        asyncio.run(asyncio.wait_for(scene(node), 120))
        assert not node.did["garbage"]


def test_after_a_lost_link_the_node_is_sent_our_versions_again(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lost, again = client_module.watch, asyncio.Event(), asyncio.Event()

    async def watching(*arguments: Any, **options: Any) -> AsyncIterator[LinkEvent]:
        async for event in real(*arguments, **options):
            yield event
            if event.state == "up":
                await lost.wait()
                yield LinkEvent("down", "lost")
                yield event
                again.set()

    monkeypatch.setattr(client_module, "watch", watching)

    async def unknown(message: Any, say: Say) -> None:
        if isinstance(message, VersionsSpoken):
            told.append(message)
        else:
            await say(None, raw=[b"ERT\xfe" + bytes(20)])

    told: list[VersionsSpoken] = []

    async def work(case: Case) -> None:
        for count in (1, 2):
            for _ in range(2):
                with pytest.raises(OffloadError, match="version 254"):
                    await case.infer()
            while len(told) < count:
                await asyncio.sleep(0.01)
            lost.set()
            await again.wait()
        assert len(told) == 2

    run(unknown, work)


def test_a_closed_client_can_be_started_again(run: Callable[..., Any]) -> None:
    async def work(case: Case) -> None:
        await case.infer()
        await case.client.close()
        case.client.start()
        await case.infer()

    run(honest, work)
