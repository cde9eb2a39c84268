"""The page `docs/reliability.md`, made from the results alone.

It shows the verdict, the rows that failed, and one line for each row with the numbers that decide
it. All other numbers stay in the results file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reliability.figure import compared, share
from reliability.telling import OTHERS, THEMES, brief, telling_of, text, theme_of

Result = Mapping[str, Any]
FIGURE = "images/reliability-throughput.svg"
"""Where the figure lies, seen from the page."""

_HEAD = """\
# Reliability

Each row below is a fault or an attack on real processes, with the condition that must hold
throughout.
"""

_HOW = """\
## How to measure

    make reliability              # the short form, about ten minutes
    make reliability FORM=long    # hours
    make fuzz SECONDS=600         # only the fuzzers

[results/reliability.json](results/reliability.json) holds every number with its commit and machine.
`python -m reliability --doc` makes this page from it. The faults are in
[tests/faults](../tests/faults/README.md), the rows in `tests/reliability`. "Identical" means equal
bit for bit to the result of a single process.

## What these numbers do not cover

- libzmq aborts the process when `malloc` fails. A node stays within the limits it finds
  (`RLIMIT_DATA`, `RLIMIT_AS`, `memory.max`) and follows changes to them. It cannot survive a limit
  that is set below what it already holds, or other processes that use up its control group. Leave
  headroom and let the service manager restart it ([node.md](node.md#memory)).
- The short soak lasts one minute. That is too short for a slope, so it judges total growth.
- Shared memory keeps the last windows until new ones overwrite them. It has no name in any file
  system and disappears with its processes.
- Wrong answers of the right shape and range pass here. Only the edge can detect them.
- Everything ran on one machine, over loopback or links between network namespaces.
"""


def page(results: Mapping[str, Any]) -> str:
    """The whole page, from the content of the results' file."""
    rows: dict[str, dict[str, Result]] = {}
    for one in results["rows"]:
        rows.setdefault(one["row"], {})[one["form"]] = one
    themes = {theme: {n: f for n, f in rows.items() if theme_of(n) == theme} for theme in _THEMES}
    parts = [_HEAD, *_verdict(rows), *_overview(themes), _HOW]
    return "\n".join([*parts, *_measured(results["rows"])])


_THEMES = (*THEMES, OTHERS)


def _verdict(rows: Mapping[str, Mapping[str, Result]]) -> list[str]:
    every = [one for forms in rows.values() for one in forms.values()]
    failed = [one for one in every if one["held"] is False]
    skipped = [one for one in every if one["held"] is None]
    broken = {one["row"] for one in failed}
    whole = {one["row"] for one in every if one["held"]} - broken
    long = sum(forms.get("long", {}).get("held") is not None for forms in rows.values())
    verdict = f"{len(whole)} of {len(rows)} rows hold"
    lacking = "does not" if len(broken) == 1 else "do not"
    parts = [
        f"**{verdict}{f'; {len(broken)} {lacking}' if broken else ''}.**\n",
        "A row holds if its condition held in every form that was run. The short form takes "
        "seconds; the long form injects many more faults and has been run for "
        f"{long} rows.\n",
    ]
    if failed:
        parts += ["## Not held\n", "| row | form | must hold | seen |", "|---|---|---|---|"]
        parts += [
            f"| ❌ {_plain(one['row'])} | {one['form']} | {_plain(one['bar'])} "
            f"| **{_plain(brief(one))}** |"
            for one in failed
        ]
        parts.append("")
    if skipped:
        parts.append("Not run, and why:\n")
        parts += [f"- {_plain(one['row'])}, {one['form']}: {_plain(brief(one))}" for one in skipped]
        parts.append("")
    return parts


_MARKS = {True: "held", False: "❌ **not held**", None: "not run"}


def _overview(themes: Mapping[str, Mapping[str, Mapping[str, Result]]]) -> list[str]:
    parts = ["## All rows\n"]
    for theme, members in themes.items():
        if not members:
            continue
        parts += [f"### {theme}\n", "| row | must hold | seen | short | long |"]
        parts.append("|---|---|---|---|---|")
        for name, forms in members.items():
            one = forms.get("short") or forms["long"]
            words = telling_of(name, one["bar"]).words
            marks = [_MARKS[forms[f]["held"]] if f in forms else "-" for f in ("short", "long")]
            seen = "see below" if compared(one) else _plain(brief(one))
            parts.append(f"| {_plain(name)} | {_plain(words)} | {seen} | {' | '.join(marks)} |")
        parts.append("")
        measured = {n: one for n, forms in members.items() for one in forms.values()}
        if any(map(compared, measured.values())):
            parts.append(f"![Requests a second of a node and of bare sockets]({FIGURE})\n")
        for name, one in measured.items():
            if compared(one):
                parts += [f"{_plain(name)}:\n", *_throughput(one)]
    return parts


def _throughput(one: Result) -> list[str]:
    sides = compared(one)
    unanswered = [k for k in ("refused", "lost") if any(k in b["node"] for b in sides.values())]
    share_of = "share, median (least to most)"
    head = ["edges", "node requests/s", "bare requests/s", share_of, "node MB/s", "bare MB/s"]
    rows = []
    costs = []
    for name, both in sides.items():
        edges = name.split()[0]
        ends = [both[side] for side in ("node", "bare")]
        row = [edges, *(text(end["requests/s"]) for end in ends), _spread(share(both))]
        row += [text(end.get("MB/s", "-")) for end in ends]
        rows.append([*row, *(text(both["node"].get(end, 0)) for end in unanswered)])
        costs += [(f"{edges}, {s}", both[s].get("CPU ms/request", {})) for s in ("node", "bare")]
    parts = [*_table([*head, *unanswered], rows)]
    if names := list(dict.fromkeys(name for _, cost in costs for name in cost)):
        rows = [[who, *(text(cost.get(name, "-")) for name in names)] for who, cost in costs]
        parts += _table(["CPU ms a request", *names], rows)
    for name, value in one["seen"].items():
        if name not in sides:
            shares = value.items() if isinstance(value, dict) else [("", value)]
            shown = ", ".join(f"{side} {_spread(inner)}".strip() for side, inner in shares)
            parts.append(f"- {_plain(name.removesuffix(', %'))}: {shown}")
    return [*parts, ""]


def _spread(found: Any) -> str:
    if not isinstance(found, dict) or "median" not in found:
        return text(found)
    return f"{found['median']} % ({found.get('least')} to {found.get('most')})"


# Where it was measured


def _measured(results: Sequence[Result]) -> list[str]:
    """Each machine and its commits, with the rows measured there."""
    places: dict[str, dict[str, list[Result]]] = {}
    for one in results:
        run = one["run"]
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        commit, _, changes = run["commit"].partition("+")
        code = f"commit `{commit[:12]}`{f' with {changes}' if changes else ''}"
        when = f"{code}, {run['date']}" if "date" in run else code
        places.setdefault(f"{run['machine']}; {versions}", {}).setdefault(when, []).append(one)
    most = max((len(ones) for runs in places.values() for ones in runs.values()), default=0)
    parts = ["## Measured on\n"]
    for place, runs in places.items():
        parts.append(f"{_plain(place)}:\n")
        for when, ones in sorted(runs.items(), key=lambda run: -len(run[1])):
            names = "; ".join(_plain(f"{one['row']} ({one['form']})") for one in ones)
            if len(ones) == most > 1:
                names, most = f"all that is not named elsewhere here ({len(ones)})", 0
            parts.append(f"- {when}: {names}")
        parts.append("")
    return parts


# Markdown


def _table(head: Sequence[str], rows: Iterable[Sequence[str] | str]) -> list[str]:
    """A row that is one text is a title within the table."""
    lines = [list(map(_plain, head)), ["---", *("--:" for _ in head[1:])]]
    for row in rows:
        titled = isinstance(row, str)
        lines.append([f"**{row}**", *("" for _ in head[1:])] if titled else list(map(_plain, row)))
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def _plain(words: str) -> str:
    """Words of the results, on one line and without what Markdown would take for its own; what is
    between backticks stays."""
    parts = " ".join(words.split()).replace("|", "\\|").split("`")
    if len(parts) % 2 == 0:
        return "\\`".join(_escaped(part) for part in parts)
    return "`".join(part if number % 2 else _escaped(part) for number, part in enumerate(parts))


def _escaped(words: str) -> str:
    special = r"[*\[]|<(?=[A-Za-z/!?])|(?<!\w)_|_(?!\w)|\\(?=[!-/:-@\[-`{-~])(?!\|)"
    return re.sub(special, lambda found: f"\\{found[0]}", words)
