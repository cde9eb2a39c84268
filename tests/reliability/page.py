"""The page that shows the results: a table, made from the numbers alone."""

from __future__ import annotations

from typing import Any

_HEAD = """\
# Reliability

What was done to edges, nodes and the network between them, and what was seen. This page is made
from [results/reliability.json](results/reliability.json), which holds every number with the commit
and the machine it was measured on; do not edit it.

    make reliability              # the short form, about five minutes
    make reliability FORM=long    # hours
    make fuzz SECONDS=600         # only the fuzzers

Faults are those of [tests/faults](../tests/faults/README.md); each row is a function in
`tests/reliability`. A row that can't be run somewhere says why. "Identical" is bit for bit what a
single process computes. Rows of the frame as a whole (failover, hedging, exposure) are not here:
they belong to the edge's scheduler and its tests.

What these numbers don't say:

- **A hard limit on allocations that comes too late ends the process.** Where `malloc` fails, libzmq
  aborts. A node keeps within the limits it finds (`RLIMIT_DATA`, `RLIMIT_AS`, `memory.max`), also
  when they change, but not within one that is lowered below what it holds, nor when other processes
  of its control group take the rest. Give it more than it asks for, and let it be restarted
  ([node.md](node.md#memory)).
- A short soak is one minute, of which a slope per hour is noise: then growth is judged, not slope.
- Shared memory keeps the last windows until others overwrite them. It has no name in any file
  system and goes with its processes.
- Lies within the shape and range of an honest answer pass here: finding them is the edge's part.
- All of it was run on one machine, over the loopback or links between namespaces of it.
"""


def page(results: dict[str, Any]) -> str:
    """The whole page, from the content of the results' file."""
    lines = [_HEAD]
    rows = results["rows"]
    held = sum(bool(one["held"]) for one in rows)
    lines.append(f"{held} of {len(rows)} rows held.\n")
    lines.append("| row | form | held | injected | seen | the bar |")
    lines.append("|---|---|---|---|---|---|")
    for one in rows:
        verdict = {True: "yes", False: "**no**", None: "not run"}[one["held"]]
        seen = one.get("skipped") or one.get("error") or _text(one.get("seen", {}))
        cells = [one["row"], one["form"], verdict, _text(one.get("injected", {})), seen, one["bar"]]
        lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
    runs = {str(one["run"]["commit"]): one["run"] for one in rows}
    lines.append("\nMeasured on:\n")
    for run in runs.values():
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        lines.append(f"- {run['machine']}; commit {run['commit'][:12]}; {versions}")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cell(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= 420 else flat[:417] + "..."
