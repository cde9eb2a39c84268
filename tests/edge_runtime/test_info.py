from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.cli import main
from engines.bundle import MANIFEST, Bundle, node_bundle, shipped_bundle


def test_it_describes_a_bundle(toy_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(toy_bundle)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for fact in (
        "model toy, weights 000000000000",
        "weights NOT adapted",
        "fp32, codec lossless",
        "40 x 40 pixels, 10 x 10 tokens, 3 x 3 windows of 16 x 16 pixels (16 tokens of 8)",
        "pixels: per window 792 B up, 512 B down",
        "match their hashes",
        "pixels uint8 (n, 16, 16, 3), extent int64 (n, 2), window int64 (n)",
        Bundle.load(toy_bundle).stage("stack").sha256[:12],
    ):
        assert fact in text


def test_json_holds_the_manifest_and_derived_values(
    toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(toy_bundle), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    manifest = json.loads((toy_bundle / MANIFEST).read_text())
    for stage in facts["stages"].values():
        assert stage.pop("bytes") > 0
    assert manifest["geometry"].items() <= facts.pop("geometry").items()
    del manifest["geometry"]
    assert manifest.items() <= facts.items()
    assert (facts["kind"], facts["verified"]) == ("full", True)
    assert facts["window_bytes"] == {"up": 16 * 16 * 3 + 16 + 8, "down": 16 * 8 * 4}


def test_the_plain_form_is_shown_or_reported_missing(
    toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    size = (shipped_bundle() / "tail.plain.onnx").stat().st_size
    assert f"plain form tail.plain.onnx, {size / 1000:.3g} kB, with the same weights" in said
    assert main(["info", "--json"]) == 0
    tail = json.loads(capsys.readouterr().out)["stages"]["tail"]
    assert (tail["plain"]["file"], tail["plain"]["bytes"]) == ("tail.plain.onnx", size)
    assert main(["info", str(toy_bundle)]) == 0
    assert "no plain form: export again" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"head": True}, "hidden states after 0 window blocks: per window 520 B up"),
        ({"stock": True}, "cannot be offloaded"),
    ],
)
def test_other_kinds_are_described(
    make_toy_bundle: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: dict[str, bool],
    said: str,
) -> None:
    assert main(["info", str(make_toy_bundle(tmp_path / "b", **flags))]) == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_node_bundle_is_described(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node_bundle(Bundle.load(toy_bundle), tmp_path / "node")
    assert main(["info", str(tmp_path / "node"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "node"
    assert list(facts["stages"]) == ["stack"]


def test_manifest_text_is_escaped(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(toy_bundle, tmp_path / "b")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["made"] = {"by": "[red]:smile: [link=http://x]y[/link]"}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert main(["info", str(copy)]) == 0
    assert "[red]:smile: [link=http://x]y[/link]" in capsys.readouterr().out


def test_damage_is_one_line_and_a_failure(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(toy_bundle, tmp_path / "b")
    with (copy / "tail.onnx").open("ab") as file:
        file.write(b"x")
    assert main(["info", str(copy)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "tail.onnx is damaged" in error
    assert error.count("\n") == 1 + error.count("\n  -> ")
    assert main(["info", str(copy), "--no-verify"]) == 0
    assert "not verified" in capsys.readouterr().out


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "--json" in text


def test_without_a_name_it_shows_the_shipped_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(shipped_bundle().resolve())


def test_help_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
