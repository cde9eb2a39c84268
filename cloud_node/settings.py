"""The settings of a node: what each is called, what it may be, and what it is for.

One table, from which come the options of the command line, the keys of ``node.toml``, the file that
`cloud-node init` writes and the table in `docs/node.md`. It promises that a value that is refused
is refused with what was found and what was expected. What settings mean together, and whether what
they name exists, is left to `config`. Loads quickly: `--help` needs nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_common.options import THREADS, Invalid, Number

DEVICES = ("auto", "cpu", "cuda", "tensorrt")

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", re.IGNORECASE)
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")
_DEVICE = re.compile(r"([a-z]+)(?::(\d{1,3}(?:,\d{1,3})*))?")


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: key in the file; with dashes, the option.
        parse: makes a value of a text.
        accepts: of a value in the file, besides texts.
        check: whether a value (not None) is in range; raises Invalid if not.
        default: None where something else decides, as `unset` tells.
        show: the value as it is written in the file.
        placeholder: of the value, for `--help`.
        help: for people, one or more sentences.
        unset: what holds when there is no value.
        example: a value to show where the default is None.
    """

    name: str
    group: str
    parse: Callable[[str], Any]
    placeholder: str
    help: str
    default: Any = None
    unset: str = ""
    example: Any = None
    accepts: tuple[type, ...] = ()
    convert: Callable[[Any], Any] = lambda value: value
    check: Callable[[Any], None] = lambda value: None
    show: Callable[[Any], str] = lambda value: quoted(str(value))

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_path(self) -> bool:
        return self.parse is _path

    def read(self, value: Any) -> Any:
        """A value of the file, converted and checked.

        Raises:
            Invalid: it can't be.
        """
        if isinstance(value, str):
            value = self.parse(value)
        elif type(value) in self.accepts:  # a bool is an int to isinstance
            value = self.convert(value)
        else:
            kinds = {int: "a number", float: "a number", list: "an array of texts"}
            text = not isinstance(getattr(self.parse, "__self__", None), Number)
            wanted = list(dict.fromkeys(["a text"] * text + [kinds[t] for t in self.accepts]))
            example = self.show(self.example if self.default is None else self.default)
            raise Invalid(f"expected {' or '.join(wanted)}, such as {example}")
        self.check(value)
        return value


def quoted(text: str) -> str:
    """A TOML string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\0-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04x}", escaped) + '"'


def size_text(size: int) -> str:
    """A number of bytes for people: ``256 MiB``."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor and size % factor == 0:
            return f"{size // factor} {unit}"
    return str(size)


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise Invalid("expected a path")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise Invalid("expected the path of a user that there is") from None


def _text(text: str) -> str:
    return text


def _size(text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise Invalid('expected bytes, or a text such as "256 MiB"')
    number, unit, binary = found.groups()
    factor = (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1 if unit else 0)
    return int(float(number) * factor)


def _choice(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise Invalid(f"expected {' or '.join(names)}")
        return text

    return parse


def _devices(text: str) -> tuple[str, ...]:
    """``cuda:0,1`` and ``cuda:0,cuda:1`` both are two GPUs."""
    return _device_list(re.split(r",\s*(?=[a-z])", text.strip()))


def _device_list(texts: list[Any]) -> tuple[str, ...]:
    found: list[str] = []
    for text in texts:
        match = _DEVICE.fullmatch(text) if isinstance(text, str) else None
        if not match or match[1] not in DEVICES or (match[1] == "cpu" and match[2]):
            raise Invalid(
                f"expected one of {', '.join(DEVICES)}, or the numbers of GPUs as in cuda:0,1 or "
                "tensorrt:0,1"
            )
        numbers = match[2].split(",") if match[2] else []
        found += [f"{match[1]}:{int(number)}" for number in numbers] or [match[1]]
    gpus = [device if ":" in device else f"{device}:0" for device in found]
    if not found:
        raise Invalid("expected at least one device, such as auto")
    if len(set(gpus)) < len(gpus):
        raise Invalid("expected each device once: one worker keeps a device busy")
    return tuple(found)


def _replicas(text: str) -> tuple[int, int]:
    least, dash, most = text.partition("-")
    if not least.isdecimal() or (dash and not most.isdecimal()):
        raise Invalid("expected a number, or two such as 1-4")
    return int(least), int(most if dash else least)


def _check_replicas(value: tuple[int, int]) -> None:
    if not 1 <= value[0] <= value[1] <= 1024:
        raise Invalid("expected 1 to 1024, the smaller number first")


def _cluster(text: str) -> str:
    """Of Ray. Its ray:// form is let through, for it is known what to do instead."""
    if text not in ("auto", "local") and not text.startswith("ray://") and not _fits(text):
        raise Invalid("expected auto, local or HOST:PORT, such as 10.0.0.1:6379")
    return text


def _fits(address: str) -> bool:
    found = _ADDRESS.fullmatch(address)
    return found is not None and int(found[2]) <= 65535


def _address(text: str) -> str | None:
    """``HOST:PORT``; None for ``off``."""
    if text == "off":
        return None
    if not _fits(text):
        raise Invalid("expected off or HOST:PORT, such as 127.0.0.1:9464")
    return text


def split_address(text: str) -> tuple[str, int]:
    """Host (without brackets) and port of a checked address."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def _sized(least: int, most: int) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if not least <= value <= most:
            raise Invalid(f"expected {size_text(least)} to {size_text(most)}")

    return check


def _plain(value: Any) -> str:
    return format(value, "g") if isinstance(value, float) else str(value)


def _show_size(value: int) -> str:
    text = size_text(value)
    return text if text.isdigit() else quoted(text)


def _show_devices(value: tuple[str, ...]) -> str:
    if len(value) == 1:
        return quoted(value[0])
    return "[" + ", ".join(map(quoted, value)) + "]"


_TIB = 1 << 40
_BATCH = Number(1, 65_536, "windows", whole=True)
_WAIT = Number(0, 1000, "ms")
_REQUESTS = Number(1, 1024, whole=True)
_DRAIN = Number(0, 3600, "seconds")

SETTINGS = (
    Setting(
        "bundle",
        "what is served, and to whom",
        _path,
        "BUNDLE",
        "Full or node-only bundle to serve. Edges must use one with the same stack.",
        unset="the small one that comes with the package",
        example="path/to/bundle",
    ),
    Setting(
        "bind",
        "what is served, and to whom",
        _text,
        "ENDPOINT",
        "Address to listen on for edges. Port 0 takes any free one.",
        default="tcp://0.0.0.0:5555",
    ),
    Setting(
        "keys",
        "what is served, and to whom",
        _path,
        "DIR",
        "Folder with node.key and authorized/*.pub, made by `edge-runtime keys node`. Keys put "
        "into or taken from authorized/ count at once.",
        default=Path("keys"),
    ),
    Setting(
        "secret_key",
        "what is served, and to whom",
        _path,
        "FILE",
        "This node's secret key, where it is kept apart from the keys of edges, as in a credential "
        "of systemd.",
        unset="node.key in the folder `keys`",
        example="/run/credentials/node.key",
    ),
    Setting(
        "authorized",
        "what is served, and to whom",
        _path,
        "DIR",
        "Folder with the public keys of the edges that get in, where it is kept apart from the "
        "secret key. The node need not be able to write to it.",
        unset="authorized/ in the folder `keys`",
        example="/etc/edge-runtime-node/authorized",
    ),
    Setting(
        "device",
        "what computes",
        _devices,
        "DEVICES",
        "What computes: tensorrt (a plan made by `edge-runtime build`), cuda or cpu (ONNX "
        "Runtime), or auto, the first of these that may serve here. A number after a colon is a "
        "GPU: cuda:0,1 or tensorrt:0,1 are two, each with a worker process of its own.",
        default=("auto",),
        accepts=(list,),
        convert=_device_list,
        show=_show_devices,
    ),
    Setting(
        "threads",
        "what computes",
        THREADS.parse,
        "N",
        "CPU threads of each worker. Several nodes on one machine must share its cores: give each "
        "its part, or they slow one another down.",
        unset="all cores",
        example=4,
        accepts=(int,),
        check=THREADS.check,
        show=_plain,
    ),
    Setting(
        "workers",
        "what computes",
        _choice("local", "ray"),
        "KIND",
        "Where workers run: local (processes of this machine) or ray (replicas of Ray Serve).",
        default="local",
    ),
    Setting(
        "ray_address",
        "what computes",
        _cluster,
        "ADDRESS",
        "Ray cluster to run workers on: auto (the one that this machine is a host of), HOST:PORT "
        "(likewise, naming its head), or local (one on this machine alone).",
        default="auto",
    ),
    Setting(
        "ray_replicas",
        "what computes",
        _replicas,
        "NUMBER",
        "How many workers on Ray; with two numbers, such as 1-4, Ray adds and removes some with "
        "the load.",
        default=(1, 1),
        accepts=(int,),
        convert=lambda value: (value, value),
        check=_check_replicas,
        show=lambda value: (
            _plain(value[0]) if value[0] == value[1] else quoted("-".join(map(str, value)))
        ),
    ),
    Setting(
        "max_batch",
        "batches and queue",
        _BATCH.parse,
        "WINDOWS",
        "Most windows that a worker computes at once, at least those of one image.",
        unset="the windows of one image",
        example=50,
        accepts=(int,),
        check=_BATCH.check,
        show=_plain,
    ),
    Setting(
        "max_wait_ms",
        "batches and queue",
        _WAIT.parse,
        "MS",
        "How long a request may wait for others to share its batch. 0 never waits.",
        default=2.0,
        accepts=(int, float),
        convert=float,
        check=_WAIT.check,
        show=_plain,
    ),
    Setting(
        "queue_bytes",
        "batches and queue",
        _size,
        "SIZE",
        "Most bytes that may wait for a worker, of all edges together; one edge gets half of it "
        "while others wait. Beyond it edges are told to try again, with a hint when. As much again "
        "may be on the way to and from edges, and at least a few of the largest messages.",
        default=256 << 20,
        accepts=(int,),
        check=_sized(64 << 10, _TIB),
        show=_show_size,
    ),
    Setting(
        "client_requests",
        "batches and queue",
        _REQUESTS.parse,
        "N",
        "Most requests of one edge that may wait or be computed at the same time.",
        default=16,
        accepts=(int,),
        check=_REQUESTS.check,
        show=_plain,
    ),
    Setting(
        "memory_ceiling",
        "batches and queue",
        _size,
        "SIZE",
        "Memory of the front process (workers not counted) at which it drops all connections and "
        "listens anew, the last resort against edges that make it hold more than they may.",
        unset="what it takes at start, what the queue and connections may hold, and a quarter more",
        example=2 << 30,
        accepts=(int,),
        check=_sized(64 << 20, _TIB),
        show=_show_size,
    ),
    Setting(
        "drain_s",
        "batches and queue",
        _DRAIN.parse,
        "SECONDS",
        "How long a node that is told to stop goes on with what it has admitted. New requests are "
        "refused at once, so that edges go elsewhere, and so is what is left at the end.",
        default=10.0,
        accepts=(int, float),
        convert=float,
        check=_DRAIN.check,
        show=_plain,
    ),
    Setting(
        "metrics",
        "what it tells",
        _address,
        "HOST:PORT",
        "Address of /metrics (Prometheus), /healthz and /readyz, over plain HTTP without a "
        "password: keep it on this machine or on a network of your own. Off unless set, for a node "
        "listens nowhere that it was not told to, and several on a machine need several ports.",
        unset="off",
        example="127.0.0.1:9464",
        show=lambda value: quoted(value or "off"),
    ),
    Setting(
        "log_level",
        "what it tells",
        _choice("debug", "info", "warning", "error"),
        "LEVEL",
        "Least severity to log, on stderr: debug, info, warning or error.",
        default="info",
    ),
    Setting(
        "log_format",
        "what it tells",
        _choice("text", "json"),
        "FORMAT",
        "text, or json: one object per line.",
        default="text",
    ),
    Setting(
        "ready_file",
        "what it tells",
        _path,
        "PATH",
        "Once serving, write endpoint and public key here as JSON; removed at the end.",
        unset="none is written",
        example="ready.json",
    ),
)

BY_NAME = {setting.name: setting for setting in SETTINGS}
GROUPS = tuple(dict.fromkeys(setting.group for setting in SETTINGS))
