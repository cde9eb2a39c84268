"""Rows about floods: messages of one key, and connections that never finish their handshake."""

from __future__ import annotations

import asyncio
import resource
import statistics
import time
from pathlib import Path
from typing import Any

from faults.asking import connected
from faults.floods import ConnectionFlood, Kind, MessageFlood
from faults.processes import Sampler, sample
from faults.proxy import Proxy

from reliability.rows import Bench, Questions, Seen, Skip, mb, row, running
from reliability.throughput import sided

EDGES = 4
_KEPT = 95.0  # percent
_MEMORY = 100e6
_NEWCOMERS, _ROUND_TRIP_S, _WITHIN_S = 20, 0.2, 5.0
CASES = {
    "1,000 a second from one address": ("127.0.0.2", 1, 1000.0),
    "1,000 a second from 200 addresses": ("127.0.1.1", 200, 1000.0),
    "1,000 a second from their own address": ("127.0.0.1", 1, 1000.0),
    "3,000 a second from 200 addresses": ("127.0.1.1", 200, 3000.0),
}
"""Half-open connections: the first address they come from, how many there are, and the rate."""


def message_flood(
    bench: Bench,
    bundle: Path,
    kind: Kind,
    *,
    rounds: int,
    seconds: float,
    connections: int = 1,
    windows: int = 1,
    limit: int | None = None,
) -> Seen:
    """One key floods a node while honest edges load it. After its first second the flood is stopped
    and continued in turns, so that a busy machine affects both sides of each comparison.

    Args:
        bundle: served without an engine.
        kind, connections, windows: see `MessageFlood`.
        rounds: of the flood stopped and continued, each for `seconds`.
        limit: on the node's data, in bytes.
    """
    with sided(bench, bundle, "serve", EDGES, limit=limit) as side:
        node = side.node
        pair = node.authorise("hostile")
        side.measure(0.5, keep=False)
        before = sample(node.pid).rss
        # Per round: honest requests per second, and the front's milliseconds per request.
        calm: list[tuple[float, float]] = []
        flooded: list[tuple[float, float]] = []

        def measure(into: list[tuple[float, float]]) -> None:
            side.measure(seconds)
            into.append((side.rates[-1], side.cpu_ms["front"][-1]))

        with (
            Sampler(node.pid, every_s=0.05) as sampler,
            MessageFlood(
                bench.fresh("flood"),
                node.endpoint,
                node.keypair.public,
                pair,
                kind,
                bundle=bundle,
                windows=windows,
                connections=connections,
            ) as flood,
        ):
            side.measure(1.0)
            first = side.rates[-1]
            for _ in range(rounds):
                flood.stop()
                measure(calm)
                flood.cont()
                measure(flooded)
            told = flood.told()
        side.measure(seconds)
        alive = node.running and node.starts == 1
        logged = side.logged()
    kept = [100 * one[0] / other[0] for one, other in zip(flooded, calm, strict=True)]
    cost = [100 * one[1] / other[1] - 100 for one, other in zip(flooded, calm, strict=True)]
    grown = sampler.peak_rss - before
    seen = {
        "honest requests/s, flood stopped": round(statistics.median(rate for rate, _ in calm), 1),
        "flood going on": round(statistics.median(rate for rate, _ in flooded), 1),
        "share kept, %": round(statistics.median(kept), 1),
        "CPU of the front for each, % more": round(statistics.median(cost), 1),
        "in the flood's first second, requests/s": round(first, 1),
        "honest requests lost": side.lost,
        "honest requests refused": dict(side.refused),
        "flood: messages sent": told.get("sent", 0),
        "flood: connections": told.get("connections", 0),
        "flood: times kept out": logged.count("hostile is kept out"),
        "bound anew": logged.count("bound anew"),
        "memory of the front, most MB more": mb(grown),
        "node lived": alive,
    }
    held = alive and statistics.median(kept) >= _KEPT and grown <= _MEMORY
    held = held and not side.lost and not side.refused and not seen["bound anew"]
    held = held and seen["flood: times kept out"] > 0
    injected: dict[str, Any] = {
        "messages": kind,
        "connections at once": connections,
        "honest edges": EDGES,
        "rounds": rounds,
        "seconds each": seconds,
    }
    return Seen(injected, seen, held)


_BAR = (
    "after its first second, one key that floods costs honest edges less than 5 % of their "
    "throughput and, from the start, no request; memory <= +100 MB"
)


@row("flood of small messages", _BAR, short_s=120, long_s=900)
def small_messages(bench: Bench) -> Seen:
    rounds, seconds = bench.pick((20, 0.5), (100, 1.0))
    return message_flood(bench, bench.toy, "cancel", rounds=rounds, seconds=seconds)


@row(
    "flood of requests", f"16 connections, data limited to 250 MiB: {_BAR}", short_s=180, long_s=900
)
def requests(bench: Bench) -> Seen:
    rounds, seconds = bench.pick((20, 0.5), (100, 1.0))
    return message_flood(
        bench,
        bench.toy,
        "request",
        rounds=rounds,
        seconds=seconds,
        connections=16,
        limit=250 << 20,
    )


@row(
    "newcomers under half-open connections",
    "1,000 half-open connections a second from one address, from 200 or from the newcomers' own, "
    "and 3,000 from 200: 20 newcomers with a round trip of 200 ms are all served within 5 s, one "
    "that was connected stays so",
    short_s=180,
)
@running
async def newcomers(bench: Bench) -> Seen:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 16_384:
        raise Skip(f"a process may have {hard} descriptors; this takes 16,384")
    seen: dict[str, Any] = {}
    held = True
    for name, case in CASES.items():
        found = await edges_join(bench, case, bench.pick(1, 10))
        seen[name] = found
        held = held and found["served"] == found["newcomers"]
        held = held and found["served after s, worst"] <= _WITHIN_S
        held = held and found["connected edge: answered"] == found["connected edge: asked"] > 0
        held = held and found["memory, most MB more"] <= 1e-6 * _MEMORY
    injected = {"round trip ms": 1000 * _ROUND_TRIP_S, "descriptors allowed": hard}
    return Seen(injected, seen, held)


async def edges_join(bench: Bench, case: tuple[str, int, float], times: int) -> dict[str, Any]:
    """`times` new edges with a long network delay connect and ask, while half-open connections
    arrive as in one of `CASES` and another edge keeps asking."""
    first, addresses, rate = case
    old, new = Questions(bench), Questions(bench)
    took: list[float] = []
    with bench.node() as node:

        async def come(endpoint: str) -> None:
            edge = bench.edge(node, endpoint=endpoint)
            begun = time.monotonic()
            async with connected(edge, bench.bundle) as client:
                await new.until_right(client, 30)
                took.append(time.monotonic() - begun)

        async with Proxy(node.endpoint) as proxy, connected(bench.edge(node), bench.bundle) as edge:
            for flow in (proxy.up, proxy.down):
                flow.set(latency_s=_ROUND_TRIP_S / 2)
            await old.until_right(edge, 20)
            before = sample(node.pid).rss
            with (
                Sampler(node.pid, every_s=0.05) as sampler,
                ConnectionFlood(
                    bench.fresh("flood"),
                    node.endpoint,
                    node.keypair.public,
                    rate=rate,
                    addresses=(first, addresses),
                ) as flood,
            ):
                await asyncio.sleep(4)  # by now libzmq gives up the first of them
                async with old.going_on(edge):
                    for _ in range(times):
                        tasks = []
                        for _ in range(_NEWCOMERS):
                            tasks.append(asyncio.create_task(come(proxy.endpoint)))
                            await asyncio.sleep(0.1)
                        await asyncio.wait(tasks, timeout=30)
                        for task in tasks:
                            task.cancel()
                        await asyncio.gather(*tasks, return_exceptions=True)
                told = flood.told()
    return {
        "newcomers": times * _NEWCOMERS,
        "served": len(took),
        "served after s, worst": round(max(took, default=0.0), 2),
        "connected edge: asked": old.asked,
        "connected edge: answered": old.right,
        "half-open connections": told["connections"],
        "open at once": told["open"],
        "memory, most MB more": mb(sampler.peak_rss - before),
    }
