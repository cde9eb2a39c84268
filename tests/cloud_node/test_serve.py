"""`cloud-node serve` as a process: starting, refusing to start, admitting and rejecting edges,
stopping."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from faults.nodes import NodeProcess
from faults.processes import Netns, children_of
from zmq.utils.monitor import parse_monitor_message

from engines.bundle import Bundle, shipped_bundle, write_manifest
from transport import keys, messages, sockets
from transport.messages import Accepted, Info, InfoRequest, Result, encode

Feeds = dict[str, np.ndarray]
FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)


def _serve(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cloud_node.cli", "serve", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def options(tmp_path: Path, bundle_of: Callable[[str], Path]) -> dict[str, str]:
    """Options of a node that would start."""
    folder = tmp_path / "keys"
    keys.generate(folder, "node")
    keys.make_directory(folder / "authorized")
    return {
        "--bundle": str(bundle_of("pixels")),
        "--bind": "tcp://127.0.0.1:0",
        "--keys": str(folder),
    }


def _refusal(options: dict[str, str]) -> str:
    done = _serve(*(word for pair in options.items() for word in pair))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    return done.stderr[done.stderr.index("error: ") :]


@pytest.mark.process
def test_missing_keys_are_refused(options: dict[str, str], tmp_path: Path) -> None:
    error = _refusal({**options, "--keys": str(tmp_path / "nowhere")})
    assert "node.key" in error
    assert "edge-runtime keys" in error


@pytest.mark.process
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_secret_key_open_to_others_is_refused(options: dict[str, str], mode: int) -> None:
    path = Path(options["--keys"], "node.key")
    path.chmod(mode)
    assert f"chmod 600 {path}" in _refusal(options)


@pytest.mark.process
def test_a_folder_of_authorised_keys_open_to_others_is_refused(options: dict[str, str]) -> None:
    path = Path(options["--keys"], "authorized")
    path.chmod(0o777)
    assert f"chmod go-w {path}" in _refusal(options)


@pytest.mark.process
def test_a_stock_order_bundle_is_refused(options: dict[str, str], tmp_path: Path) -> None:
    from engines.bundle import Stage, TensorSpec

    source = Bundle.load(options["--bundle"])
    shutil.copytree(source.path, tmp_path / "stock")
    g, stack = source.geometry, source.stage("stack")
    embedding = TensorSpec("embedding", "float32", (1, g.out_chans, g.grid, g.grid))
    low = g.low_res

    def stage(inputs: Any, outputs: Any) -> Stage:
        return msgspec.structs.replace(stack, inputs=inputs, outputs=outputs)

    encoder = stage(
        (
            TensorSpec("pixels", "uint8", (g.windows, g.window_pixels, g.window_pixels, 3)),
            TensorSpec("extent", "int64", (g.windows, 2)),
        ),
        (embedding,),
    )
    decoder = stage(
        (
            embedding,
            TensorSpec("point_coords", "float32", ("p", "k", 2)),
            TensorSpec("point_labels", "float32", ("p", "k")),
            TensorSpec("mask_input", "float32", ("p", 1, low, low)),
            TensorSpec("has_mask_input", "float32", ("p",)),
        ),
        (
            TensorSpec("low_res_logits", "float32", ("p", 4, low, low)),
            TensorSpec("iou", "float32", ("p", 4)),
        ),
    )
    stages = {"encoder": encoder, "decoder": decoder}
    manifest = msgspec.structs.replace(source.manifest, order="stock", stages=stages)
    write_manifest(tmp_path / "stock", manifest)
    error = _refusal({**options, "--bundle": str(tmp_path / "stock")})
    assert "stock order" in error
    assert "--order reordered" in error


@pytest.mark.process
def test_a_damaged_stack_is_refused(options: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(options["--bundle"], tmp_path / "bundle")
    path = tmp_path / "bundle" / "stack.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    error = _refusal({**options, "--bundle": str(tmp_path / "bundle")})
    assert "stack.onnx is damaged" in error


@pytest.mark.process
def test_a_missing_bundle_is_refused(options: dict[str, str], tmp_path: Path) -> None:
    assert "does not exist" in _refusal({**options, "--bundle": str(tmp_path / "nowhere")})


@pytest.mark.process
@pytest.mark.parametrize(
    "bind", ["0.0.0.0:5555", "tcp://0.0.0.0", "ipc:///tmp/x", "tcp://0.0.0.0:70000", "tcp://:5"]
)
def test_a_malformed_endpoint_is_refused(options: dict[str, str], bind: str) -> None:
    error = _refusal({**options, "--bind": bind})
    assert bind in error
    assert "tcp://0.0.0.0:5555" in error


@pytest.mark.process
def test_a_taken_port_is_refused(options: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        bind = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        error = _refusal({**options, "--bind": bind})
    assert bind in error
    assert "choose another" in error


@pytest.mark.process
def test_an_unwritable_ready_file_is_refused(options: dict[str, str], tmp_path: Path) -> None:
    error = _refusal({**options, "--ready-file": str(tmp_path / "no" / "ready.json")})
    assert "ready file" in error


@pytest.mark.process
def test_a_node_that_takes_all_cores_says_how_to_share_them(options: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:  # makes the node exit by itself
        words = [word for pair in options.items() for word in pair]
        words += ["--bind", f"tcp://127.0.0.1:{other.getsockname()[1]}", "--device", "cpu"]
        assert "give each its share with threads (--threads)" in _serve(*words).stderr
        assert "--threads" not in _serve(*words, "--threads", "1").stderr


@pytest.mark.process
def test_tensorrt_without_a_plan_says_how_to_build_one(options: dict[str, str]) -> None:
    error = _refusal({**options, "--device": "tensorrt"})
    assert f"\n  -> edge-runtime build {options['--bundle']} --stage stack\n" in error


@pytest.mark.process
def test_usage_errors_exit_2() -> None:
    assert _serve("--bundle", "x", "--keys", "y", "--device", "abacus").returncode == 2


@pytest.mark.process
def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, cloud_node.cli as c\n"
        "try: c.main(['serve', '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'numpy', 'zmq', 'onnxruntime', 'cryptography'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "edge-runtime keys authorize" in done.stdout


def _until(what: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not what():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def _admitted(node: Any, client: Any) -> bool:
    """Connect. True if the handshake succeeds, False if it is refused."""
    monitor = client.get_monitor_socket()
    client.connect(node.endpoint)
    try:
        while monitor.poll(60_000):
            event = parse_monitor_message(monitor.recv_multipart())
            if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return True
            # EAGAIN: no answer in time, for example from a busy machine. libzmq tries again.
            failed = event["event"] & FAILED and event["value"] != errno.EAGAIN
            if failed:
                return False
        raise AssertionError("neither let in nor refused")
    finally:
        client.disable_monitor()
        monitor.close()


def _stranger(ctx: zmq.Context[Any], node: Any, kind: str) -> Any:
    """An unauthorised client that is not connected yet."""
    if kind == "unauthorised key":
        pair = keys.KeyPair("x", *(part.decode() for part in zmq.curve_keypair()))
        return _client(ctx, node, pair)
    if kind == "wrong server key":
        pair = node.authorise(f"lost-{os.urandom(4).hex()}")
        return _client(ctx, node, pair, zmq.curve_keypair()[0].decode())
    raw = ctx.socket(zmq.DEALER)
    raw.set(zmq.LINGER, 0)
    if kind == "PLAIN":
        raw.set(zmq.PLAIN_USERNAME, b"admin")
        raw.set(zmq.PLAIN_PASSWORD, b"admin")
    return raw


def _client(
    ctx: zmq.Context[Any], node: Any, pair: keys.KeyPair, server_key: str | None = None
) -> Any:
    key = server_key or node.ready["public_key"]
    return sockets.client(ctx, node.endpoint, key, pair, node.limits, connect=False)


@pytest.mark.process
@pytest.mark.parametrize("kind", ["unauthorised key", "wrong server key", "NULL", "PLAIN"])
def test_strangers_are_refused_and_edges_admitted_after_them(
    node: Any, connect: Any, zmq_context: zmq.Context[Any], feeds: Feeds, local: Any, kind: str
) -> None:
    strangers = [_stranger(zmq_context, node, kind) for _ in range(3)]
    try:
        assert [_admitted(node, stranger) for stranger in strangers] == [False] * 3
        outputs = connect(node).ask(feeds)
        assert outputs["tokens"].tobytes() == local(node, feeds)["tokens"].tobytes()
        for stranger in strangers:
            # A raw socket queues messages until it is admitted. A `Connection` has no link to send
            # on.
            with contextlib.suppress(zmq.Again):
                stranger.send(encode(InfoRequest(messages.new_id())), flags=zmq.NOBLOCK)
        assert not any(stranger.poll(100) for stranger in strangers)
    finally:
        for stranger in strangers:
            stranger.close()


@pytest.mark.process
def test_keys_are_added_and_removed_without_a_restart(
    start_node: Any, connect: Any, zmq_context: zmq.Context[Any]
) -> None:
    node = start_node()
    assert "NO EDGE IS AUTHORISED" in node.logged()
    assert node.ready["authorised_keys"] == 0
    outsider = _stranger(zmq_context, node, "unauthorised key")
    assert not _admitted(node, outsider)
    outsider.close()
    assert "is not authorised; to let it in" in node.logged()

    pair = node.authorise("kitchen")
    edge = connect(node, pair)
    edge.send(encode(InfoRequest(messages.new_id())))
    assert isinstance(edge.receive()[0], Info)

    (node.allowed / "kitchen.pub").unlink()
    _until(lambda: "no longer authorised: kitchen" in node.logged())
    again = _client(zmq_context, node, pair)
    assert not _admitted(node, again)
    again.close()


@pytest.mark.process
def test_a_malformed_authorised_key_is_skipped_with_a_warning(
    start_node: Any, connect: Any
) -> None:
    node = start_node()
    (node.allowed / "broken.pub").write_text("public-key not-a-key\n")
    edge = connect(node)
    edge.send(encode(InfoRequest(messages.new_id())))
    assert isinstance(edge.receive()[0], Info)
    assert "ignored authorised key" in node.logged()
    assert "broken.pub" in node.logged()


@pytest.fixture
def hangups(request: pytest.FixtureRequest) -> Iterator[None]:
    """Children must not ignore SIGHUP, even if these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_stop_the_node_cleanly(
    start_node: Any, number: signal.Signals, hangups: None
) -> None:
    node = start_node()
    assert node.ready["pid"] == node.process.pid
    assert node.end(number) == 0
    assert not node.ready_file.exists()
    assert "Traceback" not in node.logged()
    assert node.logged().rstrip().endswith("stopped")


_BROKEN = """
import sys
import cloud_node.{module} as module
kind, name, calls = module.{kind}, "{name}", 0
works = getattr(kind, name)
def broken(*args):
    global calls
    calls += 1
    return works(*args) if calls < {calls} else 1 // 0
setattr(kind, name, broken)
from cloud_node.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("module", "kind", "name", "calls"),
    [
        ("server", "Server", "_expire", 20),  # in the tick
        ("server", "Server", "_next_batch", 1),
        ("listener", "Listener", "_count", 1),
        ("pool", "_Lane", "_fail_runs", 1),
    ],
)
def test_a_node_with_a_defect_ends_and_logs_it(
    start_node: Any, connect: Any, feeds: Feeds, module: str, kind: str, name: str, calls: int
) -> None:
    code = _BROKEN.format(module=module, kind=kind, name=name, calls=calls)
    node = start_node(program=[sys.executable, "-c", code])
    edge = connect(node)
    if kind == "_Lane":
        os.kill(node.workers()[0], signal.SIGKILL)
    with contextlib.suppress(zmq.Again):
        edge.socket.set(zmq.SNDTIMEO, 1000)  # the node may be gone before
        edge.request(feeds)
    assert node.process.wait(timeout=60) == 1
    assert not node.ready_file.exists()
    assert "stopped because of a defect" in node.logged()
    assert "ZeroDivisionError" in node.logged()


@pytest.mark.process
def test_stopping_finishes_admitted_requests_and_refuses_new_ones(
    start_node: Any, connect: Any, five: Feeds
) -> None:
    node = start_node()
    edge = connect(node)
    with node.stopped():
        sent = [edge.request(five) for _ in range(3)]
        accepted = edge.replies(sent, final=False)
        assert {type(message) for message in accepted.values()} == {Accepted}
        node.term()
        _until(lambda: "stopping" in node.logged())
        assert not node.ready_file.exists()
        late = edge.request(five)
        assert edge.replies([late], final=True)[late].code == "shutdown"
    replies = edge.replies(sent, final=True)
    assert node.process.wait(timeout=60) == 0
    assert [type(replies[id]) for id in sent] == [Result] * 3


@pytest.mark.process
def test_stopping_waits_until_slow_links_have_carried_the_last_replies(tmp_path: Path) -> None:
    if reason := Netns.unavailable():
        pytest.skip(reason)
    bundle = Bundle.load(shipped_bundle())
    stage, windows = bundle.stage("stack"), bundle.geometry.windows
    limits = messages.stage_limits(stage.inputs, stage.outputs, windows)
    ctx = zmq.Context()
    with Netns(rate="2mbit") as net:  # the result of an image takes more than a second on this link
        endpoint = f"tcp://{net.FAR}:5555"
        with (
            NodeProcess(bundle.path, tmp_path / "node", bind=endpoint, popen=net.popen) as node,
            net.enter(),
        ):
            pair = node.authorise()
            edge = sockets.client(ctx, endpoint, node.keypair.public, pair, limits)
            edge.set(zmq.RCVTIMEO, 60_000)
            try:
                feeds = {
                    spec.name: np.zeros((windows, *map(int, spec.shape[1:])), spec.numpy_dtype)
                    for spec in stage.inputs
                }
                feeds["extent"][:] = bundle.geometry.window_pixels
                id, seal = messages.new_id(), messages.new_seal()
                edge.send(encode(messages.Request(id, stage.sha256, 60_000, seal), feeds))
                assert isinstance(messages.decode_header(edge.recv()), Accepted)
                node.term()
                assert isinstance(messages.decode_header(edge.recv()), Result)
            finally:
                edge.close(linger=0)
                ctx.destroy(linger=0)


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(
    number: signal.Signals, start_node: Any, connect: Any, feeds: Feeds
) -> None:
    node = start_node("pixels", "--drain-s", "60")
    edge = connect(node)
    with node.stopped():
        edge.request(feeds)
        edge.receive()
        node.term()
        _until(lambda: "stopping" in node.logged())
        assert node.end(number) == -number
    assert "Traceback" not in node.logged()


_ON_TERMINAL = """
import os, sys
os.setsid()
os.open(sys.argv[1], os.O_RDWR)  # from now on its controlling terminal
os.execv(sys.executable, [sys.executable, "-m", "cloud_node.cli", *sys.argv[2:]])
"""


@pytest.mark.process
def test_a_closed_terminal_lets_the_node_finish_admitted_requests(
    start_node: Any, connect: Any, five: Feeds, hangups: None
) -> None:
    ours, theirs = pty.openpty()
    program = [sys.executable, "-c", _ON_TERMINAL, os.ttyname(theirs)]
    node = start_node(program=program)
    os.close(theirs)
    edge = connect(node)
    with node.stopped():
        sent = [edge.request(five) for _ in range(2)]
        assert {type(m) for m in edge.replies(sent, final=False).values()} == {Accepted}
        os.close(ours)
        _until(lambda: "stopping" in node.logged())
        assert not node.ready_file.exists()
        node.signal(signal.SIGHUP)  # shells send a second one
    assert {type(m) for m in edge.replies(sent, final=True).values()} == {Result}
    assert node.process.wait(timeout=60) == 0
    assert node.logged().rstrip().endswith("stopped")


@pytest.mark.process
def test_under_nohup_a_node_outlives_its_terminal(
    start_node: Any, connect: Any, feeds: Feeds, local: Any, hangups: None
) -> None:
    node = start_node(program=["nohup", sys.executable, "-m", "cloud_node.cli"])
    edge = connect(node)
    node.signal(signal.SIGHUP)
    outputs = edge.ask(feeds)
    assert outputs["tokens"].tobytes() == local(node, feeds)["tokens"].tobytes()
    assert "stopping" not in node.logged()
    assert node.end() == 0


@pytest.mark.process
def test_signals_work_for_the_first_process_of_a_container(
    start_node: Any, connect: Any, feeds: Feeds
) -> None:
    """The kernel does not deliver unhandled signals to process 1."""
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("needs util-linux's unshare and user namespaces")
    node = start_node(program=[*unshare, sys.executable, "-m", "cloud_node.cli"])
    assert node.ready["pid"] == 1
    (first,) = node.workers()
    edge = connect(node)
    (worker,) = children_of(first)
    os.kill(worker, signal.SIGSTOP)  # stopping then takes drain_s
    edge.request(feeds)
    edge.receive()
    os.kill(first, signal.SIGTERM)
    _until(lambda: "stopping" in node.logged())
    os.kill(first, signal.SIGTERM)
    assert node.process.wait(timeout=60) == 128 + signal.SIGTERM


@pytest.mark.process
def test_an_edge_that_leaves_does_no_harm(
    node: Any, connect: Any, feeds: Feeds, local: Any
) -> None:
    stayer, name = connect(node), f"leaver-{os.urandom(4).hex()}"
    leaver = connect(node, node.authorise(name))
    with node.stopped():
        leaver.request(feeds)
        leaver.receive()
        leaver.socket.close()
        _until(lambda: f"a connection of {name} has ended" in node.logged())
    outputs = stayer.ask(feeds)
    assert outputs["tokens"].tobytes() == local(node, feeds)["tokens"].tobytes()
    assert f"windows for {name}" not in node.logged()
