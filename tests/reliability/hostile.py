"""Rows about hostile peers, before and after authentication."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import time
from typing import Any

import zmq
import zmq.asyncio
from faults import sodium, zmtp
from faults.asking import connected
from faults.nodes import Act, FaultyNode
from faults.processes import Sampler, sample
from faults.zmtp import Budget, Tally
from fuzz.targets import TARGETS

from edge_runtime.offload.connection import Connection
from reliability.rows import Bench, Questions, Seen, Skip, mb, row, running
from transport.allow_list import AllowList
from transport.auth import Authenticator
from transport.messages import (
    Accepted,
    InfoRequest,
    Request,
    Result,
    decode_header,
    decode_tensors,
    encode,
)
from transport.sockets import server


def _raw() -> None:
    if sodium.MISSING is not None:
        raise Skip(str(sodium.MISSING))


@row(
    "decoder fuzz",
    "every message type, both roles, authenticator: only the typed errors; memory < +5 %",
    long_s=1800,
)
def decoders(bench: Bench) -> Seen:
    names = ("decode", "node", "edge", "zap")
    count = bench.pick(100_000, 1_000_000) // len(names)
    seen: dict[str, Any] = {}
    rng = random.Random(3)
    for name in names:  # this fills the caches
        for _ in range(2_000):
            TARGETS[name](rng.randbytes(rng.randrange(160)))
    before = sample(os.getpid()).rss
    failures = 0
    for name in names:
        outcomes: dict[str, int] = {}
        for _ in range(count):
            try:
                outcome = TARGETS[name](rng.randbytes(rng.randrange(160)))
            except Exception as error:
                failures += 1
                outcome = repr(error)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        seen[name] = outcomes
    grown = sample(os.getpid()).rss / before - 1
    seen |= {"other errors": failures, "memory, %": round(100 * grown, 2)}
    return Seen({"inputs": count * len(names)}, seen, not failures and grown < 0.05)


@row(
    "coverage-guided fuzz",
    "atheris over every target, 10^6 inputs at least: only the typed errors; memory < +5 %",
    long_s=1200,
)
def guided(bench: Bench) -> Seen:
    if bench.form == "short":
        raise Skip("takes minutes: see the long form, or `make fuzz`")
    if not importlib.util.find_spec("atheris"):
        raise Skip("atheris is not installed (pip install atheris)")
    seconds = 300
    command = [sys.executable, "-m", "fuzz", "--engine", "atheris", "--seconds", str(seconds)]
    command += ["--out", str(bench.fresh("fuzz"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout.splitlines()[-1])["targets"]
    inputs = {name: one["inputs"] for name, one in told.items()}
    grown = {name: one["rss_end"] / one["rss_settled"] - 1 for name, one in told.items()}
    failed = [name for name, one in told.items() if one["failed"]]
    seen = {
        "inputs": inputs,
        "in all": sum(inputs.values()),
        "failed": failed,
        "memory MB at the end": {name: mb(one["rss_end"]) for name, one in told.items()},
        "memory, most %": round(100 * max(grown.values()), 2),
    }
    held = not failed and sum(inputs.values()) >= 1_000_000 and max(grown.values()) < 0.05
    return Seen({"for s": seconds}, seen, held)


@row(
    "socket fuzz: node",
    "10,000 mutated multiparts of an authorised edge: no crash, no wrong answer to anybody else",
    short_s=90,
)
@running
async def fuzz_node(bench: Bench) -> Seen:
    _raw()
    questions, count = Questions(bench), 10_000
    with bench.node() as node:
        hostile = bench.hostile(node)
        async with connected(bench.edge(node), bench.bundle) as client:
            fed = questions.fed[0]
            async with questions.going_on(client):
                # A faster edge would be banned by the node after a moment.
                budget = Budget(count=count, seconds=80, rate=500)
                tally = await hostile.wrong(fed, budget=budget)
        alive = node.running and node.starts == 1
    answered = dict(sorted(tally.notes.items()))
    seen = {**questions.told(), "node lived": alive, "it was told": answered}
    held = alive and tally.messages == count and questions.right == questions.asked > 0
    return Seen({"messages": tally.messages}, seen, held)


class _Mutator:
    """A node that sends damaged copies before every answer. Only headers and frames are changed,
    not payloads, so every accepted result must be correct."""

    def __init__(self, node: FaultyNode, count: int, each: int) -> None:
        self.node, self.left, self.each = node, count, each
        self.sent = 0

    async def serve(self, socket: Any, limits: Any) -> None:
        from engines.ort import OrtEngine

        rng = random.Random(5)
        bundle = self.node.bundle
        with OrtEngine(bundle.stage_path("stack"), threads=1, device="cpu") as engine:
            while True:
                peer, frame = await socket.recv_multipart()
                message = decode_header(frame)
                if isinstance(message, InfoRequest):  # without it, the edge sends no request
                    await socket.send_multipart([peer, encode(self.node.info(message))])
                if not isinstance(message, Request):
                    continue
                outputs = engine.run(decode_tensors(message, frame, limits.request))
                result = bytes(encode(Result(message.id, 1, 1), outputs, message.seal))
                sound = [result, bytes(encode(Accepted(message.id)))]
                for _ in range(min(self.each, self.left)):
                    damaged = zmtp.mutate(rng, rng.choice(sound))
                    if rng.random() < 0.1:
                        damaged = damaged[: rng.randrange(len(damaged) + 1)]
                    try:
                        await socket.send_multipart([peer, damaged])
                    except zmq.ZMQError:  # the edge has left
                        break
                    self.sent += 1
                    self.left -= 1
                with contextlib.suppress(zmq.ZMQError):
                    await socket.send_multipart([peer, result])


@row(
    "socket fuzz: edge",
    "10,000 mutated multiparts of a node: no crash, nothing wrong accepted, other nodes unaffected",
    short_s=90,
)
@running
async def fuzz_edge(bench: Bench) -> Seen:
    spoilt, others = Questions(bench), Questions(bench)
    honest = FaultyNode(bench.bundle, bench.fresh())
    keys = FaultyNode(bench.bundle, bench.fresh())  # for its keys and its Info
    mutator = _Mutator(keys, 10_000, 20)
    ctx = zmq.asyncio.Context()
    authenticator = Authenticator(ctx, AllowList(keys.allowed))
    authenticator.start()
    socket = server(ctx, "tcp://127.0.0.1:0", keys.keypair, keys.limits)
    serving = asyncio.create_task(mutator.serve(socket, keys.limits))
    try:
        edge = keys.node(keys.authorise(), endpoint=socket.last_endpoint.decode())
        strays = quarantines = 0
        async with (
            honest,
            connected(honest.node(honest.authorise()), bench.bundle) as other,
            others.going_on(other),
        ):
            until = time.monotonic() + 80
            while mutator.left and time.monotonic() < until and not serving.done():
                # An edge stops asking a node that it has quarantined, so the next edge asks.
                async with connected(edge, bench.bundle) as client:
                    while mutator.left and not client.quarantine and time.monotonic() < until:
                        await spoilt.ask(client, 2.0)
                        await asyncio.sleep(0)
                    strays += client.strays
                    quarantines += bool(client.quarantine)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        socket.close(linger=0)
        await authenticator.stop()
        ctx.destroy(linger=0)
    seen = {
        "of the mutating node": spoilt.told(),
        "of another": others.told(),
        "strays": strays,
        "edges that put the node in quarantine": quarantines,
    }
    held = not mutator.left and not spoilt.wrong and others.right == others.asked > 0
    return Seen({"messages": mutator.sent}, seen, held)


@row(
    "raw ZMTP fuzz",
    "10,000 broken greetings and handshakes: alive; a legitimate edge connects and is served "
    "within 1 s during and after",
    short_s=120,
)
@running
async def raw_zmtp(bench: Bench) -> Seen:
    _raw()
    questions = Questions(bench)
    served: list[float] = []
    with bench.node() as node:
        before = sample(node.pid)
        address = zmtp.address_of(node.endpoint)
        budget = Budget(count=10_000, seconds=100)
        attack = asyncio.create_task(
            zmtp.broken_openings(
                address, node.keypair.public, parallel=32, linger_s=0.02, budget=budget
            )
        )
        while not attack.done():
            served.append(await _newcomer(bench, node, questions))
            await asyncio.sleep(0.5)
        tally = attack.result()
        after = await _newcomer(bench, node, questions)
        await asyncio.sleep(4)
        end = sample(node.pid)
        alive = node.running and node.starts == 1
    seen = {
        **questions.told(),
        "node lived": alive,
        "newcomer served after s, worst during": round(max(served), 3),
        "and after": round(after, 3),
        "memory MB": [mb(before.rss), mb(end.rss)],
        "descriptors": [before.fds, end.fds],
        "kinds": tally.notes,
    }
    held = alive and max(*served, after) <= 1 and questions.right == questions.asked
    held = held and tally.messages == 10_000 and end.fds <= before.fds + 4
    return Seen({"connections": tally.connections, "unconnected": tally.unconnected}, seen, held)


async def _newcomer(bench: Bench, node: Any, questions: Questions, most_s: float = 30) -> float:
    """Seconds from a new edge's first step to its first correct answer."""
    edge = bench.edge(node)
    begun = time.monotonic()

    async def work() -> None:
        async with connected(edge, bench.bundle) as client:
            await questions.until_right(client, most_s)

    await asyncio.wait_for(work(), most_s)
    return time.monotonic() - begun


@row(
    "endless multipart: node",
    "the memory ceiling holds (+128 MB here); honest edges resume within 2 s and get only right "
    "answers",
    short_s=90,
    long_s=1800,
)
@running
async def endless_node(bench: Bench) -> Seen:
    _raw()
    questions = Questions(bench)
    want = bench.pick(1 << 30, 10 << 30)
    total = Tally()
    with bench.node() as node:
        hostile = bench.hostile(node)
        async with connected(bench.edge(node), bench.bundle) as client:
            await questions.until_right(client, 20)
            before = sample(node.pid).rss
            with Sampler(node.pid, every_s=0.02) as sampler:
                async with questions.going_on(client, seconds=10):
                    until = time.monotonic() + bench.pick(60, 1500)

                    async def attack() -> None:
                        while total.sent < want and time.monotonic() < until and node.running:
                            # An edge that was cut off may not notice, because its kernel keeps
                            # trying. Wait a second at most.
                            budget = Budget(bytes=want, seconds=1)
                            try:
                                tally = await hostile.endless_multipart(
                                    part_bytes=6000, budget=budget
                                )
                            except (OSError, zmtp.PeerError, asyncio.TimeoutError):
                                total.note("refused")
                                await asyncio.sleep(0.05)
                            else:
                                total.add(tally)
                                total.connections += 1

                    await asyncio.gather(*(attack() for _ in range(8)))
                resumed = await questions.until_right(client, 30)
            alive = node.running and node.starts == 1
    grown = sampler.peak_rss - before
    seen = {
        **questions.told(),
        "node lived": alive,
        "cut off in mid-sentence": total.closed,
        "cut off, unnoticed by the attacker": total.notes.get("out of time", 0),
        "memory, most MB more": mb(grown),
        "honest edge, longest wait s": round(questions.worst_s, 2),
        "honest edge served after it s": round(resumed, 2),
    }
    held = alive and not questions.wrong and grown <= 128e6 and total.closed > 0
    held = held and questions.worst_s <= 2 and total.sent >= 0.95 * want
    injected = {"attempted MB": mb(total.sent), "connections": total.connections}
    return Seen(injected, seen, held)


@row(
    "endless multipart: edge",
    "the edge cuts the node off, names it as the cause, and other nodes go on",
    short_s=60,
)
@running
async def endless_edge(bench: Bench) -> Seen:
    _raw()
    others, spoilt = Questions(bench), Questions(bench)
    size = bench.pick(512 << 20, 10 << 30)
    policy = Act("endless", size=size, seconds=bench.pick(20, 300))
    with (
        FaultyNode(bench.bundle, bench.fresh(), policy, wire="raw", name="hostile") as bad,
        FaultyNode(bench.bundle, bench.fresh(), name="honest") as good,
    ):
        async with (
            connected(bad.node(bad.authorise()), bench.bundle) as client,
            connected(good.node(good.authorise()), bench.bundle) as other,
        ):
            await others.until_right(other, 20)
            before = sample(os.getpid()).rss
            with Sampler(os.getpid(), every_s=0.02) as sampler:
                async with others.going_on(other, seconds=10):
                    begun = time.monotonic()
                    await spoilt.ask(client, 15)
                    took = time.monotonic() - begun
                    quarantine = client.quarantine
    grown = sampler.peak_rss - before
    seen = {
        "question ended after s": round(took, 2),
        "with": dict(spoilt.failed),
        "in quarantine": bool(quarantine),
        "memory, most MB more (both ends and the attack)": mb(grown),
        "of another node": others.told(),
    }
    held = not spoilt.right and took <= 10 and grown <= 256e6 and bool(quarantine)
    held = held and others.right == others.asked > 0
    return Seen({"bytes": size}, seen, held)


@row(
    "giant frame before authentication",
    "50 connections that declare 1 GB each: memory <= +16 MB",
)
@running
async def giant(bench: Bench) -> Seen:
    _raw()
    questions = Questions(bench)
    with bench.node() as node:
        await _newcomer(bench, node, questions)
        before = sample(node.pid).rss
        with Sampler(node.pid, every_s=0.02) as sampler:
            address = zmtp.address_of(node.endpoint)
            tally = await zmtp.giant_frames(address, hold_s=3, budget=Budget(count=50))
        after = await _newcomer(bench, node, questions)
        grown = sampler.peak_rss - before
    seen = {"memory, most MB more": mb(grown), "newcomer served after s": round(after, 3)}
    held = grown <= 16e6 and tally.connections == 50
    return Seen({"connections": tally.connections, "declared bytes": 1 << 30}, seen, held)


@row(
    "half-open flood",
    "2,000 silent connections, 1,024 descriptors: a legitimate edge is served within 5 s, during "
    "and after; one that was connected stays so",
    short_s=60,
)
@running
async def flood(bench: Bench) -> Seen:
    _raw()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 8192:
        raise Skip(f"this process may have {hard} descriptors; the flood alone takes 2,000")
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, hard))
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (1024, 1024))
    popen = functools.partial(subprocess.Popen, preexec_fn=limit)
    questions, newcomers = Questions(bench), Questions(bench)
    during: list[float] = []
    with bench.node(popen=popen) as node:
        async with connected(bench.edge(node), bench.bundle) as client:
            await questions.until_right(client, 20)
            address = zmtp.address_of(node.endpoint)
            attack = asyncio.create_task(
                zmtp.half_open(address, hold_s=8, budget=Budget(count=2_000, seconds=12))
            )
            await asyncio.sleep(0.5)
            async with questions.going_on(client, seconds=10):
                while not attack.done():
                    during.append(await _newcomer(bench, node, newcomers))
                    await asyncio.sleep(0.5)
            tally = attack.result()
            after = await _newcomer(bench, node, newcomers)
        alive = node.running and node.starts == 1
    seen = {
        "connected edge": questions.told(),
        "newcomer served after s, worst during": round(max(during), 2),
        "and after": round(after, 2),
        "node lived": alive,
    }
    held = alive and max(*during, after) <= 5 and questions.right == questions.asked
    return Seen({"connections": tally.connections}, seen, held and tally.connections >= 1_900)


@row(
    "values and messages that show at once",
    "NaN, Inf, shape, type, name, count, stage, truncation, garbage, version, other type: each "
    "refused at its first reply, 0 wrong accepted",
)
@running
async def bad_values(bench: Bench) -> Seen:
    kinds = ["nan", "inf", "shape", "dtype", "name", "batch", "wrong_stage", "truncated", "garbage"]
    kinds += ["version", "no_tensors", "info"]
    each = bench.pick(5, 100)
    told: dict[str, Any] = {}
    questions = Questions(bench)
    node = FaultyNode(bench.bundle, bench.fresh())
    async with node, connected(node.node(node.authorise()), bench.bundle) as client:
        for kind in kinds:
            node.policy = lambda ask, kind=kind: Act(kind)
            right, failed = questions.right, questions.failed.total()
            for _ in range(each):
                await questions.ask(client, 5)
            told[kind] = questions.failed.total() - failed
            assert questions.right == right, kind
        node.policy = lambda ask: Act()
        await questions.until_right(client, 20)
    held = not questions.wrong and all(number == each for number in told.values())
    injected = dict.fromkeys(kinds, each)
    return Seen(injected, {"refused": told, **questions.told()}, held)


@row(
    "replay, duplicate, late, wrong id",
    "none accepted, and the edge's counter of strays is exact",
    short_s=90,
)
@running
async def replays(bench: Bench) -> Seen:
    each = bench.pick(250, 2_500)
    questions = Questions(bench)
    strays: dict[str, int] = {}
    in_time: dict[str, int] = {}
    kinds = ("replay", "wrong_id", "duplicate", "late")
    async with FaultyNode(bench.bundle, bench.fresh()) as node:
        async with connected(node.node(node.authorise()), bench.bundle) as client:
            await questions.until_right(client, 20)
            handle, tardy = client._handle, 0

            def handling(frame: Any, now: float) -> None:
                nonlocal tardy
                message = decode_header(frame)
                tardy += isinstance(message, Accepted) and message.id not in client._pending
                handle(frame, now)

            client._handle = handling  # type: ignore[method-assign]
            for kind in kinds:
                node.policy = lambda ask, kind=kind: Act(kind)
                before, right, tardy = client.strays, questions.right, 0
                # Ask one after another: otherwise a replayed answer could match a question that is
                # still open. The other kinds wait long enough that an `accepted` is rarely late.
                width = 1 if kind == "replay" else 200
                seconds = {"duplicate": 20, "replay": 0.05}.get(kind, 2.0)
                await _volley(questions, client, each, seconds, width)
                until = time.monotonic() + 10
                while client.strays - before < each and time.monotonic() < until:
                    await asyncio.sleep(0.02)
                await asyncio.sleep(0.1)
                strays[kind] = client.strays - before - tardy  # a late `accepted` counts as one too
                in_time[kind] = questions.right - right
            node.policy = lambda ask: Act()
            await questions.until_right(client, 20)
        did = {kind: node.did[kind] for kind in kinds}
    seen = {**questions.told(), "strays": strays, "right answers in time": in_time}
    # Late answers miss the deadline by a millisecond's rounding. Some arrive in time and are
    # correct.
    exact = all(
        strays[kind] + (in_time[kind] if kind != "duplicate" else 0) == did[kind] for kind in did
    )
    held = not questions.wrong and exact and in_time["duplicate"] == each
    held = held and not in_time["replay"] and not in_time["wrong_id"]
    return Seen(did, seen, held)


async def _volley(
    questions: Questions, client: Connection, count: int, seconds: float, width: int
) -> None:
    """`count` questions, `width` at a time."""

    async def work(number: int) -> None:
        for _ in range(number, count, width):
            await questions.ask(client, seconds)

    await asyncio.gather(*(work(number) for number in range(width)))
