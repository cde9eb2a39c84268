"""`edge_common.errors`: code, finding and remedy stay separate everywhere."""

from __future__ import annotations

import copy

import pytest

from edge_common import errors
from edge_common.errors import ConfigError, EdgeRuntimeError, OffloadError, PlanError


def _all(kind: type[EdgeRuntimeError] = EdgeRuntimeError) -> list[type[EdgeRuntimeError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in _all(child))]


def test_every_error_class_has_its_own_code() -> None:
    ours = [kind for kind in _all() if kind.__module__ == errors.__name__]
    codes = [kind.code for kind in ours]
    assert len(set(codes)) == len(codes) == 16
    assert all(code.replace("_", "").isalpha() and code.islower() for code in codes)


def test_finding_and_remedy_stay_separate() -> None:
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


def test_a_location_is_added_to_the_finding_only() -> None:
    with pytest.raises(ConfigError, match=r"^edge.toml: no nodes: add one$") as caught:
        raise ConfigError("no nodes", mend="add one").within("edge.toml")
    assert (caught.value.found, caught.value.mend) == ("edge.toml: no nodes", "add one")


def test_an_error_survives_transfer_to_another_process() -> None:
    error = OffloadError("it is late", mend="wait", code="late").within("node a")
    # uses the protocol of pickle, which carries errors between processes
    arrived = copy.copy(error)
    assert type(arrived) is OffloadError
    assert (arrived.found, arrived.mend, arrived.code) == ("node a: it is late", "wait", "late")


def test_unprintable_characters_are_replaced() -> None:
    assert "\x1b" not in OffloadError("a\x1b[31m", mend="\x1b[0m").shown()
