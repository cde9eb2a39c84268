"""The page that shows the results, made from the results alone.

The verdict comes first, then what is not held, a table of all rows by theme, and a section of each
row. Where it was measured (machine, commit) is said once, at the end. The figure beside it is in
:mod:`reliability.figure`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reliability.figure import compared, share
from reliability.telling import (
    OTHERS,
    THEMES,
    alike,
    as_read,
    brief,
    flat,
    listed,
    telling_of,
    text,
    theme_of,
)

Result = Mapping[str, Any]
FIGURE = "images/reliability-throughput.svg"
"""Where the figure lies, seen from the page."""

_HEAD = """\
# Reliability

What was done to edges, nodes and the network between them, and what was seen.
"""

_HOW = """\
## How it is measured

    make reliability              # the short form, about five minutes
    make reliability FORM=long    # hours
    make fuzz SECONDS=600         # only the fuzzers

This page is made from [results/reliability.json](results/reliability.json), which holds every
number with the commit and the machine it was measured on; do not edit it.

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
  The long soak so far run counts the samples it kept itself, 4.3 MB in its hour, with the edge.
- Shared memory keeps the last windows until others overwrite them. It has no name in any file
  system and goes with its processes.
- Lies within the shape and range of an honest answer pass here: finding them is the edge's part.
- All of it was run on one machine, over the loopback or links between namespaces of it.
"""


def page(results: Mapping[str, Any]) -> str:
    """The whole page, from the content of the results' file."""
    rows: dict[str, dict[str, Result]] = {}
    for one in results["rows"]:
        rows.setdefault(one["row"], {})[one["form"]] = one
    themes = {theme: {n: f for n, f in rows.items() if theme_of(n) == theme} for theme in _THEMES}
    parts = [_HEAD, *_verdict(rows), *_overview(themes), _HOW]
    for theme, members in themes.items():
        if members:
            parts.append(f"## {theme}\n")
            if theme == "Throughput" and any(map(compared, results["rows"])):
                parts.append(f"![Requests a second of a node and of bare sockets]({FIGURE})\n")
        for name, forms in members.items():
            parts += _section(name, forms)
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
        "A row is a fault or an attack on real processes, and what must hold all the while. It "
        "holds if that was so in every form that was run: the short form, in seconds, and the long "
        f"one, with many more faults, so far run of {long} rows. This says what was seen where it "
        "was measured; it proves nothing of what was not tried.\n",
    ]
    if failed:
        parts += ["## Not held\n", "| row | form | must hold | seen |", "|---|---|---|---|"]
        parts += [
            f"| ❌ {_link(one['row'])} | {one['form']} | {_plain(one['bar'])} "
            f"| **{_plain(brief(one))}** |"
            for one in failed
        ]
        parts.append("")
    if skipped:
        parts.append("Not run, and why:\n")
        parts += [f"- {_link(one['row'])}, {one['form']}: {_plain(brief(one))}" for one in skipped]
        parts.append("")
    return parts


_MARKS = {True: "held", False: "❌ **not held**", None: "not run"}


def _overview(themes: Mapping[str, Mapping[str, Mapping[str, Result]]]) -> list[str]:
    parts = ["## All rows\n", "| row | must hold | short form | long form |", "|---|---|---|---|"]
    for theme, members in themes.items():
        if members:
            parts.append(f"| **{theme}** | | | |")
        for name, forms in members.items():
            words = telling_of(name, next(iter(forms.values()))["bar"]).words
            marks = [_MARKS[forms[f]["held"]] if f in forms else "-" for f in ("short", "long")]
            parts.append(f"| {_link(name)} | {_plain(words)} | {' | '.join(marks)} |")
    return [*parts, "", "A form with - was not run.\n"]


# A row's section


def _section(name: str, forms: Mapping[str, Result]) -> list[str]:
    bars = dict.fromkeys(one["bar"] for one in forms.values())
    parts = [f"### {name}\n", *(f"Must hold: {_plain(bar)}.\n" for bar in bars)]
    verdicts = [
        f"{form} form: {_MARKS[one['held']]} ({text(one['seconds'])} s)"
        for form, one in forms.items()
    ]
    parts.append(_sentence("; ".join(verdicts)))
    told = {form: one for form, one in forms.items() if "seen" in one}
    for form, one in forms.items():
        if form not in told:
            why = one.get("error") or one.get("skipped", "")
            parts += [f"What ended the {form} form:\n", "~~~text", why, "~~~\n"]
    if len(told) > 1 and not all(map(compared, told.values())):
        return [*parts, *_beside(told)]
    for form, one in told.items():
        which = f" ({form} form)" if len(forms) > 1 else ""
        parts.append(f"Injected{which}: {_plain(listed(one['injected'])) or 'nothing'}.\n")
        parts += _throughput(one) if compared(one) else _seen(one["seen"])
    return parts


_ASKED = ("asked", "identical", "wrong", "typed errors")


def _seen(numbers: Mapping[str, Any]) -> list[str]:
    """A list, and where several things have the same numbers, a table of them."""
    groups: dict[frozenset[str], list[str]] = {}
    for name, value in numbers.items():
        if isinstance(value, dict) and len(value) > 1:
            groups.setdefault(frozenset(value), []).append(name)
    tables = [names for names in groups.values() if len(names) > 1]
    tabled = {name for names in tables for name in names}
    items = _condensed({n: v for n, v in numbers.items() if n not in tabled})
    parts = ["Seen:\n", *(line for n, v in items.items() for line in _item(n, v))]
    if items:
        parts.append("")
    for names in tables:
        keys = numbers[names[0]]
        rows = [[key, *(_value(key, numbers[name][key]) for name in names)] for key in keys]
        parts += _table(["", *names], rows)
    return parts


def _condensed(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """With what became of all questions as one item."""
    if any(name not in numbers for name in _ASKED):
        return dict(numbers)
    asked, *became = ((name, text(numbers[name])) for name in _ASKED)
    line = f"{asked[1]} asked, " + ", ".join(f"{number} {name}" for name, number in became)
    return {"questions": line, **{n: v for n, v in numbers.items() if n not in _ASKED}}


def _item(name: str, value: Any) -> list[str]:
    if isinstance(value, dict) and alike(value):
        value = f"{text(next(iter(value.values())))} each: {', '.join(value)}"
    if isinstance(value, dict) and len(text(value)) > 200:
        return [f"- {_plain(name)}", *(f"  - {_line(n, v)}" for n, v in value.items())]
    return [f"- {_line(name, value)}"]


def _line(name: str, value: Any) -> str:
    name, shown = as_read(name, value)
    return f"{_plain(name)}: {_plain(shown)}"


def _beside(told: Mapping[str, Result]) -> list[str]:
    """Several forms': a table of them, and a list of what is long and the same in all."""
    same: dict[str, Any] = {}
    rows: list[Sequence[str] | str] = []
    for title in ("injected", "seen"):
        numbers = [flat(one[title]) for one in told.values()]
        rows.append(title)
        for name in dict.fromkeys(name for found in numbers for name in found):
            values = [found.get(name, "-") for found in numbers]
            shown = [_value(name, value) for value in values]
            if len(shown[0]) > 40 and len(set(shown)) == 1:
                same[name] = values[0]
            else:
                number = next((v for v in values if v != "-"), "-")
                rows.append([as_read(name, number)[0], *shown])
    parts = _table(["", *told], rows)
    if same:
        parts += ["The same in both:\n", *(f"- {_line(n, v)}" for n, v in same.items()), ""]
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


def _value(name: str, value: Any) -> str:
    return as_read(name, value)[1]


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}.\n"


def _link(name: str) -> str:
    return f"[{name}](#{anchor(name)})"


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


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
