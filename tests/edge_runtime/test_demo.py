"""The demo: it keeps its promises, and it notices when one does not hold."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.processes import children_of, state
from PIL import Image

from edge_common.errors import ConfigError, EdgeRuntimeError, OutputError
from edge_runtime import demo
from edge_runtime.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command wrote."""
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def report(finished: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished / "report.json").read_text())
    return found


@pytest.mark.process
def test_the_report_shows_the_promised_properties(report: dict[str, Any]) -> None:
    assert report["identical_to_local"] is True
    assert 0 < report["largest_share"] <= report["max_exposure"] == 0.37
    assert [node["name"] for node in report["nodes"]] == ["alpha", "beta", "gamma"]
    shown = [w for node in report["nodes"] for w in node["windows"]]
    assert len(shown) == len(set(shown)) == report["windows_sent"] == 20
    assert report["windows_total"] == 25
    assert report["largest_share"] == max(node["share_of_image"] for node in report["nodes"])
    assert report["bytes_up"] >= report["windows_sent"] * 32 * 40 * 3
    assert report["bytes_down"] == sum(node["bytes_down"] for node in report["nodes"]) > 0
    assert report["mask_iou"] > 0.75  # three of the coins; all of them are in docs/results
    assert report["mask_iou"] == pytest.approx(np.mean(report["mask_iou_per_click"]))
    latency = report["latency_ms"]
    assert set(latency["nodes"]) == {"alpha", "beta", "gamma"}
    for times in latency["nodes"].values():
        assert {"upload", "compute", "download"} <= set(times)
    assert {"windows", "tail", "decoder", "total"} <= set(latency)
    assert {entry["event"] for entry in report["ledger"]} == {"reserved", "committed"}


@pytest.mark.process
def test_the_demo_writes_two_pictures_and_the_report_and_nothing_else(finished: Path) -> None:
    names = ["overlay.png", "report.json", "what-each-node-saw.png"]
    assert sorted(os.listdir(finished)) == names
    for name in ("overlay.png", "what-each-node-saw.png"):
        with Image.open(finished / name) as picture:
            picture.load()
            assert picture.width > 1000


@pytest.mark.process
def test_no_node_is_left_running(finished: Path) -> None:
    commands = [
        Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
        for pid in children_of(os.getpid())
        if Path(f"/proc/{pid}/cmdline").exists()
    ]
    assert not [command for command in commands if b"edge-runtime-demo-" in command]


@pytest.mark.process
def test_a_single_corrupted_bit_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of one number of one returned token."""
    real = demo._offloaded

    def corrupted(*args: Any) -> Any:
        run, found, pictures = real(*args)
        tokens = {name: array.copy() for name, array in run.tokens.items()}
        tokens["tokens"].view(np.uint8)[3, 7, 11] ^= 1
        return demo.Run(tokens, run.masks), found, pictures

    monkeypatch.setattr(demo, "_offloaded", corrupted)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "report.json").read_text())["identical_to_local"] is False


def test_identical_means_every_bit() -> None:
    rng = np.random.default_rng(0)
    tokens = {"tokens": rng.standard_normal((2, 3, 4)).astype(np.float32)}
    masks = rng.random((2, 5, 5)) > 0.5
    one = demo.Run(tokens, masks)
    assert demo.identical(one, copy.deepcopy(one))
    zero = copy.deepcopy(one)
    zero.tokens["tokens"][0, 0, 0] = 0.0
    minus = copy.deepcopy(zero)
    minus.tokens["tokens"][0, 0, 0] = -0.0  # equal as a number, not as bits
    assert not demo.identical(zero, minus)
    flipped = copy.deepcopy(one)
    flipped.masks[1, 2, 3] ^= True
    assert not demo.identical(one, flipped)
    assert not demo.identical(one, demo.Run({}, masks))
    assert not demo.identical(one, demo.Run({"tokens": tokens["tokens"][:1]}, masks))
    wider = {"tokens": tokens["tokens"].astype(np.float64)}
    assert not demo.identical(one, demo.Run(wider, masks))


def test_a_run_survives_transfer_between_processes(tmp_path: Path) -> None:
    run = demo.Run({"tokens": np.array([[1.5, np.nan]], np.float32)}, np.eye(3, dtype=bool)[None])
    demo.save_run(tmp_path / "run.npz", run)
    assert demo.identical(run, demo.load_run(tmp_path / "run.npz"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"identical_to_local": False}, "differs"),
        ({"largest_share": 0.3701}, "above 37%"),
        ({"largest_share": 0.0}, "0.0%"),
    ],
)
def test_the_verdict_names_the_problem(change: dict[str, Any], words: str) -> None:
    good = {"identical_to_local": True, "largest_share": 0.37}
    assert demo.verdict(good) == []
    assert words in " ".join(demo.verdict({**good, **change}))


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_also_ends_the_nodes(tmp_path: Path, number: signal.Signals) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    command = [sys.executable, "-m", "edge_runtime.cli", "demo"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A background test run passes on SIGINT as ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    nodes: set[int] = set()
    give_up = time.monotonic() + 60
    while len(nodes) < 3:
        assert process.poll() is None
        assert time.monotonic() < give_up
        nodes |= children_of(process.pid)
        time.sleep(0.01)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    while any(state(pid) not in ("", "Z") for pid in nodes):  # the kernel ends them with the demo
        time.sleep(0.01)
    assert os.listdir(scratch) == []  # keys and tokens are gone
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.process
def test_a_node_that_fails_to_start_is_named_and_the_others_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []

    def breaking(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        if len(started) == 1:
            command = [*command, "--threads", "0"]
        started.append(real(command, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", breaking)
    with pytest.raises(
        EdgeRuntimeError, match=r"node beta ended before it served.*--threads.*not '0'"
    ):
        demo.run_demo(tmp_path / "out", quiet=True)
    assert len(started) == 3
    assert all(process.poll() is not None for process in started)
    assert not (tmp_path / "out").exists()


def test_results_of_other_commands_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_nodes", None)  # no node is started
    out = tmp_path / "out"
    segmented = ["segment", str(demo.PHOTO), "--point", "335,43", "--local", "--out", str(out)]
    assert main(segmented) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match="holds other things than these results, such as mask-1"):
        demo.run_demo(out, quiet=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.process
def test_earlier_results_of_the_demo_are_replaced_completely(
    finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "report.json").write_text("{}")
    assert main(["demo", "--out", str(out), "--json"]) == 0
    assert json.loads((out / "report.json").read_text())["identical_to_local"] is True
    assert sorted(os.listdir(out)) == sorted(os.listdir(finished))
    assert segment_refuses(out)


def segment_refuses(out: Path) -> bool:
    """True if `segment --overwrite` refuses to replace the demo's results."""
    command = ["segment", str(demo.PHOTO), "--point", "335,43", "--local", "--out", str(out)]
    return main([*command, "--overwrite"]) == 1


@pytest.mark.process
@pytest.mark.parametrize("place", ["full", "proc"])
def test_an_unwritable_folder_is_reported_before_any_node_starts(
    place: str, full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_nodes", None)
    out = full_disk / "deep" / "out" if place == "full" else Path("/proc/demo")
    with pytest.raises(OutputError, match=f"{out} .*name another folder with --out|{out}: "):
        demo.run_demo(out, quiet=True)
    assert os.listdir(full_disk) == []


def test_the_committed_reference_is_what_its_recipe_makes() -> None:
    from exporters import demo_photo

    with Image.open(demo.REFERENCE) as committed:
        assert np.array_equal(np.array(committed), demo_photo.labels())
    import skimage

    source = Path(skimage.__file__).parent / "data" / "coins.png"
    assert demo.PHOTO.read_bytes() == source.read_bytes()


def test_the_clicks_are_on_coins_and_the_iou_is_that_coin_s() -> None:
    with Image.open(demo.REFERENCE) as committed:
        reference = np.array(committed)
    truth = [reference == reference[y, x] for x, y in demo.CLICKS]
    assert all(reference[y, x] > 0 for x, y in demo.CLICKS)
    assert len({int(reference[y, x]) for x, y in demo.CLICKS}) == 3
    assert demo.mask_ious(truth, reference, demo.CLICKS) == [1.0, 1.0, 1.0]
    half = truth[0].copy()
    half[: demo.CLICKS[0][1]] = False
    share = np.count_nonzero(half) / np.count_nonzero(truth[0])
    assert demo.mask_ious([half], reference, demo.CLICKS[:1]) == [pytest.approx(share)]
