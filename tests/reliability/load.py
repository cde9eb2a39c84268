"""Rows about too much work and too little memory."""

from __future__ import annotations

import asyncio
import collections
import functools
import re
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zmq
import zmq.asyncio
from faults.nodes import NodeProcess
from faults.processes import Sampler, sample
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.config import Node
from engines.bundle import (
    Bundle,
    Manifest,
    Stage,
    TensorSpec,
    hash_file,
    shipped_bundle,
    stage_digest,
    write_manifest,
)
from engines.geometry import Geometry
from reliability.rows import Bench, Seen, mb, quantile, row, running
from transport.messages import (
    Accepted,
    Info,
    InfoRequest,
    Refused,
    Request,
    Result,
    decode_header,
    decode_tensors,
    encode,
    new_id,
    new_seal,
    stage_limits,
)
from transport.sockets import client

_EDGES = 8
_AT_ONCE = 16  # the node's limit for one edge
_PATIENCE_S = 8.0


class Load:
    """Requests of one edge that do not wait for one another.

    Attributes:
        results: in time, with the seconds that each took. late: results after their deadline.
        refused: by code. ages: of refusals after `accepted`, in seconds.
    """

    def __init__(self, ctx: Any, node: Node, bundle: Bundle, windows: int) -> None:
        stage = bundle.stage("stack")
        self.limits = stage_limits(stage.inputs, stage.outputs, bundle.geometry.windows)
        self.stage, self.windows = stage.sha256, windows
        self.socket = client(ctx, node.endpoint, node.server_key, node.keypair, self.limits)
        self.feeds = _feeds(bundle, windows)
        self.results: list[float] = []
        self.refused: collections.Counter[str] = collections.Counter()
        self.late = self.sent = 0
        self._due: dict[bytes, tuple[float, float]] = {}
        self._room = asyncio.Event()
        self._heard: asyncio.Event | None = None

    @property
    def open(self) -> int:
        return len(self._due)

    async def send(self, deadline_s: float) -> None:
        if self._heard is None:  # an edge asks this before it sends anything large
            self._heard = asyncio.Event()
            await self.socket.send(encode(InfoRequest(new_id())))
        await self._heard.wait()
        id, now = new_id(), time.monotonic()
        request = Request(id, self.stage, int(deadline_s * 1000), new_seal())
        self._due[id] = (now, now + deadline_s)
        self.sent += 1
        await self.socket.send(encode(request, self.feeds), copy=False)

    async def read(self) -> None:
        while True:
            message = decode_header(await self.socket.recv(copy=False))
            if isinstance(message, Accepted):
                continue
            if isinstance(message, Info):
                assert self._heard
                self._heard.set()
                continue
            begun, due = self._due.pop(getattr(message, "id", b""), (0.0, 0.0))
            now = time.monotonic()
            if isinstance(message, Refused):
                self.refused[message.code] += 1
            elif isinstance(message, Result) and now <= due:
                self.results.append(now - begun)
            else:
                self.late += 1
            self._room.set()

    async def closed(self, seconds: float, most: int, *, deadline_s: float = 10.0) -> float:
        """Keep `most` requests open, then wait for the last one. Returns results per second.

        Raises:
            asyncio.TimeoutError: some requests were never answered.
        """
        until, before = time.monotonic() + seconds, len(self.results)
        while time.monotonic() < until:
            if self.open >= most:
                self._room.clear()
                await self._room.wait()
                continue
            await self.send(deadline_s)
        rate = (len(self.results) - before) / seconds
        while self.open:
            self._room.clear()
            await asyncio.wait_for(self._room.wait(), deadline_s + 1)
        return rate

    async def at(
        self, rate: float, seconds: float, deadline_s: float, *, wait: bool = True
    ) -> float:
        """Send `rate` requests per second regardless of the answers, and return timely results per
        second. Then `wait` seconds for the open requests."""
        begun, before, number = time.monotonic(), len(self.results), 0
        while (now := time.monotonic()) < begun + seconds:
            due = int((now - begun) * rate)
            while number < due:
                number += 1
                if self.open < 20_000:
                    await self.send(deadline_s)
            await asyncio.sleep(0.002)
        goodput = (len(self.results) - before) / seconds
        await asyncio.sleep(deadline_s + 0.5 if wait else 0)
        return goodput


def _feeds(bundle: Bundle, windows: int) -> dict[str, np.ndarray]:
    rng, geometry = np.random.default_rng(0), bundle.geometry
    fed = {}
    for spec in bundle.stage("stack").inputs:
        shape = (windows, *spec.shape[1:])
        if spec.name == "window":
            fed["window"] = rng.permutation(geometry.windows)[:windows]
        elif spec.name == "extent":
            fed["extent"] = np.full((windows, 2), geometry.window_pixels, np.int64)
        else:
            fed[spec.name] = rng.integers(0, 200, shape).astype(spec.numpy_dtype)
    return fed


@row(
    "overload",
    "3 x the sustainable rate: goodput >= 90 % of the peak; memory bounded; what is not answered "
    "is refused; a light edge beside it is served",
    short_s=90,
    long_s=1500,
)
@running
async def overload(bench: Bench) -> Seen:
    bundle_path = shipped_bundle()
    bundle = Bundle.load(bundle_path)
    seconds = bench.pick(10.0, 600.0)
    ctx = zmq.asyncio.Context()
    with bench.node(bundle=bundle_path) as node:
        heavy = Load(ctx, node.node(node.authorise("heavy")), bundle, 12)
        light = Load(ctx, node.node(node.authorise("light")), bundle, 1)
        readers = [asyncio.create_task(load.read()) for load in (heavy, light)]
        try:
            await heavy.closed(2, 8)
            peak = await heavy.closed(bench.pick(6, 30), 16)
            before = sample(node.pid).rss
            heavy.results.clear()
            heavy.sent = heavy.late = 0
            heavy.refused.clear()
            with Sampler(node.pid, every_s=0.1) as sampler:
                goodput, _ = await asyncio.gather(
                    heavy.at(3 * peak, seconds, 1.0), light.at(2.0, seconds, 1.0)
                )
            after = await heavy.closed(3, 8)
        finally:
            for task in readers:
                task.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            ctx.destroy(linger=0)
        alive = node.running and node.starts == 1
    # of before and after, because the speed of a shared machine varies
    share = 2 * goodput / (peak + after)
    grown = sampler.peak_rss - before
    seen = {
        "peak, requests/s": round(peak, 1),
        "goodput, requests/s": round(goodput, 1),
        "share of the peak, %": round(100 * share, 1),
        "refused": dict(heavy.refused),
        "too late": heavy.late,
        "answered after ms, p99": round(1000 * quantile(heavy.results, 0.99), 1),
        "memory of the front, most MB more": mb(grown),
        "light edge": f"{len(light.results)} of {light.sent} in time",
        "afterwards, requests/s": round(after, 1),
    }
    held = alive and share >= 0.9 and grown <= 512e6 and heavy.late <= 0.01 * heavy.sent
    held = held and len(light.results) >= 0.9 * light.sent
    injected = {"requests/s": round(3 * peak, 1), "for s": seconds, "deadline s": 1.0}
    return Seen(injected, seen, held)


def data_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmData:\s+(\d+)", text)
    return int(found[1]) * 1024 if found else 0


def write_sized_bundle(
    directory: Path, dim: int, graph: bytes = b"not a graph", *, model: str = "sized"
) -> Path:
    """A bundle with one stack, the shapes of SAM and tokens of `dim` numbers. Without a `graph`,
    its engine must never be opened."""
    geometry = Geometry(
        image_size=1024, patch_size=16, window_size=14, embed_dim=dim, out_chans=256
    )
    side, tokens = geometry.window_pixels, geometry.tokens_per_window
    directory.mkdir()
    (directory / "stack.onnx").write_bytes(graph)
    files = {"stack.onnx": hash_file(directory / "stack.onnx")}
    inputs = (
        TensorSpec("pixels", "uint8", ("n", side, side, 3)),
        TensorSpec("extent", "int64", ("n", 2)),
        TensorSpec("window", "int64", ("n",)),
    )
    outputs = (TensorSpec("tokens", "float16", ("n", tokens, dim)),)
    stage = Stage("stack.onnx", files, stage_digest(files), inputs, outputs)
    manifest = Manifest(
        model=f"{model}-{dim}",
        geometry=geometry,
        order="reordered",
        adapted=False,
        precision="fp16",
        weights_sha256="0" * 64,
        stages={"stack": stage},
    )
    write_manifest(directory, manifest)
    return directory


def write_echoing_bundle(directory: Path) -> Path:
    """A bundle with the sizes of SAM ViT-B whose stack returns the pixels as tokens. Its answers
    are cheap and can be checked."""
    side, shape = 224, (196, 768)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["pixels", "shape"], ["flat"]),
            helper.make_node("Cast", ["flat"], ["tokens"], to=TensorProto.FLOAT16),
        ],
        "stack",
        [
            value("pixels", TensorProto.UINT8, ["n", side, side, 3]),
            value("extent", TensorProto.INT64, ["n", 2]),
            value("window", TensorProto.INT64, ["n"]),
        ],
        [value("tokens", TensorProto.FLOAT16, ["n", *shape])],
        [numpy_helper.from_array(np.array([-1, *shape]), "shape")],
    )
    opset = [helper.make_opsetid("", 18)]
    made = helper.make_model(graph, opset_imports=opset, ir_version=9)
    return write_sized_bundle(directory, shape[-1], made.SerializeToString(), model="echo")


def limited(
    most: int | None, kind: int = resource.RLIMIT_DATA
) -> Callable[..., subprocess.Popen[Any]]:
    """A command prefix that starts a process with a limit in bytes. None is no limit."""
    if most is None:
        return subprocess.Popen
    limit = functools.partial(resource.setrlimit, kind, (most, most))
    return functools.partial(subprocess.Popen, preexec_fn=limit)


@row(
    "low memory",
    "requests of ViT-B's size from 8 edges; started anew with data limited to 70 % of what the "
    "front took under them: it starts, sheds, gives right answers only, does not abort, and serves "
    "afterwards",
    short_s=120,
)
@running
async def low_memory(bench: Bench) -> Seen:
    bundle = write_echoing_bundle(bench.folder / "bundle")
    seconds = bench.pick(12.0, 60.0)
    free = await under_load(bundle, bench.fresh(), seconds, None)
    limit = int(0.7 * free["data"])
    found = await under_load(bundle, bench.fresh(), seconds, limit)
    told = {
        name: {what: mb(n) if what.startswith("data") else n for what, n in one.items()}
        for name, one in {"without a limit": free, "with it": found}.items()
    }
    held = all(
        one["alive"] and one["served afterwards"] and not one["wrong"] for one in (free, found)
    )
    held = held and bool(found["right"]) and bool(found["refused"].get("overloaded"))
    return Seen({"RLIMIT_DATA MB": mb(limit), "edges": _EDGES, "for s": seconds}, told, held)


@row(
    "too little memory to start",
    "data limited to 70 % of what a start takes: ends with a message, not by a signal",
)
def no_memory(bench: Bench) -> Seen:
    with bench.node() as node:
        limit = int(0.7 * data_bytes(node.pid))
        command = list(node.command)
    command[-1] = "tcp://127.0.0.1:0"
    with limited(limit)(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            _, text = started.communicate(timeout=40)
        finally:
            started.kill()
    said = next((line for line in text.splitlines() if line.startswith("error: ")), "")
    clear = started.returncode > 0 and said != ""
    return Seen({"RLIMIT_DATA MB": mb(limit)}, {"status": started.returncode, "said": said}, clear)


class _Edge:
    """Asks for all windows of an image and compares the answers."""

    def __init__(self, ctx: Any, node: NodeProcess, name: str, seed: int) -> None:
        stage, geometry = node.bundle.stage("stack"), node.bundle.geometry
        self._limits = stage_limits(stage.inputs, stage.outputs, geometry.windows)
        self._stage = stage.sha256
        known = node.node(node.authorise(name))
        self._socket = client(ctx, known.endpoint, known.server_key, known.keypair, self._limits)
        rng, side = np.random.default_rng(seed), geometry.window_pixels
        pixels = rng.integers(0, 256, (geometry.windows, side, side, 3), np.uint8)
        self._feeds = {
            "pixels": pixels,
            "extent": np.full((geometry.windows, 2), side),
            "window": np.arange(geometry.windows),
        }
        self._truth = pixels.reshape(geometry.windows, -1, geometry.embed_dim).astype(np.float16)
        self.right = self.wrong = self.sent = 0
        self.refused: collections.Counter[str] = collections.Counter()
        self._open: dict[bytes, asyncio.Future[None]] = {}
        self._seal = new_seal()  # nothing listens there
        self._heard: asyncio.Event | None = None

    async def ask(self, seconds: float) -> None:
        """Send one request and count its outcome, also if there was none (``lost``)."""
        id = new_id()
        self._open[id] = done = asyncio.get_running_loop().create_future()
        self.sent += 1
        try:
            if self._heard is None:  # an edge asks this before it sends anything large
                self._heard = asyncio.Event()
                await self._socket.send(encode(InfoRequest(new_id())))
            await asyncio.wait_for(self._heard.wait(), seconds)
            request = Request(id, self._stage, int(seconds * 1000), self._seal)
            frame = encode(request, self._feeds)
            await asyncio.wait_for(self._socket.send(frame, copy=False), seconds)
            await asyncio.wait_for(done, seconds)
        except asyncio.TimeoutError:
            self.refused["lost"] += 1
        finally:
            del self._open[id]

    async def read(self) -> None:
        while True:
            frame = await self._socket.recv(copy=False)
            message = decode_header(frame)
            if isinstance(message, Info):
                assert self._heard
                self._heard.set()
            done = self._open.get(getattr(message, "id", b""))
            if isinstance(message, Accepted) or done is None or done.done():
                continue
            if isinstance(message, Result):
                tokens = decode_tensors(message, frame, self._limits.result, self._seal)["tokens"]
                same = np.array_equal(tokens, self._truth)
                self.right += same
                self.wrong += not same
            elif isinstance(message, Refused):
                self.refused[message.code] += 1
            done.set_result(None)


async def under_load(
    bundle: Path, folder: Path, seconds: float, limit: int | None, *, edges: int = _EDGES
) -> dict[str, Any]:
    """Load a new node with many requests at once. Returns what its front used and did.

    Args:
        bundle: from `write_echoing_bundle`. folder: for the node.
        seconds: duration of the load.
        limit: on the node's data. None is no limit.
        edges: how many, each with as many requests at once as a node accepts.
    """
    ctx = zmq.asyncio.Context()
    tasks = []
    with NodeProcess(bundle, folder, popen=limited(limit)) as node:
        loads = [_Edge(ctx, node, f"edge{number}", number) for number in range(edges)]
        most = first = data_bytes(node.pid)
        until = time.monotonic() + seconds

        async def keep_asking(edge: _Edge) -> None:
            while node.running and time.monotonic() < until:
                await edge.ask(_PATIENCE_S)

        try:
            tasks = [asyncio.create_task(edge.read()) for edge in loads]
            asking = [
                asyncio.create_task(keep_asking(edge)) for edge in loads for _ in range(_AT_ONCE)
            ]
            while node.running and not all(task.done() for task in asking):
                most = max(most, data_bytes(node.pid) if node.running else 0)
                await asyncio.wait(asking, timeout=0.02)
            tasks += asking
            before = loads[0].right
            while node.running and loads[0].right == before and time.monotonic() < until + 30:
                await loads[0].ask(_PATIENCE_S)
            served = loads[0].right > before
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            ctx.destroy(linger=0)
        said = node.log.read_text(errors="replace")
        return {
            "data at start": first,
            "data": most,
            "sent": sum(edge.sent for edge in loads),
            "right": sum(edge.right for edge in loads),
            "wrong": sum(edge.wrong for edge in loads),
            "refused": dict(sum((edge.refused for edge in loads), collections.Counter[str]())),
            "connections dropped": len(re.findall(r"connection of \S+ .*dropped", said)),
            "bound anew": said.count("bound anew"),
            "alive": node.running and node.starts == 1,
            "served afterwards": served,
            "last words": "" if node.running else said.strip().splitlines()[-1][:200],
        }
