"""`edge-runtime init`: it writes a file that loads, and leaves existing files alone."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from edge_runtime import cli
from edge_runtime.config import load_config, load_nodes
from transport.keys import generate, load_secret_bytes, write_public

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_common.process.disable_core_dumps", lambda: None)
    monkeypatch.chdir(tmp_path)
    for name in ("alpha", "beta"):
        generate(Path("theirs"), f"{name}-node")
    write_public("theirs/again.pub", KEY, "again")


def node(name: str, key: str = "") -> str:
    return f"--node={name}=tcp://{name}.example.org:5555,{key or f'theirs/{name}-node.pub'}"


def test_init_writes_a_loadable_configuration_and_the_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf").mkdir()
    arguments = ["init", node("alpha"), node("beta"), node("gamma", KEY), "--out=conf/edge.toml"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "Send each node's operator" in said
    assert "edge-runtime nodes --config conf/edge.toml" in said
    config = load_config("conf/edge.toml")
    assert [n.name for n in config.nodes] == ["alpha", "beta", "gamma"]
    assert (config.max_exposure, config.fallback, config.bundle) == (0.5, "error", None)
    loaded = load_nodes(config)
    assert loaded[2].server_key == KEY
    assert len(load_secret_bytes(config.secret)) == 32
    for secret in ("keys/edge.secret", "keys/alpha.key", "keys/beta.key", "keys/gamma.key"):
        assert stat.S_IMODE((tmp_path / secret).stat().st_mode) == 0o600
    text = (tmp_path / "conf/edge.toml").read_text()
    assert '"../keys/alpha.key"' in text  # relative, so that both folders may move together
    assert str(tmp_path) not in text
    assert "nodes get half of" in text


def test_existing_keys_are_used_and_an_existing_file_is_kept(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = generate(Path("keys"), "alpha")
    assert cli.main(["init", node("alpha"), "--json", "--max-exposure=1"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "config": "edge.toml",
        "made_keys": [],
        "warning": None,
    }
    assert load_nodes(load_config("edge.toml"))[0].keypair == before
    written = Path("edge.toml").read_text()
    assert cli.main(["init", node("beta")]) == 1
    assert "never overwritten" in capsys.readouterr().err
    assert Path("edge.toml").read_text() == written
    assert not Path("keys/beta.key").exists()


def test_keys_that_others_could_replace_are_not_written_into_the_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("open").mkdir()
    Path("open").chmod(0o777)
    assert cli.main(["init", node("alpha"), "--keys=open/mine/keys"]) == 1
    assert "chmod" in capsys.readouterr().err
    assert not Path("edge.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--node=alpha"], "expected NAME=ENDPOINT,KEY"),
        (["--node=alpha=tcp://a:5555"], "expected NAME=ENDPOINT,KEY"),
        (["--node=alpha=a:5555,theirs/alpha-node.pub"], "--node 'alpha=a:5555,"),
        (["--node=alpha=a:5555,theirs/alpha-node.pub"], "tcp://HOST:PORT"),
        (["--node=alpha=tcp://a:5555,nowhere.pub"], "cannot read the key file nowhere.pub"),
        (["--node=alpha=tcp://a:5555,theirs/alpha-node.key"], "secret key"),
        ([node("alpha"), node("alpha", "theirs/beta-node.pub")], "same name"),
        ([node("alpha"), node("beta", "theirs/alpha-node.pub")], "same server_key"),
        (["--node=al pha=tcp://a:5555,theirs/alpha-node.pub"], "node name"),
        ([node("alpha", KEY), node("beta", "theirs/again.pub")], "same server key"),
        ([node("alpha"), "--bundle=nowhere"], "nowhere"),
        ([node("alpha"), "--out=nowhere/edge.toml"], "folder nowhere does not exist"),
    ],
)
def test_mistakes_leave_nothing_behind(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["init", *arguments]) == 1
    assert says in capsys.readouterr().err
    assert not Path("edge.toml").exists()
    assert not Path("keys").exists()


def test_a_budget_may_be_in_percent(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", node("alpha"), "--max-exposure=0"]) == 2
    assert cli.main(["init", node("alpha"), "--max-exposure=37%"]) == 0
    assert load_config("edge.toml").max_exposure == 0.37


def test_this_edge_s_own_key_is_refused_as_a_node_key(capsys: pytest.CaptureFixture[str]) -> None:
    """A likely mistake: the .pub file made here instead of the one that the node sent."""
    made = generate(Path("keys"), "alpha")
    for key in ("keys/alpha.pub", made.public):
        assert cli.main(["init", node("alpha", key), node("beta")]) == 1
        said = capsys.readouterr().err
        assert "alpha" in said
        assert "is this edge's own key" in said
    assert not Path("edge.toml").exists()
    assert not Path("keys/beta.key").exists()
    assert not Path("keys/edge.secret").exists()


def test_a_key_altered_by_the_shell_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", node("alpha", KEY.replace("$R", "")[:30])]) == 1
    assert "single quotes" in capsys.readouterr().err


def test_a_folder_writable_by_others_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No command would accept the file."""
    tmp_path.chmod(0o777)
    assert cli.main(["init", node("alpha", KEY)]) == 1
    assert f"chmod go-w {tmp_path}" in capsys.readouterr().err
    assert not Path("edge.toml").exists()
    assert not Path("keys").exists()


def test_new_files_are_closed_to_others_under_any_umask() -> None:
    before = os.umask(0)
    try:
        assert cli.main(["init", node("alpha")]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path("edge.toml").stat().st_mode) == 0o644
    load_nodes(load_config("edge.toml"))


@pytest.mark.process
@pytest.mark.parametrize(("option", "name"), [("--out", "edge.toml"), ("--keys", "keys")])
def test_a_full_disk_leaves_nothing_that_blocks_the_next_try(
    option: str, name: str, full_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filler = full_disk / "filler"
    filler.write_bytes(b"x" * (64 << 10))
    arguments = ["init", node("alpha"), f"{option}={full_disk / name}"]
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err
    assert f"cannot write {full_disk / name}" in said
    assert "No space left on device\n  -> make room on that disk, or " in said
    assert [path for path in full_disk.rglob("*") if path.is_file()] == [filler]
    filler.unlink()
    assert cli.main(arguments) == 0


def test_a_budget_too_small_for_the_number_of_nodes_is_noted(
    toy_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["init", node("alpha"), node("beta"), f"--bundle={toy_bundle}"]
    assert cli.main([*arguments, "--max-exposure=0.3"]) == 0
    assert "pictures will be refused" in capsys.readouterr().out
