"""A server made of `transport` alone, as a process: authenticator, connection limits and an echo.

`EchoNode` starts it and asks for its counts. `Honest` is a well-behaved edge of it. Run by path, it
takes one argument, a JSON object: keys (folder), limits of messages, and changed connection limits.
It prints its endpoint, then its counts for every line on standard input.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import errno
import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from faults import zmtp
from faults.zmtp import Curve, Peer

from edge_common.memory_limits import MemoryLimits
from edge_common.process import raise_file_limit
from transport import peer_events, sockets
from transport.allow_list import AllowList
from transport.auth import KEY, Authenticator
from transport.dos_protection import Connections, connection_limits
from transport.keys import KeyPair, generate, load_secret, make_directory, write_public
from transport.messages import Limits, StageLimits

MIB = 1 << 20
REQUEST, RESULT = (3, 3 * MIB), (2, 2 * MIB)
LIMITS = StageLimits(Limits(*REQUEST), Limits(*RESULT))
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(folder) for folder in Path(__file__).parents[1:3]),
}


async def serve(options: dict[str, Any]) -> None:
    limits = StageLimits(Limits(*options["request"]), Limits(*options["result"]))
    most = connection_limits(
        limits.request, limits.result, backlog=sockets.BACKLOG, files=raise_file_limit()
    )
    connections = Connections(dataclasses.replace(most, **options.get("limits", {})))
    if not options.get("metered", True):
        connections.metered = False
    events: collections.Counter[str] = collections.Counter()
    refused: collections.Counter[str] = collections.Counter()
    revoked: list[str] = []
    peak = 0
    resident = MemoryLimits(group="").resident

    dropped: collections.Counter[str] = collections.Counter()

    def held() -> int:
        return int(sum(each.held for each in connections._open.values()))

    def on_revoked(names: frozenset[str]) -> None:
        revoked.extend(sorted(names))
        connections.drop({*names, ""}, "revoked")

    ctx = zmq.asyncio.Context()
    folder = Path(options["keys"])
    authenticator = Authenticator(
        ctx,
        AllowList(folder / "authorized"),
        on_revoked,
        connections=connections,
        on_refused=lambda reason: refused.update([reason]),
    )
    authenticator.start()
    key = load_secret(folder / "node.key")
    socket = sockets.server(ctx, "tcp://127.0.0.1:0", key, limits, monitor=True)

    async def follow() -> None:
        nonlocal peak
        async for event in peer_events.follow(socket, connections):
            events[event.kind] += 1
            if event.kind == "dropped":
                dropped[event.reason] += 1
            peak = max(peak, held())

    async def echo() -> None:
        async for frame, peer, surplus in sockets.received(socket, routed=True):
            connections.received(frame, peer)
            events["messages"] += 1
            events["surplus frames"] += surplus
            if authenticator.admits(*(str(frame.get(name)) for name in ("User-Id", KEY))):
                # Send the requested replies after the question: "3 1000" means three messages of
                # 1000 bytes.
                times, size = (int(n) for n in frame.bytes[:64].split()[:2])
                for _ in range(times):
                    answer = frame.bytes[:64] + bytes(size)
                    sent = socket.send_multipart([peer, answer], flags=zmq.NOBLOCK)
                    error = sent.exception()
                    if error is None:
                        connections.sent(len(answer), time.monotonic(), route=peer)
                    elif error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                        events["undelivered"] += 1
                    else:
                        raise error
            else:
                events["suppressed"] += 1
            await asyncio.sleep(0)

    work = (follow(),) if options.get("deaf") else (follow(), echo())
    tasks = [asyncio.create_task(each) for each in work]
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    say = lambda what: print(json.dumps(what), flush=True)  # noqa: E731
    say(socket.last_endpoint.decode())
    while await reader.readline():
        ended = [task for task in tasks if task.done()]
        say(
            {
                "events": events,
                "refused": refused,
                "dropped": dropped,
                "revoked": revoked,
                "connections": len(connections),
                "held": held(),
                "peak": peak,
                "rss": resident(),
                "broken": [repr(task.exception()) for task in ended],
            }
        )
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await authenticator.stop()
    ctx.destroy(linger=0)


class EchoNode:
    """A process that runs `echo_node`."""

    def __init__(self, folder: Path, files: int | None = None, **options: Any) -> None:
        self.folder = make_directory(folder)
        make_directory(folder / "authorized")
        self.key = generate(folder, "node")
        asked = {"keys": str(folder), "request": REQUEST, "result": RESULT, **options}

        def limit() -> None:
            if files:
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "log").open("wb"),
            preexec_fn=limit,
            env=ENVIRONMENT,
        )
        self.endpoint = self._read()
        self.address = zmtp.address_of(self.endpoint)

    def _read(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, self.log
        return json.loads(line)

    def stats(self) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        stats: dict[str, Any] = self._read()
        assert not stats["broken"], stats["broken"]
        return stats

    def wait_for(self, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        give_up = time.monotonic() + 60
        while not condition(stats := self.stats()):
            assert time.monotonic() < give_up, stats
            time.sleep(0.02)
        return stats

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def authorise(self, name: str) -> KeyPair:
        pair = generate(self.folder / "edges", name)
        write_public(self.folder / "authorized" / f"{name}.pub", pair.public, name)
        return pair

    async def peer(self, pair: KeyPair, **options: Any) -> Peer:
        """An edge that can send any bytes."""
        peer = await Peer.connect(self.address, **options)
        await peer.curve_client(Curve(pair.public, pair.secret, self.key.public))
        return peer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Honest:
    """An edge that sends question after question in a thread. `answers` counts."""

    def __init__(self, node: EchoNode, name: str = "honest") -> None:
        self.answers = 0
        self.failed: BaseException | None = None
        self._end = threading.Event()
        self._work = (node, node.authorise(name))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        node, pair = self._work
        with zmq.Context() as ctx:
            client = sockets.client(ctx, node.endpoint, node.key.public, pair, LIMITS)
            client.rcvtimeo = client.sndtimeo = 60_000
            try:
                while not self._end.is_set():
                    client.send(b"1 1000000 ".ljust(2 * MIB))
                    client.recv()
                    self.answers += 1
                    time.sleep(0.01)
            except BaseException as error:
                self.failed = error
            finally:
                client.close()

    def more(self, count: int) -> None:
        """Wait for this many more answers."""
        wanted = self.answers + count
        while self.answers < wanted:
            assert self.failed is None, self.failed
            time.sleep(0.005)

    def stop(self) -> None:
        self._end.set()
        self._thread.join(10)

    def close(self) -> None:
        """Stop, and check that there was no error."""
        self.stop()
        assert self.failed is None, self.failed
        assert not self._thread.is_alive()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(json.loads(sys.argv[1])))
