"""A live node: correct answers, and every bad request refused without harm to the next."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from transport import messages
from transport.messages import (
    NO_ID,
    Accepted,
    Info,
    InfoRequest,
    Refused,
    Request,
    Result,
    VersionsSpoken,
    encode,
)

Feeds = dict[str, np.ndarray]


@pytest.mark.process
def test_result_is_bit_equal_to_a_local_run(node: Any, edge: Any, feeds: Feeds, local: Any) -> None:
    sent = edge.request(feeds)
    accepted, _ = edge.receive()
    result, outputs = edge.receive()
    assert accepted == Accepted(sent)
    assert isinstance(result, Result)
    assert result.id == sent
    assert result.compute_us > 0
    expected = local(node, feeds)
    assert outputs.keys() == expected.keys() == {"tokens"}
    assert outputs["tokens"].tobytes() == expected["tokens"].tobytes()


@pytest.mark.process
def test_all_windows_at_once_and_one_by_one_agree(node: Any, edge: Any) -> None:
    rng = np.random.default_rng(5)
    n = node.bundle.geometry.windows
    w = node.bundle.geometry.window_pixels
    feeds = {
        "pixels": rng.integers(0, 256, (n, w, w, 3), dtype=np.uint8),
        "extent": np.full((n, 2), w),
        "window": np.arange(n),
    }
    whole = edge.ask(feeds)["tokens"]
    parts = [edge.ask({k: v[i : i + 1] for k, v in feeds.items()})["tokens"] for i in range(n)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


@pytest.mark.process
def test_hidden_states_bundle(start_node: Any, connect: Any, local: Any) -> None:
    node = start_node("hidden")
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 4, 8)).astype(np.float32)
    feeds = {"hidden": hidden, "window": np.array([8, 0, 3])}
    outputs = connect(node).ask(feeds)
    assert outputs["tokens"].tobytes() == local(node, feeds)["tokens"].tobytes()


@pytest.mark.process
def test_requests_of_several_edges_do_not_mix(node: Any, connect: Any, local: Any) -> None:
    edges = [connect(node) for _ in range(4)]
    rng = np.random.default_rng(9)
    w = node.bundle.geometry.window_pixels
    work = [
        {
            "pixels": rng.integers(0, 256, (2, w, w, 3), dtype=np.uint8),
            "extent": np.full((2, 2), w),
            "window": np.array([i, i + 1]),
        }
        for i in range(4)
    ]
    for _ in range(3):
        sent = [edge.request(feeds) for edge, feeds in zip(edges, work, strict=True)]
        for edge, feeds, id in zip(edges, work, sent, strict=True):
            assert edge.receive()[0] == Accepted(id)
            result, outputs = edge.receive()
            assert getattr(result, "id", None) == id
            assert outputs["tokens"].tobytes() == local(node, feeds)["tokens"].tobytes()


@pytest.mark.process
def test_info_describes_the_served_stage(node: Any, edge: Any) -> None:
    edge.send(encode(InfoRequest(messages.new_id())))
    info, _ = edge.receive()
    assert isinstance(info, Info)
    assert info.versions == messages.VERSIONS
    assert info.software.startswith("cloud-node")
    (stage,) = info.stages
    assert stage.sha256 == node.stage.sha256
    assert stage.label == "test_pixels fp32"
    assert [(t.name, t.dtype, t.shape) for t in stage.inputs] == [
        (t.name, t.dtype, t.shape) for t in node.stage.inputs
    ]


@pytest.mark.process
def test_another_bundles_stage_is_refused_by_name(
    node: Any, edge: Any, feeds: Feeds, bundle_of: Callable[[str], Path], local: Any
) -> None:
    from engines.bundle import Bundle

    other = Bundle.load(bundle_of("other")).stage("stack").sha256
    refused = edge.ask(feeds, stage=other)
    assert isinstance(refused, Refused)
    assert refused.code == "wrong_bundle"
    for part in ("test_pixels fp32", node.stage.sha256[:12], other[:12]):
        assert part in refused.message
    own = node.stage.sha256
    # the log shows a prefix, in which the two are equal
    nearly = own[:-1] + ("0" if own[-1] != "0" else "1")
    assert edge.ask(feeds, stage=nearly).code == "wrong_bundle"
    assert edge.ask(feeds)["tokens"].tobytes() == local(node, feeds)["tokens"].tobytes()


def _with(name: str, value: Any) -> Callable[[Feeds], Feeds]:
    def change(feeds: Feeds) -> Feeds:
        changed = {**feeds, name: value(feeds.get(name)) if callable(value) else value}
        return {k: v for k, v in changed.items() if v is not None}

    return change


BAD_REQUESTS: dict[str, tuple[Callable[[Feeds], Feeds], str]] = {
    "pixels as float": (_with("pixels", lambda a: a.astype(np.float16)), "malformed invalid"),
    "pixels as int8": (_with("pixels", lambda a: a.view(np.int8)), "invalid"),
    "window as int32": (_with("window", lambda a: a.astype(np.int32)), "invalid"),
    "narrow pixels": (_with("pixels", lambda a: a[:, :, :4]), "invalid"),
    "flat pixels": (_with("pixels", lambda a: a.reshape(4, -1)), "invalid"),
    "one window index too few": (_with("window", lambda a: a[:3]), "invalid"),
    "no window index": (_with("window", None), "invalid"),
    "extra tensor": (_with("mask", np.ones((4, 1), np.uint8)), "malformed"),
    "renamed tensor": (
        lambda f: {("image" if k == "pixels" else k): v for k, v in f.items()},
        "invalid",
    ),
    "negative window": (_with("window", lambda a: a * 0 - 1), "invalid"),
    "window past the last": (_with("window", lambda a: a * 0 + 9), "invalid"),
    "huge window": (_with("window", lambda a: a * 0 + 2**62), "invalid"),
    "extent 0": (_with("extent", lambda a: a * 0), "invalid"),
    "extent past the window": (_with("extent", lambda a: a * 0 + 9), "invalid"),
    "more windows than there are": (
        lambda f: {k: np.concatenate([v, v, v]) for k, v in f.items()},
        "malformed",
    ),
    "no tensors": (lambda f: {}, "invalid"),
}


@pytest.mark.process
@pytest.mark.parametrize("defect", BAD_REQUESTS)
def test_requests_that_do_not_fit_are_refused(
    node: Any, edge: Any, feeds: Feeds, local: Any, defect: str
) -> None:
    change, codes = BAD_REQUESTS[defect]
    refused = edge.ask(change(feeds))
    assert isinstance(refused, Refused), "admitted"
    assert refused.code in codes.split()
    assert refused.message
    assert edge.ask(feeds)["tokens"].tobytes() == local(node, feeds)["tokens"].tobytes()


@pytest.mark.process
def test_an_expired_deadline_is_refused(edge: Any, feeds: Feeds) -> None:
    refused = edge.ask(feeds, deadline_ms=0)
    assert isinstance(refused, Refused)
    assert refused.code == "deadline"


@pytest.mark.process
def test_a_deadline_that_passes_in_the_queue_is_refused(node: Any, edge: Any, five: Feeds) -> None:
    with node.stopped():
        first = edge.request(five)
        assert edge.receive()[0] == Accepted(first)
        second = edge.request(five, deadline_ms=100)
        refused = edge.replies([second], final=True)[second]
        assert isinstance(refused, Refused)
        assert refused.code == "deadline"
    assert isinstance(edge.replies([first], final=True)[first], Result)


@pytest.mark.process
def test_a_request_that_would_be_late_is_refused_with_a_hint(
    start_node: Any, connect: Any, five: Feeds
) -> None:
    node = start_node("slow")
    edge = connect(node)
    edge.ask(five)  # the node has an estimate now
    running = edge.request(five)
    assert edge.receive()[0] == Accepted(running)
    refused = edge.ask(five, deadline_ms=50)
    assert isinstance(refused, Refused)
    assert refused.code == "overloaded"
    assert refused.retry_ms > 0
    assert isinstance(edge.replies([running], final=True)[running], Result)


@pytest.mark.process
def test_too_many_requests_of_one_edge_are_refused_at_once_and_others_let_in(
    node: Any, connect: Any, feeds: Feeds
) -> None:
    greedy, modest = connect(node), connect(node)
    with node.stopped():
        sent = [greedy.request(feeds) for _ in range(40)]
        found = greedy.replies(sent, final=False)
        refused = [message for message in found.values() if isinstance(message, Refused)]
        assert {message.code for message in refused} == {"overloaded"}
        assert all(message.retry_ms > 0 for message in refused)
        assert len(refused) == 40 - 16
        asked = modest.request(feeds)
        assert modest.receive()[0] == Accepted(asked)
    let_in = [id for id in sent if isinstance(found[id], Accepted)]
    results = (greedy.replies(let_in, final=True) | modest.replies([asked], final=True)).values()
    assert {type(message) for message in results} == {Result}


@pytest.mark.process
def test_engine_failure_fails_one_request_only(start_node: Any, connect: Any, local: Any) -> None:
    node = start_node("broken")
    edge = connect(node)
    w = node.bundle.geometry.window_pixels
    good = {
        "pixels": np.zeros((1, w, w, 3), np.uint8),
        "extent": np.full((1, 2), w),
        "window": np.array([0]),
    }
    bad = {**good, "window": np.array([8])}  # legal, but the graph's table is one row short
    for _ in range(3):
        refused = edge.ask(bad)
        assert isinstance(refused, Refused)
        assert refused.code == "engine"
        assert edge.ask(good)["tokens"].tobytes() == local(node, good)["tokens"].tobytes()


class Canary:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.process
def test_pickle_is_never_loaded(edge: Any, feeds: Feeds, tmp_path: Path) -> None:
    canary = pickle.dumps(Canary(tmp_path / "hatched"))
    request = Request(messages.new_id(), "0" * 64, 1000, messages.new_seal())
    whole = bytes(encode(request, feeds))
    start = messages.MAGIC + bytes([messages.VERSION])
    size = len(canary).to_bytes(4, "little")
    for frame in (canary, whole[:-64] + canary, start + canary, start + size + canary):
        edge.send(frame)
        refused, _ = edge.receive()
        assert isinstance(refused, Refused)
        assert refused.code in ("malformed", "wrong_bundle")
    payload = np.frombuffer(canary.ljust(8 * 8 * 3, b"."), np.uint8)[: 8 * 8 * 3]
    pixels = payload.reshape(1, 8, 8, 3)
    edge.ask({"pixels": pixels, "extent": np.full((1, 2), 8), "window": np.array([0])})
    assert not (tmp_path / "hatched").exists()


@pytest.mark.process
def test_an_unknown_version_gets_the_list_of_known_ones(edge: Any, feeds: Feeds) -> None:
    whole = encode(Request(messages.new_id(), "0" * 64, 1000, messages.new_seal()), feeds)
    edge.send(b"ERT\x07" + whole[4:])
    assert edge.receive()[0] == VersionsSpoken(messages.VERSIONS)


@pytest.mark.process
def test_messages_for_edges_are_refused(edge: Any) -> None:
    sent = messages.new_id()
    for message in (Accepted(sent), Result(sent, 1, 1), Refused(sent, "engine", "x")):
        edge.send(encode(message))
        refused, _ = edge.receive()
        assert isinstance(refused, Refused)
        assert (refused.id, refused.code) == (sent, "malformed")


@pytest.mark.process
def test_versions_message_is_not_answered(edge: Any) -> None:
    edge.send(encode(VersionsSpoken((9,))))
    edge.send(encode(InfoRequest(messages.new_id())))
    assert isinstance(edge.receive()[0], Info)


@pytest.mark.process
def test_garbage_gets_one_refusal_each_and_harms_no_other_edge(
    node: Any, connect: Any, feeds: Feeds, local: Any
) -> None:
    vandal, honest = connect(node), connect(node)
    rng = random.Random(0)
    request = Request(messages.new_id(), node.stage.sha256, 9999, messages.new_seal())
    vandal.seals[request.id] = request.seal
    legal = bytes(encode(request, feeds))
    end = 8 + int.from_bytes(legal[4:8], "little")
    cases = [b"", b"ERT", b"ERT\2", legal[:-1], legal + b"\0", legal[:end], legal[::-1], legal * 2]
    cases += [b"ERT\2" + b"\xff" * 9, b"ERT\2\5\0\0\0" + b"\xdd\xff\xff\xff\xff", b"ERT\0"]
    for _ in range(60):
        cases.append(rng.randbytes(rng.randrange(300)))
    for _ in range(200):
        changed = bytearray(legal)
        for _ in range(rng.randrange(1, 4)):
            changed[rng.randrange(3, end)] = rng.randrange(256)
        cases.append(bytes(changed))
    for i, case in enumerate(cases):
        vandal.send(case)
        if case[:4] == b"ERT\0" and len(case) > 4:
            continue
        message, _ = vandal.receive()
        if isinstance(message, Accepted):  # a harmless mutation, for example in the id or the key
            assert isinstance(vandal.receive(tensors=False)[0], Result)
        else:
            assert isinstance(message, (Refused, VersionsSpoken))
        if i % 50 == 0:
            expected = local(node, feeds)["tokens"].tobytes()
            assert honest.ask(feeds)["tokens"].tobytes() == expected
    assert node.process.poll() is None
    assert "message dropped" not in node.logged()


@pytest.mark.process
def test_a_refusal_of_an_unreadable_id_carries_none(edge: Any) -> None:
    edge.send(b"nonsense")
    refused, _ = edge.receive()
    assert isinstance(refused, Refused)
    assert (refused.id, refused.code) == (NO_ID, "malformed")


@pytest.mark.process
def test_an_oversized_part_costs_only_its_sender_the_connection(
    node: Any, connect: Any, feeds: Feeds, local: Any
) -> None:
    vandal, honest = connect(node), connect(node)
    part = node.limits.request.message_bytes
    before = _resident(node.process.pid)
    monitor = vandal.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    vandal.send(b"ERT\2" + bytes(64 * 1024 * 1024))
    assert monitor.poll(60_000), "the link was not cut"
    vandal.socket.disable_monitor()
    monitor.close()
    assert not vandal.socket.poll(0)  # and gets no refusal
    assert part < 1 << 20
    assert _resident(node.process.pid) - before < 16 << 20
    assert honest.ask(feeds)["tokens"].tobytes() == local(node, feeds)["tokens"].tobytes()


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.process
def test_the_log_contains_no_windows(node: Any, edge: Any) -> None:
    canary = b"CANARY-IN-THE-COAL-MINE!"
    pixels = np.frombuffer(canary * 8, np.uint8).reshape(1, 8, 8, 3)
    good = {"pixels": pixels, "extent": np.full((1, 2), 8), "window": np.array([0])}
    edge.ask(good)
    edge.ask({**good, "extent": np.full((1, 2), 77)})
    edge.ask({**good, "pixels": pixels.view(np.int8)})
    edge.send(canary * 8)
    edge.receive()
    edge.send(b"ERT\2\x18\0\0\0" + canary * 8)
    edge.receive()
    log = node.logged().encode()
    assert b"windows for edge-" in log  # debug level: this line is logged at all
    assert b"CANARY" not in log
    assert str(list(canary[:8])).encode() not in log
    assert canary[:8].hex().encode() not in log


@pytest.mark.process
def test_no_log_line_can_be_forged(node: Any, edge: Any) -> None:
    import msgspec

    body = msgspec.msgpack.encode({"type": "accepted", "id": bytes(16), "a\nb FORGED": 1})
    edge.send(b"ERT\2" + len(body).to_bytes(4, "little") + body)
    refused, _ = edge.receive()
    assert isinstance(refused, Refused)
    assert not [line for line in node.logged().splitlines() if line.startswith("b FORGED")]


@pytest.mark.process
def test_core_dumps_are_disabled(node: Any) -> None:
    limits = Path(f"/proc/{node.process.pid}/limits").read_text()
    core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["0", "0"]


@pytest.mark.process
def test_nothing_heavy_is_imported(
    start_node: Any, connect: Any, feeds: Feeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # Python reports every import on stderr
    node = start_node()
    connect(node).ask(feeds)
    told = [line for line in node.logged().splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in told}
    assert {"numpy", "onnxruntime", "zmq"} <= imported
    assert not imported & {"torch", "torchvision", "matplotlib", "scipy", "PIL", "rich"}
