"""edge.toml: valid files, and the errors with their remedies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_common.errors import ConfigError, KeyFileError
from edge_runtime.config import (
    NODE_SETTINGS,
    EdgeConfig,
    NodeConfig,
    load_config,
    load_nodes,
)
from transport.keys import generate

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
NODE = '[[nodes]]\nname = "alpha"\nendpoint = "tcp://a:5555"\nserver_key = "keys/alpha-node.pub"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "edge.toml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file_and_defaults_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    path = written(tmp_path / "deep", 'bundle = "../b"\n' + NODE)
    monkeypatch.chdir(tmp_path)
    config = load_config("deep/edge.toml")
    here = tmp_path / "deep"
    assert config == EdgeConfig(
        bundle=str(here / "../b"),
        secret=str(here / "keys/edge.secret"),
        exposure=str(here / "exposure"),
        nodes=(
            NodeConfig(
                name="alpha",
                endpoint="tcp://a:5555",
                server_key=str(here / "keys/alpha-node.pub"),
                client_key=str(here / "keys/alpha.key"),
            ),
        ),
    )
    assert (config.deadline_s, config.max_exposure, config.fallback) == (10.0, 0.5, "error")
    assert load_config(path) == config


def test_a_key_may_be_written_in_the_file_itself(tmp_path: Path) -> None:
    path = written(tmp_path, NODE.replace("keys/alpha-node.pub", KEY))
    assert load_config(path).nodes[0].server_key == KEY


def test_the_device_is_read_and_checked(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, NODE)).device == "auto"
    config = load_config(written(tmp_path, 'device = "tensorrt"\n' + NODE))
    assert config.device == "tensorrt"
    with pytest.raises(ConfigError, match="device is 'tpu'; expected one of auto, cpu, cuda, tens"):
        EdgeConfig(nodes=config.nodes, device="tpu")  # type: ignore[arg-type]


def test_integers_are_accepted_as_numbers(tmp_path: Path) -> None:
    path = written(tmp_path, "deadline_s = 3\nmax_exposure = 1\nwindows_per_request = 2\n" + NODE)
    config = load_config(path)
    assert (config.deadline_s, config.max_exposure, config.windows_per_request) == (3, 1, 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_exposre = 0.4\n" + NODE, "unknown key 'max_exposre': did you mean max_exposure"),
        (
            NODE + 'endpont = "x"\n',
            "unknown key 'endpont' in .*table 1 .alpha.: did you mean endpoint",
        ),
        ("zzz = 1\n" + NODE, "known are nodes, bundle"),
        ("max_exposure = 0\n" + NODE, "max_exposure is 0"),
        ("max_exposure = 1.01\n" + NODE, "max_exposure is 1.01"),
        ("max_exposure = nan\n" + NODE, "max_exposure is nan"),
        ("deadline_s = -1\n" + NODE, "deadline_s is -1"),
        ("deadline_s = inf\n" + NODE, "deadline_s is inf"),
        (
            "deadline_s = 100000\n" + NODE,
            "is 100000.0; expected a number above 0, at most 86,400 seconds",
        ),
        ('secret = "~nosuchuser/x"\n' + NODE, "path '~nosuchuser/x' cannot be used"),
        ('bundle = "a\\u0000b"\n' + NODE, "holds a NUL"),
        (NODE.replace("keys/alpha", "~nosuchuser/alpha"), "nosuchuser.* cannot be used"),
        ('deadline_s = "soon"\n' + NODE, 'deadline_s is "soon"; expected a number, such as 10'),
        ("deadline_s = true\n" + NODE, "deadline_s is true; expected a number"),
        ('fallback = "lokal"\n' + NODE, 'fallback is "lokal"; expected "error" or "local"'),
        ("fallback = 1\n" + NODE, 'fallback is 1; expected "error" or "local"'),
        ("windows_per_request = 0\n" + NODE, "windows_per_request is 0"),
        ("windows_per_request = 1.5\n" + NODE, "is 1.5; expected a whole number"),
        ("bundle = [1]\n" + NODE, r"bundle is \[1\]; expected a text"),
        ("secret = 2024-01-01\n" + NODE, 'secret is "2024-01-01"; expected a text, such as'),
        (
            'device = "tpu"\n' + NODE,
            'device is "tpu"; expected "auto", "cpu", "cuda" or "tensorrt"',
        ),
        (NODE + 'fallback = "local"\n', r"fallback .* .*put it above the first \[\[nodes\]\]"),
        ("", "no nodes"),
        ("nodes = []\n", "no nodes"),
        ("nodes = 3\n", r"nodes is 3; expected a \[\[nodes\]\] table for each node"),
        ("nodes = [3]\n", r"\[\[nodes\]\] table 1 is 3; expected a table"),
        ("[nodes]\n", r"nodes is \{\}; expected a \[\[nodes\]\] table"),
        (
            NODE.replace("tcp://a:5555", "a:5555"),
            r'endpoint is "a:5555" in .*table 1 \(alpha\); exp.*tcp://HOST',
        ),
        (NODE.replace("endpoint", "#"), "table 1 has no endpoint"),
        (NODE.replace('"alpha"', '"a b"'), "node name 'a b'"),
        (NODE.replace('"alpha"', "7"), "name is 7 in .*table 1; expected a text"),
        (
            NODE + '[[nodes]]\nname = "beta"\nendpoint = "tcp://b:1"\nserver_key = 3\n',
            r"server_key is 3 in \[\[nodes\]\] table 2 \(beta\); expected a text",
        ),
        (NODE + NODE, "same name 'alpha'"),
        (NODE + NODE.replace('"alpha"', '"beta"'), "same endpoint"),
        (NODE + NODE.replace("alpha", "beta", 1).replace("//a", "//b"), "same server_key"),
        ("deadline_s = \n" + NODE, "not valid TOML"),
    ],
)
def test_mistakes_are_refused_with_the_remedy(tmp_path: Path, text: str, says: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_says_how_to_create_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="edge-runtime init"):
        load_config(tmp_path / "edge.toml")


def test_the_settings_of_a_node_are_recognised(tmp_path: Path) -> None:
    """Also a file as `cloud-node init` writes it, in which everything is a comment."""
    for name, text in (("x.toml", 'bind = "tcp://0.0.0.0:5555"\n'), ("node.toml", "# bind = 1\n")):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"settings of a node.*cloud-node serve --config"):
            load_config(path)


def test_the_settings_that_identify_a_node_file_are_node_settings() -> None:
    from cloud_node.settings import SETTINGS

    assert SETTINGS.keys() >= NODE_SETTINGS
    assert not {*EdgeConfig.__struct_fields__} & NODE_SETTINGS


@pytest.mark.parametrize("mode", [0o646, 0o666])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    """Others could add their own nodes."""
    path = written(tmp_path, NODE)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod go-w {path}"):
        load_config(path)
    path.chmod(0o644)
    load_config(path)
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match=f"chmod go-w {tmp_path}"):
        load_config(path)


def test_a_nodes_key_that_others_may_write_is_refused(tmp_path: Path) -> None:
    config = two_nodes(tmp_path)
    (tmp_path / "beta-node.pub").chmod(0o666)
    with pytest.raises(KeyFileError, match=f"beta: .*chmod go-w {tmp_path / 'beta-node.pub'}"):
        load_nodes(config)


def test_a_missing_key_of_a_node_comes_from_its_owner(tmp_path: Path) -> None:
    config = two_nodes(tmp_path)
    (tmp_path / "beta-node.pub").unlink()
    with pytest.raises(KeyFileError, match=r"node beta: .*beta-node.pub: No such file") as caught:
        load_nodes(config)
    assert "ask the owner of that key for it" in str(caught.value)
    assert "make one" not in str(caught.value)
    (tmp_path / "alpha.key").unlink()
    with pytest.raises(KeyFileError, match=r"node alpha: .*make one with `edge-runtime keys"):
        load_nodes(config)


def test_this_edge_s_own_key_is_refused_as_a_node_key(tmp_path: Path) -> None:
    """The edge's own .pub files are in the same folder as those that nodes sent."""
    for own in ("alpha", "beta"):
        config = two_nodes(tmp_path / own)
        text = (tmp_path / own / f"{own}.pub").read_text()
        (tmp_path / own / "alpha-node.pub").write_text(text)
        with pytest.raises(ConfigError, match=r"node alpha: .*is this edge's own key.*node.pub"):
            load_nodes(config)


def two_nodes(folder: Path) -> EdgeConfig:
    for name in ("alpha", "beta"):
        generate(folder, name)
        generate(folder, f"{name}-node")
    return EdgeConfig(
        nodes=tuple(
            NodeConfig(
                name=name,
                endpoint=f"tcp://{name}:5555",
                server_key=str(folder / f"{name}-node.pub"),
                client_key=str(folder / f"{name}.key"),
            )
            for name in ("alpha", "beta")
        )
    )


def test_keys_are_read(tmp_path: Path) -> None:
    alpha, beta = load_nodes(two_nodes(tmp_path))
    assert (alpha.name, beta.endpoint) == ("alpha", "tcp://beta:5555")
    assert len({alpha.server_key, beta.server_key, alpha.keypair.public, beta.keypair.public}) == 4
    assert alpha.keypair.secret not in repr(alpha)


def test_an_exposed_secret_key_is_refused(tmp_path: Path) -> None:
    config = two_nodes(tmp_path)
    os.chmod(tmp_path / "alpha.key", 0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_nodes(config)


@pytest.mark.parametrize(
    ("copied", "says"), [("-node.pub", "must not count as two"), (".key", "keys edge")]
)
def test_nodes_that_share_a_key_are_refused(tmp_path: Path, copied: str, says: str) -> None:
    config = two_nodes(tmp_path)
    text = (tmp_path / f"alpha{copied}").read_text()
    (tmp_path / f"beta{copied}").write_text(text)
    with pytest.raises(ConfigError, match=f"alpha and beta have the same .*{says}"):
        load_nodes(config)


def test_a_malformed_endpoint_is_refused(tmp_path: Path) -> None:
    config = two_nodes(tmp_path)
    bad = EdgeConfig(
        nodes=(
            NodeConfig(
                name="alpha",
                endpoint="alpha:5555",
                server_key=config.nodes[0].server_key,
                client_key=config.nodes[0].client_key,
            ),
        )
    )
    with pytest.raises(ConfigError, match=r"node alpha: .*tcp://HOST:PORT"):
        load_nodes(bad)
