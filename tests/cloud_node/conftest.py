"""Small real bundles, real `cloud-node serve` processes and a bare edge to talk to them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import zmq
from faults.nodes import NodeProcess
from onnx import TensorProto, helper, numpy_helper

from engines.bundle import (
    Manifest,
    Stage,
    TensorSpec,
    hash_file,
    stage_digest,
    write_manifest,
)
from engines.geometry import Geometry
from engines.ort import OrtEngine
from transport import messages, sockets
from transport.keys import KeyPair

GEOMETRY = Geometry(image_size=24, patch_size=4, window_size=2, embed_dim=8, out_chans=4)
W, T, C = GEOMETRY.window_pixels, GEOMETRY.tokens_per_window, GEOMETRY.embed_dim
SLOW_TURNS = {"slow": 100, "slower": 400}


def _stack_model(kind: str) -> onnx.ModelProto:
    """A stack that mixes its inputs, with random weights.

    `kind` selects the variant. ``pixels`` and ``hidden`` name the input. ``slow`` takes about a
    quarter
    of a second, ``slower`` about one second. The table of ``broken`` is one row short, so ONNX
    Runtime
    fails on the last window. ``other`` has other weights.
    """
    rng = np.random.default_rng(1 if kind == "other" else 0)
    rows = GEOMETRY.windows - (kind == "broken")
    tables: dict[str, np.ndarray] = {
        "mix": rng.normal(size=(W * W * 3, T * C)).astype(np.float32) / 500,
        "position": rng.normal(size=(rows, T * C)).astype(np.float32),
        "flat": np.array([-1, W * W * 3], np.int64),
        "tokens_shape": np.array([-1, T, C], np.int64),
        "row": rng.normal(size=(2, T * C)).astype(np.float32),
    }
    if kind == "hidden":
        tables["mix"] = tables["mix"][: T * C]
        tables["flat"] = np.array([-1, T * C], np.int64)
        inputs = [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["n", T, C])]
        nodes = [helper.make_node("Reshape", ["hidden", "flat"], ["flat_in"])]
    else:
        inputs = [
            helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", W, W, 3]),
            helper.make_tensor_value_info("extent", TensorProto.INT64, ["n", 2]),
        ]
        nodes = [
            helper.make_node("Cast", ["pixels"], ["pixels_f"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["pixels_f", "flat"], ["flat_in"]),
        ]
    inputs.append(helper.make_tensor_value_info("window", TensorProto.INT64, ["n"]))
    nodes += [
        helper.make_node("MatMul", ["flat_in", "mix"], ["mixed"]),
        helper.make_node("Gather", ["position", "window"], ["placed"]),
        helper.make_node("Add", ["mixed", "placed"], ["sum"]),
    ]
    last = "sum"
    if kind != "hidden":
        nodes += [
            helper.make_node("Cast", ["extent"], ["extent_f"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["extent_f", "row"], ["extent_t"]),
            helper.make_node("Add", ["sum", "extent_t"], ["summed"]),
        ]
        last = "summed"
    if kind in SLOW_TURNS:
        side = 512
        tables["square"] = np.eye(side, dtype=np.float32)
        tables["turns"] = np.array(SLOW_TURNS[kind], np.int64)
        tables["go"] = np.array(True)
        tables["zero_at"] = np.array([[0]], np.int64)
        body = helper.make_graph(
            [
                helper.make_node("MatMul", ["state", "square"], ["next"]),
                helper.make_node("Identity", ["on"], ["on_out"]),
            ],
            "body",
            [
                helper.make_tensor_value_info("turn", TensorProto.INT64, []),
                helper.make_tensor_value_info("on", TensorProto.BOOL, []),
                helper.make_tensor_value_info("state", TensorProto.FLOAT, [side, side]),
            ],
            [
                helper.make_tensor_value_info("on_out", TensorProto.BOOL, []),
                helper.make_tensor_value_info("next", TensorProto.FLOAT, [side, side]),
            ],
        )
        tables["first"] = np.zeros((side, side), np.float32)
        nodes += [
            helper.make_node("Loop", ["turns", "go", "first"], ["spun"], body=body),
            helper.make_node("ReduceSum", ["spun"], ["nothing"], keepdims=0),
            helper.make_node("Add", [last, "nothing"], ["delayed"]),
        ]
        last = "delayed"
    nodes.append(helper.make_node("Reshape", [last, "tokens_shape"], ["tokens"]))
    output = helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["n", T, C])
    constants = [numpy_helper.from_array(value, name) for name, value in tables.items()]
    graph = helper.make_graph(nodes, "stack", inputs, [output], constants)
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=9)


def _write_bundle(folder: Path, kind: str) -> Path:
    folder.mkdir()
    onnx.save(_stack_model(kind), folder / "stack.onnx")
    files = {"stack.onnx": hash_file(folder / "stack.onnx")}
    window = TensorSpec("window", "int64", ("n",))
    fed = (
        (TensorSpec("hidden", "float32", ("n", T, C)), window)
        if kind == "hidden"
        else (
            TensorSpec("pixels", "uint8", ("n", W, W, 3)),
            TensorSpec("extent", "int64", ("n", 2)),
            window,
        )
    )
    stage = Stage(
        file="stack.onnx",
        files=files,
        sha256=stage_digest(files),
        inputs=fed,
        outputs=(TensorSpec("tokens", "float32", ("n", T, C)),),
    )
    manifest = Manifest(
        model=f"test_{kind}",
        geometry=GEOMETRY,
        order="reordered",
        adapted=False,
        precision="fp32",
        head_blocks=0 if kind == "hidden" else None,
        weights_sha256="0" * 64,
        stages={"stack": stage},
    )
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Node bundles by kind, each written once."""
    root = tmp_path_factory.mktemp("bundles")

    def make(kind: str) -> Path:
        return root / kind if (root / kind).exists() else _write_bundle(root / kind, kind)

    return make


@pytest.fixture(scope="session")
def start_node(
    tmp_path_factory: pytest.TempPathFactory, bundle_of: Callable[[str], Path]
) -> Iterator[Callable[..., NodeProcess]]:
    """Start nodes. Kill those that still run at the end."""
    with contextlib.ExitStack() as stack:

        def start(
            kind: str = "pixels", *options: str, folder: str = "node", **more: Any
        ) -> NodeProcess:
            root = tmp_path_factory.mktemp(folder)
            node = NodeProcess(bundle_of(kind), root / "node", options=options, **more)
            return stack.enter_context(node)

        yield start


@pytest.fixture(scope="session")
def node(start_node: Callable[..., NodeProcess]) -> NodeProcess:
    """The node that most tests share. No test may harm it."""
    return start_node()


class Edge:
    """A bare synchronous edge: it sends frames and returns the answers."""

    def __init__(self, ctx: zmq.Context[Any], node: NodeProcess, pair: KeyPair) -> None:
        self.name = pair.name
        self.limits = node.limits
        self.stage = node.stage
        self.socket = sockets.client(
            ctx, node.endpoint, str(node.ready["public_key"]), pair, node.limits
        )
        self.socket.set(zmq.SNDTIMEO, 60_000)
        self.seals: dict[bytes, bytes] = {}

    def send(self, *frames: Any) -> None:
        """Send one message. A legal message has one frame."""
        self.socket.send_multipart(frames, copy=False)

    def receive(
        self, timeout_ms: int = 60_000, *, tensors: bool = True
    ) -> tuple[messages.Message, dict[str, np.ndarray]]:
        assert self.socket.poll(timeout_ms), "no reply"
        (frame,) = self.socket.recv_multipart(copy=False)
        message = messages.decode_header(frame)
        if not tensors:
            return message, {}
        seal = self.seals.get(getattr(message, "id", b""), b"")
        return message, messages.decode_tensors(message, frame, self.limits.result, seal)

    def request(
        self,
        feeds: Mapping[str, np.ndarray],
        *,
        deadline_ms: int = 120_000,
        stage: str | None = None,
    ) -> bytes:
        """Send a request and return its id."""
        id, seal = messages.new_id(), messages.new_seal()
        self.seals[id] = seal
        message = messages.Request(id, stage or self.stage.sha256, deadline_ms, seal)
        self.send(messages.encode(message, feeds))
        return id

    def replies(self, ids: Iterable[bytes], *, final: bool) -> dict[bytes, messages.Message]:
        """Return one reply per request, in any order: the last one if `final`, else the first
        one."""
        waited, found = set(ids), {}
        while waited:
            message, _ = self.receive()
            id = getattr(message, "id", b"")
            if id in waited and not (final and isinstance(message, messages.Accepted)):
                waited.remove(id)
                found[id] = message
        return found

    def ask(self, feeds: Mapping[str, np.ndarray], **options: Any) -> Any:
        """Send a request and return the final reply: a Refused, or the outputs of a Result."""
        sent = self.request(feeds, **options)
        message, arrays = self.receive()
        if isinstance(message, messages.Accepted):
            assert message.id == sent
            message, arrays = self.receive()
        assert getattr(message, "id", None) == sent
        return arrays if isinstance(message, messages.Result) else message


@pytest.fixture(scope="session")
def zmq_context() -> Iterator[zmq.Context[Any]]:
    ctx: zmq.Context[Any] = zmq.Context()
    yield ctx
    ctx.destroy(linger=0)


@pytest.fixture
def connect(zmq_context: zmq.Context[Any]) -> Iterator[Callable[..., Edge]]:
    """Connect authorised edges and close them after the test."""
    edges: list[Edge] = []

    def make(node: NodeProcess, pair: KeyPair | None = None) -> Edge:
        pair = pair or node.authorise(f"edge-{os.urandom(4).hex()}")
        edges.append(Edge(zmq_context, node, pair))
        return edges[-1]

    yield make
    for edge in edges:
        edge.socket.close()


@pytest.fixture
def edge(node: NodeProcess, connect: Callable[..., Edge]) -> Edge:
    """An authorised edge of the shared node."""
    return connect(node)


@pytest.fixture
def feeds() -> dict[str, np.ndarray]:
    """Four windows that fit the shared node's stack."""
    return make_feeds(4)


@pytest.fixture
def five() -> dict[str, np.ndarray]:
    """Five windows: two requests of this size do not fit one batch."""
    return make_feeds(5)


def make_feeds(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "pixels": rng.integers(0, 256, (count, W, W, 3), dtype=np.uint8),
        "extent": rng.integers(1, W + 1, (count, 2)),
        "window": rng.permutation(GEOMETRY.windows)[:count],
    }


@pytest.fixture
def local() -> Callable[[NodeProcess, Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Run the same stack in this process."""

    def run(node: NodeProcess, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with OrtEngine(node.bundle.stage_path("stack"), threads=1, device="cpu") as engine:
            return engine.run(feeds)

    return run
