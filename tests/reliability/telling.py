"""Rows in a few words: the theme of each, what must hold, and its numbers as people read them.

The numbers and the verdict are the results' alone. What is written here of a row is only which of
its numbers decide (`Telling.decides`, by the names that the row gives them), so that a line has
room for them; a row that is not here is told by its bar and by all that it saw.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Numbers = Mapping[str, Any]
VERDICTS = {True: "held", False: "NOT HELD", None: "not run"}


@dataclass(frozen=True)
class Telling:
    """A row's few words, and the numbers that decide, as `flat` names them or as these end."""

    words: str
    decides: tuple[str, ...] = ()


_NETWORK = {
    "node killed in the middle of a request": Telling(
        "noticed within 50 ms, no wrong answer, served again",
        ("wrong", "noticed ms, worst", "served again after s"),
    ),
    "worker killed in the middle of a request": Telling(
        "a typed refusal; the node serves again by itself",
        ("wrong", "back, worst s", "front lived"),
    ),
    "node frozen": Telling(
        "noticed within 4.8 s, served again",
        ("wrong", "noticed s, worst", "served again after s, worst"),
    ),
    "black hole": Telling(
        "no question outlasts its deadline; readmitted within 12 s",
        ("past its deadline ms, worst", "readmitted after s, worst"),
    ),
    "flapping": Telling(
        "no stale reply accepted; descriptors and memory flat",
        ("wrong", "descriptors", "memory of the edge, %"),
    ),
    "slow uplink": Telling(
        "no false disconnect, no lost request",
        ("requests", "answered", "another link of the same edge disconnected"),
    ),
    "sliced, reset and half-closed TCP": Telling(
        "no crash, no wrong answer", ("wrong", "connections cut", "node lived")
    ),
    "soak": Telling(
        "nothing wrong; memory and descriptors flat",
        ("wrong", "memory of the edge MB", "slope MB/h", "node left running: memory MB"),
    ),
    "cancellation": Telling(
        "no task left behind, answers stay right", ("wrong", "tasks left", "pending left")
    ),
    "clock jump": Telling(
        "answers right, deadlines unaffected",
        ("wrong", "deadline of 1 s missed by ms, worst", "ended before it"),
    ),
    "watchdog": Telling(
        "no sign of life from a loop that is stuck",
        ("signs of life", "of these while stuck", "longest pause otherwise ms"),
    ),
    "schema skew": Telling("works, or is refused clearly", ("golden stable",)),
}
_HOSTILE = {
    "decoder fuzz": Telling("only the typed errors", ("other errors", "memory, %")),
    "coverage-guided fuzz": Telling(
        "only the typed errors", ("in all", "failed", "memory, most %")
    ),
    "socket fuzz: node": Telling(
        "no crash, nothing wrong to anybody else", ("asked", "identical", "node lived")
    ),
    "socket fuzz: edge": Telling(
        "nothing wrong accepted, other nodes unaffected",
        ("of the mutating node: wrong", "of another: asked", "of another: identical"),
    ),
    "raw ZMTP fuzz": Telling(
        "a newcomer is served within 1 s",
        ("wrong", "newcomer served after s, worst during", "node lived"),
    ),
    "endless multipart: node": Telling(
        "the memory ceiling holds; honest edges resume within 2 s",
        ("wrong", "memory, most MB more", "honest edge, longest wait s", "node lived"),
    ),
    "endless multipart: edge": Telling(
        "the node is cut off and named; others go on",
        ("in quarantine", "question ended after s", "of another node: wrong"),
    ),
    "giant frame before authentication": Telling("memory <= +16 MB", ("memory, most MB more",)),
    "half-open flood": Telling(
        "a newcomer is served within 5 s",
        ("newcomer served after s, worst during", "connected edge: wrong", "node lived"),
    ),
    "flood of small messages": Telling(
        "honest edges keep their throughput and lose nothing",
        ("share kept, %", "honest requests lost", "memory of the front, most MB more"),
    ),
    "flood of requests": Telling(
        "honest edges keep their throughput and lose nothing",
        ("share kept, %", "honest requests lost", "memory of the front, most MB more"),
    ),
    "newcomers under half-open connections": Telling(
        "all are served within 5 s",
        ("served after s, worst",),
    ),
    "values and messages that show at once": Telling(
        "each refused at its first reply", ("refused", "wrong")
    ),
    "replay, duplicate, late, wrong id": Telling(
        "none accepted, all counted", ("wrong", "strays", "right answers in time")
    ),
}
_LOAD = {
    "overload": Telling(
        "goodput >= 90 % of the peak, memory bounded",
        ("share of the peak, %", "memory of the front, most MB more", "light edge"),
    ),
    "low memory": Telling(
        "sheds or drops, does not abort",
        ("with it: alive", "with it: served afterwards", "with it: last words"),
    ),
    "slow readers": Telling(
        "an honest edge beside them is served",
        ("honest edge: asked", "answered", "longest s", "memory of the front, most MB more"),
    ),
    "too little memory to start": Telling("ends with a message", ("status", "said")),
}
_TRUST = {
    "authentication": Telling(
        "0 admitted, reasons named", ("admitted", "legitimate afterwards", "revoked key, 1 s later")
    ),
    "keys": Telling(
        "secret keys 0600, looser ones refused",
        ("umask 000", "umask 022", "start with 0640, umask 000", "start with 0604, umask 000"),
    ),
    "no pickle": Telling("0 uses, a pickle never runs", ("uses", "canary ran")),
    "stolen routing ids": Telling(
        "0 results can be read", ("results that reached a thief", "readable", "wrong")
    ),
    "linkability": Telling("nothing shared between what two nodes see", ("shared",)),
    "log hygiene": Telling(
        "0 hits in logs, metrics and files", ("hits", "files searched", "bytes of logs")
    ),
}
_IMAGES = {
    "image: one of 3 nodes killed": Telling(
        "every image identical, exposure kept",
        ("wrong", "identical", "typed errors", "against the rules of exposure", "p99 of clean"),
    ),
    "image: one of 5 nodes killed, no fallback": Telling(
        "every image identical or a typed error, exposure kept",
        ("wrong", "identical", "typed errors", "against the rules of exposure", "p99 of clean"),
    ),
    "image: all nodes dead or frozen": Telling(
        "the right tokens or a typed error, in time",
        ("local: wrong", "local: longest s", "error: wrong", "error: longest s"),
    ),
    "image: stragglers": Telling(
        "all images identical",
        ("wrong", "identical", "p99 of clean", "windows sent twice or more, %"),
    ),
    "image: everything slow": Telling(
        "all images identical", ("wrong", "identical", "windows sent twice or more, %")
    ),
    "image: flapping": Telling(
        "every image identical; descriptors and memory flat",
        ("wrong", "identical", "descriptors", "memory of the edge, %"),
    ),
    "image: cancellation": Telling(
        "nothing left under way, accounting exact",
        ("wrong", "identical", "cancelled", "against the rules of exposure", "left under way"),
    ),
    "image: overhead": Telling(
        "dispatch beside bare requests of the same bytes",
        ("more ms: median", "more ms: p99", "more ms, without placement: median"),
    ),
}
_MOVED = Telling(
    "moves >= 80 % of what bare sockets do, 16 edges >= 90 % of one",
    ("share of bare, %: median", "16 edges of 1, %: node: median", "refused", "lost"),
)
_THROUGHPUT = {"throughput, ViT-B windows": _MOVED, "throughput, ViT-H windows": _MOVED}

THEMES: dict[str, dict[str, Telling]] = {
    "Network and processes": _NETWORK,
    "Hostile peers": _HOSTILE,
    "Load and memory": _LOAD,
    "Trust": _TRUST,
    "Whole images": _IMAGES,
    "Throughput": _THROUGHPUT,
}
OTHERS = "Others"


def theme_of(row: str) -> str:
    return next((theme for theme, rows in THEMES.items() if row in rows), OTHERS)


def telling_of(row: str, bar: str) -> Telling:
    return THEMES.get(theme_of(row), {}).get(row) or Telling(bar)


def flat(numbers: Numbers, prefix: str = "") -> dict[str, Any]:
    """All numbers by ``outer: inner``; those of a dict that all are the same, once."""
    if alike(numbers):
        return {f"{prefix}each of {', '.join(numbers)}": next(iter(numbers.values()))}
    found: dict[str, Any] = {}
    for name, value in numbers.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}: ")
        else:
            found[prefix + name] = value
    return found


def alike(numbers: Numbers) -> bool:
    """Whether these are three or more times one and the same thing."""
    values = list(numbers.values())
    return len(values) > 2 and all(one == values[0] for one in values[1:])


def brief(told: Numbers) -> str:
    """What a row saw of what decides, in one line; for one that failed or was not run, why."""
    if why := told.get("error") or told.get("skipped"):
        line = " ".join(str(why).split())
        return line if len(line) <= 300 else f"{line[:297]}..."
    everything = flat(told.get("seen", {}))
    wanted = telling_of(told["row"], told["bar"]).decides

    chosen = {
        name: value
        for name, value in everything.items()
        if any(f": {one}: " in f": {name}: " for one in wanted)
    }
    return listed(chosen or everything)


def listed(numbers: Numbers) -> str:
    """All of them on one line."""
    return "; ".join(": ".join(as_read(*item)) for item in flat(numbers).items())


# A unit that ends what is measured, or what is said of it goes on after: "noticed ms, worst".
_UNIT = re.compile(r"(.+?),? (ms|s|MB/h|MB|%|requests/s)((?: more)?)((?:[,:]| \().*)?")


def as_read(name: str, value: Any) -> tuple[str, str]:
    """``noticed ms, worst`` of 5.2 as ``noticed, worst`` of ``5.2 ms``."""
    found = _UNIT.fullmatch(name)
    if not found or isinstance(value, (str, bool, dict)):
        return name, text(value)
    what, unit, more, rest = found.groups("")
    return what + rest, f"{text(value)} {unit}{more}"


def text(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {text(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, (int, float)) else str(value) or "none"
