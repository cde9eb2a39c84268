"""Rows of the reliability bar: how one is written, and what all of them work with.

A row is a function of a `Bench` that injects its fault, watches, and returns a `Seen`: the numbers
injected, those seen, and whether they meet the bar. It is registered by `row` under its name, with
the bar in words. A row judges by numbers alone and is free to raise: that is "not held", with the
error. One that can't be run here raises `Skip` and says why.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from faults.asking import ask, feeds
from faults.edges import HostileEdge
from faults.nodes import NodeProcess

from edge_common.errors import OffloadError
from edge_runtime.config import Node
from edge_runtime.offload.connection import Connection
from engines.bundle import Bundle
from engines.ort import OrtEngine
from transport.keys import KeyPair
from transport.messages import StageLimits, stage_limits

T = TypeVar("T")
Form = Literal["short", "long"]
Numbers = Mapping[str, Any]
SEEDS = 8
"""Different pictures asked about, so that an answer to another question shows."""


class Skip(Exception):
    """This row can't be run here; says why."""


@dataclass(frozen=True)
class Seen:
    """What a row injected and saw, and whether that meets its bar."""

    injected: Numbers
    seen: Numbers
    held: bool


@dataclass(frozen=True)
class Row:
    """A row of the bar. `seconds` is the most that each form may take."""

    name: str
    bar: str
    work: Callable[[Bench], Seen]
    seconds: Mapping[Form, float]


ROWS: dict[str, Row] = {}


def row(
    name: str, bar: str, *, short_s: float = 60, long_s: float = 900
) -> Callable[[Callable[[Bench], Seen]], Callable[[Bench], Seen]]:
    """Register a row."""

    def register(work: Callable[[Bench], Seen]) -> Callable[[Bench], Seen]:
        assert name not in ROWS
        ROWS[name] = Row(name, bar, work, {"short": short_s, "long": long_s})
        return work

    return register


def running(work: Callable[[Bench], Awaitable[Seen]]) -> Callable[[Bench], Seen]:
    """A row written as a coroutine."""

    @functools.wraps(work)
    def run(bench: Bench) -> Seen:
        return asyncio.run(work(bench))  # type: ignore[arg-type]

    return run


@dataclass
class Bench:
    """What a row works with.

    Args:
        folder: of its own, empty.
        toy: a bundle whose stack takes no time.
        form: short or long.
    """

    folder: Path
    toy: Path
    form: Form = "short"
    _names: Any = field(default_factory=lambda: iter(range(10_000)))

    def pick(self, short: T, long: T) -> T:
        """By the form."""
        return short if self.form == "short" else long

    @functools.cached_property
    def bundle(self) -> Bundle:
        return Bundle.load(self.toy)

    @property
    def limits(self) -> StageLimits:
        stage = self.bundle.stage("stack")
        return stage_limits(stage.inputs, stage.outputs, self.bundle.geometry.windows)

    @functools.cached_property
    def truth(self) -> list[dict[str, np.ndarray]]:
        """What a single process gives, by seed."""
        with OrtEngine(self.bundle.stage_path("stack"), threads=1, device="cpu") as engine:
            return [engine.run(feeds(self.bundle, seed)) for seed in range(SEEDS)]

    def fresh(self, name: str = "node") -> Path:
        return self.folder / f"{name}{next(self._names)}"

    def node(self, **options: Any) -> NodeProcess:
        """A real ``cloud-node serve``, or with `policy` one that lies; start it with ``with``."""
        return NodeProcess(options.pop("bundle", self.toy), self.fresh(), **options)

    def idle_client(self) -> Connection:
        """A client that has no connection, to be given messages by hand."""
        pair = KeyPair("edge", "b" * 40, "c" * 40)
        node = Node("node", "tcp://127.0.0.1:1", "a" * 40, pair)
        return Connection(None, node, self.bundle.stage("stack"), self.limits)  # type: ignore[arg-type]

    def hostile(self, node: NodeProcess, seed: int = 0) -> HostileEdge:
        """An edge that `node` has let in."""
        pair = node.authorise(f"hostile{next(self._names)}")
        stage = self.bundle.stage("stack").sha256
        return HostileEdge(node.endpoint, node.keypair.public, pair, stage, seed=seed)

    def edge(self, node: NodeProcess, *, name: str = "node", endpoint: str | None = None) -> Node:
        """`node` as a newly authorised edge wants it."""
        pair = node.authorise(f"edge{next(self._names)}")
        return node.node(pair, name=name, endpoint=endpoint)


class Questions:
    """Asks, and compares every answer with the truth, bit by bit.

    Attributes:
        right, wrong: answers. failed: typed errors, by the reason's first words. worst_s: longest
            that any question took. over_s: longest beyond its deadline.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.right = self.wrong = self.asked = 0
        self.failed: collections.Counter[str] = collections.Counter()
        self.worst_s = self.over_s = 0.0
        self.times_s: collections.deque[float] = collections.deque(maxlen=1_000)
        self.compare = True
        self.fed = [feeds(bench.bundle, seed) for seed in range(SEEDS)]

    async def ask(self, client: Connection, seconds: float = 10.0) -> bool:
        """One question; whether it was answered rightly."""
        seed = self.asked % SEEDS
        self.asked += 1
        begun = time.monotonic()
        try:
            reply = await ask(client, self.fed[seed], seconds)
        except OffloadError as error:
            reason = getattr(error, "reason", "") or error.found
            self.failed[" ".join(reason.split()[:4])] += 1
            return False
        else:
            same = not self.compare or all(
                np.array_equal(reply.outputs[name], array)
                for name, array in self._bench.truth[seed].items()
            )
            self.right += same
            self.wrong += not same
            return same
        finally:
            took = time.monotonic() - begun
            self.times_s.append(took)
            self.worst_s = max(self.worst_s, took)
            self.over_s = max(self.over_s, took - seconds)

    async def until_right(self, client: Connection, within_s: float) -> float:
        """Ask until an answer is right; seconds that took.

        Raises:
            AssertionError: none was within the time.
        """
        begun = time.monotonic()
        while time.monotonic() - begun < within_s:
            if await self.ask(client, 2.0):
                return time.monotonic() - begun
            await asyncio.sleep(0.02)
        raise AssertionError(f"no answer within {within_s} s; failed: {dict(self.failed)}")

    @asynccontextmanager
    async def going_on(
        self, *clients: Connection, seconds: float = 10.0, pause_s: float = 0.01
    ) -> AsyncIterator[None]:
        """Ask all of them, over and over, while the body runs."""

        async def work(client: Connection) -> None:
            while not ended:
                if not await self.ask(client, seconds):
                    await asyncio.sleep(0.05)
                await asyncio.sleep(pause_s)

        ended = False
        tasks = [asyncio.create_task(work(client)) for client in clients]
        try:
            yield
        finally:
            ended = True
            await asyncio.gather(*tasks)

    def told(self) -> dict[str, Any]:
        """For a row's numbers."""
        return {
            "asked": self.asked,
            "identical": self.right,
            "wrong": self.wrong,
            "typed errors": sum(self.failed.values()),
        }


def quantile(values: list[float], share: float) -> float:
    """By rank; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def mb(size: float) -> float:
    return round(size / 1e6, 2)


def workers_of(front: int) -> list[int]:
    """Pids of the processes that a node's front has started."""
    try:
        listed = Path(f"/proc/{front}/task/{front}/children").read_text().split()
    except OSError:
        return []
    return [int(pid) for pid in listed]
