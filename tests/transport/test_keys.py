"""Key files: modes under any umask, never overwritten, and clear errors for all other content."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_common.errors import KeyFileError
from transport import keys


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o277])
def test_key_files_have_fixed_modes_under_any_umask(tmp_path: Path, mask: int) -> None:
    folder = tmp_path / "keys"
    with _umask(mask & 0o077):
        keys.make_directory(folder)
    with _umask(mask):
        keys.generate(folder, "alpha")
        keys.generate_secret(folder / "edge.secret")
    assert _mode(folder) == 0o700
    assert _mode(folder / "alpha.key") == 0o600
    assert _mode(folder / "edge.secret") == 0o600
    assert _mode(folder / "alpha.pub") == 0o644
    assert sorted(os.listdir(folder)) == ["alpha.key", "alpha.pub", "edge.secret"]


def test_a_secret_is_never_open_to_others_not_even_briefly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    opened = os.open

    def spy(path: os.PathLike[str], flags: int, mode: int = 0o777) -> int:
        descriptor = opened(path, flags, mode)
        if flags & os.O_CREAT:
            seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(os, "open", spy)
    with _umask(0):
        keys.generate_secret(tmp_path / "edge.secret")
    assert seen == [0o600]


def test_a_written_key_is_read_back(tmp_path: Path) -> None:
    made = keys.generate(tmp_path, "alpha")
    assert keys.load_secret(tmp_path / "alpha.key") == made
    assert keys.load_public(tmp_path / "alpha.pub") == made.public
    assert zmq.curve_public(made.secret.encode()).decode() == made.public
    secret = keys.generate_secret(tmp_path / "edge.secret")
    assert keys.load_secret_bytes(tmp_path / "edge.secret") == secret
    assert len(secret) == 32


def test_every_key_is_new(tmp_path: Path) -> None:
    made = [keys.generate(tmp_path, f"n{i}") for i in range(10)]
    assert len({pair.secret for pair in made}) == len({pair.public for pair in made}) == 10


def test_the_secret_is_in_neither_repr_nor_public_file(tmp_path: Path) -> None:
    made = keys.generate(tmp_path, "alpha")
    assert made.secret not in repr(made)
    assert made.secret not in (tmp_path / "alpha.pub").read_text()


@pytest.mark.parametrize("existing", ["alpha.key", "alpha.pub"])
def test_existing_files_are_not_overwritten(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("precious")
    with pytest.raises(KeyFileError, match="never overwritten"):
        keys.generate(tmp_path, "alpha")
    assert os.listdir(tmp_path) == [existing]
    assert (tmp_path / existing).read_text() == "precious"


def test_a_dangling_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "edge.secret").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyFileError, match="never overwritten"):
        keys.generate_secret(tmp_path / "edge.secret")
    assert not (tmp_path / "elsewhere").exists()


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeyFileError, match="No space left"):
        keys.generate(tmp_path, "alpha")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyFileError, match="cannot make the folder"):
        keys.generate(tmp_path / "file" / "keys", "alpha")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "a b", "-x", "x" * 65])
def test_names_unfit_for_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyFileError, match="cannot name a key"):
        keys.generate(tmp_path, name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", [0o601, 0o602, 0o604, 0o610, 0o620, 0o640, 0o644, 0o666, 0o777])
def test_looser_modes_are_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    keys.generate(tmp_path, "alpha")
    keys.generate_secret(tmp_path / "edge.secret")
    loads: list[tuple[Path, Callable[[Path], object]]] = [
        (tmp_path / "alpha.key", keys.load_secret),
        (tmp_path / "edge.secret", keys.load_secret_bytes),
    ]
    for path, load in loads:
        path.chmod(mode)
        with pytest.raises(KeyFileError, match=f"chmod 600 {path}"):
            load(path)
        path.chmod(0o600)
        load(path)
        path.chmod(0o400)
        load(path)


@pytest.mark.parametrize(
    ("mode", "fit"), [(0o440, True), (0o400, True), (0o460, False), (0o444, False)]
)
def test_a_systemd_credential_may_look_readable_by_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, fit: bool
) -> None:
    """Access control lists appear so. The same file elsewhere is refused."""
    keys.generate(tmp_path, "node")
    path = tmp_path / "node.key"
    path.chmod(mode)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    if fit:
        keys.load_secret(path)
    else:
        with pytest.raises(KeyFileError, match="is open to others"):
            keys.load_secret(path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "other"))
    if mode & 0o077:
        with pytest.raises(KeyFileError, match="is open to others"):
            keys.load_secret(path)


@pytest.mark.parametrize("mode", [0o662, 0o646, 0o666])
def test_a_public_key_writable_by_others_is_refused_with_the_remedy(
    tmp_path: Path, mode: int
) -> None:
    """Others could replace the key by their own."""
    pair = keys.generate(tmp_path, "alpha")
    path = tmp_path / "alpha.pub"
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=f"chmod go-w {path}"):
        keys.load_public(path)
    assert keys.read_public(path) == pair.public  # the file of a key that was sent to us
    path.chmod(0o644)
    assert keys.load_public(path) == pair.public


def test_a_folder_of_keys_writable_by_others_is_refused(tmp_path: Path) -> None:
    folder = keys.make_directory(tmp_path / "keys")
    keys.generate(folder, "alpha")
    keys.generate_secret(folder / "edge.secret")
    folder.chmod(0o777)
    for load, name in (
        (keys.load_public, "alpha.pub"),
        (keys.load_secret, "alpha.key"),
        (keys.load_secret_bytes, "edge.secret"),
    ):
        with pytest.raises(KeyFileError, match=f"chmod go-w {folder}"):
            load(folder / name)
    with pytest.raises(KeyFileError, match=f"chmod go-w {folder}"):
        keys.generate(folder, "beta")
    with pytest.raises(KeyFileError, match=f"chmod go-w {folder}"):
        keys.generate_secret(folder / "other.secret")
    assert sorted(os.listdir(folder)) == ["alpha.key", "alpha.pub", "edge.secret"]


def test_root_creates_keys_in_another_user_s_folder(tmp_path: Path) -> None:
    """For example in a container started with a folder of the host's user."""
    if os.geteuid():
        pytest.skip("only root can change the owner of a file")
    folder = keys.make_directory(tmp_path / "keys")
    os.chown(folder, 12_345, -1)
    keys.generate(folder, "alpha")
    keys.make_directory(folder / "authorized")
    with pytest.raises(KeyFileError, match="belongs to"):
        keys.load_secret(folder / "alpha.key")


def _write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(0o600)
    return path


GOOD = "f7s}l.e5eder=/DG^1}p{v]U^M=}]*A+NGve.qW$"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "public-key",
        f"public-key {GOOD}",
        f"secret-key {GOOD}",
        f"public-key {GOOD}\nsecret-key {GOOD}",  # not a pair
        f"public-key {GOOD}\npublic-key {GOOD}",
        f"public-key {GOOD[:-1]}\nsecret-key {GOOD}",
        f"public-key {GOOD} x\nsecret-key {GOOD}",
        f"public-key {'~' * 40}\nsecret-key {GOOD}",
        f"public-key {'#' * 40}\nsecret-key {GOOD}",  # over 32 bits in a group
        "{}",
        b"\x80\x04\x95",
        b"\0" * 100,
        "# only\n# comments\n" * 1000,
    ],
)
def test_malformed_secret_files(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(KeyFileError, match=r"a\.key"):
        keys.load_secret(_write(tmp_path / "a.key", text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        f"public-key {GOOD}\nextra 1",
        f"public-key {GOOD}\npublic-key {GOOD}",  # which of two would count?
        f"public-key {GOOD}A",
        "public-key " + "\x00" * 40,
    ],
)
def test_malformed_public_files(tmp_path: Path, text: str) -> None:
    with pytest.raises(KeyFileError, match=r"a\.pub"):
        keys.load_public(_write(tmp_path / "a.pub", text))


@pytest.mark.parametrize("value", ["", "00" * 31, "00" * 33, "zz" * 32, "00" * 32 + " 1"])
def test_malformed_placement_secrets(tmp_path: Path, value: str) -> None:
    with pytest.raises(KeyFileError, match=r"edge\.secret"):
        keys.load_secret_bytes(_write(tmp_path / "edge.secret", f"placement-secret {value}\n"))


def test_a_secret_key_in_place_of_a_public_one_is_refused(tmp_path: Path) -> None:
    keys.generate(tmp_path, "alpha")
    with pytest.raises(KeyFileError, match="holds a secret key"):
        keys.load_public(tmp_path / "alpha.key")


def test_pipes_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(KeyFileError, match="not a regular file"):
            keys.load_secret(path)
    with pytest.raises(KeyFileError, match="edge-runtime keys"):
        keys.load_secret(tmp_path / "missing.key")


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda t: f"public-key {t}".encode()))
def test_fuzz_key_files(tmp_path: Path, data: bytes) -> None:
    path = _write(tmp_path / "fuzz", data)
    for load in (keys.load_secret, keys.load_public, keys.load_secret_bytes):
        try:
            load(path)
        except KeyFileError as error:
            assert str(error)  # noqa: PT017  an error is allowed, not required


def test_check_public() -> None:
    assert keys.check_public(GOOD) == GOOD
    for bad in ("", GOOD[:-1], GOOD + "0", "é" * 40, '"' * 40, "#" * 40):
        with pytest.raises(KeyFileError, match="malformed key"):
            keys.check_public(bad)
