"""Settings of a node: their sources, their allowed values, and the error messages."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloud_node.config import EDGE_SETTINGS, NodeConfig, Prepared, examine, load, prepare
from cloud_node.settings import SETTINGS
from edge_common.errors import BundleError, ConfigError, KeyFileError
from edge_common.options import Invalid
from edge_common.settings import quoted, size_text
from transport import keys


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def make(text: str) -> Path:
        path = tmp_path / "node.toml"
        path.write_text(text)
        return path

    return make


@pytest.fixture
def usable(tmp_path: Path, bundle_of: Callable[[str], Path]) -> NodeConfig:
    """Settings of a node that would start."""
    keys.generate(tmp_path / "keys", "node")
    keys.make_directory(tmp_path / "keys" / "authorized")
    return NodeConfig(
        bundle=bundle_of("pixels"), bind="tcp://127.0.0.1:0", keys=tmp_path / "keys", threads=1
    )


def with_(config: NodeConfig, **changes: Any) -> NodeConfig:
    return msgspec.structs.replace(config, **changes)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda s: s.name)
def test_a_setting_without_a_default_explains_itself_and_has_an_example(setting: Any) -> None:
    assert setting.default is not None or (setting.about.unset and setting.about.example)


def test_without_options_and_file_the_defaults_hold() -> None:
    loaded = load()
    assert loaded.config == NodeConfig()
    assert set(loaded.sources.values()) == {"default"}
    assert set(loaded.sources) == set(SETTINGS)


def test_options_win_over_the_file_and_the_file_over_defaults(
    write: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write('threads = 3\ndrain_s = 1\nbundle = "models/b"\nready_file = "/run/x"\n')
    loaded = load(file, {"threads": 5, "keys": Path("k")})
    config = loaded.config
    assert (config.threads, config.drain_s, config.max_wait_ms) == (5, 1.0, 2.0)
    assert config.bundle == tmp_path / "models" / "b"
    assert config.ready_file == Path("/run/x")
    assert config.keys == Path("k")  # as typed: relative to the current folder
    sources = loaded.sources
    assert sources["threads"] == "--threads"
    assert sources["drain_s"] == str(file)
    assert sources["max_wait_ms"] == "default"


def test_a_file_that_others_may_write_is_refused(write: Callable[[str], Path]) -> None:
    """Others could point it at their own folder of keys."""
    path = write("threads = 3\n")
    path.chmod(0o666)
    with pytest.raises(ConfigError, match=f"chmod go-w {path}"):
        load(path)


def test_the_settings_of_an_edge_are_recognised(write: Callable[[str], Path]) -> None:
    from edge_runtime.config import EdgeConfig

    for text in ("max_exposure = 0.4\n", '[[nodes]]\nname = "alpha"\n'):
        with pytest.raises(ConfigError, match=r"settings of an edge.*edge-runtime nodes --config"):
            load(write(text))
    assert {*EdgeConfig.__struct_fields__} >= EDGE_SETTINGS
    assert not SETTINGS.keys() & EDGE_SETTINGS


def test_keys_named_in_a_file_are_relative_to_it(
    write: Callable[[str], Path], tmp_path: Path
) -> None:
    assert load(write("")).config.keys == tmp_path / "keys"
    config = load(write('secret_key = "a.key"\nauthorized = "edges"\n')).config
    assert config.key_file == tmp_path / "a.key"
    assert config.authorized_folder == tmp_path / "edges"
    assert NodeConfig().key_file == Path("keys/node.key")
    assert NodeConfig().authorized_folder == Path("keys/authorized")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ('device = "cuda"', ("cuda",)),
        ('device = "cuda:0,2"', ("cuda:0", "cuda:2")),
        ('device = "tensorrt:1, cpu"', ("tensorrt:1", "cpu")),
        ('device = ["cuda:0", "cuda:1"]', ("cuda:0", "cuda:1")),
        ("queue_bytes = 1048576", 1 << 20),
        ('queue_bytes = "64 MiB"', 64 << 20),
        ('queue_bytes = "1.5GB"', 1_500_000_000),
        ('queue_bytes = "300k"', 300_000),
        ("max_wait_ms = 0", 0.0),
        ("max_wait_ms = 0.5", 0.5),
        ('metrics = "off"', None),
        ('metrics = "[::1]:9464"', "[::1]:9464"),
        ('log_format = "json"', "json"),
        ('ray_replicas = 3\nworkers = "ray"', (3, 3)),
        ('ray_replicas = "1-4"\nworkers = "ray"', (1, 4)),
        ('memory_ceiling = "2 GiB"', 2 << 30),
    ],
)
def test_values(write: Callable[[str], Path], line: str, value: Any) -> None:
    name = line.split(" ")[0]
    found = getattr(load(write(line)).config, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("thread = 2", ["'thread'", "did you mean threads?"]),
        ("max-batch = 50", ["did you mean max_batch?"]),
        ("colour = 1", ["'colour'", "known are bundle, bind"]),
        ("[metrics]\naddress = 1", ["[metrics] begins a table", "NAME = VALUE"]),
        ("[node]\nthreads = 1", ["[node] begins a table"]),
        ("metrics = false", ["metrics is false", 'a text such as "127.0.0.1:9464"']),
        ("threads = 0", ["threads is 0", "1 to 1,024"]),
        ("threads = 1.5", ["threads is 1.5", "whole number from 1 to 1,024"]),
        ("threads = true", ["threads is true", "whole number"]),
        ('threads = "many"', ["threads is 'many'", "whole number"]),
        ("bind = 5555", ["bind is 5555", "expected a text, such as", "tcp://0.0.0.0:5555"]),
        ('bind = "0.0.0.0:5555"', ["'0.0.0.0:5555'", "tcp://0.0.0.0:5555"]),
        ("max_wait_ms = nan", ["max_wait_ms is nan", "0 to 1,000 ms"]),
        ("max_wait_ms = -1", ["0 to 1,000 ms"]),
        ("drain_s = inf", ["0 to 3,600 seconds"]),
        ('queue_bytes = "plenty"', ["queue_bytes is 'plenty'", '"256 MiB"']),
        ("queue_bytes = 1", ["64 KiB to 1024 GiB"]),
        ("max_batch = 0", ["1 to 65,536"]),
        ("client_requests = 0", ["1 to 1,024"]),
        ('device = "gpu"', ["auto, cpu, cuda, tensorrt", "cuda:0,1"]),
        ('device = "cpu:1"', ["device is 'cpu:1'"]),
        ('device = ["cuda", "cuda:0"]', ["each device once"]),
        ("device = [1]", ["device is [1]", "auto, cpu"]),
        ("device = []", ["at least one device"]),
        ("device = 0", ["a text or an array of texts"]),
        ('metrics = "9464"', ["off or HOST:PORT"]),
        ('metrics = "127.0.0.1:70000"', ["off or HOST:PORT"]),
        ('workers = "many"', ["local or ray"]),
        ('log_level = "loud"', ["debug or info"]),
        ('bundle = ""', ["expected a path"]),
        ('bundle = "a\\u0000b"', ["expected a path"]),
        ('bundle = "~nobody-of-that-name/x"', ["a user that exists"]),
        ('ray_address = "head:6379"', ["ray_address is head:6379", 'workers = "ray"']),
        ('ray_address = "the head"', ["auto, local or HOST:PORT"]),
        ("ray_replicas = 2", ["ray_replicas is 2", 'workers = "ray"']),
        ("ray_replicas = 0", ["1 to 1024"]),
        ('ray_replicas = "4-1"', ["the smaller number first"]),
        ('ray_replicas = "1-"', ["a number, or two such as 1-4"]),
        ('workers = "ray"\ndevice = "cuda:0,1"', ["cuda:0,cuda:1", "ray_replicas"]),
        ('memory_ceiling = "128 MiB"', ["expected at least 320 MiB", "queue_bytes, 256 MiB"]),
        ('bind = "tcp://*:9464"\nmetrics = "127.0.0.1:9464"', ["need different ports"]),
        ('bind = "tcp://127.0.0.1:9464"\nmetrics = "0.0.0.0:9464"', ["need different ports"]),
        ('bind = "tcp://10.0.0.1:9464"\nmetrics = "10.0.0.1:9464"', ["need different ports"]),
        ("threads = ]", ["not valid TOML", "line 1"]),
    ],
)
def test_mistakes_are_named_with_a_remedy(
    write: Callable[[str], Path], line: str, parts: list[str]
) -> None:
    file = write(line)
    with pytest.raises(ConfigError) as caught:
        load(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_long_value_is_not_repeated_in_full(write: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(f'threads = "{"9" * 1000}x"'))
    assert len(str(caught.value)) < 300


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cloud-node init --out"):
        load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'bind = "\xe9"')
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(tmp_path / "latin.toml")


def test_different_ports_or_hosts_do_not_conflict(write: Callable[[str], Path]) -> None:
    load(write('bind = "tcp://127.0.0.1:7000"\nmetrics = "127.0.0.2:7000"'))
    load(write('bind = "tcp://127.0.0.1:0"\nmetrics = "127.0.0.1:0"'))


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda s: s.name)
def test_a_shown_value_can_be_read_again(setting: Any, write: Callable[[str], Path]) -> None:
    value = setting.sample
    loaded = load(write(f"{setting.name} = {setting.show(value)}"))
    found = getattr(loaded.config, setting.name)
    assert found == (write("").parent / value if setting.is_path else value)


@pytest.mark.parametrize("text", ['a"b', "back\\slash", "tab\there", "new\nline", "é", "\x7f"])
def test_strings_are_quoted_as_toml_requires(write: Callable[[str], Path], text: str) -> None:
    bundle = load(write(f"bundle = {quoted(text)}")).config.bundle
    assert bundle is not None
    assert bundle.name == text


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1 << 20, (1 << 20) + 1, 3 << 30])
def test_sizes_are_shown_exactly(size: int) -> None:
    assert SETTINGS["queue_bytes"].about.kind.read(size_text(size)) == size


def test_settings_are_refused_with_a_reason() -> None:
    for setting in SETTINGS.values():
        with pytest.raises(Invalid, match="expected"):
            setting.read({"a": 1})


def test_prepare_loads_the_named_files(usable: NodeConfig) -> None:
    prepared = prepare(usable)
    assert isinstance(prepared, Prepared)
    assert prepared.keypair == keys.load_secret(usable.keys / "node.key")
    assert prepared.label == "test_pixels fp32"
    assert prepared.limits.request.total_bytes > 0
    assert examine(prepared) == [
        f"no edge is authorised in {usable.keys / 'authorized'}: see `edge-runtime keys authorize "
        "--help`"
    ]


def test_key_and_allow_list_may_be_in_different_folders(usable: NodeConfig, tmp_path: Path) -> None:
    key = tmp_path / "credential"
    (usable.keys / "node.key").rename(key)
    with pytest.raises(KeyFileError, match=r"node\.key"):
        prepare(usable)
    edges = keys.make_directory(tmp_path / "edges")
    keys.write_public(edges / "kitchen.pub", keys.generate(tmp_path / "e", "e").public, "kitchen")
    prepared = prepare(with_(usable, secret_key=key, authorized=edges))
    assert len(prepared.allowed) == 1
    assert examine(prepared) == []


@pytest.mark.parametrize(
    ("changes", "error", "part"),
    [
        ({"max_batch": 1}, ConfigError, "max_batch is 1, expected at least"),
        ({"bundle": Path("/nowhere")}, BundleError, "does not exist"),
        ({"ready_file": Path("/nowhere/ready.json")}, ConfigError, "/nowhere does not exist"),
        ({"ready_file": Path("/")}, ConfigError, "ready_file is /, which is a folder"),
        ({"keys": Path("/nowhere")}, KeyFileError, "edge-runtime keys"),
        ({"authorized": Path("/nowhere")}, KeyFileError, "authorised keys /nowhere"),
    ],
)
def test_prepare_refuses(
    usable: NodeConfig, changes: dict[str, Any], error: type[Exception], part: str
) -> None:
    with pytest.raises(error, match=re.escape(part)):
        prepare(with_(usable, **changes))


def test_a_queue_must_hold_two_requests_of_this_bundle(usable: NodeConfig) -> None:
    limits = prepare(usable).limits
    with pytest.raises(ConfigError, match=r"queue_bytes is 1000, expected at least \d+ KiB"):
        prepare(with_(usable, queue_bytes=1000))
    prepare(with_(usable, queue_bytes=2 * (limits.request.total_bytes + 4096)))


def test_examine_notices_a_damaged_file(usable: NodeConfig, tmp_path: Path) -> None:
    import shutil

    assert usable.bundle
    shutil.copytree(usable.bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / "stack.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    prepared = prepare(with_(usable, bundle=tmp_path / "bundle"))
    with pytest.raises(BundleError, match=r"stack\.onnx is damaged"):
        examine(prepared)


def test_examine_checks_addresses(usable: NodeConfig) -> None:
    for changes in ({"bind": "tcp://192.0.2.1:0"}, {"metrics": "192.0.2.1:9464"}):
        with pytest.raises(ConfigError, match="this machine can't listen there"):
            examine(prepare(with_(usable, **changes)))
    with pytest.raises(ConfigError, match="is not an address"):
        examine(prepare(with_(usable, bind="tcp://no-such-host.invalid:5555")))
    with socket.create_server(("127.0.0.1", 0)) as other:
        bind = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        assert any(
            "something listens there" in n for n in examine(prepare(with_(usable, bind=bind)))
        )
    notes = examine(prepare(with_(usable, metrics="0.0.0.0:0", threads=None)))
    assert any("127.0.0.1 keeps it on this machine" in note for note in notes)
    assert any("takes all cores" in note for note in notes)
    assert len(examine(prepare(with_(usable, metrics="127.0.0.1:0")))) == 1
