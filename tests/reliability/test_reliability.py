"""The harness itself, with a few quick rows, and the page and figure of its results.

The rows judge times and belong to ``make reliability``. The tests of the modules assert the counts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from reliability.__main__ import (
    OUT,
    PAGE,
    apart,
    left,
    load_rows,
    measure,
    merge,
    recorded,
    write_page,
)
from reliability.figure import figure
from reliability.page import FIGURE, page
from reliability.rows import Bench, Row, Seen, Skip
from reliability.telling import THEMES, as_read, brief, flat

TESTS = Path(__file__).parents[1]


def made(work: Callable[[Bench], Seen]) -> Row:
    return Row("made up", "stands", work, {"short": 5, "long": 5})


@pytest.fixture
def bench(tmp_path: Path, toy_bundle: Path) -> Bench:
    return Bench(tmp_path, toy_bundle)


def test_the_numbers_of_a_row_are_reported(bench: Bench) -> None:
    told = measure(made(lambda _: Seen({"faults": 3}, {"wrong": 0}, True)), bench)
    assert told.pop("seconds") >= 0
    assert told == {
        "row": "made up",
        "bar": "stands",
        "form": "short",
        "injected": {"faults": 3},
        "seen": {"wrong": 0},
        "held": True,
    }


def test_a_row_that_raises_is_not_held(bench: Bench) -> None:
    def work(_: Bench) -> Seen:
        raise ZeroDivisionError("of all things")

    told = measure(made(work), bench)
    assert told["held"] is False
    assert "ZeroDivisionError" in told["error"]
    assert "test_reliability.py" in told["error"]


def test_a_row_that_cannot_run_says_why(bench: Bench) -> None:
    def work(_: Bench) -> Seen:
        raise Skip("no such kernel")

    told = measure(made(work), bench)
    assert told["held"] is None
    assert told["skipped"] == "no such kernel"


@pytest.mark.process
def test_a_row_that_hangs_is_killed(tmp_path: Path, toy_bundle: Path) -> None:
    frozen = dataclasses.replace(load_rows()["node frozen"], seconds={"short": 0.5, "long": 1})
    told = apart(frozen, "short", toy_bundle, tmp_path / "row")
    assert told["held"] is False
    assert "still ran" in told["error"]


def test_rows_that_did_not_run_keep_their_results(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    old = [{"row": name, "form": "short", "held": True, "run": {}} for name in ("keys", "soak")]
    path.write_text(json.dumps({"rows": old}))
    found = merge(path, [{"row": "keys", "form": "short", "held": False}], {"commit": "abc"})
    assert {one["row"]: one["held"] for one in found["rows"]} == {"keys": False, "soak": True}
    long = merge(path, [{"row": "keys", "form": "long", "held": False}], {"commit": "abc"})
    assert [(one["row"], one["form"]) for one in long["rows"]].count(("keys", "short")) == 1
    assert len(long["rows"]) == 3


def command(out: Path, rows: list[str]) -> dict[str, Any]:
    chosen = [word for name in rows for word in ("--row", name)]
    return {
        "args": [
            *(sys.executable, "-m", "reliability", "--machine", "a box", "--out", str(out)),
            *chosen,
        ],
        "cwd": TESTS.parent,
        "env": {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "PATH": "/usr/bin:/bin"},
        "text": True,
    }


@pytest.mark.process
def test_the_command_runs_rows(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    rows = ["schema skew", "no pickle", "values and messages that show at once"]
    done = subprocess.run(**command(out, rows), capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["rows"]
    assert {one["row"] for one in found} == set(rows)
    for one in found:
        assert one["held"] is True
        assert one["form"] == "short"
        assert one["injected"]
        assert f"{one['row']}\n" in done.stdout
        assert one["run"]["machine"] == "a box"
        assert one["run"]["command"].startswith("PYTHONPATH=tests python -m reliability")
        assert {"python", "libzmq", "kernel"} <= one["run"]["versions"].keys()


@pytest.mark.process
def test_an_interrupt_keeps_the_rows_measured_so_far(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    with subprocess.Popen(
        **command(out, ["replay, duplicate, late, wrong id", "endless multipart: edge"]),
        stdout=subprocess.PIPE,
        # A background process has SIGINT ignored, and children inherit that.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout
        lines = iter(process.stdout.readline, "")
        assert any("endless multipart: edge" in line and "held" in line for line in lines)
        process.send_signal(signal.SIGINT)  # only to this process, which must then end the row
        rest = "".join(lines)
    assert process.returncode == 130
    assert f"stopped; what was measured is in {out}; not run: replay, duplicate" in rest
    assert [one["row"] for one in json.loads(out.read_text())["rows"]] == [
        "endless multipart: edge"
    ]


def test_the_remaining_time_is_estimated_from_earlier_runs(tmp_path: Path) -> None:
    rows = [made(lambda _: Seen({}, {}, True)), *load_rows().values()][:2]
    known = {rows[1].name: 130.0}
    assert left(rows[1:], known) == "about 2 min left, by the rows' recorded seconds"
    assert left(rows, known).startswith("at least about 2 min left")
    assert "nobody knows" in left(rows[:1], known)
    path = tmp_path / "results.json"
    found = [
        {"row": "soak", "form": form, "seconds": s} for form, s in (("short", 60), ("long", 900))
    ]
    path.write_text(json.dumps({"rows": found}))
    assert recorded("short", tmp_path / "none.json", path) == {"soak": 60}


# The summary of a row


def test_every_row_has_a_theme_and_a_short_form_of_its_bar() -> None:
    told = {name: telling for rows in THEMES.values() for name, telling in rows.items()}
    assert told.keys() == load_rows().keys()
    for name, telling in told.items():
        numbers = re.findall(r"\d[\d.]*", telling.words)
        assert set(numbers) <= set(re.findall(r"\d[\d.]*", load_rows()[name].bar)), name


def test_a_summary_line_has_the_deciding_numbers() -> None:
    told: dict[str, Any] = {
        "row": "node killed in the middle of a request",
        "bar": "",
        "seen": {"asked": 9, "wrong": 0, "noticed ms, median": 4.0, "noticed ms, worst": 52.1},
    }
    assert brief(told) == "wrong: 0; noticed, worst: 52.1 ms"
    assert brief({**told, "row": "unheard of", "seen": {"a": {"b": True}}}) == "a: b: yes"
    assert brief({"row": "soak", "error": "it\n  broke"}) == "it broke"
    assert len(brief({"row": "soak", "error": "x" * 2000})) == 300


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("back, worst s", 3.07, ("back, worst", "3.07 s")),
        ("memory, most MB more (both ends)", 1, ("memory, most (both ends)", "1 MB more")),
        ("1 edge: share of bare, %: median", 80.0, ("1 edge: share of bare: median", "80.0 %")),
        ("descriptors", [17, 1700], ("descriptors", "17, 1,700")),
        ("requests/s", 671.0, ("requests/s", "671.0")),
        ("of each", True, ("of each", "yes")),
    ],
)
def test_numbers_are_shown_with_their_units(
    name: str, value: Any, expected: tuple[str, str]
) -> None:
    assert as_read(name, value) == expected


def test_equal_values_are_shown_once() -> None:
    assert flat({"nan": 5, "inf": 5, "shape": 5}) == {"each of nan, inf, shape": 5}
    assert flat({"a": {"x": 1, "y": 2}, "b": {}}) == {"a: x": 1, "a: y": 2, "b": {}}


# The page


RUN = {"machine": "a box", "commit": "c" * 40, "versions": {"python": "3.12"}}
SIDES = {"node": {"requests/s": 80.0, "lost": 3}, "bare": {"requests/s": 100.0}}
SPREAD = {"median": 79.5, "least": 70.0, "most": 90.0}


def result(row: str, held: bool | None = True, form: str = "short", **more: Any) -> dict[str, Any]:
    told: dict[str, Any] = {
        "row": row,
        "form": form,
        "held": held,
        "bar": f"the bar of {row}",
        "seconds": 1.5,
    }
    if not {"error", "skipped"} & more.keys():
        told |= {"injected": {"faults": 3}, "seen": {"wrong": 0}}
    return {**told, "run": RUN, **more}


def moved(size: str) -> dict[str, Any]:
    seen = {"1 edge": {"share of bare, %": SPREAD, **SIDES}, "16 edges of 1, %": {"node": SPREAD}}
    return result(f"throughput, {size} windows", seen=seen)


EVERY = [
    result("keys"),
    result("soak"),
    result("soak", False, "long", seen={"wrong": 7, "slope MB/h": 2.5}),
    result("flapping", None, skipped="no | such *kernel*"),
    result("black hole", False, error="ZeroDivisionError at x.py:3: <of> all things\n  more"),
    result(
        "of a name that is new",
        seen={
            "a": {"x": 1, "y": 2},
            "b": {"y": 4, "x": 3},
            "c": {"v": 5, "w": "6 | *"},
            "d": {"v": 7, "w": "**8**"},
        },
    ),
    moved("ViT-B"),
]


def test_rows_not_held_come_first_with_the_reason() -> None:
    made_of = page({"rows": EVERY})
    top, _, rest = made_of.partition("## All rows")
    assert "**3 of 6 rows hold; 2 do not.**" in top
    assert "| ❌ soak | long | the bar of soak | **wrong: 7; slope: 2.5 MB/h** |" in top
    assert "**ZeroDivisionError at x.py:3: \\<of> all things more**" in top
    assert "flapping, short: no \\| such \\*kernel\\*" in top
    assert "keys" not in top
    assert "| soak | nothing wrong; memory and descriptors flat | wrong: 0 | held | ❌" in rest


def test_a_page_without_failures_has_no_section_about_them() -> None:
    made_of = page({"rows": [result("keys"), result("soak")]})
    assert "**2 of 2 rows hold.**" in made_of
    assert "Not held" not in made_of
    assert "❌" not in made_of


def test_rows_are_grouped_by_theme() -> None:
    made_of = page({"rows": EVERY})
    headings = re.findall(r"^##+ (.*)", made_of, re.MULTILINE)
    assert headings == [
        "Not held",
        "All rows",
        *("Network and processes", "Trust", "Throughput", "Others"),
        "How to measure",
        "What these numbers do not cover",
        "Measured on",
    ]
    trust = made_of.partition("### Trust\n")[2].partition("###")[0]
    assert "| keys |" in trust
    assert "| soak |" not in trust
    seen = "a: x: 1; a: y: 2; b: y: 4; b: x: 3; c: v: 5; c: w: 6 \\| \\*; d: v: 7; d: w: "
    name = "of a name that is new"
    assert f"| {name} | the bar of {name} | {seen}\\*\\*8\\*\\* | held | - |" in made_of


def test_throughput_is_a_table_and_a_figure() -> None:
    made_of = page({"rows": EVERY})
    assert "| 1 | 80.0 | 100.0 | 79.5 % (70.0 to 90.0) | - | - | 3 |" in made_of
    assert f"]({FIGURE})" in made_of
    assert FIGURE not in page({"rows": EVERY[:-1]})


def test_the_machine_is_named_once() -> None:
    other = {**RUN, "commit": "d" * 40 + "+changes", "date": "2030-01-02"}
    made_of = page({"rows": [*EVERY, result("no pickle", run=other)]})
    assert made_of.count("a box") == 1
    assert "- commit `cccccccccccc`: all that is not named elsewhere here (7)" in made_of
    assert "- commit `dddddddddddd` with changes, 2030-01-02: no pickle (short)" in made_of


@pytest.mark.parametrize("measured", [False, True])
def test_the_page_is_valid_markdown(measured: bool) -> None:
    if measured and not OUT.exists():
        pytest.skip("nothing has been measured yet")
    made_of = page(json.loads(OUT.read_text()) if measured else {"rows": EVERY})
    for table in re.findall(r"(?:^\|.*\|\n)+", made_of, re.MULTILINE):
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(cells)) == 1, table
    assert "\n\n\n" not in made_of


# The figure


def test_the_figure_shows_every_size_and_number_of_edges() -> None:
    drawn = figure([*EVERY, moved("ViT-H")])
    assert drawn
    assert drawn == figure([*EVERY, moved("ViT-H")])
    texts = ["".join(element.itertext()) for element in ElementTree.fromstring(drawn)]
    assert {"ViT-B, 1 edge", "ViT-H, 1 edge", "80.0 (79.5 % of bare)", "100.0"} <= set(texts)


def test_without_throughput_there_is_no_figure(tmp_path: Path) -> None:
    (tmp_path / FIGURE).parent.mkdir()
    assert figure([result("keys")]) is None
    write_page({"rows": EVERY}, tmp_path / "page.md")
    assert (tmp_path / FIGURE).read_text() == figure(EVERY)
    write_page({"rows": EVERY[:-1]}, tmp_path / "page.md")
    assert not (tmp_path / FIGURE).exists()


def test_the_committed_page_matches_the_results() -> None:
    if not OUT.exists():
        pytest.skip("nothing has been measured yet")
    results = json.loads(OUT.read_text())
    again = "run: PYTHONPATH=tests python -m reliability --doc"
    assert PAGE.read_text() == page(results), again
    picture = PAGE.parent / FIGURE
    assert (picture.read_text() if picture.exists() else None) == figure(results["rows"]), again
    assert {one["row"] for one in results["rows"]} <= load_rows().keys()
