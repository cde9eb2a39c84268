"""Faulty nodes: they speak the real protocol over CURVE and misbehave as a policy says.

A `FaultyNode` runs the stack of a real bundle, so its honest answers are bit-equal to a real
node's. It asks its policy about every request; a policy is any function from an `Ask` to an `Act`.
The ``router`` wire is a real ROUTER made by :func:`transport.sockets.server`. The ``raw`` wire is a
`zmtp.Peer` per connection and can do more than libzmq: messages that never end, connections closed
in the middle of a message. Every act is counted and its effort bounded. Random choices follow from
the seed and the request's number.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import zmq
import zmq.asyncio

from edge_common.errors import ProtocolError
from edge_runtime.config import Node
from engines.bundle import Bundle, Stage, TensorSpec
from engines.ort import OrtEngine
from faults.background import Service, cancel_all
from faults.processes import Child
from faults.zmtp import Budget, Curve, Peer, PeerError, endless_multipart, frame
from transport.allow_list import AllowList
from transport.auth import Authenticator
from transport.keys import KeyPair, generate, load_secret, make_directory, write_public
from transport.messages import (
    VERSIONS,
    Accepted,
    Cancel,
    Info,
    InfoRequest,
    Request,
    Result,
    StageInfo,
    StageLimits,
    TensorInfo,
    VersionsSpoken,
    decode_header,
    decode_tensors,
    encode,
    new_id,
    new_seal,
    refuse,
    stage_limits,
)
from transport.sockets import server

Arrays = dict[str, np.ndarray]
Wire = Literal["router", "raw"]

Value = Literal["nan", "inf", "zeros", "norm", "shape", "dtype", "name", "batch", "forge"]
"""Wrong numbers: a NaN or an infinity; zeros; `factor` times the norm; a wrong dimension, type,
name or number of windows; `share` of the windows replaced by numbers with the same statistics."""
Shape = Literal[
    "wrong_id",
    "wrong_stage",
    "wrong_seal",
    "refuse",
    "truncated",
    "garbage",
    "version",
    "no_tensors",
    "info",
    "frames",
]
"""Wrong messages: an id that was not requested; a refusal because of another bundle; a result
sealed with another key; a refusal because of overload; a message shorter than declared; an invalid
header; an unknown version; a result without tensors; an answer of another type; a message of
several frames."""
Order = Literal["replay", "cross_frame", "cross_node", "duplicate", "reordered"]
"""Wrong time or place: an exact copy of an earlier answer; the numbers of an earlier answer, or of
another node's, under this id; the same answer twice; the result before its `accepted`."""
Pace = Literal["slow", "late", "stall", "accepted_only", "not_accepted", "never_read"]
"""Wrong speed: `factor` times as slow; after the deadline; no answer at all; only `accepted`; only
the result; no further reading for `delay_s` (0: forever)."""
Bytes = Literal["endless", "giant", "close_mid", "half"]
"""Wrong bytes: a result that never ends (raw); a frame of `size` bytes; RST in the middle of the
result (raw); half the result and then silence (raw)."""
Kind = Literal["honest"] | Value | Shape | Order | Pace | Bytes
KINDS: tuple[str, ...] = (
    "honest",
    *(kind for group in (Value, Shape, Order, Pace, Bytes) for kind in get_args(group)),
)
RAW_ONLY = frozenset({"endless", "close_mid", "half"})


@dataclass(frozen=True)
class Act:
    """The answer to one request.

    Args:
        kind: one of `KINDS`.
        delay_s: wait this long before the result; with ``late``, after the deadline.
        factor: for ``norm`` and ``slow``.
        share: of windows, for ``forge``.
        size: bytes that ``giant`` sends or ``endless`` may send.
        seconds: time limit for ``endless`` and ``half``.
    """

    kind: Kind = "honest"
    delay_s: float = 0.0
    factor: float = 10.0
    share: float = 1.0
    size: int = 16 << 20
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is no act; choose one of {', '.join(KINDS)}")


HONEST = Act()


@dataclass(frozen=True)
class Ask:
    """A request as the policy sees it. `number` counts this node's requests from 0."""

    number: int
    request: Request
    windows: tuple[int, ...]


Policy = Callable[[Ask], Act]


class Script:
    """The acts one by one, then `then` forever."""

    def __init__(self, *acts: Act | Kind, then: Act | Kind = HONEST) -> None:
        self._acts = [_act(act) for act in acts]
        self._then = _act(then)

    def __call__(self, ask: Ask) -> Act:
        return self._acts[ask.number] if ask.number < len(self._acts) else self._then


class Mix:
    """A random act per request, with the given weights. The rest of 1 is honest."""

    def __init__(self, weights: Mapping[Act | Kind, float], *, seed: int = 0) -> None:
        self._acts = [_act(act) for act in weights]
        self._weights = list(weights.values())
        if min(self._weights, default=0) < 0 or sum(self._weights) > 1 + 1e-9:
            raise ValueError("weights must not be negative, nor more than 1 in all")
        self._acts.append(HONEST)
        self._weights.append(max(0.0, 1 - sum(self._weights)))
        self._seed = seed

    def __call__(self, ask: Ask) -> Act:
        rng = random.Random(f"{self._seed}/{ask.number}")
        return rng.choices(self._acts, self._weights)[0]


def _act(act: Act | str) -> Act:
    return act if isinstance(act, Act) else Act(act)  # type: ignore[arg-type]


def policy_from(spec: Any) -> Policy:
    """A policy from JSON: ``"nan"``; ``{"kind": "forge", "share": 0.04}``; a list of these, whose
    last one repeats; ``{"mix": [[act, weight], ...], "seed": 1}``."""
    if isinstance(spec, Mapping) and "mix" in spec:
        return Mix({_parse(act): weight for act, weight in spec["mix"]}, seed=spec.get("seed", 0))
    listed = spec if isinstance(spec, list) else [spec]
    acts = [_parse(act) for act in listed]
    return Script(*acts[:-1], then=acts[-1])


def _parse(spec: Any) -> Act:
    return Act(**spec) if isinstance(spec, Mapping) else _act(spec)


class Pool:
    """Results that colluding nodes share. Give the same pool to all of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: dict[str, Arrays] = {}

    def put(self, name: str, outputs: Arrays) -> None:
        with self._lock:
            self._latest[name] = outputs

    def of_another(self, name: str) -> Arrays | None:
        with self._lock:
            return next((out for other, out in self._latest.items() if other != name), None)


class Channel(Protocol):
    """The way back to one edge."""

    async def send(self, frames: Sequence[Any]) -> bool:
        """Send a message. False if the edge has left or accepts nothing."""

    async def bytes(self, act: Act, frames: Sequence[Any]) -> None:
        """Perform an act of `Bytes`."""

    def stop_reading(self, seconds: float) -> None:
        """Stop reading. 0 seconds means forever."""


class FaultyNode(Service):
    """A node with the real protocol, in the caller's loop (``async with``) or its own thread.

    Args:
        bundle: the bundle whose stack it serves.
        folder: of its keys, ``node.key`` and ``authorized/``. Missing keys are made.
        policy: asked about every request. It may be replaced at any time.
        name: for the pool.
        wire: ``router`` (a real ROUTER) or ``raw`` (see the module docstring).
        bind: endpoint. Port 0 is any free port.
        service_s: added to the computing time. ``slow`` multiplies both.
        seed: of random choices.
        pool: shared with other nodes, for ``cross_node``.
        info_stage: the stage hash that Info claims. None is the true one.
        model: computed instead of the bundle's stack.

    Attributes:
        cancels: how often an edge cancelled a request.
        told: how often an edge sent its protocol versions.
        did: acts performed, by kind. Also ``garbage`` (unreadable messages) and ``fallback``
            (honest because there was nothing to replay).
        log: the last (request id, kind), oldest first.
        forged: windows forged. undelivered: messages that an edge did not accept.
        requests: number received. connections: number accepted, with ``raw``.
    """

    def __init__(
        self,
        bundle: Bundle,
        folder: Path,
        policy: Policy | Act | Kind = HONEST,
        *,
        name: str = "node",
        wire: Wire = "router",
        bind: str = "tcp://127.0.0.1:0",
        service_s: float = 0.0,
        seed: int = 0,
        pool: Pool | None = None,
        info_stage: str | None = None,
        model: Callable[[Arrays], Arrays] | None = None,
    ) -> None:
        self.bundle, self.stage = bundle, bundle.stage("stack")
        self.limits = stage_limits(self.stage.inputs, self.stage.outputs, bundle.geometry.windows)
        self.folder, self.name, self.wire = Path(folder), name, wire
        self.allowed = make_directory(make_directory(self.folder) / "authorized")
        secret = self.folder / "node.key"
        self.keypair = load_secret(secret) if secret.exists() else generate(self.folder, "node")
        self.policy: Policy = policy if callable(policy) else Script(then=policy)
        self.endpoint = bind
        self.did: collections.Counter[str] = collections.Counter()
        self.log: collections.deque[tuple[bytes, str]] = collections.deque(maxlen=100_000)
        self.requests = self.cancels = self.told = self.forged = self.undelivered = (
            self.connections
        ) = 0
        self._service_s, self._seed = service_s, seed
        self._pool = pool or Pool()
        self._info_stage = info_stage or self.stage.sha256
        self._model = model
        self._sent: collections.deque[tuple[list[Any], Arrays]] = collections.deque(maxlen=8)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closers: list[Callable[[], Awaitable[None] | None]] = []

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.endpoint.removeprefix("tcp://").rpartition(":")
        return host, int(port)

    def authorise(self, name: str = "edge", folder: Path | None = None) -> KeyPair:
        """A new authorised key pair, written to `folder` (default: beside the node's own keys)."""
        return _authorise(self.allowed, name, folder or self.folder / "edges")

    def node(self, pair: KeyPair, *, endpoint: str | None = None) -> Node:
        """This node in an edge's configuration. `endpoint` is that of a proxy before it."""
        return Node(self.name, endpoint or self.endpoint, self.keypair.public, pair)

    async def _start(self) -> None:
        if self._model is None:
            engine = OrtEngine(self.bundle.stage_path("stack"), threads=1, device="cpu")
            self._closers.append(engine.close)
            self._model = engine.run
        self._engine = asyncio.Lock()
        await (self._start_router() if self.wire == "router" else self._start_raw())

    async def _stop(self) -> None:
        await cancel_all(list(self._tasks))
        for close in reversed(self._closers):
            done = close()
            if done is not None:
                await done
        self._closers.clear()

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.did["defect"] += 1
            print(f"{self.name}: {error!r}", file=sys.stderr)

    async def _start_router(self) -> None:
        ctx = zmq.asyncio.Context()
        self._closers.append(lambda: ctx.destroy(linger=0))
        authenticator = Authenticator(ctx, AllowList(self.allowed))
        authenticator.start()
        self._closers.append(authenticator.stop)
        socket = server(ctx, self.endpoint, self.keypair, self.limits)
        self._closers.append(lambda: socket.close(linger=0))
        self.endpoint = socket.last_endpoint.decode()
        self._spawn(_Router(self, socket).read())

    async def _start_raw(self) -> None:
        host, port = self.address
        listener = await asyncio.start_server(self._greet, host, port, limit=4096)
        self.endpoint = "tcp://{}:{}".format(*listener.sockets[0].getsockname()[:2])
        self._closers.append(listener.close)

    def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._spawn(self._converse(Peer(reader, writer)))

    async def _converse(self, peer: Peer) -> None:
        async with peer:
            with contextlib.suppress(
                PeerError, OSError, asyncio.IncompleteReadError, asyncio.TimeoutError
            ):
                await peer.curve_server(Curve(self.keypair.public, self.keypair.secret))
                channel = _Raw(self, peer)
                while True:
                    await channel.reading.wait()
                    self.take(channel, await peer.read_message())

    def take(self, channel: Channel, frames: Sequence[Any]) -> None:
        """Handle one message of an edge."""
        try:
            message = decode_header(frames[0])
            if isinstance(message, InfoRequest):
                self._spawn(self._send(channel, [encode(self.info(message))]))
                return
            if isinstance(message, Cancel):  # a node may still answer, and this one does
                self.cancels += 1
                return
            if isinstance(message, VersionsSpoken):
                self.told += 1
                return
            if not isinstance(message, Request):
                raise ProtocolError("not for a node")
            feeds = decode_tensors(message, frames[0], self.limits.request)
        except ProtocolError:
            self.did["garbage"] += 1
            return
        ask = Ask(self.requests, message, tuple(feeds["window"].tolist()))
        self.requests += 1
        act = self.policy(ask)
        if act.kind in RAW_ONLY and self.wire != "raw":
            raise ValueError(f"{act.kind} needs wire='raw': libzmq holds unfinished messages back")
        self.log.append((message.id, act.kind))
        self._spawn(self._answer(channel, ask, act, feeds))

    async def _answer(self, channel: Channel, ask: Ask, act: Act, feeds: Arrays) -> None:
        loop, kind, request = asyncio.get_running_loop(), act.kind, ask.request
        arrived = loop.time()
        rng = np.random.default_rng([self._seed, ask.number])
        self.did[kind] += 1
        if kind == "never_read":
            channel.stop_reading(act.delay_s)
        if kind in ("stall", "never_read"):
            return
        if kind == "refuse":
            await self._send(channel, [encode(refuse(request.id, "overloaded", "go away"))])
            return
        if kind == "wrong_stage":
            text = "this node serves another stack"
            await self._send(channel, [encode(refuse(request.id, "wrong_bundle", text))])
            return
        if kind not in ("not_accepted", "reordered"):
            await self._send(channel, [encode(Accepted(request.id))])
        if kind == "accepted_only":
            return
        async with self._engine:
            started = loop.time()
            assert self._model is not None
            outputs = self._model(feeds)
            factor = act.factor if kind == "slow" else 1.0
            if pause := self._service_s * factor:
                await asyncio.sleep(pause)
            took = loop.time() - started
        times = (round((started - arrived) * 1e6), round(took * 1e6))
        if kind == "late":
            # The deadline was rounded down to whole milliseconds. Wait a little longer to be late
            # for sure.
            due = arrived + request.deadline_ms / 1000 + 0.05
            await asyncio.sleep(max(0.0, due - loop.time()))
        if act.delay_s:
            await asyncio.sleep(act.delay_s)
        earlier = self._sent[-1] if self._sent else None
        self._sent.append(([encode(Result(request.id, *times), outputs, request.seal)], outputs))
        frames = self._frames(ask, act, outputs, times, earlier, rng)
        self._pool.put(self.name, outputs)
        if kind in get_args(Bytes):
            await channel.bytes(act, frames)
            return
        await self._send(channel, frames)
        if kind == "duplicate":
            await self._send(channel, frames)
        if kind == "reordered":
            await self._send(channel, [encode(Accepted(request.id))])

    def _frames(
        self,
        ask: Ask,
        act: Act,
        outputs: Arrays,
        times: tuple[int, int],
        earlier: tuple[list[Any], Arrays] | None,
        rng: np.random.Generator,
    ) -> list[Any]:
        """The frames of the result, true or false."""
        kind, result = act.kind, Result(ask.request.id, *times)
        if kind in get_args(Value):
            outputs, forged = falsify(outputs, self.stage.outputs, act, rng)
            self.forged += forged
        elif kind == "wrong_id":
            result = Result(new_id(), *times)
        elif kind == "no_tensors":
            return [encode(result)]
        elif kind == "info":
            return [encode(self.info(InfoRequest(ask.request.id)))]
        elif kind in ("replay", "cross_frame"):
            if earlier is None:
                self.did["fallback"] += 1
            elif kind == "replay":
                return earlier[0]
            else:
                outputs = earlier[1]
        elif kind == "cross_node":
            theirs = self._pool.of_another(self.name)
            if theirs is None:
                self.did["fallback"] += 1
            else:
                outputs = theirs
        seal = new_seal() if kind == "wrong_seal" else ask.request.seal
        whole = bytes(encode(result, outputs, seal))
        if kind == "truncated":
            whole = whole[:-4]
        elif kind == "garbage":
            whole = rng.bytes(64) + whole[64:]
        elif kind == "version":
            whole = b"ERT\xfe" + whole[4:]
        return [whole, b""] if kind == "frames" else [whole]

    async def _send(self, channel: Channel, frames: Sequence[Any]) -> None:
        if not await channel.send(frames):
            self.undelivered += 1

    def info(self, message: InfoRequest) -> Info:
        sides = [
            tuple(TensorInfo(s.name, s.dtype, s.shape) for s in specs)
            for specs in (self.stage.inputs, self.stage.outputs)
        ]
        served = StageInfo(self._info_stage, f"{self.bundle.manifest.model} faulty", *sides)
        return Info(message.id, VERSIONS, (served,), "faulty node")


class _Router:
    """The reader of the real ROUTER, and the channels to its peers."""

    def __init__(self, node: FaultyNode, socket: Any) -> None:
        self.node, self.socket = node, socket
        self.reading = asyncio.Event()
        self.reading.set()

    async def read(self) -> None:
        while True:
            await self.reading.wait()
            peer, *frames = await self.socket.recv_multipart()
            if frames:
                self.node.take(_RouterChannel(self, peer), frames)
            await asyncio.sleep(0)


class _RouterChannel:
    def __init__(self, router: _Router, peer: bytes) -> None:
        self.router, self.peer = router, peer

    async def send(self, frames: Sequence[Any]) -> bool:
        try:
            await self.router.socket.send_multipart([self.peer, *frames], flags=zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    async def bytes(self, act: Act, frames: Sequence[Any]) -> None:
        assert act.kind == "giant"  # the other acts need the raw wire
        await self.send([bytes(act.size)])

    def stop_reading(self, seconds: float) -> None:
        self.router.reading.clear()
        if seconds:
            asyncio.get_running_loop().call_later(seconds, self.router.reading.set)


class _Raw:
    """The channel to one edge on the raw wire."""

    def __init__(self, node: FaultyNode, peer: Peer) -> None:
        self.node, self.peer = node, peer
        self.reading = asyncio.Event()
        self.reading.set()

    async def send(self, frames: Sequence[Any]) -> bool:
        try:
            await self.peer.send_message(frames)
        except OSError:
            return False
        return True

    async def bytes(self, act: Act, frames: Sequence[Any]) -> None:
        peer = self.peer
        parts = [bytes(part) for part in frames]
        with contextlib.suppress(OSError):
            if act.kind == "endless":
                part = min(1 << 16, self.node.limits.result.total_bytes)
                budget = Budget(bytes=act.size, seconds=act.seconds)
                await endless_multipart(peer, part_bytes=part, opening=parts, budget=budget)
            elif act.kind == "giant":
                await peer.send(frame(bytes(min(act.size, 4096)), declared=act.size, long=True))
            else:
                sealed = peer.seal(parts[0])
                await peer.send(sealed[: len(sealed) // 2])
                if act.kind == "close_mid":
                    await asyncio.sleep(0.01)  # wait for the bytes to arrive: RST overtakes them
                    peer.abort()
                else:
                    await asyncio.sleep(act.seconds)

    def stop_reading(self, seconds: float) -> None:
        self.reading.clear()
        if seconds:
            asyncio.get_running_loop().call_later(seconds, self.reading.set)


def falsify(
    outputs: Arrays, specs: Sequence[TensorSpec], act: Act, rng: np.random.Generator
) -> tuple[Arrays, int]:
    """Outputs changed by an act of `Value`, and the number of forged windows.

    Args:
        outputs: honest ones with leading dimension n. They are not modified.
        specs: of the stage, which distinguish bfloat16 from uint16.
        act: see `Value`.
        rng: chooses places and windows.
    """
    dtypes = {spec.name: spec.dtype for spec in specs}
    name, honest = next(iter(outputs.items()))
    bf16 = dtypes[name] == "bfloat16"
    values = _widen(honest) if bf16 else honest.copy()
    forged = 0
    if act.kind in ("nan", "inf"):
        values.flat[int(rng.integers(values.size))] = np.nan if act.kind == "nan" else np.inf
    elif act.kind == "zeros":
        values[:] = 0
    elif act.kind == "norm":
        values *= values.dtype.type(act.factor)
    elif act.kind == "shape":
        values = values[..., :-1]
    elif act.kind == "batch":
        values = np.concatenate([values, values[:1]])
    elif act.kind == "forge":
        # The same numbers with tokens in another order: no statistic of a window shows it.
        chosen = np.flatnonzero(rng.random(len(values)) < act.share)
        shift = int(rng.integers(1, values.shape[1]))
        values[chosen] = np.roll(values[chosen], shift, axis=1)
        forged = len(chosen)
    if act.kind == "dtype":
        changed = values.astype(np.float16 if honest.dtype != np.float16 else np.float32)
    else:
        changed = _narrow(values) if bf16 else values
    told = f"{name}_" if act.kind == "name" else name
    others = {other: array for other, array in outputs.items() if other != name}
    return {told: np.ascontiguousarray(changed), **others}, forged


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


class NodeProcess(Child):
    """A node in its own process, which can be killed, frozen and restarted on the same port.

    Args:
        bundle: folder of the bundle to serve.
        folder: of its keys, ready file and log. An earlier node's folder can be reused.
        policy: as in `policy_from`, for a `FaultyNode`. None starts a real ``cloud-node serve``.
        bind: endpoint. Port 0 is any free port. Restarts keep the port.
        options: more arguments of the command.
        program: replaces ``cloud-node``.
        wait, popen: see `Child`.

    Attributes:
        ready: the content of its ready file.
    """

    def __init__(
        self,
        bundle: Path,
        folder: Path,
        *,
        policy: Any = None,
        bind: str = "tcp://127.0.0.1:0",
        options: Sequence[str] = (),
        program: Sequence[str] = (sys.executable, "-m", "cloud_node.cli"),
        wait: bool = True,
        popen: Callable[..., Any] = subprocess.Popen,
    ) -> None:
        self.ready: dict[str, Any] = {}
        self.bundle = Bundle.load(bundle)
        self.folder = make_directory(folder)
        self.allowed = make_directory(self.folder / "authorized")
        secret = self.folder / "node.key"
        self.keypair = load_secret(secret) if secret.exists() else generate(self.folder, "node")
        self.endpoint = bind
        self.ready_file = self.folder / "ready.json"
        if policy is None:
            command = [*program, "serve", "--threads", "1", "--log-level", "debug"]
            command += ["--keys", str(self.folder)]
        else:
            command = [sys.executable, "-m", "faults.nodes", "--policy", json.dumps(policy)]
            command += ["--folder", str(self.folder)]
        command += ["--bundle", str(bundle), "--ready-file", str(self.ready_file), *options]
        paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        super().__init__(
            [*command, "--bind", bind],
            log=self.folder / "log",
            ready=self._is_ready,
            wait=wait,
            popen=popen,
            environment={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
        )

    @property
    def stage(self) -> Stage:
        return self.bundle.stage("stack")

    @property
    def limits(self) -> StageLimits:
        return stage_limits(self.stage.inputs, self.stage.outputs, self.bundle.geometry.windows)

    def authorise(self, name: str = "edge", folder: Path | None = None) -> KeyPair:
        """A new authorised key pair, written to `folder` (default: beside the node's own keys)."""
        return _authorise(self.allowed, name, folder or self.folder / "edges")

    def workers(self) -> list[int]:
        """The pids of its child processes."""
        found: list[int] = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(pid) for pid in (task / "children").read_text().split()]
        return found

    @contextlib.contextmanager
    def stopped(self) -> Iterator[int]:
        """Freeze its only worker inside the block, unless the worker is killed."""
        give_up = time.monotonic() + 60
        while len(found := self.workers()) != 1:
            assert time.monotonic() < give_up, found
            time.sleep(0.01)
        os.kill(found[0], signal.SIGSTOP)
        try:
            yield found[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(found[0], signal.SIGCONT)

    def node(self, pair: KeyPair, *, name: str = "node", endpoint: str | None = None) -> Node:
        """This node in an edge's configuration. `endpoint` is that of a proxy before it."""
        return Node(name, endpoint or self.endpoint, self.keypair.public, pair)

    def start(self, *, wait: bool = True) -> None:
        if not self.running:
            self.ready_file.unlink(missing_ok=True)  # left by a killed process
        super().start(wait=wait)

    def _is_ready(self) -> bool:
        try:
            self.ready = json.loads(self.ready_file.read_text())
        except (OSError, ValueError):
            return False
        self.endpoint = self.command[-1] = self.ready["endpoint"]
        return True


def _authorise(allowed: Path, name: str, folder: Path) -> KeyPair:
    pair = generate(folder, name)
    write_public(allowed / f"{name}.pub", pair.public, name)
    return pair


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m faults.nodes``: one node in its own process, which can be killed and frozen."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--folder", required=True, type=Path, help="its keys")
    parser.add_argument("--bind", default="tcp://127.0.0.1:0")
    parser.add_argument("--ready-file", required=True, type=Path)
    parser.add_argument("--policy", type=json.loads, default="honest", help="JSON")
    parser.add_argument("--wire", choices=get_args(Wire), default="router")
    parser.add_argument("--name", default="node")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--service-s", type=float, default=0.0)
    options = parser.parse_args(arguments)

    async def work() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        async with FaultyNode(
            Bundle.load(options.bundle),
            options.folder,
            policy_from(options.policy),
            name=options.name,
            wire=options.wire,
            bind=options.bind,
            service_s=options.service_s,
            seed=options.seed,
        ) as node:
            ready = {"endpoint": node.endpoint, "public_key": node.keypair.public}
            scratch = options.ready_file.with_suffix(".new")
            scratch.write_text(json.dumps({**ready, "pid": os.getpid()}))
            scratch.replace(options.ready_file)
            await stop.wait()
            print(json.dumps({"did": node.did, "forged": node.forged}), flush=True)

    asyncio.run(work())


if __name__ == "__main__":
    main()
