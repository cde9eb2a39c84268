"""A server of `transport` alone, as a process: authenticator, meter and monitor, and an echo.

Run by path with one argument, JSON: keys (folder), limits, and what differs of the bounds. Prints
its endpoint, then says on request (one line on standard input) what it counted.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import errno
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from transport import meter as metering
from transport import sockets
from transport.auth import AllowList, Authenticator
from transport.keys import load_secret
from transport.messages import Limits, StageLimits
from transport.process import raise_file_limit


async def serve(options: dict[str, Any]) -> None:
    limits = StageLimits(Limits(*options["request"]), Limits(*options["result"]))
    bounds = metering.bounds(
        limits.request,
        limits.result,
        hwm=sockets.receive_mark(limits.request),
        files=raise_file_limit(),
    )
    meter = metering.Meter(dataclasses.replace(bounds, **options.get("bounds", {})))
    if not options.get("metered", True):
        meter.metered = False
    events: collections.Counter[str] = collections.Counter()
    revoked: list[str] = []
    held = peak = 0
    resident = metering.Resident()

    def on_revoked(names: frozenset[str]) -> None:
        revoked.extend(sorted(names))
        events.update(f"dropped {b.reason}" for b in meter.revoke(names))

    ctx = zmq.asyncio.Context()
    folder = Path(options["keys"])
    authenticator = Authenticator(ctx, AllowList(folder / "authorized"), on_revoked)
    authenticator.start()
    socket = sockets.server(ctx, "tcp://127.0.0.1:0", load_secret(folder / "node.key"), limits)

    async def follow() -> None:
        nonlocal held, peak
        async for event in sockets.peers(socket, meter):
            events[f"{event.kind} {event.reason}".strip()] += 1
            held = meter.held()
            peak = max(peak, held)

    async def echo() -> None:
        while True:
            frames = await socket.recv_multipart(copy=False)
            meter.delivered(frames, routed=True)
            peer, *parts = frames
            events["messages"] += 1
            if authenticator.admits(str(parts[0].get("User-Id"))):
                # What is asked for, as often as is asked: "3 1000" is three messages of 1000 bytes.
                times, size = (int(n) for n in parts[0].bytes.split()[:2])
                for _ in range(times):
                    answer = [parts[0].bytes, bytes(size)]
                    sent = socket.send_multipart([peer.bytes, *answer], flags=zmq.NOBLOCK)
                    error = sent.exception()
                    if error is None:
                        meter.handed(answer, time.monotonic(), route=peer.bytes)
                    elif error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                        events["undelivered"] += 1
                    else:
                        raise error
            else:
                events["suppressed"] += 1
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(work) for work in (follow(), echo())]
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
                "refused": authenticator.refused,
                "dropped": meter.dropped,
                "revoked": revoked,
                "connections": len(meter),
                "held": meter.held(),
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


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(json.loads(sys.argv[1])))
