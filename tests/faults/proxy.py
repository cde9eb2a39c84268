"""A TCP proxy that simulates network faults between an edge and a node.

Each direction (`Proxy.up` from client to server, `Proxy.down` back) is a `Flow` with its own
latency, jitter, rate, slicing, black hole and cut. They may change while bytes pass. Bytes that
arrive are complete and in order. Random choices follow from the seed and the byte's position in its
stream, never from the kernel's chunks. At most ``buffer_bytes`` wait per connection and direction;
then the proxy stops reading, so TCP slows down the sender. Leaving the context closes every socket
and task.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import random
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from faults.background import Service, cancel_all

T = TypeVar("T")
_CHUNK = 16 * 1024
_CONNECT_S = 5.0


@dataclass(frozen=True)
class Cut:
    """Ends a connection at a byte of one direction.

    Args:
        after: the number of bytes of the direction that are passed on, counted from the
            connection's start. A connection beyond it is cut at its next byte.
        how: ``reset`` (RST to both ends) or ``fin`` (FIN to the receiver). After ``fin`` the other
            direction works on and further bytes of the sender are discarded.
        times: how many connections are cut. None is all of them.
    """

    after: int
    how: Literal["reset", "fin"] = "reset"
    times: int | None = 1


@dataclass(frozen=True)
class Faults:
    """Faults of one direction. The default has none.

    Args:
        latency_s: from reading to writing.
        jitter_s: a random extra latency up to this, per chunk. Order is kept.
        rate: bytes per second of all connections together. None is unlimited.
        burst: bytes that may pass at once after a pause.
        slices: write pieces of 1 to this many bytes. None keeps the chunks.
        slice_gap_s: pause after each piece. Without it the receiver's kernel may join them.
        black_hole: read and discard. Such a stream can't continue: see `Proxy.black_hole`.
        cut: see `Cut`.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    rate: float | None = None
    burst: int = 32 * 1024
    slices: int | None = None
    slice_gap_s: float = 0.0
    black_hole: bool = False
    cut: Cut | None = None

    def __post_init__(self) -> None:
        if min(self.latency_s, self.jitter_s, self.slice_gap_s) < 0:
            raise ValueError("times must not be negative")
        if (self.rate is not None and self.rate <= 0) or self.burst < 1:
            raise ValueError("rate and burst must be positive")
        if (self.slices is not None and self.slices < 1) or (self.cut and self.cut.after < 0):
            raise ValueError("slices must be at least 1, and cut.after at least 0")


class Flow:
    """One direction of all connections: its faults and its counts.

    Attributes:
        read: bytes read from senders.
        passed: bytes written to receivers.
        dropped: bytes discarded by a black hole or after a cut.
        pieces: number of writes.
        cuts: connections cut at a byte.
    """

    def __init__(self, name: str, run: Callable[[Callable[[], Any]], Any]) -> None:
        self.name = name
        self.faults = Faults()
        self.read = self.passed = self.dropped = self.pieces = self.cuts = 0
        self._run = run
        self._cuts_left: int | None = None
        self._free_at = 0.0

    def set(self, **changes: Any) -> None:
        """Change some faults, at once and for open connections too: ``up.set(latency_s=0.05)``."""
        self._put(dataclasses.replace(self.faults, **changes))

    def clear(self) -> None:
        """Remove all faults."""
        self._put(Faults())

    def _put(self, faults: Faults) -> None:
        def put() -> None:
            if faults.cut is not self.faults.cut:
                self._cuts_left = faults.cut.times if faults.cut else None
            if faults.rate != self.faults.rate:
                self._free_at = 0.0
            self.faults = faults

        self._run(put)

    def _cut_at(self) -> int | None:
        """The byte at which a connection is cut, if any."""
        return self.faults.cut.after if self.faults.cut and self._cuts_left != 0 else None

    def _count_cut(self) -> None:
        self.cuts += 1
        if self._cuts_left:
            self._cuts_left -= 1

    def _reserve(self, size: int, now: float) -> float:
        """When a piece of `size` bytes may pass. A token bucket, stored as the time at which it is
        full."""
        faults = self.faults
        if faults.rate is None:
            return now
        start = max(self._free_at, now - faults.burst / faults.rate)
        self._free_at = start + size / faults.rate
        return max(now, self._free_at)


class _Pipe:
    """One direction of one connection: a reader, a bounded queue of (due, bytes), a writer."""

    def __init__(
        self, link: _Link, flow: Flow, source: socket.socket, sink: socket.socket, seed: str
    ) -> None:
        self.link, self.flow, self.source, self.sink = link, flow, source, sink
        self.sent = 0
        self.deaf = False  # half-closed by a call or a cut: discard further bytes
        self.holed = False  # a black hole took bytes: nothing may follow them
        self._jitter = random.Random(f"{seed}/jitter")
        self._sizes = random.Random(f"{seed}/slices")
        self._boundary = 0
        self._queue: collections.deque[tuple[float, bytes]] = collections.deque()
        self._queued = 0
        self._ended = False
        self._error: OSError | None = None
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Run until the source has ended and all of its bytes were passed on."""
        reading = asyncio.create_task(self._read())
        try:
            await self._write()
        finally:
            await cancel_all([reading])

    def half_close(self) -> None:
        """Send FIN to the receiver now and discard the waiting bytes."""
        if not self.deaf:
            self.deaf = True
            with contextlib.suppress(OSError):
                self.sink.shutdown(socket.SHUT_WR)
            self._changed.set()

    async def _read(self) -> None:
        proxy, flow = self.link.proxy, self.flow
        loop, due = asyncio.get_running_loop(), 0.0
        try:
            while True:
                while self._queued >= proxy.buffer_bytes:
                    await self._wait()
                await proxy.thawed.wait()
                data = await loop.sock_recv(self.source, _CHUNK)
                if not data:
                    return
                flow.read += len(data)
                faults = flow.faults
                if faults.black_hole:
                    self.holed = True
                if self.holed or self.deaf:
                    flow.dropped += len(data)
                    continue
                extra = self._jitter.uniform(0, faults.jitter_s) if faults.jitter_s else 0.0
                due = max(due, loop.time() + faults.latency_s + extra)
                self._queue.append((due, data))
                self._queued += len(data)
                self._changed.set()
        except OSError as error:
            self._error = error
        finally:
            self._ended = True
            self._changed.set()

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._queue:
                if self._ended:
                    if self._error:
                        raise self._error
                    if not self.deaf and not self.holed:
                        self.half_close()
                    return
                await self._wait()
            due, data = self._queue[0]
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            await self._pass_on(data)
            self._queue.popleft()
            self._queued -= len(data)
            self._changed.set()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _pass_on(self, data: bytes) -> None:
        proxy, flow = self.link.proxy, self.flow
        loop, start = asyncio.get_running_loop(), 0
        while start < len(data):
            await proxy.thawed.wait()
            faults = flow.faults
            if faults.black_hole:
                self.holed = True
            if self.deaf or self.holed:
                flow.dropped += len(data) - start
                return
            size = len(data) - start
            if faults.slices:
                while self._boundary <= self.sent:
                    self._boundary += self._sizes.randint(1, faults.slices)
                size = min(size, self._boundary - self.sent)
            if faults.rate is not None:
                # Short waits, so that a change of the rate soon takes effect.
                size = min(size, faults.burst, max(1, int(faults.rate / 20)))
            cut = flow._cut_at()
            if cut is not None:
                size = min(size, max(0, cut - self.sent))
            if size:
                wait = flow._reserve(size, loop.time()) - loop.time()
                if wait > 0:
                    await asyncio.sleep(wait)
                await loop.sock_sendall(self.sink, data[start : start + size])
                start += size
                self.sent += size
                flow.passed += size
                flow.pieces += 1
            if cut is not None and self.sent >= cut and flow.faults.cut:
                flow._count_cut()
                if flow.faults.cut.how == "fin":
                    self.half_close()
                else:
                    self.link.reset()
                    await asyncio.sleep(3600)  # until the cancellation in the next turn
            elif faults.slices:
                await asyncio.sleep(faults.slice_gap_s)


class _Link:
    """One client's connection and the matching one to the target."""

    def __init__(self, proxy: Proxy, number: int, near: socket.socket) -> None:
        self.proxy, self.number, self.near = proxy, number, near
        self.far: socket.socket | None = None
        self.pipes: dict[str, _Pipe] = {}
        self.was_reset = False
        self.task = asyncio.create_task(self._run(), name=f"proxy-{number}")
        self.task.add_done_callback(self._close)

    def reset(self) -> None:
        """Send RST to both ends in the loop's next turn."""
        self.was_reset = True
        self.task.cancel()

    async def _run(self) -> None:
        try:
            self.far = await self._connect()
            seed = f"{self.proxy.seed}/{self.number}"
            for flow, source, sink in (
                (self.proxy.up, self.near, self.far),
                (self.proxy.down, self.far, self.near),
            ):
                pipe = _Pipe(self, flow, source, sink, f"{seed}/{flow.name}")
                self.pipes[flow.name] = pipe
            tasks = [asyncio.create_task(pipe.run()) for pipe in self.pipes.values()]
            try:
                await asyncio.gather(*tasks)
            finally:
                await cancel_all(tasks)
        except OSError:
            self.was_reset = True  # one end broke off: break off the other too

    def _close(self, task: asyncio.Task[None]) -> None:
        # Not in the task: a task that is cancelled before its first step runs no code.
        self.proxy.resets += self.was_reset
        for end in (self.near, self.far):
            if end is not None:
                if self.was_reset:
                    _linger_zero(end)
                end.close()
        self.proxy._links.discard(self)

    async def _connect(self) -> socket.socket:
        proxy, loop = self.proxy, asyncio.get_running_loop()
        await proxy.passing.wait()
        await proxy.thawed.wait()
        family = socket.AF_INET6 if ":" in proxy.target[0] else socket.AF_INET
        far = socket.socket(family, socket.SOCK_STREAM)
        try:
            far.setblocking(False)
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connecting = asyncio.create_task(loop.sock_connect(far, proxy.target))
            try:
                # Not wait_for: before Python 3.12 it may swallow the cancellation by a reset.
                if not (await asyncio.wait({connecting}, timeout=_CONNECT_S))[0]:
                    raise TimeoutError(f"{proxy.target} does not answer")
                connecting.result()
            finally:
                await cancel_all([connecting])
        except BaseException:
            far.close()
            raise
        return far


class Proxy(Service):
    """Listens on a free port of ``127.0.0.1`` and forwards to `target`, with faults.

    ``async with Proxy(target)`` runs in the caller's loop, ``with Proxy(target)`` in its own
    thread. In both cases any thread may call the methods, and they have acted when they return.

    Args:
        target: ``(host, port)``, or an endpoint like ``tcp://127.0.0.1:5555``.
        seed: of all random choices.
        buffer_bytes: limit on waiting bytes per connection and direction, exceeded by at most one
            chunk of 16 KiB. It must hold rate times latency.
        max_connections: further connections are reset on arrival.

    Attributes:
        up, down: the two directions.
        connections: number accepted. resets: ended by RST. shed: beyond the limit.
    """

    def __init__(
        self,
        target: tuple[str, int] | str,
        *,
        seed: int = 0,
        buffer_bytes: int = 1 << 20,
        max_connections: int = 4096,
    ) -> None:
        if isinstance(target, str):
            host, _, port = target.removeprefix("tcp://").rpartition(":")
            target = (host.strip("[]"), int(port))
        self.target = target
        self.seed = seed
        self.buffer_bytes = buffer_bytes
        self.max_connections = max_connections
        self.up, self.down = Flow("up", self._call), Flow("down", self._call)
        self.connections = self.resets = self.shed = 0
        self.address: tuple[str, int] = ("127.0.0.1", 0)
        self._links: set[_Link] = set()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    @property
    def endpoint(self) -> str:
        """The endpoint to use instead of the target's: ``tcp://127.0.0.1:PORT``."""
        return f"tcp://{self.address[0]}:{self.address[1]}"

    @property
    def open(self) -> int:
        """The number of open connections."""
        return len(self._links)

    def freeze(self) -> None:
        """Hold all bytes until `thaw`, when they all arrive, as after a restored route."""
        self._call(lambda: self.thawed.clear())

    def thaw(self) -> None:
        self._call(lambda: self.thawed.set())

    def black_hole(self, on: bool, *, then: Literal["reset", "silent"] = "reset") -> None:
        """Accept everything, including connections, and pass nothing on in either direction.

        After the end, new connections work. Connections that lost bytes are reset or, with
        ``then="silent"``, stay dead.
        """

        def switch() -> None:
            for flow in (self.up, self.down):
                flow.faults = dataclasses.replace(flow.faults, black_hole=on)
            if on:
                self.passing.clear()
                return
            self.passing.set()
            for link in list(self._links):
                if then == "reset" and any(pipe.holed for pipe in link.pipes.values()):
                    link.reset()

        self._call(switch)

    def refuse(self, on: bool) -> None:
        """Refuse new connections (ECONNREFUSED) or listen again on the same port."""
        self._call(self._unlisten if on else self._listen)

    def reset_all(self) -> int:
        """Send RST to both ends of every connection. Returns how many there were."""

        def reset() -> int:
            links = list(self._links)
            for link in links:
                link.reset()
            return len(links)

        return self._call(reset)

    def half_close(self, direction: Literal["up", "down"]) -> int:
        """Send FIN in one direction of every connection. The receiver sees the end of the stream
        and the other direction continues. Returns how many connections there were."""

        def close() -> int:
            pipes = [link.pipes[direction] for link in self._links if direction in link.pipes]
            for pipe in pipes:
                pipe.half_close()
            return len(pipes)

        return self._call(close)

    def _listen(self) -> None:
        if self._listener is not None:
            return
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(self.address)
        listener.listen(1024)
        self.address = listener.getsockname()
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept(listener), name="proxy-accept")

    def _unlisten(self) -> None:
        if self._listener is None or self._accepting is None:
            return
        asyncio.get_running_loop().remove_reader(self._listener)
        self._accepting.cancel()
        self._listener.close()
        self._listener = self._accepting = None

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                near, _ = await loop.sock_accept(listener)
            except OSError:  # no descriptors left: some will be freed
                await asyncio.sleep(0.05)
                continue
            self.connections += 1
            if len(self._links) >= self.max_connections:
                self.shed += 1
                _linger_zero(near)
                near.close()
                continue
            near.setblocking(False)
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._links.add(_Link(self, self.connections, near))

    async def _start(self) -> None:
        self.thawed, self.passing = asyncio.Event(), asyncio.Event()
        self.thawed.set()
        self.passing.set()
        self._listen()

    async def _stop(self) -> None:
        self._unlisten()
        await cancel_all(link.task for link in list(self._links))


def _linger_zero(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def random_cuts(
    seed: int, count: int, most: int, how: Literal["reset", "fin"] = "reset"
) -> Iterator[tuple[Literal["up", "down"], Cut]]:
    """`count` cuts at random bytes below `most` of a random direction, one after another."""
    rng = random.Random(f"{seed}/cuts")
    for _ in range(count):
        side: Literal["up", "down"] = "up" if rng.random() < 0.5 else "down"
        yield side, Cut(rng.randrange(most), how)
