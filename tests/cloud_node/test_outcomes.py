"""Every admitted request has one outcome, whichever call raises on the way.

A `Server` runs in a thread with a real listener and real edges. The test plays the workers, so it
decides when and how a batch ends. `Fault` then makes each call of the server raise in turn.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest
import zmq
from node_metrics import nonzero, value

from cloud_node import listener, server
from cloud_node.config import NodeConfig, Prepared, prepare
from cloud_node.poison import PoisonTracker
from cloud_node.pool import OnEvent, Pool, PoolClosed, Slot, WorkerDied, WorkerEvent
from cloud_node.queue import Queue
from cloud_node.server import Server
from edge_common.errors import EngineError
from transport import keys, messages
from transport.messages import (
    NO_ID,
    Accepted,
    Cancel,
    Info,
    InfoRequest,
    Refused,
    Result,
    encode,
)

# If the call that makes a coroutine into a task raises, the coroutine is lost.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")

Feeds = dict[str, np.ndarray]
Ends = list[Exception | None]
_FILES = {module.__file__ for module in (server, listener)}


class Injected(Exception):
    """No program raises this error."""


class Fault:
    """Makes one call under `root` raise: the first one that is not in `tried`. A call that repeats
    counts `times`.

    Pass it to `sys.setprofile` in the thread that gets the fault. C functions count too.

    Attributes:
        at: the call. within: the function that made it.
    """

    def __init__(self, root: CodeType, tried: set[str], times: int = 1) -> None:
        self.at = self.within = ""
        self._root, self._tried, self._times = root, tried, times
        self._seen: collections.Counter[str] = collections.Counter()

    def __call__(self, frame: FrameType, event: str, what: Any) -> None:
        if event == "call":
            # Python itself calls weakref's functions. The test counts with prometheus_client's.
            if any(name in frame.f_code.co_filename for name in ("weakref", "prometheus_client")):
                return
            caller, name = frame.f_back, frame.f_code.co_name
        elif event == "c_call":
            caller, name = frame, what.__name__
        else:
            return
        if caller is None or caller.f_code.co_filename not in _FILES or not self._under(caller):
            return
        place = f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno} {name}"
        self._seen[place] += 1
        place = f"{place} #{min(self._times, self._seen[place])}"
        if place not in self._tried:
            self._tried.add(place)
            self.at, self.within = place, caller.f_code.co_name
            sys.setprofile(None)
            raise Injected(place)

    def _under(self, frame: FrameType | None) -> bool:
        while frame is not None and frame.f_code is not Server._on_frame_freed.__code__:
            if frame.f_code is self._root:
                return True
            frame = frame.f_back
        return False


class Worker(Pool):
    """One worker: its batches wait for `go` and end as `ends` says. None means success."""

    def __init__(self, prepared: Prepared) -> None:
        self.stage = prepared.stage
        self.max_batch, self.lanes = prepared.bundle.geometry.windows, 1
        self.ends: Ends = []
        self.out: set[Batch] = set()
        self.runs = 0
        self.computing = self.busy = self.closed = False

    ready = 1

    async def start(self, on_event: OnEvent) -> None:
        self.on_event = on_event
        self.go, self.idle = asyncio.Event(), asyncio.Event()
        self.idle.set()
        on_event(WorkerEvent("ready", 0, "cpu", 0))

    async def follow(self) -> None:
        await asyncio.Event().wait()

    async def acquire(self) -> Slot:
        await self.idle.wait()
        while self.busy and not self.closed:
            await asyncio.sleep(0.001)
        if self.closed:
            raise PoolClosed("closed")
        self.idle.clear()
        return Batch(self)

    async def close(self, drain_s: float) -> None:
        self.closed = True
        self.go.set()
        self.idle.set()


class Batch(Slot):
    def __init__(self, worker: Worker) -> None:
        super().__init__(_arrays(worker.stage.inputs, worker.max_batch))
        self.worker = worker
        self.outputs: Feeds = {}
        worker.out.add(self)

    async def run(self, n: int) -> Feeds:
        worker = self.worker
        worker.computing = True
        try:
            await worker.go.wait()
        finally:
            worker.computing = False
            worker.idle.set()
        if worker.closed:
            raise PoolClosed("closed")
        if error := (worker.ends.pop(0) if worker.ends else None):
            raise error
        self.compute_us = 10
        worker.runs += 1
        self.outputs = _arrays(worker.stage.outputs, n)
        for array in self.outputs.values():
            array.T[:] = np.arange(n)  # each row is its number
        return self.outputs

    def _recycle(self) -> None:
        for array in self.outputs.values():
            array[:] = 7  # the next batch writes to the same memory
        self.worker.out.discard(self)
        self.worker.idle.set()


def _arrays(specs: Any, rows: int) -> Feeds:
    return {s.name: np.zeros((rows, *map(int, s.shape[1:])), s.numpy_dtype) for s in specs}


class Running:
    """A server in a thread, with one edge.

    Attributes:
        error: the error that ended it.
        heard: messages to the edge since the last `attempt`.
    """

    def __init__(self, prepared: Prepared, connect: Callable[..., Any]) -> None:
        self.limits, self.stage = prepared.limits, prepared.stage
        self.error: BaseException | None = None
        self.heard: list[Any] = []
        self.fault = Fault(Server.run.__code__, set())
        self.worker = Worker(prepared)
        self.server = Server(prepared, self.worker)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        while self.server.metrics.state != "ready":
            time.sleep(0.001)
        self.endpoint = self.server._listener.endpoint
        self.ready = {"public_key": prepared.keypair.public}
        self._keys, self._connect = prepared.config.keys, connect
        self._rng = np.random.default_rng(0)
        self.edge, self.other = self.new_edge(), self.new_edge()

    def outcomes(self) -> float:
        """The number of requests that have ended."""
        return sum(nonzero(self.server.metrics, "requests_total").values())

    def _work(self) -> None:
        async def work() -> None:
            self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
            await self.server.run(self.stop)

        try:
            asyncio.run(work())
        except BaseException as error:
            self.error = error
        finally:
            sys.setprofile(None)

    def new_edge(self) -> Any:
        name = f"edge-{os.urandom(4).hex()}"
        pair = keys.generate(self._keys.parent / "edges", name)
        keys.write_public(self._keys / "authorized" / f"{name}.pub", pair.public, name)
        edge = self._connect(self, pair)
        edge.name = name
        edge.send(encode(InfoRequest(messages.new_id())))
        edge.receive()
        return edge

    def until(self, what: Callable[[], bool]) -> None:
        """Wait until `what()` is true or the server ends. The edge keeps reading, because unread
        messages are lost with its connection."""
        give_up = time.monotonic() + 20
        while not what() and self.thread.is_alive():
            assert time.monotonic() < give_up, (
                self.fault.at,
                self.server._open,
                self.worker.out,
                self.server._unread,
                self.heard,
            )
            self.hear(1)

    def hear(self, wait_ms: int) -> bool:
        if not self.edge.socket.poll(wait_ms):
            return False
        self.heard.append(self.edge.receive()[0])
        return True

    def told(self, *kinds: type) -> list[bytes]:
        return [message.id for message in self.heard if isinstance(message, kinds)]

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Call in the loop's thread and wait for the result."""
        done = threading.Event()

        def work() -> None:
            try:
                function(*args)
            finally:
                done.set()

        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(work)
            self.until(done.is_set)

    def arm(self) -> None:
        """Allow a fault from now on."""
        self.call(sys.setprofile, self.fault)

    def request(self, windows: int, edge: Any = None, **options: Any) -> bytes:
        """Use new pixels each time: the server recognises requests that killed workers."""
        pixels = self._rng.integers(0, 256, (windows, 8, 8, 3), dtype=np.uint8)
        extent = np.full((windows, 2), 8)
        feeds = {"pixels": pixels, "extent": extent, "window": np.arange(windows)}
        return bytes((edge or self.edge).request(feeds, **options))

    def accepted(self, *requests: bytes) -> list[bytes]:
        self.until(lambda: set(self.told(Accepted)) >= set(requests))
        return list(requests)

    def computing(self, *requests: bytes) -> list[bytes]:
        """Wait until these are accepted and one batch of them is with the worker."""
        self.accepted(*requests)
        self.until(lambda: self.worker.computing)
        return list(requests)

    def ask_info(self) -> None:
        """The answer means that the server read all earlier messages and the edge all earlier
        replies."""
        asked = messages.new_id()
        self.until(lambda: bool(self.edge.socket.poll(0, zmq.POLLOUT)))
        if self.thread.is_alive():
            self.edge.send(encode(InfoRequest(asked)))
        self.until(lambda: asked in self.told(Info))

    def make_late(self) -> None:
        """Let the deadlines of all requests pass."""

        def work() -> None:
            queue = self.server._queue
            for job in self.server._open:
                job.due = 0.0
            queue._deadlines = [(0.0, number) for number in queue._jobs]

        self.call(work)

    def settle(self, sent: Sequence[bytes] = ()) -> None:
        """Let the worker go on and wait until the edge has read every reply: those to `sent` and
        any others."""
        self.call(self.worker.go.set)
        self.until(lambda: not self.server._open)
        self.call(sys.setprofile, None)
        self.until(lambda: not self.worker.out and not self.server._unread)
        self.ask_info()
        if self.server._broken.done():
            self.thread.join(30)
        while not self.thread.is_alive():
            missing = {*sent} - {*self.told(Result, Refused)}
            if not self.hear(5000 if missing else 10):
                return

    def end(self) -> None:
        """Drain, with a limit of 60 s. It takes much less."""
        with contextlib.suppress(RuntimeError):  # the server has ended
            self.loop.call_soon_threadsafe(self.worker.go.set)
            self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(30)
        assert not self.thread.is_alive(), "the drain uses its whole limit"


@pytest.fixture
def start(
    tmp_path: Path, bundle_of: Callable[[str], Path], connect: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], Running]]:
    folder = tmp_path / "keys"
    keys.generate(folder, "node")
    keys.make_directory(folder / "authorized")
    config = NodeConfig(
        bundle=bundle_of("pixels"),
        bind="tcp://127.0.0.1:0",
        keys=folder,
        drain_s=60,
        max_wait_ms=10_000,  # a batch forms when it is full, not earlier
        memory_ceiling=1 << 40,  # a limit on this whole process
        queue_bytes=6 * (5 * 216 + 4096),  # six requests of five windows
    )
    made: list[Running] = []
    logging.disable()  # logged tracebacks would keep results alive
    monkeypatch.setattr(server, "_FLUSH_S", 0.1)
    monkeypatch.setattr(server, "_TICK_S", 0.01)

    def start() -> Running:
        made.append(Running(prepare(config), connect))
        return made[-1]

    yield start
    for running in made:
        running.end()


class Act(NamedTuple):
    """Something that a server goes through under `root`. `do` returns the ids of requests that get
    one reply each, and how many more there were."""

    root: Callable[..., Any]
    do: Callable[[Running], tuple[list[bytes], int]]


def batch(*ends: Exception | None, sizes: Sequence[int] = (2, 3, 4)) -> Act:
    """A batch that ends as given. The next ones succeed."""

    def do(running: Running) -> tuple[list[bytes], int]:
        running.worker.ends = list(ends)
        sent = running.computing(*(running.request(windows) for windows in sizes))
        running.arm()
        return sent, 0

    return Act(Server._run, do)


def cancelled(running: Running) -> tuple[list[bytes], int]:
    first, second, third = running.computing(*(running.request(windows) for windows in (2, 3, 4)))
    running.edge.send(encode(Cancel(second)))
    running.ask_info()
    running.arm()
    return [first, third], 1


def dispatched(running: Running) -> tuple[list[bytes], int]:
    running.arm()
    return running.accepted(*(running.request(windows) for windows in (2, 3, 4))), 0


def handled(running: Running) -> tuple[list[bytes], int]:
    running.arm()
    running.call(running.worker.go.set)
    sent = running.request(9)
    running.until(lambda: {sent, NO_ID} & {*running.told(Result, Refused)})
    return [NO_ID if NO_ID in running.told(Refused) else sent], 0


def shed(running: Running) -> tuple[list[bytes], int]:
    """One edge's requests are shed for another edge's request."""
    while running.other.socket.poll(0):
        running.other.receive()
    sent = running.computing(running.request(9))
    sent += running.accepted(*(running.request(5) for _ in range(6)))
    running.arm()
    running.request(5, running.other)
    running.until(lambda: bool(running.fault.at or running.other.socket.poll(0)))
    return sent, 1


def expired(running: Running) -> tuple[list[bytes], int]:
    sent = running.computing(running.request(9))
    late = running.accepted(*(running.request(2) for _ in range(3)))
    running.arm()
    running.make_late()
    running.until(lambda: set(running.told(Refused)) >= set(late))
    return sent + late, 0


def expired_again(running: Running) -> tuple[list[bytes], int]:
    """A batch is due to run again, but no worker takes it."""
    running.worker.ends = [WorkerDied("no", began=False)]
    late = running.computing(*(running.request(windows) for windows in (2, 3, 4)))
    running.worker.busy = True
    running.call(running.worker.go.set)
    running.until(lambda: bool(running.server._retries))
    running.arm()
    running.make_late()
    running.until(lambda: set(running.told(Refused)) >= set(late))
    running.worker.busy = False
    return late, 0


def worker_event(running: Running) -> tuple[list[bytes], int]:
    sent = running.computing(running.request(9))
    running.arm()
    for kind in ("died", "ready"):
        with contextlib.suppress(Injected):  # pools do the same
            running.call(running.worker.on_event, WorkerEvent(kind, 0, "cpu", 1))  # type: ignore[arg-type]
    running.until(lambda: running.server.metrics.state == "ready")
    return sent, 0


def left(running: Running) -> tuple[list[bytes], int]:
    leaver = running.new_edge()
    running.request(9, leaver)
    running.until(lambda: running.worker.computing)
    for _ in range(2):
        running.request(2, leaver)
    running.until(lambda: len(running.server._open) == 3)
    running.arm()
    leaver.socket.close()
    running.until(lambda: len(running.server._open) == 1)
    return [], 3


def revoked(running: Running) -> tuple[list[bytes], int]:
    outcast = running.new_edge()
    running.request(9, outcast)
    running.until(lambda: running.worker.computing)
    for _ in range(2):
        running.request(2, outcast)
    running.until(lambda: len(running.server._open) == 3)
    running.arm()
    (running._keys / "authorized" / f"{outcast.name}.pub").unlink()
    running.until(lambda: len(running.server._open) == 1)
    return [], 3


ACTS = {
    "computed": batch(),
    "one computed": batch(sizes=[9]),
    "failed": batch(EngineError("no")),
    "failed alone": batch(*[EngineError("no")] * 4),
    "one failed": batch(EngineError("no"), sizes=[9]),
    "died": batch(WorkerDied("no")),
    "one died": batch(WorkerDied("no"), sizes=[9]),
    "not begun": batch(WorkerDied("no", began=False)),
    "closed": batch(PoolClosed("no")),
    "one cancelled": Act(Server._run, cancelled),
    "dispatched": Act(Server._dispatch, dispatched),
    "handled": Act(Server._handle, handled),
    "shed": Act(Server._handle, shed),
    "expired": Act(Server._expire, expired),
    "expired again": Act(Server._expire, expired_again),
    "worker event": Act(Server._on_worker_event, worker_event),
    "left": Act(Server._on_connection_ended, left),
    "revoked": Act(Server._on_revoked, revoked),
}


@pytest.mark.parametrize("name", ACTS)
def test_each_request_has_one_outcome_whichever_call_raises(
    start: Callable[[], Running], name: str
) -> None:
    act, tried = ACTS[name], set[str]()
    running = start()
    while not tried or running.fault.at:
        if not running.thread.is_alive():
            running = start()
        running.fault = fault = Fault(act.root.__code__, tried, times=1 + (act.root is Server._run))
        counted = running.outcomes()
        running.heard.clear()
        running.call(running.worker.go.clear)
        sent, more = act.do(running)
        running.settle(sent)
        assert sorted(running.told(Result, Refused)) == sorted(sent), fault.at
        assert running.outcomes() - counted == len(sent) + more, fault.at
        if running.thread.is_alive():
            assert running.server._queue.running == len(running.server._queue) == 0, fault.at
            assert running.server._unread_total == 0, fault.at
            continue
        # The server can't go on and says so: the fault hit the very end of a batch.
        assert isinstance(running.error, (Injected, RuntimeError)), fault.at
        assert act.root is not Server._run or fault.within == "_run", fault.at
    assert len(tried) > 3


class Deaf(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        raise Injected("log")


BROKEN: dict[str, tuple[str, Any, str]] = {
    "sending": ("computed", listener.Listener, "send"),
    "encoding": ("computed", server, "encode"),
    "estimating": ("computed", Queue, "record_batch"),
    "logging results": ("computed", server.log, "filters"),
    "refusing": ("one failed", server, "refuse"),
    "logging failures": ("failed alone", server.log, "filters"),
    "suspecting": ("died", PoisonTracker, "died"),
    "logging deaths": ("died", server.log, "filters"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_permanent_defect_leaves_no_request_open(
    start: Callable[[], Running], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    running, (end, place, what) = start(), BROKEN[name]
    counted = running.outcomes()
    sent, _ = ACTS[end].do(running)

    def fail(*_: Any, **__: Any) -> Any:
        raise Injected(name)

    if what == "filters":
        logging.disable(logging.NOTSET)
    with monkeypatch.context() as patch:
        patch.setattr(place, what, [Deaf()] if what == "filters" else fail)
        running.call(running.worker.go.set)
        running.until(lambda: not running.server._open)
    logging.disable()
    running.settle()
    assert running.thread.is_alive()
    assert running.outcomes() - counted == len(sent)
    assert running.server._queue.running == 0
    told = running.told(Result, Refused)
    assert sorted(told) == (sorted(sent) if what not in ("send", "encode", "refuse") else [])


def test_a_request_also_expires_between_two_ticks(
    start: Callable[[], Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_TICK_S", 3600.0)
    running = start()
    running.worker.go.clear()
    first = running.request(9)
    running.computing(first)
    late = running.request(9, deadline_ms=50)
    running.accepted(late)
    due = max(job.due for job in running.server._open if job.id == late)
    running.until(lambda: running.loop.time() > due)
    running.settle([first, late])
    assert running.told(Result) == [first]
    assert [m.code for m in running.heard if isinstance(m, Refused)] == ["deadline"]
    assert running.worker.runs == 1


def test_a_batch_that_waited_for_a_dead_worker_is_run_again(
    start: Callable[[], Running],
) -> None:
    running = start()
    running.worker.ends = [WorkerDied("no", began=False)]
    sent = [running.request(windows) for windows in (2, 3, 4)]
    running.settle(running.computing(*sent))
    assert sorted(running.told(Result)) == sorted(sent)
    assert not running.server._poison._deaths


def test_what_is_cancelled_before_it_is_run_again_is_not_computed(
    start: Callable[[], Running],
) -> None:
    running = start()
    running.worker.ends = [WorkerDied("no", began=False)]
    kept, gone = running.computing(running.request(4), running.request(5))
    running.worker.busy = True
    running.call(running.worker.go.set)
    running.until(lambda: bool(running.server._retries))
    running.edge.send(encode(Cancel(gone)))
    running.ask_info()
    running.worker.busy = False
    running.settle([kept])
    assert running.told(Result, Refused) == [kept]
    assert value(running.server.metrics, "windows_total") == 4


def test_a_request_gets_its_own_rows_although_another_one_of_its_batch_was_cancelled(
    start: Callable[[], Running],
) -> None:
    running = start()
    gone, kept = running.computing(running.request(4), running.request(5))
    running.edge.send(encode(Cancel(gone)))
    running.ask_info()
    running.loop.call_soon_threadsafe(running.worker.go.set)
    message, outputs = running.edge.receive()
    assert isinstance(message, Result)
    assert message.id == kept
    assert outputs["tokens"][:, 0, 0].tolist() == [4, 5, 6, 7, 8]


@pytest.mark.parametrize(("ready", "hint_ms"), [(0, 2500), (1, 100)])
def test_after_the_last_worker_died_the_hint_includes_the_start_of_the_next(
    start: Callable[[], Running], ready: int, hint_ms: int
) -> None:
    running = start()
    running.call(running.worker.on_event, WorkerEvent("ready", 0, "cpu", 0, seconds=2.0))
    running.worker.ends = [WorkerDied("no")]
    sent = running.computing(running.request(9))
    running.worker.ready = ready
    running.settle(sent)
    (refused,) = [message for message in running.heard if isinstance(message, Refused)]
    assert (refused.code, refused.retry_ms) == ("worker_died", hint_ms)


def test_replies_that_have_left_do_not_count_as_unread(
    start: Callable[[], Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEADER_BYTES", 0)  # as if replies were large
    running = start()
    running.settle(running.computing(running.request(9)))
    running.until(lambda: not running.server._unread_total)
    assert running.told(Result)


def test_requests_of_connections_that_a_rebind_ended_are_not_computed(
    start: Callable[[], Running],
) -> None:
    running = start()
    running.computing(running.request(9))
    running.accepted(running.request(9))
    rebind = running.server._rebind(0, "nothing")
    asyncio.run_coroutine_threadsafe(rebind, running.loop).result(30)
    running.call(running.worker.go.set)
    running.until(lambda: not running.server._open)
    assert nonzero(running.server.metrics, "requests_total") == {"lost": 2}
    assert running.worker.runs == 1


def test_requests_for_which_memory_is_too_little_now_are_refused(
    start: Callable[[], Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start()
    first = running.request(9)
    running.computing(first)
    waiting = running.accepted(*(running.request(5) for _ in range(4)))
    memory = running.server._memory
    smaller = dataclasses.replace(memory.budget, queue=2 * (5 * 216 + 4096))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "budget", smaller)
        patch.setattr(memory, "update", lambda: True)
        running.until(lambda: len(running.told(Refused)) == 2)
    running.settle([first, *waiting])
    assert running.told(Refused) == waiting[:2], "the oldest"
    assert {m.code for m in running.heard if isinstance(m, Refused)} == {"overloaded"}
    assert sorted(running.told(Result)) == sorted([first, *waiting[2:]])
    assert running.thread.is_alive()


def test_a_client_with_a_failed_request_shares_no_batch_for_a_while(
    start: Callable[[], Running],
) -> None:
    running = start()
    running.worker.ends = [EngineError("no")]
    failed = running.request(9)
    running.settle(running.computing(failed))
    assert running.told(Refused) == [failed]
    running.call(running.worker.go.clear)
    sent = running.computing(*(running.request(windows) for windows in (2, 3, 4)))
    running.settle(sent)
    assert running.worker.runs == 3


def test_without_a_worker_only_requests_with_enough_time_are_admitted(
    start: Callable[[], Running],
) -> None:
    running = start()
    running.worker.ready = 0
    died = WorkerEvent("died", 0, "cpu", 1, seconds=30.0)
    running.call(running.worker.on_event, died)
    late, patient = running.request(9, deadline_ms=5000), running.request(9)
    running.accepted(patient)
    (refused,) = [message for message in running.heard if isinstance(message, Refused)]
    assert (refused.id, refused.code, refused.retry_ms) == (late, "overloaded", 10_000)
    running.worker.ready = 1
    running.call(running.worker.on_event, WorkerEvent("ready", 0, "cpu", 1, seconds=0.1))
    running.accepted(running.request(9, deadline_ms=5000))
    running.call(running.worker.go.set)


def test_a_node_that_is_short_of_memory_admits_nothing(
    start: Callable[[], Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start()
    with monkeypatch.context() as patch:
        patch.setattr(running.server._memory, "scarce", lambda: True)
        sent = running.request(9)
        running.until(lambda: sent in running.told(Refused))
    assert running.heard[-1].code == "overloaded"
    assert "short of memory" in running.heard[-1].message
    running.settle(running.accepted(running.request(9)))


def test_a_draining_node_waits_for_unsent_replies(
    start: Callable[[], Running],
) -> None:
    running = start()
    running.call(running.server._unread.update, {"a": 1000})
    running.call(running.stop.set)
    running.thread.join(0.5)
    assert running.thread.is_alive()
    running.call(running.server._on_frame_freed, "a", 1000)
    running.thread.join(30)
    assert not running.thread.is_alive()


def test_outputs_are_copied_into_the_reply_before_their_memory_is_reused(
    start: Callable[[], Running],
) -> None:
    running = start()
    running.worker.go.set()
    running.request(9)
    (accepted, _), (result, outputs) = running.edge.receive(), running.edge.receive()
    assert isinstance(accepted, Accepted)
    assert isinstance(result, Result)
    assert outputs["tokens"][:, 0, 0].tolist() == [*range(9)]
