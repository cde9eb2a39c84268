"""``edge-runtime segment``, in this process and through real nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.nodes import Act, FaultyNode
from PIL import Image
from toy import poisoned, slow

from edge_common.errors import PlanError
from edge_runtime.cli import main
from edge_runtime.config import EdgeConfig, NodeConfig
from edge_runtime.exposure.store import PhotoRecord
from edge_runtime.offload.offloader import Offloader
from edge_runtime.offload.spotcheck import SpotCheck, Verdict
from edge_runtime.predictor import OffloadPredictor
from engines.bundle import Bundle
from transport.keys import generate_secret


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    path = tmp_path / "photo.png"
    Image.fromarray(rng.integers(0, 256, (48, 60, 3), np.uint8)).save(path)
    return path


def toml(config: EdgeConfig, path: Path) -> Path:
    lines = [f'bundle = "{config.bundle}"', f'secret = "{config.secret}"', "deadline_s = 30"]
    for node in config.nodes:
        lines += ["[[nodes]]", f'name = "{node.name}"', f'endpoint = "{node.endpoint}"']
        lines += [f'server_key = "{node.server_key}"', f'client_key = "{node.client_key}"']
    path.write_text("\n".join(lines))
    return path


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def mask(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image) > 0


def test_the_device_comes_from_the_option_or_edge_toml(
    photo: Path,
    tmp_path: Path,
    toy_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["segment", str(photo), "--point", "5,6", "--bundle", str(toy_bundle), "--local"]
    assert main([*command, "--device", "tensorrt", "--out", str(tmp_path / "t")]) == 1
    error = capsys.readouterr().err
    assert f"  -> edge-runtime build {toy_bundle} --stage stack\n" in error
    assert not (tmp_path / "t").exists()
    assert main([*command, "--device", "cpu", "--out", str(tmp_path / "c")]) == 0
    assert main([*command, "--device", "tpu"]) == 2
    node = NodeConfig(name="a", endpoint="tcp://a:1", server_key="a.pub")
    config = EdgeConfig(nodes=(node,), bundle=str(toy_bundle), device="tensorrt")
    monkeypatch.setattr(Offloader, "__init__", lambda self, *_: None)
    monkeypatch.setattr(Offloader, "close", lambda self: None)
    with OffloadPredictor(config) as predictor, pytest.raises(PlanError, match="no TensorRT plan"):
        predictor.pipeline.engine("tail")
    with OffloadPredictor(config, device="cpu") as predictor:
        predictor.pipeline.engine("tail")


def test_local_writes_masks_overlay_and_json(
    photo: Path, tmp_path: Path, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prompts = ["--point", "5,6", "--point", "30,20", "--point", "31,2,0", "--box", "1,2,30,40"]
    options = ["--local", "--bundle", str(toy_bundle), "--out", str(out)]
    assert main(["segment", str(photo), *prompts, *options]) == 0
    names = ["mask-1.png", "mask-2.png", "mask-3.png", "masks.png", "overlay.png", "result.json"]
    assert sorted(os.listdir(out)) == names
    result = json.loads((out / "result.json").read_text())
    assert result["photo"] == "photo.png"
    assert result["size"] == {"width": 60, "height": 48}
    assert result["offloaded"] is False
    assert "exposure" not in result
    assert [len(item["prompt"]["points"]) for item in result["objects"]] == [1, 2, 0]
    assert result["objects"][2]["prompt"]["box"] == {"x0": 1, "y0": 2, "x1": 30, "y1": 40}
    with Image.open(photo) as image, OffloadPredictor(bundle=toy_bundle) as predictor:
        predictor.set_image(np.array(image))
        expected, scores, _ = predictor.predict(np.array([[5, 6]]), np.array([1]))
    best = int(scores.argmax())
    assert np.array_equal(mask(out / "mask-1.png"), expected[best])
    first = result["objects"][0]["masks"]
    assert [m["file"] for m in first] == ["mask-1.png"]
    assert first[0]["predicted_iou"] == pytest.approx(float(scores[best]))
    assert first[0]["area"] == np.count_nonzero(expected[best])
    with Image.open(out / "masks.png") as labels:
        numbers = np.array(labels)
    assert np.array_equal(numbers == 3, mask(out / "mask-3.png"))
    assert "object 3:" in capsys.readouterr().out


def test_multimask_keeps_all_three_masks_best_first(
    photo: Path, tmp_path: Path, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--local", "--bundle", str(toy_bundle), "--out", str(out), "--multimask", "--json"]
    assert main(["segment", str(photo), "--point", "5,6", *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("folder") == str(out)
    assert printed == json.loads((out / "result.json").read_text())
    masks = printed["objects"][0]["masks"]
    assert [m["file"] for m in masks] == ["mask-1.png", "mask-1-2.png", "mask-1-3.png"]
    assert all((out / m["file"]).is_file() for m in masks)
    scores = [m["predicted_iou"] for m in masks]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.process
def test_through_nodes_the_masks_are_equal_and_exposure_is_reported(
    photo: Path, tmp_path: Path, shared_fleet: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toml(shared_fleet.config(), tmp_path / "edge.toml")
    prompts = ["--point", "5,6", "--point", "50,40"]
    local = ["--local", "--bundle", str(shared_fleet.bundle), "--out", str(tmp_path / "local")]
    away = ["--config", str(config), "--out", str(tmp_path / "away")]
    assert main(["segment", str(photo), *prompts, *local]) == 0
    assert main(["segment", str(photo), *prompts, *away, "--max-exposure", "0.45"]) == 0
    for name in ("mask-1.png", "mask-2.png"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "away" / name).read_bytes()
    assert (tmp_path / "away" / "what-each-node-saw.png").is_file()
    result = json.loads((tmp_path / "away" / "result.json").read_text())
    exposure = result["exposure"]
    assert exposure["largest_share"] <= exposure["max_exposure"] == 0.45
    assert {node["name"] for node in exposure["nodes"]} == {"alpha", "beta", "gamma"}
    shown = sorted(w for node in exposure["nodes"] for w in node["windows"])
    assert len(shown) == exposure["windows_sent"] == len(set(shown))
    assert sum(node["share_of_image"] for node in exposure["nodes"]) == pytest.approx(1)
    assert set(result["latency_ms"]["nodes"]["alpha"]) == {
        "upload",
        "queue",
        "compute",
        "download",
    }
    assert "alpha saw" in capsys.readouterr().out


@contextmanager
def one_node(folder: Path, bundle: Path, **options: Any) -> Iterator[tuple[FaultyNode, Path]]:
    """A misbehaving node that may see the whole photo, and the edge.toml that names it."""
    secret = folder / "keys" / "edge.secret"
    secret.parent.mkdir(mode=0o700)
    generate_secret(secret)
    with FaultyNode(Bundle.load(bundle), folder / "keys" / "node", **options) as node:
        node.authorise("edge", secret.parent)
        known = NodeConfig(
            name="alpha",
            endpoint=node.endpoint,
            server_key=node.keypair.public,
            client_key=str(secret.with_name("edge.key")),
        )
        config = EdgeConfig(nodes=(known,), bundle=str(bundle), secret=str(secret))
        path = toml(config, folder / "keys" / "edge.toml")
        path.write_text("max_exposure = 1.0\n" + path.read_text())
        yield node, path


@pytest.mark.process
def test_a_failed_run_leaves_a_record_of_the_nodes_exposure(
    photo: Path,
    tmp_path: Path,
    shared_fleet: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # No second node may see beta's windows.
    monkeypatch.setattr(PhotoRecord, "durable", lambda _: False)
    config = toml(shared_fleet.config(), tmp_path / "edge.toml")
    beta = shared_fleet.nodes["beta"].endpoint
    config.write_text(config.read_text().replace(beta, closed_port()))
    out = tmp_path / "deep" / "result"
    command = ["segment", str(photo), "--point", "5,6", "--config", str(config), "--out", str(out)]
    for name in ("result.sends.json", "result.sends-2.json"):  # the first record is not overwritten
        assert main(command) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: node beta ")
        assert "\n  -> `edge-runtime nodes` checks every node" in said
        assert str(out.with_name(name)) in said
        record = json.loads(out.with_name(name).read_text())
        assert record["photo"] == "photo.png"
        assert "node beta" in record["error"]
        assert record["code"] == "unreachable"
        seen = {node["name"]: node["windows"] for node in record["exposure"]["nodes"]}
        assert seen["beta"] == []
        last = {line["node"]: line for line in record["exposure"]["ledger"]}
        events = {name: line["event"] for name, line in last.items()}
        assert events == {"alpha": "committed", "beta": "released", "gamma": "committed"}
        for name in ("alpha", "gamma"):
            assert seen[name] == last[name]["windows"] != []
    assert sorted(os.listdir(out.parent)) == ["result.sends-2.json", "result.sends.json"]


def test_windows_that_are_not_on_record_yet_cost_a_node_only_those(
    photo: Path, tmp_path: Path, shared_fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Second choices wait for the disk; the first choices in the same request do not."""
    monkeypatch.setattr(PhotoRecord, "durable", lambda _: False)
    config = toml(shared_fleet.config(), tmp_path / "edge.toml")
    beta = shared_fleet.nodes["beta"].endpoint
    config.write_text(config.read_text().replace(beta, closed_port()))
    out = tmp_path / "result"
    command = ["segment", str(photo), "--point", "5,6", "--config", str(config), "--out", str(out)]
    assert main([*command, "--fallback", "local"]) == 0
    seen = json.loads((out / "result.json").read_text())["exposure"]
    by_node = {node["name"]: node["windows"] for node in seen["nodes"]}
    assert by_node["alpha"]
    assert by_node["gamma"]
    assert by_node["beta"] == []
    assert seen["windows_at_home"]


def test_non_finite_tokens_are_an_error_and_on_record(
    photo: Path, tmp_path: Path, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def huge(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"tokens": np.full((len(feeds["window"]), 16, 8), 3e38, np.float32)}

    out = tmp_path / "result"
    with one_node(tmp_path, toy_bundle, model=huge) as (_, config):
        command = ["segment", str(photo), "--point", "5,6", "--config", str(config)]
        assert main([*command, "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "the tail of" in said
    assert "not finite" in said
    assert not out.exists()
    record = json.loads((tmp_path / "result.sends.json").read_text())
    assert record["exposure"]["windows_sent"] == 6


def test_a_broken_bundle_is_an_error_and_writes_no_mask(
    photo: Path, tmp_path: Path, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = poisoned(toy_bundle, tmp_path / "broken", "tail")
    command = ["segment", str(photo), "--point", "5,6", "--local", "--bundle", str(broken.path)]
    assert main([*command, "--out", str(tmp_path / "result")]) == 1
    found, mend = capsys.readouterr().err.splitlines()
    assert found.startswith("error: the tail of ")
    assert f"`edge-runtime verify {broken.path}`" in mend
    assert sorted(os.listdir(tmp_path)) == ["broken", "photo.png"]


@pytest.mark.process
def test_absent_nodes_saw_nothing(
    photo: Path, tmp_path: Path, shared_fleet: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toml(shared_fleet.config(), tmp_path / "edge.toml")
    nobody = re.sub(r"tcp://[^\"]*", lambda _: closed_port(), config.read_text())
    config.write_text(nobody)
    command = ["segment", str(photo), "--point", "5,6", "--config", str(config)]
    assert main([*command, "--out", str(tmp_path / "out"), "--fallback", "local"]) == 0
    assert "alpha saw 0 of 9 windows, 0.0% of the photo; failed: " in capsys.readouterr().out
    exposure = json.loads((tmp_path / "out" / "result.json").read_text())["exposure"]
    assert (exposure["windows_sent"], exposure["bytes_up"]) == (0, 0)
    assert (exposure["largest_share"], len(exposure["windows_at_home"])) == (0, 6)


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_behind(
    photo: Path, tmp_path: Path, make_fleet: Callable[..., Any], number: signal.Signals
) -> None:
    fleet = make_fleet("alpha")
    folder = tmp_path / "here"
    folder.mkdir()
    config = toml(fleet.config(), tmp_path / "edge.toml")
    command = [sys.executable, "-m", "edge_runtime.cli", "segment", str(photo), "--point", "5,6"]
    command += ["--config", str(config), "--max-exposure", "1", "--out", str(folder / "result")]
    fleet.nodes["alpha"].signal(signal.SIGSTOP)
    # A test run under nohup passes on SIGHUP as ignored.
    heed = partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    while not os.listdir(folder):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (128 + number, "")
    assert os.listdir(folder) == []


STUCK_TAIL = """
import hashlib, sys
from pathlib import Path
from edge_runtime.cli import main
from engines.pipeline import Pipeline
ready = Path(sys.argv.pop())
def tail(*_):
    ready.touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)  # no signal handler runs meanwhile
Pipeline.tail = tail
sys.exit(main())
"""


@pytest.mark.process
@pytest.mark.parametrize("where", ["waiting for a node", "computing the tail"])
def test_a_signal_leaves_a_record_of_a_node_s_exposure(
    photo: Path, tmp_path: Path, toy_bundle: Path, where: str
) -> None:
    ready = tmp_path / "keys" / "ready"
    waiting = where == "waiting for a node"
    policy = "accepted_only" if waiting else "honest"
    with one_node(tmp_path, toy_bundle, policy=policy) as (node, config):
        start = ["-m", "edge_runtime.cli"] if waiting else ["-c", STUCK_TAIL]
        command = [sys.executable, *start, "segment", str(photo), "--point", "5,6"]
        command += ["--config", str(config), "--out", str(tmp_path / "result")]
        command += [] if waiting else [str(ready)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not (node.requests if waiting else ready.exists()):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    record = tmp_path / "result.sends.json"
    assert str(record) in said
    assert json.loads(record.read_text())["exposure"]["windows_sent"] == 6
    assert not (tmp_path / "result").exists()


@pytest.mark.parametrize(
    ("settings", "options", "right"),
    [("", ["--strict"], True), ("strict = true\n", [], True), ("recompute = 1.0\n", [], False)],
)
@pytest.mark.process
def test_a_lie_never_reaches_a_strict_mask_and_others_are_marked_suspect(
    photo: Path,
    tmp_path: Path,
    toy_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    settings: str,
    options: list[str],
    right: bool,
) -> None:
    real = SpotCheck.verdict

    def slowly(*arguments: Any) -> Verdict:  # the report waits for it
        time.sleep(0.2)
        return real(*arguments)

    monkeypatch.setattr(SpotCheck, "verdict", slowly)
    command = ["segment", str(photo), "--point", "5,6", "--bundle", str(toy_bundle)]
    assert main([*command, "--local", "--out", str(tmp_path / "local")]) == 0
    with one_node(tmp_path, toy_bundle, policy=Act("norm", factor=-1)) as (_, config):
        config.write_text(settings + config.read_text())
        away = [*command, "--config", str(config), "--out", str(tmp_path / "away"), *options]
        assert main(away) == 0
    result = json.loads((tmp_path / "away" / "result.json").read_text())
    exposure = result["exposure"]
    assert exposure["windows_recomputed"] == exposure["nodes"][0]["windows"]
    assert "differ" in exposure["nodes"][0]["failure"]
    assert exposure["suspect"] is not right
    assert ("these masks may be wrong" in capsys.readouterr().out) is not right
    files = [tmp_path / folder / "mask-1.png" for folder in ("local", "away")]
    assert (files[0].read_bytes() == files[1].read_bytes()) is right


@pytest.mark.process
def test_edge_toml_of_the_current_folder_is_found(
    photo: Path, tmp_path: Path, shared_fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml(shared_fleet.config(), tmp_path / "edge.toml")
    monkeypatch.chdir(tmp_path)
    assert main(["segment", "photo.png", "--point", "5,6"]) == 0
    result = json.loads((tmp_path / "out" / "photo.png" / "result.json").read_text())
    assert result["offloaded"] is True


def test_without_nodes_the_message_explains_both_options(
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["segment", str(photo), "--point", "5,6"]) == 1
    said = capsys.readouterr().err
    assert "--local" in said
    assert "edge-runtime init" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.process
def test_a_budget_that_cannot_be_met_leaves_nothing_behind(
    photo: Path, tmp_path: Path, shared_fleet: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toml(shared_fleet.config(), tmp_path / "edge.toml")
    command = ["segment", str(photo), "--point", "5,6", "--config", str(config)]
    command += ["--out", str(tmp_path / "result"), "--max-exposure", "0.1"]
    assert main(command) == 1
    assert "what would suffice" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["edge.toml", "photo.png"]
    assert main([*command, "--fallback", "local"]) == 0
    result = json.loads((tmp_path / "result" / "result.json").read_text())
    assert result["exposure"]["largest_share"] <= result["exposure"]["max_exposure"] == 0.1
    assert result["exposure"]["windows_at_home"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--local"], "say what to segment"),
        (["--local", "--point", "60,5"], "outside the photo, which is 60 x 48 pixels"),
        (["--local", "--point", "x"], "expected X,Y"),
        (["--local", "--box", "0,0,61,5"], "which is 60 x 48 pixels"),
        (["--local", "--point", "1,1", "--max-exposure", "0.3"], "--max-exposure is about nodes"),
        (["--local", "--point", "1,1", "--deadline", "3"], "--deadline is about nodes"),
        (["--local", "--point", "1,1", "--strict"], "--strict is about nodes"),
        (["--config", "no.toml", "--point", "1,1"], "no.toml does not exist"),
        (["--local", "--point", "-5,10"], "the point -5,10 is outside the photo"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    photo: Path,
    tmp_path: Path,
    toy_bundle: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    out = tmp_path / "result"
    code = main(["segment", str(photo), "--bundle", str(toy_bundle), "--out", str(out), *options])
    said = capsys.readouterr()
    assert code == 1
    assert said.err.startswith("error: ")
    assert all(line.startswith("  -> ") for line in said.err.splitlines()[1:])
    assert message in said.err
    assert os.listdir(tmp_path) == ["photo.png"]


@pytest.mark.process
def test_shares_may_be_in_percent_and_threads_are_limited(
    photo: Path,
    tmp_path: Path,
    shared_fleet: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = toml(shared_fleet.config(), tmp_path / "edge.toml")
    command = ["segment", str(photo), "--point", "5,6", "--config", str(config)]
    command += ["--out", str(tmp_path / "out")]
    assert main([*command, "--threads", "100000"]) == 2  # more than a machine can start
    assert capsys.readouterr().err.startswith("error: --threads: expected a whole number from 1 to")
    assert main([*command, "--max-exposure", "10%"]) == 1
    assert "0.1" in capsys.readouterr().err
    assert main([*command, "--max-exposure", "45%"]) == 0


def test_earlier_results_are_kept_unless_overwrite_is_given(
    photo: Path, tmp_path: Path, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result"
    command = ["segment", str(photo), "--local", "--bundle", str(toy_bundle), "--out", str(out)]
    assert main([*command, "--point", "5,6", "--point", "9,9"]) == 0
    before = (out / "result.json").read_bytes()
    assert main([*command, "--point", "7,7"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "result.json").read_bytes() == before
    assert main([*command, "--point", "7,7", "--overwrite"]) == 0
    assert not (out / "mask-2.png").exists()
    assert sorted(os.listdir(tmp_path)) == ["photo.png", "result"]


def test_a_second_run_keeps_both_results_and_names_do_not_clash(
    photo: Path, tmp_path: Path, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.open(photo).convert("RGB").save(tmp_path / "photo.jpg")
    command = ["--point", "5,6", "--local", "--bundle", str(toy_bundle)]
    for name in ("photo.png", "photo.jpg", "photo.png", "photo.png"):
        assert main(["segment", name, *command]) == 0
    names = ["photo.jpg", "photo.png", "photo.png-2", "photo.png-3"]
    assert sorted(os.listdir("out")) == names
    (tmp_path / "out" / "photo.png" / "mine").touch()  # a folder with other files is kept
    assert main(["segment", "photo.png", *command]) == 0
    assert main(["segment", "photo.jpg", *command, "--overwrite"]) == 0
    assert sorted(os.listdir("out")) == [*names, "photo.png-4"]
    assert main(["segment", "photo.png", *command, "--overwrite"]) == 1


def test_several_photos_share_prompts_and_one_bad_photo_stops_none(
    photo: Path, tmp_path: Path, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(photo, folder / "a.png")
    Image.new("RGB", (4, 4)).save(folder / "small.png")  # the prompt is outside
    (folder / "broken.jpg").write_bytes(b"no photo")
    (folder / "notes.txt").touch()
    (folder / "deeper.png").mkdir()
    out = tmp_path / "out"
    command = ["segment", str(folder), str(photo), "--point", "5,6", "--local"]
    command += ["--bundle", str(toy_bundle), "--out", str(out)]
    assert main([*command, "--json"]) == 1
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [line["photo"] for line in lines] == ["a.png", "broken.jpg", "small.png", "photo.png"]
    assert ["folder" in line for line in lines] == [True, False, False, True]
    assert "no" not in lines[0].get("error", "")
    assert "not an image" in lines[1]["error"]
    assert "outside the photo, which is 4 x 4" in lines[2]["error"]
    assert said.err == "error: 2 of 4 photos failed\n"
    assert sorted(os.listdir(out)) == ["a.png", "photo.png"]
    assert lines[3]["folder"] == str(out / "photo.png")
    assert main(command) == 1
    said = capsys.readouterr()
    assert said.out.count("object 1: ") == 2
    assert said.err.count("error: ") == 3
    assert sorted(os.listdir(out)) == ["a.png", "a.png-2", "photo.png", "photo.png-2"]


def test_a_folder_without_photos_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["segment", str(tmp_path), "--point", "5,6", "--local"]) == 1
    assert "holds no photos" in capsys.readouterr().err


def test_pictures_are_optional_and_their_time_is_counted(
    photo: Path, tmp_path: Path, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["segment", str(photo), "--point", "5,6", "--local", "--bundle", str(toy_bundle)]
    assert main([*command, "--out", str(tmp_path / "bare"), "--no-pictures", "--json"]) == 0
    assert sorted(os.listdir(tmp_path / "bare")) == ["mask-1.png", "masks.png", "result.json"]
    spent = json.loads(capsys.readouterr().out)["latency_ms"]
    parts = sum(value for name, value in spent.items() if name != "total")
    assert 0 < spent["files"] < parts <= spent["total"]


@pytest.mark.process
@pytest.mark.parametrize("place", ["full", "proc"])
def test_an_unwritable_folder_is_reported_before_any_computation(
    place: str,
    photo: Path,
    full_disk: Path,
    toy_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = {"full": full_disk / "deep" / "out", "proc": Path("/proc/out")}[place]
    endless = slow(toy_bundle, tmp_path / "endless", "stack")
    command = ["segment", str(photo), "--point", "5,6", "--local", "--out", str(out)]
    assert main([*command, "--bundle", str(endless.path)]) == 1
    said = capsys.readouterr().err
    assert str(out) in said
    assert "\n  -> " in said
    assert "name another folder with --out" in said
    assert said.count("\n") == 2
    assert os.listdir(full_disk) == []


@pytest.mark.process
def test_a_disk_that_fills_up_during_the_run_is_named(
    photo: Path,
    full_disk: Path,
    toy_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("edge_runtime.imaging.segmentation._ROOM_OF_PICTURES", 0)
    command = ["segment", str(photo), "--point", "5,6", "--local", "--bundle", str(toy_bundle)]
    assert main([*command, "--out", str(full_disk / "out")]) == 1
    said = capsys.readouterr().err
    assert f"cannot write {full_disk}/out: No space left on device\n" in said
    assert "  -> make room on that disk, or name another folder with --out\n" in said
    assert os.listdir(full_disk) == []


def test_prompts_are_in_pixels_of_the_upright_photo(
    tmp_path: Path, toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(3)
    upright = rng.integers(0, 256, (60, 40, 3), np.uint8)
    Image.fromarray(upright).save(tmp_path / "upright.png")
    lying = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to view it upright
    lying.save(tmp_path / "lying.png", exif=exif)
    results: list[Any] = []
    for name in ("upright", "lying"):
        command = ["segment", str(tmp_path / f"{name}.png"), "--point", "5,55", "--local"]
        command += ["--bundle", str(toy_bundle), "--out", str(tmp_path / name)]
        assert main(command) == 0
        results.append((tmp_path / name / "mask-1.png").read_bytes())
        assert mask(tmp_path / name / "mask-1.png").shape == (60, 40)
    assert results[0] == results[1]


def test_segment_works_with_the_shipped_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_runtime.demo import CLICKS, PHOTO, REFERENCE, mask_ious

    monkeypatch.chdir(tmp_path)
    x, y = CLICKS[0]
    assert main(["segment", str(PHOTO), "--point", f"{x},{y}", "--local"]) == 0
    found = mask(tmp_path / "out" / "coins.png" / "mask-1.png")
    with Image.open(REFERENCE) as reference:
        assert mask_ious([found], np.array(reference), [(x, y)])[0] > 0.5
