"""Rows of too much work and too little memory."""

from __future__ import annotations

import asyncio
import collections
import functools
import re
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import zmq
import zmq.asyncio
from faults.processes import Sampler, sample

from edge_runtime.config import Node
from engines.bundle import Bundle, shipped_bundle
from reliability.rows import Bench, Seen, mb, quantile, row, running
from transport.messages import (
    Accepted,
    Refused,
    Request,
    Result,
    decode_header,
    encode,
    new_id,
    stage_limits,
)
from transport.sockets import client


class Load:
    """Requests of one edge, sent without waiting for one another.

    Attributes:
        results: in time, with the seconds each took. late: results after their deadline. refused:
            by code. ages: of refusals after `accepted`, seconds.
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

    @property
    def open(self) -> int:
        return len(self._due)

    async def send(self, deadline_s: float) -> None:
        id, now = new_id(), time.monotonic()
        request = Request(id, self.stage, int(deadline_s * 1000))
        self._due[id] = (now, now + deadline_s)
        self.sent += 1
        await self.socket.send_multipart(encode(request, self.feeds), copy=False)

    async def read(self) -> None:
        while True:
            frames = await self.socket.recv_multipart(copy=False)
            message = decode_header(frames[0])
            if isinstance(message, Accepted):
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
        """Keep `most` requests open, then wait for the last; results a second.

        Raises:
            asyncio.TimeoutError: some are never answered.
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
        """Send `rate` requests a second, come what may; results in time a second. Then `wait` for
        what is still open."""
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
    share = 2 * goodput / (peak + after)  # of before and after: a shared machine has its moods
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


def _data_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmData:\s+(\d+)", text)
    return int(found[1]) * 1024 if found else 0


@row(
    "low memory",
    "once it serves, data limited to 70 % of what the front grew by under the same load: it sheds "
    "or drops, does not abort, and serves afterwards",
    short_s=90,
)
@running
async def low_memory(bench: Bench) -> Seen:
    seconds = bench.pick(4.0, 60.0)
    free = await _under_load(bench, seconds, None)
    limit = free["data at start"] + int(0.7 * (free["data"] - free["data at start"]))
    found = await _under_load(bench, seconds, limit)
    told = {
        name: {what: mb(n) if what.startswith("data") else n for what, n in one.items()}
        for name, one in {"without a limit": free, "with it": found}.items()
    }
    held = bool(found["alive"] and found["served afterwards"])
    return Seen({"RLIMIT_DATA MB": mb(limit)}, told, held)


@row(
    "too little memory to start",
    "data limited to 70 % of what a start takes: ends with a message, not by a signal",
)
def no_memory(bench: Bench) -> Seen:
    with bench.node() as node:
        limit = int(0.7 * _data_bytes(node.pid))
        command = list(node.command)
    set_limit = functools.partial(resource.setrlimit, resource.RLIMIT_DATA, (limit, limit))
    command[-1] = "tcp://127.0.0.1:0"
    done = subprocess.run(
        command, preexec_fn=set_limit, capture_output=True, text=True, timeout=40, check=False
    )
    last = (done.stderr.strip().splitlines() or [""])[-1]
    clear = done.returncode > 0 and bool(last)
    return Seen({"RLIMIT_DATA MB": mb(limit)}, {"status": done.returncode, "said": last}, clear)


async def _under_load(bench: Bench, seconds: float, limit: int | None) -> dict[str, Any]:
    """Many requests at once of four edges, and what the front used and did."""
    ctx = zmq.asyncio.Context()
    bundle_path = shipped_bundle()
    bundle = Bundle.load(bundle_path)
    readers = []
    with bench.node(bundle=bundle_path) as node:

        def edge(name: str, windows: int) -> Load:
            load = Load(ctx, node.node(node.authorise(name)), bundle, windows)
            readers.append(asyncio.create_task(load.read()))
            return load

        loads = [edge(f"heavy{number}", bundle.geometry.windows) for number in range(4)]
        # What the first answer brings with it (pyzmq starts threads then) belongs to the start.
        await loads[0].closed(0.5, 1)
        warm = len(loads[0].results)
        most = first = _data_bytes(node.pid)
        if limit:
            resource.prlimit(node.pid, resource.RLIMIT_DATA, (limit, limit))
        try:
            sending = {
                asyncio.create_task(load.at(100.0, seconds, 60.0, wait=False)) for load in loads
            }
            while node.running and not all(task.done() for task in sending):
                most = max(most, _data_bytes(node.pid) if node.running else 0)
                await asyncio.wait(sending, timeout=0.05)
            answered = sum(len(load.results) for load in loads) - warm
            refused = sum((load.refused for load in loads), collections.Counter[str]())
            again = edge("after", 1)
            readers += sending  # ended below, in case they wait for a node that is no more
            readers.append(asyncio.create_task(again.send(30.0)))
            until = time.monotonic() + 30
            while node.running and not again.results and time.monotonic() < until:
                await asyncio.sleep(0.05)
            said = node.log.read_text(errors="replace").strip().splitlines()[-1]
        finally:
            for task in readers:
                task.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            ctx.destroy(linger=0)
        return {
            "data at start": first,
            "data": most,
            "sent": sum(load.sent for load in loads),
            "answered": answered,
            "refused": dict(refused),
            "alive": node.running and node.starts == 1,
            "served afterwards": bool(again.results),
            "last words": "" if node.running else said[:200],
        }
