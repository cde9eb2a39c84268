"""Rows about the network, and about processes that start and end."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time

import zmq.asyncio
from faults.asking import connected
from faults.processes import Netns, Sample, Sampler, children_of, random_plan, run_plan, sample
from faults.proxy import Proxy, random_cuts

from edge_runtime.config import Node
from edge_runtime.offload.connection import Connection
from engines.bundle import Bundle, shipped_bundle
from reliability.load import Load
from reliability.rows import (
    Bench,
    Questions,
    Seen,
    Skip,
    mb,
    ms,
    quantile,
    row,
    running,
)

HEARTBEAT_S = 1.0 + 3.0
"""Interval and timeout of a small stage's links, see `transport.sockets`."""
MOST_BACKOFF_S = 10.0


async def _lost(client: Connection, within_s: float) -> float | None:
    """Seconds until the client knows that its link is down."""
    begun = time.monotonic()
    while time.monotonic() - begun < within_s:
        if client.link is not None and client.link.state != "up":
            return time.monotonic() - begun
        await asyncio.sleep(0.001)
    return None


@row(
    "node killed in the middle of a request",
    "every answer identical or a typed error; noticed within 50 ms; served again after the restart",
)
@running
async def killed(bench: Bench) -> Seen:
    questions, noticed, rng = Questions(bench), [], random.Random(1)
    kills = bench.pick(6, 200)
    with bench.node() as node:
        async with connected(bench.edge(node), bench.bundle) as client:
            for _ in range(kills):
                await questions.until_right(client, 30)
                async with questions.going_on(client, client, seconds=2, pause_s=0):
                    await asyncio.sleep(rng.uniform(0, 0.05))
                    node.signal(signal.SIGKILL)
                    noticed.append(await _lost(client, 10) or 10.0)
                await asyncio.to_thread(node.restart)
            back = await questions.until_right(client, 30)
    seen = {
        **questions.told(),
        "noticed ms, median": ms(quantile(noticed, 0.5)),
        "noticed ms, worst": ms(max(noticed)),
        "served again after s": round(back, 2),
    }
    return Seen({"SIGKILL": kills}, seen, not questions.wrong and max(noticed) <= 0.05)


@row(
    "worker killed in the middle of a request",
    "every answer identical or a typed refusal; the node lives and serves again by itself",
    long_s=1800,
)
@running
async def worker_killed(bench: Bench) -> Seen:
    questions, rng, kills = Questions(bench), random.Random(2), bench.pick(5, 20)
    back = []
    with bench.node() as node:
        front = node.pid
        async with connected(bench.edge(node), bench.bundle) as client:
            for _ in range(kills):
                await questions.until_right(client, 30)
                workers = children_of(front)
                if not workers:
                    raise Skip("this node computes in its own process")
                async with questions.going_on(client, client, seconds=5, pause_s=0):
                    await asyncio.sleep(rng.uniform(0, 0.05))
                    os.kill(min(workers), signal.SIGKILL)
                    await asyncio.sleep(0.05)
                back.append(await questions.until_right(client, 60))
        alive = node.running and node.pid == front
    seen = {**questions.told(), "refusals": dict(questions.failed), "back, worst s": max(back)}
    seen["back, worst s"] = round(max(back), 2)
    seen["front lived"] = alive
    return Seen({"SIGKILL of the worker": kills}, seen, alive and not questions.wrong)


@row(
    "node frozen",
    f"noticed within {1.2 * HEARTBEAT_S:.1f} s (heartbeat + timeout + 20 %); no wrong answer; "
    "served again after SIGCONT",
)
@running
async def frozen(bench: Bench) -> Seen:
    questions, noticed, back = Questions(bench), [], []
    times = bench.pick(2, 20)
    with bench.node() as node:
        async with connected(bench.edge(node), bench.bundle) as client:
            for _ in range(times):
                await questions.until_right(client, 30)
                node.stop()
                begun = time.monotonic()
                await questions.ask(client, 20)
                noticed.append(time.monotonic() - begun)
                node.cont()
                back.append(await questions.until_right(client, 30))
    seen = {
        **questions.told(),
        "noticed s, worst": round(max(noticed), 2),
        "served again after s, worst": round(max(back), 2),
    }
    held = not questions.wrong and max(noticed) <= 1.2 * HEARTBEAT_S
    return Seen({"SIGSTOP": times}, seen, held)


@row(
    "black hole",
    "no question lasts beyond its deadline + 10 %; readmitted within max backoff + 2 s = "
    f"{MOST_BACKOFF_S + 2:.0f} s",
)
@running
async def black_hole(bench: Bench) -> Seen:
    questions, back = Questions(bench), []
    lasting = bench.pick([1.0, 6.0], [1.0, 2.0, 5.0, 10.0, 20.0, 30.0])
    if reason := Netns.unavailable():
        raise Skip(reason)
    with (
        Netns() as net,
        bench.node(bind=f"tcp://{net.FAR}:5555", popen=net.popen) as node,
        net.enter(),
    ):
        async with connected(bench.edge(node), bench.bundle) as client:
            for seconds in lasting:
                await questions.until_right(client, 30)
                net.down()
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    await questions.ask(client, 1.0)
                    await asyncio.sleep(0.05)
                net.up()
                back.append(await questions.until_right(client, 60))
    seen = {
        **questions.told(),
        "past its deadline ms, worst": ms(max(0.0, questions.over_s)),
        "readmitted after s, worst": round(max(back), 2),
    }
    held = not questions.wrong and questions.over_s <= 0.2 and max(back) <= MOST_BACKOFF_S + 2
    return Seen({"cable pulled for s": lasting}, seen, held)


@row(
    "flapping",
    "no stale reply accepted; descriptors flat; the edge's memory < +5 %",
    short_s=60,
)
@running
async def flapping(bench: Bench) -> Seen:
    questions, seconds = Questions(bench), bench.pick(12.0, 600.0)
    with bench.node(policy="honest") as node:
        async with connected(bench.edge(node), bench.bundle) as client:
            for _ in range(50):
                await questions.ask(client)
            before, starts = await _settled(), node.starts
            until = time.monotonic() + seconds
            async with questions.going_on(client, client, seconds=1):
                while time.monotonic() < until:
                    await asyncio.to_thread(node.restart)
                    await asyncio.sleep(0.5)
            await questions.until_right(client, 30)
            after, strays = await _settled(), client.strays
    grown = after.rss / before.rss - 1
    seen = {
        **questions.told(),
        "stray replies, all ignored": strays,
        "descriptors": [before.fds, after.fds],
        "memory of the edge, %": round(100 * grown, 2),
    }
    flat = after.fds <= before.fds + 1 and grown < 0.05
    injected = {"restarts": node.starts - starts, "for s": seconds}
    return Seen(injected, seen, flat and not questions.wrong and questions.right > 50)


async def _settled() -> Sample:
    await asyncio.sleep(0.3)
    return sample(os.getpid())


@row("slow uplink", "8 Mbit/s, MTU 1500, saturated: no false disconnect, no lost request")
@running
async def slow_uplink(bench: Bench) -> Seen:
    if reason := Netns.unavailable():
        raise Skip(reason)
    bundle_path = shipped_bundle()
    bundle, seconds = Bundle.load(bundle_path), bench.pick(6.0, 300.0)
    ctx = zmq.asyncio.Context()
    with (
        Netns(rate="8mbit", mtu=1500) as net,
        bench.node(bundle=bundle_path, bind=f"tcp://{net.FAR}:5555", popen=net.popen) as node,
        net.enter(),
    ):
        load = Load(ctx, node.node(node.authorise()), bundle, bundle.geometry.windows)
        reading = asyncio.create_task(load.read())
        try:
            async with connected(bench.edge(node), bundle) as idle:
                link = idle.link
                await load.closed(seconds, 6, deadline_s=60)
                same = idle.link is link
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            ctx.destroy(linger=0)
    size = {"request": load.limits.request.total_bytes, "result": load.limits.result.total_bytes}
    answered = len(load.results)
    seen = {
        "requests": load.sent,
        "answered": answered,
        "refused": dict(load.refused),
        "took s, longest": round(max(load.results, default=0.0), 2),
        "another link of the same edge disconnected": not same,
    }
    injected = {"rate": "8 Mbit/s", "mtu": 1500, "bytes": size, "at once": 6}
    return Seen(injected, seen, same and answered == load.sent > 10)


@row(
    "sliced, reset and half-closed TCP",
    "no crash, no wrong answer; served again after each",
    short_s=90,
    long_s=3600,
)
@running
async def cut_up(bench: Bench) -> Seen:
    questions, cuts = Questions(bench), bench.pick(60, 2_000)
    with bench.node() as node:
        async with Proxy(node.endpoint, seed=1) as proxy:
            edge = bench.edge(node, endpoint=proxy.endpoint)
            async with connected(edge, bench.bundle) as client:
                proxy.up.set(slices=7)
                proxy.down.set(slices=7)
                for _ in range(5):
                    assert await questions.ask(client)
                proxy.up.clear()
                proxy.down.clear()
                for number, (side, cut) in enumerate(random_cuts(1, cuts, 4_000)):
                    if number % 2:
                        cut = type(cut)(cut.after, "fin")
                    flow = getattr(proxy, side)
                    flow.set(cut=cut)
                    proxy.reset_all()  # the next connection is cut at that byte
                    for _ in range(3):
                        await questions.ask(client, 3.0)
                    flow.set(cut=None)
                    await questions.until_right(client, 30)
                done = proxy.up.cuts + proxy.down.cuts
        alive = node.running and node.starts == 1
    seen = {**questions.told(), "connections cut": done, "node lived": alive}
    return Seen(
        {"cuts at random bytes": cuts, "pieces of bytes": "1 to 7"},
        seen,
        alive and not questions.wrong and done > cuts / 2,
    )


@row(
    "soak",
    "faults every few seconds: nothing wrong; memory slope < 1 MB/h, of the edge and of a node "
    "that is left running while edges come and go; descriptors flat",
    short_s=110,
    long_s=8 * 3600,
)
@running
async def soak(bench: Bench) -> Seen:
    seconds = bench.pick(60.0, 3600.0)
    questions = Questions(bench)
    with bench.node() as a, bench.node() as b, bench.node() as c, bench.node() as left:
        nodes = {"a": a, "b": b, "c": c}
        guest = bench.edge(left, name="guest")
        async with (
            Proxy(c.endpoint, seed=3) as proxy,
            connected(bench.edge(left, name="left"), bench.bundle) as fourth,
            connected(bench.edge(a, name="a"), bench.bundle) as first,
            connected(bench.edge(b, name="b"), bench.bundle) as second,
            connected(bench.edge(c, name="c", endpoint=proxy.endpoint), bench.bundle) as third,
        ):
            clients = (first, second, third, fourth)
            plan = random_plan(4, list(nodes), seconds=seconds, every_s=5, down_s=(0.1, 2.0))
            for client in clients:
                for _ in range(100):
                    await questions.ask(client)
            await _visit(questions, guest, bench)
            before, node_before = await _settled(), sample(left.pid)
            with (
                run_plan(plan, nodes) as done,
                # Few samples: the measured process itself stores them.
                Sampler(os.getpid(), every_s=0.5, most=200) as sampler,
                Sampler(left.pid, every_s=0.5, most=200) as node_sampler,
            ):
                async with questions.going_on(*clients, seconds=2):
                    until = time.monotonic() + seconds
                    resets = visits = 0
                    while time.monotonic() < until:
                        await asyncio.sleep(4.9)
                        resets += proxy.reset_all()
                        await _visit(questions, guest, bench)
                        visits += 1
            for client in clients:
                await questions.until_right(client, 60)
            after, node_after = await _settled(), sample(left.pid)
        alive = left.running and left.starts == 1
    seen = {
        **questions.told(),
        "descriptors": [before.fds, after.fds],
        "memory of the edge MB": [mb(before.rss), mb(after.rss)],
        "slope MB/h": mb(sampler.slope("rss")),
        "strays": sum(client.strays for client in clients),
        "node left running": {
            "lived": alive,
            "descriptors": [node_before.fds, node_after.fds],
            "memory MB": [mb(node_before.rss), mb(node_after.rss)],
            "slope MB/h": mb(node_sampler.slope("rss")),
        },
    }
    # In one minute, a slope of 1 MB/h is 17 kB, less than the page cache varies. So growth is
    # judged.
    grown = max(after.rss - before.rss, node_after.rss - node_before.rss)
    slope = max(one.slope("rss") for one in (sampler, node_sampler))
    flat = grown < 2e6 if bench.form == "short" else slope < 1e6
    flat = flat and after.fds <= before.fds + 2 and node_after.fds <= node_before.fds + 2
    injected = {
        "kills and freezes": len(done),
        "resets": resets,
        "edges that came and went": visits,
        "for s": seconds,
    }
    return Seen(injected, seen, alive and not questions.wrong and flat)


async def _visit(questions: Questions, edge: Node, bench: Bench) -> None:
    """An edge connects, asks, and leaves."""
    async with connected(edge, bench.bundle) as client:
        await questions.until_right(client, 30)
