"""Numeric options within bounds, and the errors for all others."""

from __future__ import annotations

import pytest

from edge_common.options import SECONDS, SEED, SHARE, THREADS, Invalid, Number, Parser


@pytest.mark.parametrize(
    ("number", "text", "value"),
    [
        (THREADS, "1", 1),
        (THREADS, "1024", 1024),
        (SECONDS, "0.5", 0.5),
        (SECONDS, "86400", 86400.0),
        (SEED, str((1 << 64) - 1), (1 << 64) - 1),
        (SHARE, "0.37", 0.37),
        (SHARE, "37%", 0.37),
        (SHARE, "37.5 %", 0.375),
        (SHARE, "100%", 1.0),
        (Number(-5, 5), "-5", -5.0),
    ],
)
def test_values_within_bounds_are_accepted(number: Number, text: str, value: float) -> None:
    assert number(text) == value
    assert type(number(text)) is type(value)


@pytest.mark.parametrize(
    ("number", "text", "said"),
    [
        (THREADS, "100000", "expected a whole number from 1 to 1,024, not '100000'"),
        (THREADS, "0", "from 1 to"),
        (THREADS, "1.5", "a whole number"),
        (THREADS, "", "a whole number"),
        (THREADS, "9" * 5000, "a whole number"),
        (SECONDS, "0", "expected a number above 0, at most 86,400 seconds, not '0'"),
        (SECONDS, "nan", "above 0"),
        (SECONDS, "inf", "at most"),
        (SECONDS, "ten", "a number"),
        (SHARE, "37", "expected a share above 0, at most 1, such as 0.37, not '37'"),
        (SHARE, "0%", "above 0"),
        (SHARE, "101%", "at most 1"),
        (SHARE, "37%%", "a share"),
        (SHARE, "%", "a share"),
        (SHARE, "nan%", "a share"),
    ],
)
def test_values_out_of_bounds_are_refused(number: Number, text: str, said: str) -> None:
    with pytest.raises(Invalid) as caught:
        number(text)
    assert said in str(caught.value)


def parser() -> Parser:
    made = Parser("edge-runtime x")
    made.add_argument("--point")
    made.add_argument("--threads", type=THREADS)
    made.add_subparsers().add_parser("sub").add_argument("--share", type=SHARE)
    return made


def test_a_value_may_begin_with_a_minus() -> None:
    assert parser().parse_args(["--point", "-5,10"]).point == "-5,10"
    assert parser().parse_args(["--point", "-.5,-10"]).point == "-.5,-10"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threads", "0"], "error: --threads: expected a whole number from 1"),
        # abbreviations are refused: they would break when options are added
        (["--thr", "1"], "error: "),
        (
            ["--point", "--threads"],
            "error: --point: expected one argument (`edge-runtime x --help`",
        ),
        (["sub", "--share", "2"], "error: --share: expected a share"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1
