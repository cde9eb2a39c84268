"""The settings of a node. Imports little, because ``--help`` needs only this."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edge_common.options import Invalid
from edge_common.settings import ADDRESS, PATH, SIZE, Kind, Option, is_address, quoted, settings_of

DEVICES = ("auto", "cpu", "cuda", "tensorrt")
_DEVICE = re.compile(r"([a-z]+)(?::(\d{1,3}(?:,\d{1,3})*))?")
_TIB = 1 << 40

_SERVED = "bundle, address and keys"
_COMPUTES = "devices and workers"
_QUEUE = "batches and queue"
_REPORTS = "logs and metrics"


def _read_devices(value: Any) -> tuple[str, ...]:
    """``cuda:0,1`` and ``cuda:0,cuda:1`` are the same two GPUs; a TOML array is also accepted."""
    texts = re.split(r",\s*(?=[a-z])", value.strip()) if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise Invalid('expected a text or an array of texts, such as "auto"')
    devices: list[str] = []
    for text in texts:
        match = _DEVICE.fullmatch(text) if isinstance(text, str) else None
        if not match or match[1] not in DEVICES or (match[1] == "cpu" and match[2]):
            raise Invalid(
                f"expected one of {', '.join(DEVICES)}, or the numbers of GPUs as in cuda:0,1 or "
                "tensorrt:0,1"
            )
        numbers = match[2].split(",") if match[2] else []
        devices += [f"{match[1]}:{int(number)}" for number in numbers] or [match[1]]
    if not devices:
        raise Invalid("expected at least one device, such as auto")
    if len({device if ":" in device else f"{device}:0" for device in devices}) < len(devices):
        raise Invalid("expected each device once: one worker keeps a device busy")
    return tuple(devices)


def _show_devices(value: tuple[str, ...]) -> str:
    if len(value) == 1:
        return quoted(value[0])
    return "[" + ", ".join(map(quoted, value)) + "]"


def _read_replicas(value: Any) -> tuple[int, int]:
    if type(value) is int:
        value = str(value)
    least, dash, most = value.partition("-") if isinstance(value, str) else ("", "", "")
    if not least.isdecimal() or (dash and not most.isdecimal()):
        raise Invalid("expected a number, or two such as 1-4")
    found = int(least), int(most if dash else least)
    if not 1 <= found[0] <= found[1] <= 1024:
        raise Invalid("expected 1 to 1024, the smaller number first")
    return found


def _show_replicas(value: tuple[int, int]) -> str:
    return str(value[0]) if value[0] == value[1] else quoted("-".join(map(str, value)))


def _read_cluster(value: Any) -> str:
    # A ray:// address is accepted here: the pool explains what to use instead.
    known = ("auto", "local")
    if isinstance(value, str) and (
        value in known or value.startswith("ray://") or is_address(value)
    ):
        return value
    raise Invalid("expected auto, local or HOST:PORT, such as 10.0.0.1:6379")


_DEVICES = Kind(_read_devices, _show_devices)
_REPLICAS = Kind(_read_replicas, _show_replicas)
_CLUSTER = Kind(_read_cluster)


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of ``cloud-node serve``."""

    bundle: Annotated[
        Path | None,
        Option(
            _SERVED,
            "BUNDLE",
            "Full or node-only bundle to serve. Edges must use one with the same stack.",
            unset="the small one in the package",
            example="path/to/bundle",
            kind=PATH,
        ),
    ] = None
    bind: Annotated[
        str,
        Option(_SERVED, "ENDPOINT", "Address to listen on for edges. Port 0 takes any free one."),
    ] = "tcp://0.0.0.0:5555"
    keys: Annotated[
        Path,
        Option(
            _SERVED,
            "DIR",
            "Folder with node.key and authorized/*.pub, made by `edge-runtime keys node`. Changes "
            "to authorized/ take effect at once.",
            kind=PATH,
        ),
    ] = Path("keys")
    secret_key: Annotated[
        Path | None,
        Option(
            _SERVED,
            "FILE",
            "Secret key of this node, if it is not in the folder `keys`; for example a credential "
            "of systemd.",
            unset="node.key in the folder `keys`",
            example="/run/credentials/node.key",
            kind=PATH,
        ),
    ] = None
    authorized: Annotated[
        Path | None,
        Option(
            _SERVED,
            "DIR",
            "Folder with the public keys of the edges that may connect, if it is not in the folder "
            "`keys`. The node only reads it.",
            unset="authorized/ in the folder `keys`",
            example="/etc/edge-runtime-node/authorized",
            kind=PATH,
        ),
    ] = None
    device: Annotated[
        tuple[str, ...],
        Option(
            _COMPUTES,
            "DEVICES",
            "tensorrt (a plan made by `edge-runtime build`), cuda or cpu (ONNX Runtime), or auto: "
            "the first of these that works here. Numbers after a colon are GPUs: cuda:0,1 or "
            "tensorrt:0,1 are two, each with a worker process of its own.",
            kind=_DEVICES,
        ),
    ] = ("auto",)
    threads: Annotated[
        Annotated[int, Meta(ge=1, le=1024)] | None,
        Option(
            _COMPUTES,
            "N",
            "CPU threads of each worker. Several nodes on one machine slow each other down unless "
            "each has its share of the cores.",
            unset="all cores",
            example=4,
        ),
    ] = None
    workers: Annotated[
        Literal["local", "ray"],
        Option(
            _COMPUTES,
            "KIND",
            "Where workers run: local (processes of this machine) or ray (replicas of Ray Serve).",
        ),
    ] = "local"
    ray_address: Annotated[
        str,
        Option(
            _COMPUTES,
            "ADDRESS",
            "Ray cluster for workers: auto (the one that this machine belongs to), HOST:PORT (the "
            "same, by its head), or local (a new one on this machine alone).",
            kind=_CLUSTER,
        ),
    ] = "auto"
    ray_replicas: Annotated[
        tuple[int, int],
        Option(
            _COMPUTES,
            "NUMBER",
            "Number of workers on Ray. With two numbers, such as 1-4, Ray adds and removes workers "
            "with the load.",
            kind=_REPLICAS,
        ),
    ] = (1, 1)
    max_batch: Annotated[
        Annotated[int, Meta(ge=1, le=65_536)] | None,
        Option(
            _QUEUE,
            "WINDOWS",
            "Most windows that a worker computes at once, at least those of one image.",
            unset="the windows of one image",
            example=50,
            unit="windows",
        ),
    ] = None
    max_wait_ms: Annotated[
        float,
        Meta(ge=0, le=1000),
        Option(
            _QUEUE,
            "MS",
            "How long a request may wait for others to share its batch. 0 never waits.",
            unit="ms",
        ),
    ] = 2.0
    queue_bytes: Annotated[
        int,
        Meta(ge=64 << 10, le=_TIB),
        Option(
            _QUEUE,
            "SIZE",
            "Most bytes that may wait for a worker, for all edges together; one edge gets half of "
            "it while others wait. Beyond it, edges are told when to try again. The same amount "
            "again may be on the way to and from edges, and at least a few of the largest "
            "messages.",
            kind=SIZE,
        ),
    ] = 256 << 20
    client_requests: Annotated[
        int,
        Meta(ge=1, le=1024),
        Option(
            _QUEUE, "N", "Most requests of one edge that may wait or be computed at the same time."
        ),
    ] = 16
    memory_ceiling: Annotated[
        Annotated[int, Meta(ge=64 << 20, le=_TIB)] | None,
        Option(
            _QUEUE,
            "SIZE",
            "Memory of the front process, without workers, at which it drops all connections and "
            "starts to listen again. This is the last defence against edges that fill its memory.",
            unset="memory at start, plus 5/4 of what the queue and connections may hold",
            example=2 << 30,
            kind=SIZE,
        ),
    ] = None
    drain_s: Annotated[
        float,
        Meta(ge=0, le=3600),
        Option(
            _QUEUE,
            "SECONDS",
            "How long a stopping node continues with admitted requests. New requests are refused "
            "at once, so that edges go elsewhere; at the end, the remaining ones are too.",
            unit="seconds",
        ),
    ] = 10.0
    metrics: Annotated[
        str | None,
        Option(
            _REPORTS,
            "HOST:PORT",
            "Address of /metrics (Prometheus), /healthz and /readyz: plain HTTP without a "
            "password, so keep it on this machine or on a private network. Several nodes on one "
            "machine need different ports.",
            unset="off",
            example="127.0.0.1:9464",
            kind=ADDRESS,
        ),
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Option(
            _REPORTS, "LEVEL", "Lowest severity to log, on stderr: debug, info, warning or error."
        ),
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"], Option(_REPORTS, "FORMAT", "text, or json: one object per line.")
    ] = "text"
    ready_file: Annotated[
        Path | None,
        Option(
            _REPORTS,
            "PATH",
            "File for the endpoint and public key, as JSON, while the node serves.",
            unset="none is written",
            example="ready.json",
            kind=PATH,
        ),
    ] = None

    @property
    def key_file(self) -> Path:
        """File of the node's secret key."""
        return self.secret_key or self.keys / "node.key"

    @property
    def authorized_folder(self) -> Path:
        """Folder with the public keys of the edges that may connect."""
        return self.authorized or self.keys / "authorized"


SETTINGS = settings_of(NodeConfig)
