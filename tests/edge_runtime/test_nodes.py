"""`edge-runtime nodes`: the state of each node, and an exit code for scripts."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import cli
from engines.bundle import Bundle
from transport.keys import generate

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def _keep_core_dumps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_common.process.disable_core_dumps", lambda: None)


def written(folder: Path, fleet: Any, bundle: Path | None = None, **changes: str) -> str:
    """An edge.toml of the fleet. ``changes`` are settings of its first node."""
    config = fleet.config()
    lines = [f'secret = "{config.secret}"', f'bundle = "{bundle or config.bundle}"']
    for number, node in enumerate(config.nodes):
        settings = {
            "name": node.name,
            "endpoint": node.endpoint,
            "server_key": node.server_key,
            "client_key": node.client_key,
            **(changes if number == 0 else {}),
        }
        lines += ["[[nodes]]", *(f'{key} = "{value}"' for key, value in settings.items())]
    path = folder / "edge.toml"
    path.write_text("\n".join(lines))
    return str(path)


def checked(
    config: str, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, list[dict[str, Any]]]:
    code = cli.main(["nodes", "--config", config, "--json", "--timeout=20", *more])
    return code, json.loads(capsys.readouterr().out)


def test_healthy_nodes_are_ok(
    shared_fleet: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path, shared_fleet)
    code, found = checked(config, capsys)
    assert code == 0
    assert [status["name"] for status in found] == ["alpha", "beta", "gamma"]
    for status in found:
        assert status["usable"] is True
        assert status["round_trip_ms"] > 0
        assert "toy fp32" in status["detail"]
    assert cli.main(["nodes", "--config", config]) == 0
    text = capsys.readouterr().out
    assert "3 of 3 nodes can be used." in text
    assert "ROUND TRIP" in text


def test_an_absent_node_is_reported(
    shared_fleet: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    config = written(tmp_path, shared_fleet, endpoint=nobody)
    code, found = checked(config, capsys)
    assert code == 1
    assert [status["usable"] for status in found] == [False, True, True]
    assert found[0]["reachable"] is False
    assert found[0]["authorised"] is None
    assert "node not running" in found[0]["detail"]
    assert cli.main(["nodes", "--config", config]) == 1
    assert "2 of 3 nodes can be used." in capsys.readouterr().out


def test_a_node_without_this_edge_s_key_is_reported(
    shared_fleet: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(tmp_path, "stranger")
    config = written(tmp_path, shared_fleet, client_key=str(tmp_path / "stranger.key"))
    code, found = checked(config, capsys)
    assert code == 1
    assert (found[0]["reachable"], found[0]["authorised"]) == (True, False)
    assert "keys authorize" in found[0]["detail"]


def test_a_node_with_another_key_is_reported(
    shared_fleet: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(tmp_path, "other")
    config = written(tmp_path, shared_fleet, server_key=str(tmp_path / "other.pub"))
    code, found = checked(config, capsys)
    assert code == 1
    assert "wrong server key" in found[0]["detail"]
    assert (found[0]["reachable"], found[0]["authorised"]) == (True, None)


def test_nodes_with_another_bundle_are_reported(
    shared_fleet: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make_toy_bundle: Callable[..., Path],
) -> None:
    other = make_toy_bundle(tmp_path / "other", head=True)
    code, found = checked(written(tmp_path, shared_fleet, bundle=other), capsys)
    assert code == 1
    for status in found:
        assert (status["authorised"], status["same_bundle"]) == (True, False)
        assert status["round_trip_ms"] > 0
        assert Bundle.load(other).stage("stack").sha256[:12] in status["detail"]


def test_a_frozen_node_is_reported(
    shared_fleet: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path, shared_fleet)
    shared_fleet.nodes["beta"].signal(signal.SIGSTOP)
    try:
        code, found = checked(config, capsys, "--timeout=5")
    finally:
        shared_fleet.nodes["beta"].signal(signal.SIGCONT)
    assert code == 1
    assert [status["usable"] for status in found] == [True, False, True]
    assert "frozen" in found[1]["detail"]
    assert found[1]["authorised"] is None  # this can't be known


def test_mistakes_are_one_line(
    tmp_path: Path, shared_fleet: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["nodes", "--config", str(tmp_path / "no.toml")]) == 1
    assert "edge-runtime init" in capsys.readouterr().err
    config = written(tmp_path, shared_fleet)
    assert cli.main(["nodes", "--config", config, "--timeout=0"]) == 2
    assert "error: --timeout: expected a number above 0" in capsys.readouterr().err
