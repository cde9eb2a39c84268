from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.cli import main
from engines.bundle import shipped_bundle

pytest.importorskip("onnx")
BUNDLE = str(shipped_bundle("fp16"))


def test_logits_appear_only_in_the_plain_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tensors", BUNDLE, "--stage", "tail", "--top", "3"]) == 0
    said = capsys.readouterr().out
    assert "576 x 576" not in said
    assert "1 x 576 x 512" in said
    assert main(["tensors", BUNDLE, "--stage", "tail", "--plain", "--top", "3"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "5.308 4 Softmax float32 1 x 4 x 576 x 576" in said
    assert "alike ones share a row" in said


def test_json_output_of_tensors(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--windows", "7", "--prompts", "2", "--points", "0", "--top", "2", "--json"]
    assert main(["tensors", BUNDLE, *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["form"] == "main"
    assert facts["dimensions"] == {"n": 7, "p": 2, "k": 0}
    assert facts["problems"] == []
    assert list(facts["stages"]) == ["stack", "tail", "decoder"]
    for stage in facts["stages"].values():
        assert stage["unknown"] == []
        assert len(stage["largest"]) == 2
        assert stage["largest_bytes"] == stage["largest"][0]["bytes"]
    assert facts["stages"]["stack"]["largest"][0]["shape"] == [7, 25, 512]
    assert facts["stages"]["tail"]["operators"]["Attention"] == 4


@pytest.mark.parametrize(("limit", "code"), [("5.31", 0), ("5.3", 1)])
def test_limit_decides_the_exit_code(
    limit: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tensors", BUNDLE, "--plain", "--limit", limit]) == code
    said = " ".join(capsys.readouterr().out.split())
    if code:
        assert "tail: 8 of 219 tensors exceed 5.3 MB, the largest" in said
    else:
        assert "none exceeds 5.31 MB" in said


def test_any_onnx_graph_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    graph = f"{BUNDLE}/stack.plain.onnx"
    assert main(["tensors", graph, "--top", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["dimensions"]["n"] == 25
    assert list(facts["stages"]) == ["stack.plain.onnx"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"{BUNDLE}/stack.onnx", "--plain"], "--stage and --plain choose a graph of a bundle"),
        ([BUNDLE, "--stage", "head"], "has no head"),
        (["nowhere.onnx"], "nowhere.onnx does not exist"),
        (["nowhere"], "bundle nowhere does not exist"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tensors", *arguments]) == 1
    found, *mend = capsys.readouterr().err.splitlines()
    assert message in found
    assert all(line.startswith("  -> ") for line in mend)
    assert len(mend) <= 1


def test_an_unknown_shape_fails_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from onnx import TensorProto, helper, save

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [7])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, [1, None])
    graph = helper.make_graph([helper.make_node("NonZero", ["x"], ["y"])], "g", [x], [y])
    save(helper.make_model(graph), tmp_path / "g.onnx")
    assert main(["tensors", str(tmp_path / "g.onnx")]) == 0
    assert "1 tensors of unknown shape (y, ...)" in capsys.readouterr().out
    assert main(["tensors", str(tmp_path / "g.onnx"), "--limit", "1"]) == 1


def test_the_weights_file_is_not_required(tmp_path: Path) -> None:
    graph = tmp_path / "tail.plain.onnx"
    shutil.copyfile(f"{BUNDLE}/tail.plain.onnx", graph)
    assert main(["tensors", str(graph)]) == 0


@pytest.mark.process
def test_help_has_an_example_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from edge_runtime.cli import main; main(['tensors', '--help']); "
        "assert not {'torch', 'onnx', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout
    assert "exit code" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--limit=nan", "expected a number from 0 to"),
        ("--limit=-1", "not '-1'"),
        ("--windows=x", "expected a whole number from 0 to"),
        ("--top=-1", "not '-1'"),
    ],
)
def test_malformed_numbers_are_refused(
    option: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tensors", BUNDLE, option]) == 2
    assert says in capsys.readouterr().err
