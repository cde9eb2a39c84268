"""`edge-runtime exposure`: the record as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_runtime import cli
from edge_runtime.exposure import record_file
from edge_runtime.exposure.mosaic import Mosaic
from edge_runtime.exposure.motion import Position
from edge_runtime.exposure.store import ExposureStore
from edge_runtime.imaging.render import colour

KEYS = [bytes([n]) * 32 for n in (0x11, 0x12, 0x20)]


def snapshot(**columns: int) -> bytes:
    """A scene of 64 x 128 pixels; each party has seen that many columns of pixels."""
    mosaic, position = Mosaic(1024), Position(part=0, y=0.0, x=0.0, error=0.0)
    mosaic.show(position, (64, 128))
    for party, count in columns.items():
        mosaic.see(party, position, [(0, 0, 64, count)])
    return mosaic.to_bytes()


@pytest.fixture(autouse=True)
def _around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(record_file, "_SHARED_MEMORY", tmp_path / "memory")
    monkeypatch.setattr("edge_common.process.disable_core_dumps", lambda: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A record of two streams and three photos."""
    with ExposureStore(tmp_path / "exposure", 0.37, clock=lambda: 86_400.0) as store:
        store.begin_scene("door").reserve(snapshot(acme=32))
        store.begin_scene("door").reserve(snapshot(acme=16, globex=48))
        store.begin_scene("yard")
        for key in KEYS:
            photo = store.photo(key, (96, 144), 32)
            photo.place("acme", [0, 7])
            photo.grant("globex", [4])
    return tmp_path / "exposure"


def shown(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    assert cli.main(["exposure", "--folder", str(folder), *options]) == 0
    return capsys.readouterr().out


def test_the_table_lists_scenes_and_photos(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line.split() for line in shown(capsys, folder).splitlines()]
    when = ["1970-01-02", "00:00:00"]
    assert ["door", *when, "no", "37%", "acme", "25.0%"] in lines
    assert ["door", *when, "yes", "37%", "acme", "12.5%,", "globex", "37.5%"] in lines
    assert ["yard", *when, "yes", "37%", "unknown:", "up", "to", "37%", "each"] in lines
    # 32 x 32 of 96 x 144 pixels twice, and the 16 columns of the fifth window
    assert ["111111111111", *when, "37%", "acme", "14.8%,", "globex", "3.7%"] in lines
    assert "yard" not in shown(capsys, folder, "--stream=door")
    with ExposureStore(folder):
        assert "A process has the record open" in shown(capsys, folder)


def test_json_holds_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, folder, "--json"))
    assert found["in_use"] is False
    assert [scene["stream"] for scene in found["scenes"]] == ["door", "door", "yard"]
    assert [scene["goes_on"] for scene in found["scenes"]] == [False, True, True]
    last = found["scenes"][-1]
    assert (last["blanket"], last["parties"], last["began"]) == (True, None, "1970-01-02T00:00:00Z")
    assert [photo["photo"] for photo in found["photos"]] == [key.hex() for key in KEYS]
    assert found["photos"][0]["parties"]["acme"] == pytest.approx(2 * 32 * 32 / (96 * 144))


def test_the_picture_shows_what_each_party_has_seen(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "seen.png"
    expected = {"--stream=door": (4 / 32, 12 / 32), "--photo=20": (2048 / 13824, 512 / 13824)}
    for choice, shares in expected.items():
        shown(capsys, folder, choice, "--out", str(file))
        assert file.stat().st_mode & 0o777 == 0o600
        picture = np.array(Image.open(file))
        counts = [(picture == colour(number)).all(-1).sum() for number in (1, 2)]
        assert counts[0] / counts[1] == pytest.approx(shares[0] / shares[1], rel=0.03)


def test_what_is_unknown_is_not_drawn(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "seen.png"
    assert cli.main(["exposure", "--folder", str(folder), "--stream=yard", f"--out={file}"]) == 1
    assert "--new-scene yard" in capsys.readouterr().err
    assert not file.exists()


def test_a_person_ends_a_scene(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "begins a new scene" in shown(capsys, folder, "--new-scene=yard")
    with ExposureStore(folder) as store:
        assert store.resume("yard") is None
        assert store.resume("door") is not None
        assert cli.main(["exposure", f"--folder={folder}", "--new-scene=door"]) == 1
        assert "another process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--stream=attic", "it has door, yard"),
        ("--photo=1", "2 photos with a number that begins with '1'"),
        ("--photo=f", "no photo"),
        ("--new-scene=attic", "there are door, yard"),
    ],
)
def test_a_wrong_choice_is_explained(
    folder: Path, option: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["exposure", f"--folder={folder}", option]) == 1
    assert says in capsys.readouterr().err


def test_without_a_record_nothing_is_shown_or_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "none"
    assert "Nothing is on record" in shown(capsys, folder)
    empty: dict[str, Any] = json.loads(shown(capsys, folder, "--json"))
    assert (empty["scenes"], empty["photos"]) == ([], [])
    assert cli.main(["exposure", f"--folder={folder}", "--new-scene=door"]) == 1
    assert not folder.exists()


def test_the_record_lies_beside_edge_toml(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "a" * 40
    (tmp_path / "edge.toml").write_text(
        f'[[nodes]]\nname = "alpha"\nendpoint = "tcp://127.0.0.1:5555"\nserver_key = "{key}"\n'
    )
    assert cli.main(["exposure", f"--config={tmp_path / 'edge.toml'}"]) == 0
    assert "door" in capsys.readouterr().out


def test_long_records_are_cut_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExposureStore(tmp_path / "exposure") as store:
        for number in range(30):
            store.photo(bytes([number]) * 32, (96, 144), 32).place("acme", [number % 15])
    text = shown(capsys, tmp_path / "exposure")
    assert "and 10 older photos" in text
    assert "1d1d1d1d1d1d" in text
    assert "090909090909" not in text
