"""Rows about whole images that an edge has several nodes compute."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import signal
import statistics
import sys
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq.asyncio
from faults.nodes import NodeProcess
from faults.processes import sample

from edge_common.errors import EdgeRuntimeError
from edge_runtime.config import EdgeConfig, NodeConfig
from edge_runtime.exposure.colouring import touch
from edge_runtime.exposure.ledger import ExposureLedger
from edge_runtime.exposure.placement import place
from edge_runtime.offload.connection import Connection
from edge_runtime.offload.dispatch import Dispatch, Nodes
from edge_runtime.offload.health import Fleet as Health
from edge_runtime.offload.health import NodeHealth
from edge_runtime.offload.offloader import Offloader, image_hash
from edge_runtime.offload.report import Replied, RunRecord
from engines.bundle import Bundle
from engines.pipeline import Pipeline
from engines.windows import Windows, cut
from reliability.load import write_sized_bundle
from reliability.rows import Bench, Numbers, Seen, ms, quantile, row
from reliability.throughput import in_this_role
from transport.keys import generate_secret
from transport.messages import stage_limits

WITNESS = """
import sys, zlib
from pathlib import Path
from cloud_node import server
decode, file = server.decode_tensors, Path(sys.argv[sys.argv.index("--keys") + 1], "witness")
def noting(*arguments):
    feeds = decode(*arguments)
    with file.open("a") as out:
        for number, pixels in zip(feeds["window"], feeds["pixels"]):
            print(number, zlib.crc32(pixels.tobytes()), file=out)
    return feeds
server.decode_tensors = noting
from cloud_node.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""Program of a real node that writes down every window it receives."""

FRAME = 40
"""Side of the images, in pixels: that of the toy bundle, so that all nine windows are sent."""


@dataclass
class Images:
    """An edge that has nodes compute whole images, and what became of each image.

    Args:
        bench: of the row.
        nodes: by name; names that differ only in a last digit are one party's.
        settings: of the edge.

    Attributes:
        identical, wrong: images that came back.
        failed: images that did not, by the code of the error.
        times_s: of all images. records: of all images, with the windows of each.
        broken: what was against the rules of exposure.
    """

    bench: Bench
    nodes: dict[str, NodeProcess]
    settings: Numbers
    identical: int = 0
    wrong: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    times_s: list[float] = field(default_factory=list)
    records: list[RunRecord] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)  # windows; of these first, extra
    _known: dict[int, tuple[int, int]] = field(default_factory=dict)  # checksum -> image, window

    def __enter__(self) -> Images:
        secret = self.bench.fresh("secret")
        generate_secret(secret)
        self._edge = next(self.bench._names)
        name = f"edge{self._edge}"
        for node in self.nodes.values():
            node.authorise(name)
        config = EdgeConfig(
            nodes=tuple(
                NodeConfig(
                    name=each,
                    endpoint=node.endpoint,
                    server_key=node.keypair.public,
                    client_key=str(node.folder / "edges" / f"{name}.key"),
                    provider=each.rstrip("0123456789"),
                )
                for each, node in self.nodes.items()
            ),
            secret=str(secret),
            **self.settings,
        )
        self._stack = contextlib.ExitStack()
        self.alone = self._stack.enter_context(Pipeline(self.bench.bundle, threads=1))
        pipeline = self._stack.enter_context(Pipeline(self.bench.bundle, threads=1))
        self.offloader = self._stack.enter_context(Offloader(config, pipeline))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def windows(self) -> Windows:
        """Those of the next image, which differs from all others."""
        number = len(self.records)
        rng = np.random.default_rng([self._edge, number])
        windows = cut(
            rng.integers(0, 256, (FRAME, FRAME, 3), dtype=np.uint8), self.bench.bundle.geometry
        )
        for window, pixels in zip(windows.window.tolist(), windows.pixels, strict=True):
            self._known[zlib.crc32(pixels.tobytes())] = number, window
        return windows

    def run(self) -> RunRecord:
        """One image."""
        windows, record = self.windows(), RunRecord()
        self.records.append(record)
        begun = time.monotonic()
        try:
            outputs = self.offloader.stack(windows, record)
        except EdgeRuntimeError as error:
            self.times_s.append(time.monotonic() - begun)
            self.failed[error.code] += 1
            self.explained(record, error.code)
        else:
            self.times_s.append(time.monotonic() - begun)
            self.compare(windows, outputs)
        self.judge(record)
        return record

    def compare(self, windows: Windows, outputs: dict[str, np.ndarray]) -> None:
        truth = self.alone.stack(self.alone.stack_inputs(windows))
        same = all(np.array_equal(outputs[name], truth[name]) for name in truth)
        self.identical += same
        self.wrong += not same

    def judge(self, record: RunRecord) -> None:
        """Check the ledger of an image that is over."""
        ledger = record.ledger
        if ledger is None:
            return
        if any(permit.state == "reserved" for permit in ledger.permits):
            self.broken.append("a permit was left reserved")
        for party, nodes in ledger.nodes.items():
            self._within(ledger, party, set().union(*map(ledger.seen, nodes)), "by the ledger")
        windows = [w for p in ledger.permits if p.state == "committed" for w in p.windows]
        self.sent += Counter(first=len(set(windows)), extra=len(windows) - len(set(windows)))

    def _within(self, ledger: ExposureLedger, party: str, seen: set[int], how: str) -> None:
        placement = ledger.placement
        if placement.share(seen) > placement.max_exposure:
            self.broken.append(f"{party} saw {placement.share(seen):.2f} {how}")
        if any(touch(a, b, placement.side, placement.separation) for a in seen for b in seen):
            self.broken.append(f"{party} saw windows that touch {how}")

    def explained(self, record: RunRecord, code: str) -> None:
        """Of an image that failed: whether a permitted way to its tokens was left."""
        ledger = record.ledger
        assert ledger is not None
        back = {w for e in record.events if isinstance(e, Replied) for w in e.windows}
        lost = {e.node for e in record.events if not isinstance(e, Replied)}
        ways = {
            window: [n for n in self.nodes if n not in lost and not ledger.refusal(n, (window,))]
            for window in ledger.placement.areas.keys() - back
        }
        if all(ways.values()):
            self.broken.append(f"an image failed ({code}) though {ways} were left")

    def received(self) -> int:
        """Check what the nodes wrote down that they received. Returns how many windows."""
        found: dict[tuple[int, str], set[int]] = defaultdict(set)  # image, node -> windows
        count = 0
        for name, node in self.nodes.items():
            for line in (node.folder / "witness").read_text().splitlines():
                number, window = self._known.get(int(line.split()[-1]), (-1, -1))
                if number < 0:
                    continue  # of another edge
                count += 1
                found[number, name].add(window)
        for number, record in enumerate(self.records):
            ledger = record.ledger
            if ledger is None:
                continue
            for party, nodes in ledger.nodes.items():
                seen = {name: found[number, name] for name in nodes}
                if any(windows - ledger.seen(name) for name, windows in seen.items()):
                    self.broken.append(f"{party} received what the ledger does not know")
                self._within(ledger, party, set().union(*seen.values()), "as it received")
        return count

    def settle(self, within_s: float = 60.0) -> None:
        """Wait until every node may be sent to again, and run an image."""
        until = time.monotonic() + within_s
        connections, health = self.offloader._nodes.connections, self.offloader._nodes.fleet.nodes

        def ready(name: str) -> bool:
            link = connections[name].link
            now = time.monotonic()
            return link is not None and link.state == "up" and health[name].ready_at(now) <= now

        while not all(map(ready, self.nodes)):
            if time.monotonic() > until:
                raise AssertionError(f"not ready: {[n for n in self.nodes if not ready(n)]}")
            time.sleep(0.005)
        self.run()

    def clean(self, count: int) -> list[float]:
        """Run images while nothing is wrong. Returns their times."""
        self.settle()
        for _ in range(count):
            self.run()
        return self.times_s[-count:]

    def warm(self) -> None:
        """Have the edge get to know the nodes, and how long it takes for a window itself."""
        self.clean(15)
        if self.settings["fallback"] == "local":
            node = next(iter(self.nodes.values()))
            while self.offloader._nodes.local_s is None:
                node.kill()
                self.run()
                node.start()
                self.settle()

    def left(self) -> dict[str, int]:
        """What is still under way on the edge although no image runs. All should be 0."""
        nodes = self.offloader._nodes

        async def tasks() -> int:
            names = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]
            return sum(name.startswith(("Dispatch.", "Connection.infer")) for name in names)

        return {
            "tasks": self.offloader._background.call(tasks()),
            "requests": sum(node.under_way for node in nodes.fleet.nodes.values()),
            "windows": sum(node.load for node in nodes.fleet.nodes.values()),
            "images": len(nodes._images),
            "pending": sum(
                len(connection._pending)
                - (connection._greeting is not None and not connection._greeting.done())
                for connection in nodes.connections.values()
            ),
        }

    def told(self) -> dict[str, Any]:
        return {
            "images": len(self.records),
            "identical": self.identical,
            "wrong": self.wrong,
            "typed errors": dict(self.failed),
            "against the rules of exposure": self.broken[:5],
            "windows sent twice or more, %": share(self.sent["extra"], self.sent["first"]),
        }

    @property
    def right(self) -> bool:
        return not self.wrong and not self.broken


def missed(record: RunRecord) -> set[str]:
    """Nodes that did not return what they were asked for."""
    assert record.ledger is not None
    back: dict[str, set[int]] = defaultdict(set)
    for event in record.events:
        if isinstance(event, Replied):
            back[event.node] |= {*event.windows}
    nodes = [node for nodes in record.ledger.nodes.values() for node in nodes]
    return {node for node in nodes if record.ledger.asked(node) - back[node]}


def share(part: float, whole: float) -> float:
    return round(100 * part / whole, 1) if whole else 0.0


def slower(times: Sequence[float], clean: Sequence[float]) -> dict[str, float]:
    """Quantiles in ms, beside those without faults."""
    p99, before = quantile([*times], 0.99), quantile([*clean], 0.99)
    return {
        "median ms": ms(statistics.median(times)),
        "p99 ms": ms(p99),
        "clean: median ms": ms(statistics.median(clean)),
        "clean: p99 ms": ms(before),
        "p99 of clean": round(p99 / before, 2),
    }


@contextlib.contextmanager
def serving(bench: Bench, names: Sequence[str], **options: Any) -> Iterator[dict[str, NodeProcess]]:
    """Nodes by name. A random policy gets another seed for each, so that not all fail at once."""
    with contextlib.ExitStack() as stack:
        nodes = {}
        for seed, name in enumerate(names):
            if isinstance(policy := options.get("policy"), dict):
                options["policy"] = {**policy, "seed": seed}
            nodes[name] = stack.enter_context(bench.node(wait=False, **options))
        for node in nodes.values():
            node.wait_ready()
        yield nodes


def witnessed(bench: Bench, names: Sequence[str]) -> Any:
    return serving(bench, names, program=(sys.executable, "-c", WITNESS))


def in_a_moment(seconds: float, *work: Any) -> threading.Thread:
    """Do `work` after a time, in a thread. Begins at once."""

    def wait() -> None:
        time.sleep(seconds)
        for each in work:
            each()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def killed(bench: Bench, names: Sequence[str], **settings: Any) -> Seen:
    """SIGKILL one node at random instants of an image."""
    kills, rng = bench.pick(10, 500), random.Random(len(names))
    faulty: list[float] = []
    hit = 0
    with (
        witnessed(bench, names) as nodes,
        Images(bench, nodes, {"max_exposure": 0.5, **settings}) as images,
    ):
        images.warm()
        clean = images.clean(bench.pick(30, 300))
        lasting = statistics.median(clean)
        images.sent.clear()
        for _ in range(kills):
            name = rng.choice(names)
            instant = rng.uniform(0, 1.2 * lasting)
            kill = in_a_moment(instant, functools.partial(nodes[name].signal, signal.SIGKILL))
            record = images.run()
            faulty.append(images.times_s[-1])
            hit += name in missed(record)
            kill.join()
            nodes[name].restart()
            images.settle()
        received, left = images.received(), images.left()
    seen = {
        **images.told(),
        "images in which the node was missed": hit,
        "windows that nodes wrote down": received,
        "left under way": left,
        **slower(faulty, clean),
    }
    failed = sum(images.failed.values())
    held = (
        images.right and not any(left.values()) and images.identical + failed == len(images.records)
    )
    if settings["fallback"] == "local":
        held = held and not failed
    if bench.form == "long":
        held = held and seen["p99 of clean"] <= 2
    return Seen({"SIGKILL": kills, "nodes": len(names)}, seen, held)


_KILLED = (
    "every image identical{}; budget and separation kept by the ledger and by what the nodes "
    "received; nothing left under way; long form: p99 <= 2 x clean"
)


@row("image: one of 3 nodes killed", _KILLED.format(""), short_s=120, long_s=4 * 3600)
def killed_of_3(bench: Bench) -> Seen:
    return killed(bench, ["a", "b", "c"], fallback="local")


@row(
    "image: one of 5 nodes killed, no fallback",
    _KILLED.format(", or a typed error where no permitted way is left"),
    short_s=150,
    long_s=4 * 3600,
)
def killed_of_5(bench: Bench) -> Seen:
    return killed(bench, ["a", "b", "c", "d", "e"], fallback="error")


@row(
    "image: all nodes dead or frozen",
    "with a local fallback the right tokens, otherwise a typed error; within the deadline + 10 %",
    short_s=120,
    long_s=3600,
)
def all_dead(bench: Bench) -> Seen:
    rounds, rng, deadline = bench.pick(1, 25), random.Random(5), 2.0
    over: dict[str, float] = {}
    held = True
    seen: dict[str, Any] = {}
    with witnessed(bench, ["a", "b", "c"]) as nodes:
        for fallback in ("local", "error"):
            settings = {"fallback": fallback, "deadline_s": deadline, "max_exposure": 0.5}
            with Images(bench, nodes, settings) as images:
                images.warm()
                good = len(images.records)
                for number in range(2 * rounds):
                    action = "stop" if number % 2 else "kill"
                    all_ = [getattr(node, action) for node in nodes.values()]
                    fault = in_a_moment(rng.uniform(0, 0.01), *all_)
                    images.run()
                    over[fallback] = max(over.get(fallback, 0.0), images.times_s[-1])
                    fault.join()
                    for node in nodes.values():
                        node.cont() if action == "stop" else node.restart()
                    images.settle()
                    good += 1
                images.received()
                left = images.left()
            seen[fallback] = {**images.told(), "longest s": round(over[fallback], 2), "left": left}
            held = held and images.right and over[fallback] <= 1.1 * deadline
            held = held and not any(left.values()) and images.identical >= good
            held = held and (fallback == "error" or not images.failed)
    return Seen({"SIGKILL of all": 2 * rounds, "SIGSTOP of all": 2 * rounds}, seen, held)


SIX = ["north1", "north2", "south1", "south2", "west1", "west2"]
SERVICE = ("--service-s", "0.02")


def paced(bench: Bench, count: int, policy: Any, warm: int = 30) -> Images:
    """Images by six nodes of three parties whose requests take 20 ms, after some to get warm."""
    with (
        serving(bench, SIX, policy=policy, options=SERVICE) as nodes,
        Images(bench, nodes, {"max_exposure": 0.5}) as images,
    ):
        images.clean(warm)
        images.sent.clear()
        images.times_s.clear()
        for _ in range(count):
            images.run()
        assert not any(images.left().values()), images.left()
    return images


@row(
    "image: stragglers",
    "5 % of the replies 10 x slower: all images identical; long form: p99 <= 1.5 x clean, extra "
    "windows <= 5 %",
    short_s=120,
    long_s=1800,
)
def stragglers(bench: Bench) -> Seen:
    count = bench.pick(80, 2000)
    clean = paced(bench, count, "honest")
    late = {"mix": [[{"kind": "honest", "delay_s": 0.2}, 0.05]]}
    images = paced(bench, count, late)
    seen = {**images.told(), **slower(images.times_s, clean.times_s)}
    seen["clean: windows sent twice or more, %"] = clean.told()["windows sent twice or more, %"]
    held = images.right and clean.right and images.identical == len(images.records)
    if bench.form == "long":
        held = held and seen["p99 of clean"] <= 1.5
        held = held and seen["windows sent twice or more, %"] <= 5
    return Seen({"images": count, "share of replies, %": 5, "slower": "10 x"}, seen, held)


@row(
    "image: everything slow",
    "all nodes 5 x slower from one image to the next: all images identical; long form: windows "
    "sent <= 1.1 x",
    short_s=120,
    long_s=1800,
)
def all_slow(bench: Bench) -> Seen:
    count = bench.pick(60, 1000)
    policy = [*["honest"] * 40, {"kind": "slow", "factor": 5}]
    images = paced(bench, count, policy)
    seen = {**images.told(), "median ms": ms(statistics.median(images.times_s))}
    held = images.right and images.identical == len(images.records)
    if bench.form == "long":
        held = held and seen["windows sent twice or more, %"] <= 10
    return Seen({"images": count, "slower": "5 x"}, seen, held)


@row(
    "image: flapping",
    "a node is restarted every 0.5 s: every image identical; descriptors flat; memory < +5 %",
    short_s=60,
    long_s=1200,
)
def flapping(bench: Bench) -> Seen:
    seconds, rng = bench.pick(5.0, 600.0), random.Random(6)
    settings = {"max_exposure": 0.5, "fallback": "local"}
    restarts = 0
    with (
        serving(bench, ["a", "b", "c"], policy="honest") as nodes,
        Images(bench, nodes, settings) as images,
    ):
        images.clean(50)
        before = sample(os.getpid())
        ended = threading.Event()

        def flap() -> None:
            nonlocal restarts
            while not ended.wait(0.5):
                nodes[rng.choice([*nodes])].restart()
                restarts += 1

        flapping = threading.Thread(target=flap)
        flapping.start()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            images.run()
        ended.set()
        flapping.join()
        images.settle()
        time.sleep(0.3)
        after, left = sample(os.getpid()), images.left()
    grown = share(after.rss - before.rss, before.rss)
    seen = {
        **images.told(),
        "descriptors": [before.fds, after.fds],
        "memory of the edge, %": grown,
        "left under way": left,
    }
    held = images.right and not images.failed and not any(left.values())
    held = held and after.fds <= before.fds + 1 and (grown < 5 or bench.form == "short")
    return Seen({"restarts": restarts, "for s": seconds}, seen, held)


@row(
    "image: cancellation",
    "images given up at random instants, up to 4 at a time: no task, request or permit left; "
    "the nodes received nothing that the ledger does not know; the others identical",
    short_s=60,
    long_s=1200,
)
def cancellation(bench: Bench) -> Seen:
    count, rng = bench.pick(50, 2000), random.Random(7)
    cancelled = 0
    with (
        witnessed(bench, ["a", "b", "c"]) as nodes,
        Images(bench, nodes, {"max_exposure": 0.5, "fallback": "local"}) as images,
    ):
        lasting = statistics.median(images.clean(20))
        offloader = images.offloader
        for _ in range(count):
            runs = []
            for _ in range(rng.randint(1, 4)):
                windows, record = images.windows(), RunRecord()
                images.records.append(record)
                run = Dispatch(
                    windows,
                    functools.partial(offloader.place_photo, windows),
                    offloader._nodes,
                    offloader.pipeline,
                    offloader.config,
                    record,
                )
                runs.append(
                    (
                        windows,
                        record,
                        asyncio.run_coroutine_threadsafe(run.run(), offloader._background._loop),
                    )
                )
            time.sleep(rng.uniform(0, 1.5 * lasting))
            gone = rng.randrange(len(runs))
            runs[gone][2].cancel()
            for windows, _, future in runs:
                try:
                    images.compare(windows, future.result(30))
                except CancelledError:
                    cancelled += 1
            give_up = time.monotonic() + 5
            while any((left := images.left()).values()) and time.monotonic() < give_up:
                time.sleep(0.001)
            if any(left.values()):
                break
            for _, record, _ in runs:
                images.judge(record)
        received = images.received()
    seen = {
        **images.told(),
        "cancelled": cancelled,
        "windows that nodes wrote down": received,
        "left under way": left,
    }
    held = images.right and not any(left.values()) and cancelled > count / 4
    held = held and images.identical + cancelled == len(images.records)
    return Seen({"cancelled at random instants": count}, seen, held)


@row(
    "image: overhead",
    "25 windows of ViT-H by 3 nodes that compute nothing, in turns with bare requests of the same "
    "bytes: <= 3 ms more in the median, <= 10 ms at p99",
    short_s=180,
    long_s=1800,
)
def overhead(bench: Bench) -> Seen:
    path, count = write_sized_bundle(bench.folder / "bundle", 1280), bench.pick(60, 1000)
    with serving(bench, ["a", "b", "c"], bundle=path, popen=in_this_role("serve")) as nodes:
        took, used = asyncio.run(by_turns(Bundle.load(path), nodes, count))
    middle = {name: statistics.median(times) for name, times in took.items()}
    last = {name: quantile(times, 0.99) for name, times in took.items()}
    more = {
        "median": ms(middle["dispatch"] - middle["bare"]),
        "p99": ms(last["dispatch"] - last["bare"]),
    }
    seen = {
        "median ms": {name: ms(each) for name, each in middle.items()},
        "CPU ms": {name: ms(statistics.median(each)) for name, each in used.items()},
        "p99 ms": {name: ms(each) for name, each in last.items()},
        "more ms: median": more["median"],
        "more ms: p99": more["p99"],
        "more ms, without placement: median": ms(
            middle["dispatch"] - middle["bare"] - middle["placement"]
        ),
    }
    held = bench.form == "short" or (more["median"] <= 3 and more["p99"] <= 10)
    return Seen({"images": count, "nodes": 3, "windows": 25}, seen, held)


async def by_turns(
    bundle: Bundle, nodes: dict[str, NodeProcess], count: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of whole images by `Dispatch`, of its placement, and of bare requests; and seconds of
    the edge's processor, which other work on the machine changes less."""
    stage = bundle.stage("stack")
    limits = stage_limits(stage.inputs, stage.outputs, bundle.geometry.windows)
    ctx = zmq.asyncio.Context()
    edges = [node.node(node.authorise(), name=name) for name, node in nodes.items()]
    connections = [Connection(ctx, edge, stage, limits) for edge in edges]
    health = Health(NodeHealth(name, name) for name in nodes)
    known = Nodes(connections, health)
    config = EdgeConfig(
        nodes=tuple(
            NodeConfig(name=edge.name, endpoint=edge.endpoint, server_key=edge.server_key)
            for edge in edges
        ),
        deadline_s=30.0,
    )
    image = np.random.default_rng(1).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    windows = cut(image, bundle.geometry)
    took: dict[str, list[float]] = {"dispatch": [], "placement": [], "bare": []}
    used: dict[str, list[float]] = {name: [] for name in took}

    def placing() -> ExposureLedger:
        begun, cpu = time.perf_counter(), time.thread_time()
        placement = place(
            areas=windows.area().tolist(),
            windows=windows.window.tolist(),
            side=bundle.geometry.windows_per_side,
            nodes=[*nodes],
            max_exposure=0.5,
            secret=bytes(32),
            image_hash=image_hash(windows),
        )
        took["placement"].append(time.perf_counter() - begun)
        used["placement"].append(time.thread_time() - cpu)
        return ExposureLedger(placement)

    async def bare(feeds: dict[str, dict[str, np.ndarray]], ledger: ExposureLedger) -> None:
        until = asyncio.get_running_loop().time() + 30
        permits = {
            name: ledger.reserve(name, fed["window"].tolist()) for name, fed in feeds.items()
        }
        await asyncio.gather(
            *(
                known.connections[name].infer(fed, permits[name], until)
                for name, fed in feeds.items()
            )
        )

    for connection in connections:
        connection.start()
    try:
        with Pipeline(bundle, threads=1) as pipeline:
            inputs = pipeline.stack_inputs(windows)
            assignment = placing().placement.assignment
            feeds = {
                name: {key: array[list(mine)] for key, array in inputs.items()}
                for name, mine in assignment.items()
            }
            for number in range(count + 10):
                run = Dispatch(windows, placing, known, pipeline, config, RunRecord())
                begun, cpu = time.perf_counter(), time.process_time()
                await run.run()
                took["dispatch"].append(time.perf_counter() - begun)
                used["dispatch"].append(time.process_time() - cpu)
                del run
                ledger = ExposureLedger(placing().placement)
                begun, cpu = time.perf_counter(), time.process_time()
                await bare(feeds, ledger)
                took["bare"].append(time.perf_counter() - begun)
                used["bare"].append(time.process_time() - cpu)
                if number == 9:  # warm now
                    for times in [*took.values(), *used.values()]:
                        times.clear()
    finally:
        for connection in connections:
            await connection.close()
        ctx.destroy(linger=0)
    return took, used
