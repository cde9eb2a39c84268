"""The worker process by itself, at the other end of its socket."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cloud_node import worker as worker_module
from cloud_node.shared_memory import Arena, Layout
from cloud_node.worker import Noop, WarmEngine
from cloud_node.worker_messages import (
    Closed,
    Done,
    Failed,
    FromWorker,
    Logged,
    Open,
    Ready,
    Run,
    RunFailed,
    ToWorker,
    decode_from_worker,
    encode,
)
from edge_common.children import Unpacker
from edge_common.children import pack as with_length
from edge_common.errors import EngineError
from engines.bundle import Bundle, TensorSpec
from engines.engine import check_out

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def pack(message: ToWorker | FromWorker) -> bytes:
    return with_length(encode(message))


@dataclass
class Peer:
    """The node's end of a worker's socket."""

    socket: socket.socket
    arena: Arena
    process: subprocess.Popen[bytes]
    out: Path
    logged: list[Logged] = field(default_factory=list)
    _unpacker: Unpacker = field(default_factory=Unpacker)
    _bodies: list[bytes] = field(default_factory=list)

    def send(self, message: ToWorker) -> None:
        self.socket.sendall(pack(message))

    def receive(self) -> Any:
        """The next message that is no log record; None at the end."""
        while True:
            while not self._bodies:
                try:
                    data = self.socket.recv(4096)
                except ConnectionResetError:
                    return None
                if not data:
                    return None
                self._bodies += self._unpacker.feed(data)
            message = decode_from_worker(self._bodies.pop(0))
            if not isinstance(message, Logged):
                return message
            self.logged.append(message)

    def fill(self, place: int, feeds: Mapping[str, np.ndarray]) -> int:
        for name, array in feeds.items():
            self.arena.batches[place][name][: len(array)] = array
        return len(feeds["window"])


@pytest.fixture
def start(tmp_path: Path, bundle_of: Callable[[str], Path]) -> Iterator[Callable[..., Peer]]:
    """Start workers and send them what to open."""
    peers: list[Peer] = []

    def start(kind: str = "pixels", **changes: Any) -> Peer:
        bundle = Bundle.load(bundle_of(kind))
        request = _request(bundle, **changes)
        arena = Arena.create(request.layout)
        ours, theirs = socket.socketpair()
        ours.settimeout(60)
        out = tmp_path / f"out-{len(peers)}"
        command = [sys.executable, "-m", "cloud_node.worker_start"]
        command += [str(theirs.fileno()), str(os.getpid())]
        with theirs, out.open("wb") as file:
            process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(),),
                stdout=file,
                stderr=file,
                cwd=Path(worker_module.__file__).parents[1],
            )
        peer = Peer(ours, arena, process, out)
        peers.append(peer)
        assert peer.receive() == Closed()
        socket.send_fds(peer.socket, [pack(request)], [arena.fd])
        return peer

    yield start
    for peer in peers:
        peer.process.kill()
        peer.process.wait()
        peer.socket.close()
        peer.arena.close()


def _request(bundle: Bundle, /, **changes: Any) -> Open:
    stage = bundle.stage("stack")
    return Open(
        **{
            "bundle": str(bundle.path),
            "stage": stage.sha256,
            "device": "cpu",
            "threads": 1,
            "layout": Layout(stage.inputs, stage.outputs, 9, 2, 2),
            "log_level": logging.DEBUG,
            **changes,
        }
    )


@pytest.mark.process
def test_a_run_uses_the_given_place_in_shared_memory(
    start: Callable[..., Peer], feeds: dict[str, np.ndarray]
) -> None:
    peer = start()
    ready = peer.receive()
    assert isinstance(ready, Ready)
    assert ready.kind == "cpu"
    assert ready.slowest_s > 0
    # the warm-up uses other memory
    assert not any(a.any() for r in peer.arena.results for a in r.values())
    peer.send(Run(7, 1, peer.fill(1, feeds)))
    done = peer.receive()
    assert isinstance(done, Done)
    assert done.id == 7
    tokens = peer.arena.results[1]["tokens"]
    assert tokens[:4].any(axis=(1, 2)).all()
    assert not tokens[4:].any()
    assert not peer.arena.results[0]["tokens"].any()


@pytest.mark.process
def test_the_worker_announces_the_stage_before_opening_it(start: Callable[..., Peer]) -> None:
    peer = start(log_level=logging.INFO)
    assert isinstance(peer.receive(), Ready)
    assert peer.logged[0].text.startswith("opening ")


@pytest.mark.process
def test_runs_may_be_queued(start: Callable[..., Peer], feeds: dict[str, np.ndarray]) -> None:
    peer = start()
    rows = peer.fill(0, feeds)
    peer.socket.sendall(b"".join(pack(Run(i, 0, rows)) for i in range(20)))
    assert isinstance(peer.receive(), Ready)
    assert [peer.receive().id for _ in range(20)] == list(range(20))


@pytest.mark.process
def test_the_worker_ends_when_the_socket_closes_after_finishing_queued_runs(
    start: Callable[..., Peer], feeds: dict[str, np.ndarray]
) -> None:
    peer = start()
    assert isinstance(peer.receive(), Ready)
    peer.send(Run(1, 0, peer.fill(0, feeds)))
    peer.socket.shutdown(socket.SHUT_WR)
    assert peer.receive().id == 1
    assert peer.receive() is None
    assert peer.process.wait(60) == 0


@pytest.mark.process
def test_signals_to_the_process_group_do_not_end_the_worker(
    start: Callable[..., Peer], feeds: dict[str, np.ndarray]
) -> None:
    peer = start()
    assert isinstance(peer.receive(), Ready)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        peer.process.send_signal(number)
    peer.send(Run(1, 0, peer.fill(0, feeds)))
    assert isinstance(peer.receive(), Done)


@pytest.mark.process
@pytest.mark.parametrize(
    ("changes", "kind", "found"),
    [
        ({"bundle": "/no/such/bundle"}, "BundleError", "does not exist"),
        ({"stage": "0" * 64}, "BundleError", "restart the node"),
        ({"stage": "same start"}, "BundleError", "restart the node"),
        ({"device": "cuda"}, "EngineError", "CUDA"),
        ({"device": "tensorrt"}, "PlanError", "edge-runtime build"),
    ],
)
def test_an_engine_that_cannot_be_opened_is_reported(
    start: Callable[..., Peer],
    bundle_of: Callable[[str], Path],
    changes: dict[str, Any],
    kind: str,
    found: str,
) -> None:
    if changes.get("stage") == "same start":
        stage = Bundle.load(bundle_of("pixels")).stage("stack").sha256
        changes = {"stage": stage[:-1] + ("0" if stage[-1] != "0" else "1")}
    peer = start(**changes)
    failed = peer.receive()
    if failed == Ready("cuda", getattr(failed, "slowest_s", 0)) and changes == {"device": "cuda"}:
        pytest.skip("there is CUDA here")
    assert isinstance(failed, Failed)
    assert failed.kind == kind
    assert found in str(failed.error())
    assert peer.receive() is None
    assert peer.process.wait(60) == 1


@pytest.mark.process
@pytest.mark.parametrize("garbage", [b"\0\0\0\1\xc1", b"\xff" * 64, pack(Run(1, 99, 1))])
def test_malformed_messages_end_the_worker(start: Callable[..., Peer], garbage: bytes) -> None:
    peer = start()
    assert isinstance(peer.receive(), Ready)
    peer.socket.sendall(garbage)
    assert peer.receive() is None
    assert peer.process.wait(60) != 0


@pytest.mark.parametrize(
    "message",
    [Done(1, -1), Done(1, 1 << 62), Ready("cpu", -1.0), Ready("cpu", float("inf"))],
)
def test_impossible_times_make_a_message_invalid(message: FromWorker) -> None:
    with pytest.raises(ValueError, match="Expected"):
        msgspec.msgpack.decode(pack(message)[4:], type=FromWorker)


@pytest.mark.process
def test_the_kernel_kills_the_worker_first_and_it_leaves_no_core_dump(
    start: Callable[..., Peer],
) -> None:
    peer = start()
    assert isinstance(peer.receive(), Ready)
    proc = Path(f"/proc/{peer.process.pid}")
    assert int((proc / "oom_score_adj").read_text()) >= 500
    core = next(x for x in (proc / "limits").read_text().splitlines() if "core file" in x)
    assert core.split()[4:6] == ["0", "0"]


@pytest.mark.process
def test_the_worker_opens_no_network_and_closes_the_memory_s_descriptor(
    start: Callable[..., Peer],
) -> None:
    peer = start()
    assert isinstance(peer.receive(), Ready)
    links = Path(f"/proc/{peer.process.pid}/fd")
    try:
        opened = [os.readlink(link) for link in links.iterdir()]
    except PermissionError:
        pytest.skip("a process without core dumps shows its descriptors to root only")
    assert sum(name.startswith("socket:") for name in opened) == 1
    # Python's mapping keeps a descriptor of its own.
    assert sum("memfd:" in name for name in opened) == 1


@pytest.mark.process
def test_no_tensor_content_is_logged(start: Callable[..., Peer]) -> None:
    canary = b"CANARY-IN-THE-COAL-MINE!"
    peer = start("broken")
    assert isinstance(peer.receive(), Ready)
    good = {
        "pixels": np.frombuffer(canary * 8, np.uint8).reshape(1, 8, 8, 3),
        "extent": np.full((1, 2), 8),
        "window": np.array([0]),
    }
    peer.send(Run(1, 0, peer.fill(0, good)))
    assert isinstance(peer.receive(), Done)
    peer.send(Run(2, 0, peer.fill(0, {**good, "window": np.array([8])})))
    failed = peer.receive()
    assert isinstance(failed, RunFailed)
    said = (
        peer.out.read_text()
        + str(failed.failure.error())
        + "".join(line.text for line in peer.logged)
    )
    for form in (canary.decode(), str(list(canary[:8]))[1:-1], canary[:8].hex()):
        assert form not in said


# The loop with misbehaving engines, in this process


class Odd(Noop):
    """An engine that behaves as the test says."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.runs: list[Any] = []

    def run(
        self, feeds: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        does = self.runs.pop(0) if self.runs else None
        if isinstance(does, BaseException):
            raise does
        if isinstance(does, TensorSpec):
            check_out((does,), {"n": 2}, out or {})
        return super().run(feeds, out)


@pytest.fixture
def serve(bundle_of: Callable[[str], Path]) -> Callable[..., Any]:
    """Serve runs with an `Odd` engine. Returns the replies and the exit status."""

    def serve(runs: list[Any], count: int) -> tuple[list[Any], int]:
        bundle = Bundle.load(bundle_of("pixels"))
        layout = _request(bundle).layout
        arena = Arena.create(layout)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.sendall(b"".join(pack(Run(i, 0, 2)) for i in range(count)))
            ours.shutdown(socket.SHUT_WR)
            odd = Odd(layout)
            engine = WarmEngine(_request(bundle), odd)
            odd.runs = runs
            channel = worker_module._Channel(theirs)
            status = worker_module._serve(channel, arena, engine)
            theirs.shutdown(socket.SHUT_WR)
            data = b"".join(iter(lambda: ours.recv(4096), b""))
        arena.close()
        return [decode_from_worker(body) for body in Unpacker().feed(data)], status

    return serve


def test_an_engine_that_works_again_goes_on(serve: Callable[..., Any]) -> None:
    error = EngineError("no", mend="wait", code="busy")
    answers, status = serve([error, None, None, MemoryError(), None], 4)
    assert [type(answer) for answer in answers] == [RunFailed, Done, RunFailed, Done]
    assert answers[0].failure.error().fields() == error.fields()
    assert answers[2].failure.found == "MemoryError in the engine"
    assert status == 0


def test_an_engine_that_keeps_failing_ends_the_process(serve: Callable[..., Any]) -> None:
    answers, status = serve([EngineError("no"), EngineError("still no")], 3)
    assert [type(answer) for answer in answers] == [RunFailed]
    assert status == 1


@pytest.mark.parametrize(
    "returns",
    [
        TensorSpec("tokens", "float32", (1, 4, 8)),
        TensorSpec("tokens", "float16", ("n", 4, 8)),
        TensorSpec("tokens", "float32", ("n", 5, 8)),
        TensorSpec("tokens", "float32", ("n", 4)),
    ],
)
def test_outputs_that_do_not_fit_fail_the_run(
    serve: Callable[..., Any], returns: TensorSpec
) -> None:
    answers, status = serve([returns], 2)
    assert [type(answer) for answer in answers] == [RunFailed, Done]
    assert "the engine returns tokens as" in answers[0].failure.found
    assert status == 0


def test_an_unexpected_error_does_not_expose_its_text(serve: Callable[..., Any]) -> None:
    answers, _ = serve([ValueError("CANARY")], 1)
    assert answers[0].failure.found == "ValueError in the engine"
