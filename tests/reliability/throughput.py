"""Rows about throughput: a node whose engine does nothing, beside two bare sockets with the same
security.

Without an engine, the cost of a request is the node's own: byte accounting, admission, queue, the
copy into shared memory, the worker's turn, the result. `main` runs the processes. ``serve`` is a
real node without the engine. ``bare`` is a ROUTER with the same options, keys and authenticator
that answers every message with frames of a result's sizes, unread. ``edge`` loads either one with
the same requests. Node and bare ROUTER take turns in short windows, because the speed of a shared
machine varies.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zmq
import zmq.asyncio
from faults.nodes import NodeProcess
from faults.processes import Sampler, children_of, sample
from faults.proxy import Proxy

from cloud_node.config import load, prepare
from cloud_node.pool import LocalPool
from cloud_node.server import Server
from edge_common.process import keep_freed_memory
from engines.bundle import Bundle, TensorSpec
from engines.geometry import Geometry
from reliability.load import Load, limited, write_sized_bundle
from reliability.rows import Bench, Seen, mb, row, running
from transport.allow_list import AllowList
from transport.auth import Authenticator
from transport.keys import KeyPair
from transport.messages import (
    HEADER_BYTES,
    InfoRequest,
    Refused,
    Request,
    Result,
    decode_header,
    encode,
    new_id,
    new_seal,
    stage_limits,
)
from transport.sockets import client, server

EDGES = (1, 16)
IN_FLIGHT = 3
"""Concurrent requests of one edge, each with all windows of an image."""
_RAMP_S = 0.4
_LOST_S = 8.0
_SHARE, _KEPT = 80.0, 90.0  # percent
_SLOW = 12
_MAIN = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); import reliability.throughput as t; t.main()"
)


def _whole(specs: Sequence[TensorSpec], geometry: Geometry) -> dict[str, np.ndarray]:
    """All windows of an image, made of noise: compressible zeros would distort the result."""
    rng = np.random.default_rng(0)
    arrays = {}
    for spec in specs:
        shape = tuple(d if isinstance(d, int) else geometry.windows for d in spec.shape)
        arrays[spec.name] = rng.integers(0, 200, shape).astype(spec.numpy_dtype)
    if "window" in arrays:
        arrays["window"] = np.arange(geometry.windows)
        arrays["extent"] = np.full((geometry.windows, 2), geometry.window_pixels)
    return arrays


# The processes


async def _serve(options: argparse.Namespace) -> None:
    """A node as ``cloud-node serve`` makes it, without the engine."""
    settings = {"bundle": options.bundle, "keys": options.keys, "bind": options.bind}
    prepared = prepare(load(None, {**settings, "ready_file": options.ready_file}).config)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await Server(prepared, LocalPool(prepared.bundle, noop=True)).run(stop)


def _bare(options: argparse.Namespace) -> None:
    """A ROUTER in a plain loop. Only ZAP has its own thread."""
    prepared = prepare(load(None, {"bundle": options.bundle, "keys": options.keys}).config)
    ctx = zmq.asyncio.Context()
    started = threading.Event()

    async def authenticate() -> None:
        Authenticator(ctx, AllowList(options.keys / "authorized")).start()
        started.set()
        await asyncio.Event().wait()

    threading.Thread(target=asyncio.run, args=(authenticate(),), daemon=True).start()
    started.wait()
    plain: Any = zmq.Context.shadow(ctx.underlying)
    socket = server(plain, options.bind, prepared.keypair, prepared.limits)
    outputs = _whole(prepared.stage.outputs, prepared.bundle.geometry)
    reply = encode(Result(new_id(), 1, 1), outputs, new_seal())
    ready = {"endpoint": socket.last_endpoint.decode(), "pid": os.getpid()}
    scratch = options.ready_file.with_suffix(".new")
    scratch.write_text(json.dumps(ready))
    scratch.replace(options.ready_file)
    while True:
        peer, *_ = socket.recv_multipart(copy=False)
        socket.send_multipart([peer.bytes, reply], copy=False)


class _Load:
    """Edges in one process, each with its own key and connection."""

    def __init__(self, told: dict[str, Any]) -> None:
        bundle = Bundle.load(told["bundle"])
        stage = bundle.stage("stack")
        self._limits = stage_limits(stage.inputs, stage.outputs, bundle.geometry.windows)
        self._stage, self._feeds = stage.sha256, _whole(stage.inputs, bundle.geometry)
        self._size = self._limits.result.total_bytes
        self._told, self._ctx, self._poller = told, zmq.Context(), zmq.Poller()
        self._sockets = [self._connect(*keys) for keys in told["keys"]]

    def _connect(self, public: str, secret: str) -> Any:
        told, pair = self._told, KeyPair("edge", public, secret)
        socket = client(self._ctx, told["endpoint"], told["public"], pair, self._limits)
        socket.set(zmq.SNDTIMEO, round(_LOST_S * 1000))
        if told["asks"]:  # an edge asks this before it sends anything large
            socket.send(encode(InfoRequest(new_id())))
            socket.recv()
        self._poller.register(socket, zmq.POLLIN)
        return socket

    def run(self, seconds: float) -> dict[str, Any]:
        """Load for `seconds`, after a ramp. Returns the results that arrived in that time."""
        began = time.monotonic()
        begin, end = began + _RAMP_S, began + _RAMP_S + seconds
        open_ = dict.fromkeys(self._sockets, 0)
        refused: collections.Counter[str] = collections.Counter()
        results = every = 0
        for socket, _ in itertools.product(self._sockets, range(IN_FLIGHT)):
            self._ask(socket)
            open_[socket] += 1
        while any(open_.values()):
            ready = self._poller.poll(_LOST_S * 1000)
            if not ready:
                break
            for socket, _ in ready:
                frame = socket.recv(copy=False)
                now = time.monotonic()
                if len(frame) >= self._size:  # no other message is as long
                    assert len(frame) - self._size < HEADER_BYTES
                    results += begin <= now < end
                    every += 1
                else:
                    message = decode_header(frame)
                    if not isinstance(message, Refused):
                        continue
                    refused[message.code] += 1
                if now < end:
                    self._ask(socket)
                else:
                    open_[socket] -= 1
        lost = sum(open_.values())
        for number, socket in enumerate(self._sockets):
            if open_[socket]:  # late answers belong to no later run
                self._poller.unregister(socket)
                socket.close()
                self._sockets[number] = self._connect(*self._told["keys"][number])
        return {"results": results, "all": every, "refused": refused, "lost": lost}

    def _ask(self, socket: Any) -> None:
        request = Request(new_id(), self._stage, 60_000, new_seal())
        socket.send(encode(request, self._feeds), copy=False)


def _edge() -> None:
    """Read the node to load from the first line of stdin, and the seconds from each following
    line."""
    load_ = _Load(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        print(json.dumps(load_.run(float(line))), flush=True)


# The rows


class _Side:
    """A node, real or bare, and the edges that load it.

    Attributes:
        rates: results per second, by window. cpu_ms: of the processes per request, by window.
        refused, lost: requests without a result.
        node: the node's process.
    """

    def __init__(self, node: NodeProcess, edge: subprocess.Popen[str]) -> None:
        self.rates: list[float] = []
        self.cpu_ms: dict[str, list[float]] = collections.defaultdict(list)
        self.refused: collections.Counter[str] = collections.Counter()
        self.lost = 0
        self.node, self._edge = node, edge

    def measure(self, seconds: float, *, keep: bool = True) -> None:
        before = self._cpu_s()
        assert self._edge.stdin
        assert self._edge.stdout
        print(seconds, file=self._edge.stdin, flush=True)
        told = json.loads(self._edge.stdout.readline())
        after = self._cpu_s()
        if not keep:
            return
        self.rates.append(told["results"] / seconds)
        for name, used in after.items():
            self.cpu_ms[name].append(1000 * (used - before[name]) / max(1, told["all"]))
        self.refused.update(told["refused"])
        self.lost += told["lost"]

    def logged(self) -> str:
        """The node's output so far."""
        return self.node.log.read_text(errors="replace")

    def _cpu_s(self) -> dict[str, float]:
        used = {"front": sample(self.node.pid).cpu_s, "edges": sample(self._edge.pid).cpu_s}
        if workers := children_of(self.node.pid):
            used["worker"] = sum(sample(pid).cpu_s for pid in workers)
        return used

    def told(self, bytes_each: int) -> dict[str, Any]:
        rate = statistics.median(self.rates)
        return {
            "requests/s": round(rate, 1),
            "MB/s": round(rate * bytes_each / 1e6),
            "CPU ms/request": {n: round(statistics.median(v), 1) for n, v in self.cpu_ms.items()},
            **({"refused": dict(self.refused)} if self.refused else {}),
            **({"lost": self.lost} if self.lost else {}),
        }


def _command(role: str) -> list[str]:
    # The parent may have the tests on its path in a way that children do not inherit.
    return [sys.executable, "-c", _MAIN, str(Path(__file__).parents[1]), role]


def in_this_role(role: str, limit: int | None = None) -> Callable[..., subprocess.Popen[bytes]]:
    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return limited(limit)([*_command(role), *command[4:]], **options)

    return start


@contextmanager
def sided(
    bench: Bench, bundle: Path, role: str, edges: int, *, limit: int | None = None
) -> Iterator[_Side]:
    """A node (``serve`` or ``bare``) of `bundle` and one process with the given number of edges to
    load it. `limit`: on the node's data, in bytes."""
    with bench.node(bundle=bundle, popen=in_this_role(role, limit)) as node:
        pairs = [node.authorise(f"edge{number}") for number in range(edges)]
        edge = subprocess.Popen(
            _command("edge"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert edge.stdin
            told = {
                "bundle": str(bundle),
                "endpoint": node.endpoint,
                "public": node.keypair.public,
                "asks": role == "serve",
                "keys": [(pair.public, pair.secret) for pair in pairs],
            }
            print(json.dumps(told), file=edge.stdin, flush=True)
            yield _Side(node, edge)
        finally:
            edge.kill()
            edge.wait()


def _shares(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Percentages of values measured in the same round."""
    return [100 * a / b if b else 0.0 for a, b in zip(ours, theirs, strict=True)]


def _spread(shares: Sequence[float]) -> dict[str, float]:
    found = {"median": statistics.median(shares), "least": min(shares), "most": max(shares)}
    return {name: round(value, 1) for name, value in found.items()}


def _compare(bench: Bench, dim: int) -> Seen:
    bundle_path = write_sized_bundle(bench.folder / "bundle", dim)
    bundle = Bundle.load(bundle_path)
    stage, windows = bundle.stage("stack"), bundle.geometry.windows
    limits = stage_limits(stage.inputs, stage.outputs, windows)
    sizes = limits.request.total_bytes, limits.result.total_bytes
    rounds, seconds = bench.pick((5, 1.5), (15, 6.0))
    sides: dict[tuple[str, int], _Side] = {}
    with ExitStack() as stack:
        for edges in EDGES:
            for role in ("serve", "bare"):
                sides[role, edges] = stack.enter_context(sided(bench, bundle_path, role, edges))
        for side in sides.values():
            side.measure(0.3, keep=False)
        for number in range(rounds):
            order = list(sides.values())
            for side in order if number % 2 else reversed(order):
                side.measure(seconds)
    seen: dict[str, Any] = {}
    held = True
    for edges in EDGES:
        ours, theirs = sides["serve", edges], sides["bare", edges]
        share = _spread(_shares(ours.rates, theirs.rates))
        held = held and share["median"] >= _SHARE and not ours.refused and not ours.lost
        seen[f"{edges} edge{'s' * (edges > 1)}"] = {
            "share of bare, %": share,
            "node": ours.told(sum(sizes)),
            "bare": theirs.told(sum(sizes)),
        }
    few, many = EDGES
    kept = {
        name: _spread(_shares(sides[role, many].rates, sides[role, few].rates))
        for name, role in (("node", "serve"), ("bare", "bare"))
    }
    seen[f"{many} edges of {few}, %"] = kept
    held = held and kept["node"]["median"] >= _KEPT
    injected = {
        "windows a request": windows,
        "bytes in": sizes[0],
        "bytes out": sizes[1],
        "in flight, each edge": IN_FLIGHT,
        "rounds": rounds,
        "seconds each": seconds,
    }
    return Seen(injected, seen, held)


_BAR = (
    "a node without an engine moves >= 80 % of what two bare sockets with the same security do; "
    "16 edges together get >= 90 % of what one gets"
)


@row("throughput, ViT-B windows", _BAR, short_s=180, long_s=1800)
def vit_b(bench: Bench) -> Seen:
    return _compare(bench, 768)


@row("throughput, ViT-H windows", _BAR, short_s=180, long_s=1800)
def vit_h(bench: Bench) -> Seen:
    return _compare(bench, 1280)


@row(
    "slow readers",
    "edges that read 20 kB/s and ask for more than the node may hold: its memory is bounded, none "
    "of an honest edge's requests is lost and none takes 10 s",
    short_s=120,
    long_s=900,
)
@running
async def slow_readers(bench: Bench) -> Seen:
    path = write_sized_bundle(bench.folder / "bundle", 768)
    bundle, seconds = Bundle.load(path), bench.pick(30.0, 300.0)
    windows, each = bundle.geometry.windows, 20_000
    ctx = zmq.asyncio.Context()
    with bench.node(bundle=path, popen=in_this_role("serve")) as node:
        async with Proxy(node.endpoint) as proxy:
            proxy.down.set(rate=float(each * _SLOW))
            slow = [
                Load(
                    ctx,
                    node.node(node.authorise(f"slow{n}"), endpoint=proxy.endpoint),
                    bundle,
                    windows,
                )
                for n in range(_SLOW)
            ]
            honest = Load(ctx, node.node(node.authorise("honest")), bundle, windows)
            tasks = [asyncio.create_task(load.read()) for load in (*slow, honest)]
            try:
                await honest.closed(1, 1)
                honest.results.clear()
                honest.sent = 0
                before = sample(node.pid).rss
                with Sampler(node.pid, every_s=0.05) as sampler:
                    tasks += [
                        asyncio.create_task(load.at(5.0, seconds, 3600.0, wait=False))
                        for load in slow
                    ]
                    await asyncio.sleep(2)
                    await honest.closed(seconds - 2, 1, deadline_s=60.0)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                ctx.destroy(linger=0)
        alive = node.running and node.starts == 1
        dropped = node.log.read_text(errors="replace").count("or too slowly")
    grown = sampler.peak_rss - before
    seen = {
        "honest edge: asked": honest.sent,
        "answered": len(honest.results),
        "longest s": round(max(honest.results, default=0.0), 2),
        "slow edges: sent": sum(load.sent for load in slow),
        "warned of, at most once a minute each": dropped,
        "memory of the front, most MB more": mb(grown),
        "node lived": alive,
    }
    held = alive and honest.sent == len(honest.results) > 0
    held = held and max(honest.results) <= 10 and grown <= 1 << 30
    return Seen({"slow edges": _SLOW, "bytes/s each": each, "for s": seconds}, seen, held)


def main() -> None:
    parser = argparse.ArgumentParser("reliability.throughput")
    parser.add_argument("role", choices=("serve", "bare", "edge"))
    for name in ("bundle", "keys", "ready-file"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--bind")
    options, _ = parser.parse_known_args()  # the others are options of cloud-node
    logging.basicConfig(level=logging.INFO)
    keep_freed_memory()  # like cloud-node
    if options.role == "serve":
        asyncio.run(_serve(options))
    elif options.role == "bare":
        _bare(options)
    else:
        _edge()


if __name__ == "__main__":
    main()
