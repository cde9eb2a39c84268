"""`edge_common.errors`: code, finding and remedy stay apart wherever an error goes."""

from __future__ import annotations

import copy

import pytest

from edge_common import errors
from edge_common.errors import ConfigError, EdgeRuntimeError, OffloadError, PlanError


def _all(kind: type[EdgeRuntimeError] = EdgeRuntimeError) -> list[type[EdgeRuntimeError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in _all(child))]


def test_every_class_of_errors_has_a_code_of_its_own() -> None:
    ours = [kind for kind in _all() if kind.__module__ == errors.__name__]
    codes = [kind.code for kind in ours]
    assert len(set(codes)) == len(codes) == 15
    assert all(code.replace("_", "").isalpha() and code.islower() for code in codes)


def test_what_was_found_and_the_remedy_stay_apart() -> None:
    error = PlanError("the plan is old", mend="build it again")
    assert (error.found, error.mend, error.code) == ("the plan is old", "build it again", "plan")
    assert str(error) == "the plan is old: build it again"
    assert error.shown() == "error: the plan is old\n  -> build it again"
    assert error.fields() == {
        "error": "the plan is old",
        "code": "plan",
        "mend": "build it again",
    }


def test_without_a_remedy_there_is_one_line() -> None:
    error = OffloadError("it is late", code="late")
    assert (str(error), error.shown()) == ("it is late", "error: it is late")
    assert (error.code, OffloadError.code) == ("late", "offload")


def test_a_place_is_added_to_what_was_found_alone() -> None:
    with pytest.raises(ConfigError, match=r"^edge.toml: no nodes: add one$") as caught:
        raise ConfigError("no nodes", mend="add one").within("edge.toml")
    assert (caught.value.found, caught.value.mend) == ("edge.toml: no nodes", "add one")


def test_an_error_survives_the_way_to_another_process() -> None:
    error = OffloadError("it is late", mend="wait", code="late").within("node a")
    arrived = copy.copy(error)  # by the same protocol as pickle, which carries it between processes
    assert type(arrived) is OffloadError
    assert (arrived.found, arrived.mend, arrived.code) == ("node a: it is late", "wait", "late")


def test_what_a_terminal_must_not_print_is_replaced() -> None:
    assert "\x1b" not in OffloadError("a\x1b[31m", mend="\x1b[0m").shown()
