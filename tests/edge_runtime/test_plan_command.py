"""`edge-runtime plan`: what a number of parties can do under a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_common.errors import PlacementError
from edge_runtime import cli
from edge_runtime.commands import plan
from edge_runtime.exposure.placement import Placement, place

AREAS, WINDOWS, SIDE = [1] * 9, list(range(9)), 3


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert cli.main(["plan", "--json", *options]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_the_worst_placement_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--max-exposure=37%", "--parties=1-6")
    assert found["windows"] == 15
    rows = {row["parties"]: row for row in found["parties"]}
    assert list(rows) == [1, 2, 3, 4, 5, 6]
    assert [row["separation"] for row in rows.values()][2:] == [4, 8, 8, 8]
    assert [row["home"] > 0 for row in rows.values()] == [True, True, False, False, False, False]
    for count, row in rows.items():
        assert row["busiest"] <= 0.37
        assert 1 / count <= row["at_least"] <= 1
    assert found["enough"] == {"any": 3, "edges": 3, "corners": 4}


def test_what_is_said_to_suffice_does_and_less_does_not() -> None:
    def fits(parties: int, budget: float) -> bool:
        try:
            place(AREAS, WINDOWS, SIDE, [str(n) for n in range(parties)], budget, b"s" * 32, b"")
        except PlacementError:
            return False
        return True

    for budget in (0.2, 0.25, 0.34, 0.5, 0.6):
        enough = plan.enough_parties(AREAS, WINDOWS, SIDE, budget)["any"]
        assert enough is not None
        assert fits(enough, budget)
        assert not fits(enough - 1, budget)
        row = plan.look(AREAS, WINDOWS, SIDE, enough - 1, budget)
        assert row.home > 0
        assert fits(enough - 1, row.at_least)
        assert not fits(enough - 1, row.at_least - 0.01)
    assert plan.enough_parties(AREAS, WINDOWS, SIDE, 0.1)["any"] is None


def test_the_fewest_windows_with_a_second_party_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fewer(*args: Any, **options: Any) -> Placement:
        found = place(*args, **options)
        second = dict.fromkeys(range(args[5][0] + 3), "some party")  # differs from key to key
        return msgspec.structs.replace(found, second=second)

    monkeypatch.setattr(plan, "place", fewer)
    assert plan.look(AREAS, WINDOWS, SIDE, 4, 0.5).second == 3


def test_more_parties_leave_more_room_for_retries(capsys: pytest.CaptureFixture[str]) -> None:
    rows = planned(capsys, "--parties=4-9")["parties"]
    second = [row["second"] for row in rows]
    assert second == sorted(second)
    assert second[-1] > 10


def test_the_table_says_what_to_do(capsys: pytest.CaptureFixture[str], toy_bundle: Path) -> None:
    assert cli.main(["plan", "--bundle", str(toy_bundle), "--parties=2", "--max-exposure=0.4"]) == 0
    text = capsys.readouterr().out
    assert "1920 x 1080: 6 windows, budget 40.0 %" in text
    assert "PARTIES" in text
    assert "Fewest parties: 3 can take all windows under 40.0 %" in text
    assert "With 2, none stays at home from --max-exposure 0.5" in text
    assert cli.main(["plan", "--max-exposure=1%"]) == 0
    assert "No number of parties" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", ["--parties=0", "--parties=5-3", "--parties=3-99", "--image=10", "--image=0x5"]
)
def test_wrong_options_are_explained(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", option]) == 2
    assert "expected" in capsys.readouterr().err
