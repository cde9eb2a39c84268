"""Rows of the reliability bar: how to write one, and the tools that all of them use.

A row is a function of a `Bench` that injects a fault, observes, and returns a `Seen`: the injected
and observed numbers, and whether they meet the bar. `row` registers it under its name, with the bar
in words. A row judges by numbers alone. An exception counts as "not held" and is recorded. A row
that can't run here raises `Skip` with the reason.
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
"""The number of different pictures, so that an answer to another question is noticed."""


class Skip(Exception):
    """This row can't run here. The text says why."""


@dataclass(frozen=True)
class Seen:
    """The injected and observed numbers, and whether they meet the bar."""

    injected: Numbers
    seen: Numbers
    held: bool


@dataclass(frozen=True)
class Row:
    """A row of the bar. `seconds` is the time limit of each form."""

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
    """Turn a coroutine into a row."""

    @functools.wraps(work)
    def run(bench: Bench) -> Seen:
        return asyncio.run(work(bench))  # type: ignore[arg-type]

    return run


@dataclass
class Bench:
    """The tools of a row.

    Args:
        folder: an empty folder for this row alone.
        toy: a bundle whose stack takes no time.
        form: short or long.
    """

    folder: Path
    toy: Path
    form: Form = "short"
    _names: Any = field(default_factory=lambda: iter(range(10_000)))

    def pick(self, short: T, long: T) -> T:
        """The value for this form."""
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
        """The results of a single process, by seed."""
        with OrtEngine(self.bundle.stage_path("stack"), threads=1, device="cpu") as engine:
            return [engine.run(feeds(self.bundle, seed)) for seed in range(SEEDS)]

    def fresh(self, name: str = "node") -> Path:
        return self.folder / f"{name}{next(self._names)}"

    def node(self, **options: Any) -> NodeProcess:
        """A real ``cloud-node serve``, or with `policy` a faulty node. Start it with ``with``."""
        return NodeProcess(options.pop("bundle", self.toy), self.fresh(), **options)

    def idle_client(self) -> Connection:
        """A client without a connection. The row feeds it messages."""
        pair = KeyPair("edge", "b" * 40, "c" * 40)
        node = Node("node", "tcp://127.0.0.1:1", "a" * 40, pair)
        return Connection(None, node, self.bundle.stage("stack"), self.limits)  # type: ignore[arg-type]

    def hostile(self, node: NodeProcess, seed: int = 0) -> HostileEdge:
        """A hostile edge that `node` has authorised."""
        pair = node.authorise(f"hostile{next(self._names)}")
        stage = self.bundle.stage("stack").sha256
        return HostileEdge(node.endpoint, node.keypair.public, pair, stage, seed=seed)

    def edge(self, node: NodeProcess, *, name: str = "node", endpoint: str | None = None) -> Node:
        """`node` in the configuration of a newly authorised edge."""
        pair = node.authorise(f"edge{next(self._names)}")
        return node.node(pair, name=name, endpoint=endpoint)


class Questions:
    """Asks, and compares every answer with the true one, bit by bit.

    Attributes:
        right, wrong: answers. failed: typed errors, by the first words of the reason. worst_s: the
            longest time of a question. over_s: the longest time beyond its deadline.
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
        """Ask one question. True if the answer was correct."""
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
        """Ask until an answer is correct. Returns the seconds that took.

        Raises:
            AssertionError: no answer was correct within the time.
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
        """Ask all questions again and again while the body runs."""

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
        """The counts, for a row's numbers."""
        return {
            "asked": self.asked,
            "identical": self.right,
            "wrong": self.wrong,
            "typed errors": sum(self.failed.values()),
        }


def quantile(values: list[float], share: float) -> float:
    """The quantile by rank. 0 for no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def mb(size: float) -> float:
    return round(size / 1e6, 2)
