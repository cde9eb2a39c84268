"""What runs a node's batches: a pool of workers, one per device, seen from the event loop.

:class:`Pool` and :class:`Slot` are all that the server knows of workers, whether they are processes
of this machine or replicas elsewhere. A pool promises that a batch ends in outputs, in an
:class:`~engines.errors.EngineError` (the batch failed, the worker lives) or in a
:class:`WorkerDied` (the worker did not survive it, and is replaced without being asked), and that
it never waits for whoever reads the outputs. Which requests make a batch is left to the server.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np

from engines.engine import Device
from engines.errors import ConfigError, EdgeRuntimeError


class WorkerDied(EdgeRuntimeError):
    """The worker crashed, was killed or hung; what it was running is lost, the next runs again."""


class PoolClosed(EdgeRuntimeError):
    """The pool is closing or closed and takes no more work."""


@dataclass(frozen=True)
class WorkerEvent:
    """Something happened to the worker of ``lane``.

    Attributes:
        kind: ``started``: its process (or replica) runs, the engine is being opened; ``ready``: it
            is warm; ``died``: it ended or was killed, ready or not; ``stopped``: it ended because
            the pool was closed.
        lane: number of the lane, from 0.
        device: as configured, such as ``cuda:1``.
        restarts: how often the worker of this lane was replaced so far.
        pid: of its process, 0 if it has none here.
        seconds: for ``ready``, since ``started``; for ``died``, until it is started again.
        text: for ``ready``, what computes; for ``died``, why, in one line.
    """

    kind: Literal["started", "ready", "died", "stopped"]
    lane: int
    device: str
    restarts: int
    pid: int = 0
    seconds: float = 0.0
    text: str = ""


OnEvent = Callable[[WorkerEvent], None]
"""Called in the event loop; must not block."""


class Slot(ABC):
    """Room for one batch: fill `inputs`, `run`, use the outputs, `release`. For one task at a time.

    Attributes:
        inputs: every input of the stage, with room for `Pool.max_batch` rows, writable until `run`
            is called; what they hold at first is undefined.
        compute_us: time inside the engine of the last successful run.
    """

    inputs: dict[str, np.ndarray]
    compute_us: int = 0

    @abstractmethod
    async def run(self, n: int) -> dict[str, np.ndarray]:
        """Run the stage on the first ``n`` rows of `inputs`.

        May be called again on the same slot after an EngineError (with other rows, say), never
        after success or WorkerDied. A cancelled run goes on in the worker, its outputs are lost.

        Returns:
            every output, n rows each, read-only, valid until `release`.

        Raises:
            EngineError: this batch failed; the worker lives.
            WorkerDied: the worker died or was killed because it hung; release the slot.
            PoolClosed: the pool was closed before the outputs were there.
        """

    @abstractmethod
    def release(self) -> None:
        """Give the slot back, at any time and from any thread; twice is allowed.

        `inputs` and outputs must not be used from then on.
        """


class Pool(ABC):
    """Workers that all run the same stage.

    Attributes:
        max_batch: most rows a slot takes.
        lanes: how many batches compute at the same time once all workers are ready.
    """

    max_batch: int
    lanes: int

    @property
    @abstractmethod
    def ready(self) -> int:
        """How many lanes have a warm worker now."""

    @abstractmethod
    async def start(self, on_event: OnEvent) -> None:
        """Start the workers; returns when every lane is warm.

        Raises:
            EdgeRuntimeError: a worker could not start; everything started was ended again.
        """

    @abstractmethod
    async def acquire(self) -> Slot:
        """Wait for a slot of the worker that is least busy.

        A busy worker gives out one more slot than it computes where that keeps its device from
        waiting. Slots whose outputs are not released yet do not count against it.

        Raises:
            PoolClosed: the pool was closed, before or while waiting.
        """

    @abstractmethod
    async def close(self, drain_s: float) -> None:
        """End the workers, runs in progress first, but wait at most ``drain_s`` for those.

        Called again, also while it waits, it waits no longer. Outputs that are not released stay
        valid.
        """


_DEVICE = re.compile(r"(?P<device>[a-z]+)(:(?P<ordinal>[0-9]{1,3}))?")


def parse_device(text: str) -> tuple[Device, int]:
    """``cuda:1`` as ``("cuda", 1)``; without a number, the first.

    Raises:
        ConfigError: it is no device.
    """
    found = _DEVICE.fullmatch(text)
    if not found or found["device"] not in get_args(Device):
        raise ConfigError(
            f"device {text!r}, expected one of {', '.join(get_args(Device))}, and for a machine "
            "with several GPUs the number of one after a colon, such as cuda:1"
        )
    if found["device"] == "cpu" and found["ordinal"]:
        raise ConfigError(f"device {text!r}, expected cpu without a number")
    return cast(Device, found["device"]), int(found["ordinal"] or 0)
