"""`edge-runtime keys`: the steps of enrolment, and the mistakes on the way."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from edge_runtime.cli import main
from transport import keys
from transport.allow_list import AllowList


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """The finding and, on its own line, the remedy if there is one."""
    found, *remedy = capsys.readouterr().err.strip().splitlines()
    assert found.startswith("error: ")
    assert not remedy or (len(remedy) == 1 and remedy[0].startswith("  -> "))
    return " ".join((found, *remedy))


def test_the_enrolment_steps_work(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "node", "--dir", "n"]) == 0
    assert "Send n/node.pub to the owner of each edge" in capsys.readouterr().out
    assert main(["keys", "edge", "--dir", "e", "--node", "alpha", "--node", "beta"]) == 0
    told = capsys.readouterr().out
    assert "e/alpha.pub  to the operator of alpha" in told
    assert "e/beta.pub  to the operator of beta" in told
    assert "edge-runtime init --node alpha=tcp://HOST:5555,e/alpha-node.pub" in told
    assert main(["keys", "authorize", "--dir", "n", "e/alpha.pub", "--as", "kitchen"]) == 0
    assert "Authorised kitchen" in capsys.readouterr().out

    alpha = keys.load_secret("e/alpha.key")
    assert AllowList("n/authorized").name_of(alpha.public) == "kitchen"
    assert alpha.public != keys.load_secret("e/beta.key").public
    assert len(keys.load_secret_bytes("e/edge.secret")) == 32
    assert keys.load_secret("n/node.key").public == keys.load_public("n/node.pub")
    for path in ("n/node.key", "e/alpha.key", "e/beta.key", "e/edge.secret"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_root_authorises_an_edge_for_another_user_s_node(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For example in a container started once as root, with keys of the node's user."""
    if os.geteuid():
        pytest.skip("only root can change the owner of a file")
    main(["keys", "node", "--dir", "n"])
    main(["keys", "edge", "--dir", "e", "--node", "alpha"])
    for path in (*Path("n").rglob("*"), Path("n"), Path("e/alpha.pub")):
        os.chown(path, 12_345, -1)
    capsys.readouterr()
    assert main(["keys", "authorize", "--dir", "n", "e/alpha.pub"]) == 0
    assert keys.read_public("e/alpha.pub") in capsys.readouterr().out  # to compare with the edge's


def test_a_public_key_from_an_unsafe_place_can_be_authorised(folders: Path) -> None:
    """A memory stick shows all files as open to everybody. Only the copy counts."""
    main(["keys", "node", "--dir", "n"])
    main(["keys", "edge", "--dir", "e", "--node", "alpha"])
    os.chmod("e/alpha.pub", 0o777)
    assert main(["keys", "authorize", "--dir", "n", "e/alpha.pub"]) == 0
    assert len(AllowList("n/authorized")) == 1


@pytest.mark.process
def test_a_printed_key_can_be_pasted_into_a_shell(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["keys", "node", "--dir", "a b"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("Public key: ")]
    pasted = subprocess.run(
        ["sh", "-c", f"printf %s {line.removeprefix('Public key: ')}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert pasted.stdout == keys.load_public("a b/node.pub")


@pytest.mark.parametrize("action", ["node", "edge", "authorize"])
def test_each_action_shows_examples_that_parse(
    action: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["keys", "node", "--dir", "keys"])
    main(["keys", "edge", "--dir", "elsewhere", "--node", "kitchen"])
    Path("kitchen.pub").write_text(Path("elsewhere/kitchen.pub").read_text())
    capsys.readouterr()
    assert main(["keys", action, "--help"]) == 0
    told = capsys.readouterr().out
    examples = [
        shlex.split(line, comments=True)
        for line in told.partition("examples:")[2].splitlines()
        if "edge-runtime keys" in line
    ]
    assert len(examples) >= 2
    if action == "node":
        shutil.rmtree("keys")
    for words in examples:
        assert words[:3] == ["edge-runtime", "keys", action]
        assert main(words[1:]) == 0, words


def test_a_removed_edge_needs_no_restart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "restart" not in told.replace("without a restart", "").replace("No restart", "")
    assert "authorized" in told


def test_json_output_of_keys(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["keys", "node", "--dir", "n", "--json"])
    node = json.loads(capsys.readouterr().out)
    assert node["public_key"] == keys.load_public(node["public_file"])
    main(["keys", "edge", "--dir", "e", "--node", "alpha", "--json"])
    edge = json.loads(capsys.readouterr().out)
    assert edge["keys"][0]["node"] == "alpha"
    assert edge["keys"][0]["public_key"] == keys.load_public(edge["keys"][0]["public_file"])
    main(["keys", "authorize", "--dir", "n", "e/alpha.pub", "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "name": "alpha",
        "public_key": edge["keys"][0]["public_key"],
        "already": False,
    }


def test_secrets_are_not_printed(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["keys", "node", "--dir", "n"])
    main(["keys", "edge", "--dir", "n", "--node", "alpha", "--json"])
    printed = capsys.readouterr()
    for name in ("node", "alpha"):
        assert keys.load_secret(f"n/{name}.key").secret not in printed.out + printed.err
    assert keys.load_secret_bytes("n/edge.secret").hex() not in printed.out + printed.err


def test_a_second_node_added_later_keeps_the_placement_secret(folders: Path) -> None:
    main(["keys", "edge", "--node", "alpha"])
    before = keys.load_secret_bytes("keys/edge.secret")
    assert main(["keys", "edge", "--node", "beta"]) == 0
    assert keys.load_secret_bytes("keys/edge.secret") == before


def test_existing_keys_are_kept_and_no_step_is_left_half_done(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["keys", "node"])
    main(["keys", "edge", "--node", "beta"])
    before = {path.name: path.read_bytes() for path in Path("keys").glob("*.*")}
    capsys.readouterr()
    assert main(["keys", "node"]) == 1
    assert "never overwritten" in _error(capsys)
    assert main(["keys", "edge", "--node", "alpha", "--node", "beta"]) == 1
    assert "beta.key exists" in _error(capsys)
    assert {path.name: path.read_bytes() for path in Path("keys").glob("*.*")} == before


@pytest.mark.parametrize("names", [["node"], ["edge"], ["a", "a"], ["../a"], [""]])
def test_unusable_names_are_refused(
    folders: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for name in names for word in ("--node", name)]
    assert main(["keys", "edge", *words]) == 1
    assert "cannot name" in _error(capsys)


def test_authorising_again_changes_nothing(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["keys", "node", "--dir", "n"])
    main(["keys", "edge", "--dir", "e", "--node", "alpha"])
    main(["keys", "authorize", "--dir", "n", "e/alpha.pub"])
    capsys.readouterr()
    assert main(["keys", "authorize", "--dir", "n", "e/alpha.pub", "--as", "other"]) == 0
    assert "already, as alpha" in capsys.readouterr().out
    assert os.listdir("n/authorized") == ["alpha.pub"]


def test_two_edges_with_the_same_key_name(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["keys", "node", "--dir", "n"])
    for edge in ("e1", "e2"):
        main(["keys", "edge", "--dir", edge, "--node", "alpha"])
    main(["keys", "authorize", "--dir", "n", "e1/alpha.pub"])
    capsys.readouterr()
    assert main(["keys", "authorize", "--dir", "n", "e2/alpha.pub"]) == 1
    assert "--as" in _error(capsys)
    assert main(["keys", "authorize", "--dir", "n", "e2/alpha.pub", "--as", "garage"]) == 0


def test_files_that_are_no_edge_s_public_key_are_refused(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["keys", "node", "--dir", "n"])
    main(["keys", "edge", "--dir", "e", "--node", "alpha"])
    capsys.readouterr()
    for path, hint in (
        ("n/node.pub", "this node's own key"),
        ("e/alpha.key", "holds a secret key"),
        ("e/edge.secret", "no key file"),
        ("missing.pub", "No such file"),
    ):
        assert main(["keys", "authorize", "--dir", "n", path]) == 1
        assert hint in _error(capsys)
    assert main(["keys", "authorize", "--dir", "nowhere", "e/alpha.pub"]) == 1
    assert "edge-runtime keys node" in _error(capsys)
    assert os.listdir("n/authorized") == []
