"""The messages between a node's front process and a worker process."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from cloud_node.shared_memory import Layout
from edge_common import errors
from edge_common.errors import EdgeRuntimeError, EngineError
from engines.bundle import Sha256
from engines.engine import Device

STAGE = "stack"
"""The stage that workers run."""

_DAY_US = 86_400_000_000
"""No run takes longer. A broken worker could otherwise distort the estimates of the queue."""

Kind = Literal["tensorrt", "cuda", "cpu", "noop"]
"""The engine: TensorRT, ONNX Runtime on CUDA or on the CPU, or none."""


class Open(msgspec.Struct, frozen=True, kw_only=True, tag="open"):
    """Open an engine. `stage` is the digest of the stack that the node serves.

    `noop` opens no engine and returns meaningless outputs, to measure everything else.
    """

    bundle: str
    stage: Sha256
    device: Device
    threads: int | None
    layout: Layout
    log_level: int
    noop: bool = False


class Run(msgspec.Struct, frozen=True, tag="run"):
    """Run the first `rows` rows of the batch at `place`; outputs go to the result at `place`."""

    id: int
    place: int
    rows: int


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """Other processes of the same user can no longer read this one's memory, so `Open` may follow
    with the descriptor of the shared memory."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine is open and warm. `slowest_s`: the longest run of the warm-up."""

    kind: Kind
    slowest_s: Annotated[float, msgspec.Meta(ge=0, le=_DAY_US / 1e6)]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot be opened, or a run failed. `kind`: the name of the error's class."""

    kind: str
    found: str
    mend: str = ""
    code: str = ""

    @classmethod
    def of(cls, error: EdgeRuntimeError) -> Failed:
        """The message about an error."""
        return cls(type(error).__name__, error.found, error.mend, error.code)

    def error(self) -> EdgeRuntimeError:
        """The error again."""
        kind = getattr(errors, self.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, EdgeRuntimeError)):
            kind = EngineError
        return kind(self.found, mend=self.mend, code=self.code or None)


class Done(msgspec.Struct, frozen=True, tag="done"):
    """A run succeeded."""

    id: int
    compute_us: Annotated[int, msgspec.Meta(ge=0, le=_DAY_US)]


class RunFailed(msgspec.Struct, frozen=True, tag="run_failed"):
    """A run failed, and the worker lives."""

    id: int
    failure: Failed


class Logged(msgspec.Struct, frozen=True, tag="logged"):
    """A line for the node's log."""

    level: int
    name: str
    text: str


ToWorker = Open | Run
FromWorker = Closed | Ready | Failed | Done | RunFailed | Logged

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
