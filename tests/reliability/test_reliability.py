"""The harness itself, with a few rows that take no time; and that the page quotes the results.

The rows judge times and belong to ``make reliability``: what they count is asserted in the tests of
the modules they are about.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reliability.__main__ import OUT, PAGE, apart, load_rows, measure, merge
from reliability.page import page
from reliability.rows import Bench, Row, Seen, Skip

TESTS = Path(__file__).parents[1]


def made(work: Callable[[Bench], Seen]) -> Row:
    return Row("made up", "stands", work, {"short": 5, "long": 5})


@pytest.fixture
def bench(tmp_path: Path, toy_bundle: Path) -> Bench:
    return Bench(tmp_path, toy_bundle)


def test_what_a_row_sees_is_told(bench: Bench) -> None:
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


def test_a_row_that_cannot_be_run_says_why(bench: Bench) -> None:
    def work(_: Bench) -> Seen:
        raise Skip("no such kernel")

    told = measure(made(work), bench)
    assert told["held"] is None
    assert told["skipped"] == "no such kernel"


def test_a_row_that_hangs_is_ended(tmp_path: Path, toy_bundle: Path) -> None:
    frozen = dataclasses.replace(load_rows()["node frozen"], seconds={"short": 0.5, "long": 1})
    told = apart(frozen, "short", toy_bundle, tmp_path / "row")
    assert told["held"] is False
    assert "still ran" in told["error"]


def test_rows_that_were_not_run_keep_their_results(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    old = [{"row": name, "form": "short", "held": True, "run": {}} for name in ("keys", "soak")]
    path.write_text(json.dumps({"rows": old}))
    found = merge(path, [{"row": "keys", "form": "short", "held": False}], {"commit": "abc"})
    assert {one["row"]: one["held"] for one in found["rows"]} == {"keys": False, "soak": True}
    long = merge(path, [{"row": "keys", "form": "long", "held": False}], {"commit": "abc"})
    assert [(one["row"], one["form"]) for one in long["rows"]].count(("keys", "short")) == 1
    assert len(long["rows"]) == 3


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    rows = ["schema skew", "no pickle", "values and messages that show at once"]
    chosen = [word for name in rows for word in ("--row", name)]
    done = subprocess.run(
        [sys.executable, "-m", "reliability", "--machine", "a box", "--out", str(out), *chosen],
        cwd=TESTS.parent,
        env={"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["rows"]
    assert {one["row"] for one in found} == set(rows)
    for one in found:
        assert one["held"] is True
        assert one["form"] == "short"
        assert one["injected"]
        assert one["run"]["machine"] == "a box"
        assert one["run"]["command"].startswith("PYTHONPATH=tests python -m reliability")
        assert {"python", "libzmq", "kernel"} <= one["run"]["versions"].keys()


def test_the_page_is_made_from_the_results() -> None:
    if not OUT.exists():
        pytest.skip("nothing has been measured yet")
    results = json.loads(OUT.read_text())
    assert PAGE.read_text() == page(results), "run: PYTHONPATH=tests python -m reliability --doc"
    assert {one["row"] for one in results["rows"]} <= load_rows().keys()
