"""Files and folders appear whole or not at all, even on full disks."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from edge_common.errors import ConfigError, OutputError
from edge_common.files import (
    atomic_file,
    explain_write_errors,
    move_folder,
    scratch_folder,
    write_atomically,
)


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path) as scratch:
        scratch.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with atomic_file(path) as scratch:
            scratch.write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_modes_follow_the_umask_and_secrets_are_exact(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "open", "x")
        os.umask(0o777)
        write_atomically(tmp_path / "secret", "x", mode=0o600)
        os.umask(0)
        with atomic_file(tmp_path / "other", mode=0o600) as scratch:
            assert scratch.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert modes == {"open": 0o640, "secret": 0o600, "other": 0o600}


def test_a_file_is_never_replaced_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ConfigError, match="never overwritten"):
        write_atomically(path, "new", replace=False, error=ConfigError)

    def too_late() -> None:
        with atomic_file(path, replace=False) as scratch:
            scratch.write_text("new")
            path.write_text("meanwhile")

    for number in (None, errno.EPERM, errno.EOPNOTSUPP):  # memory cards have no links
        path.unlink()
        if number is not None:

            def refuse(*_: object, number: int = number) -> None:
                raise OSError(number, os.strerror(number))

            monkeypatch.setattr(os, "link", refuse)
        with pytest.raises(OutputError, match="never overwritten"):
            too_late()
        assert path.read_text() == "meanwhile"
        assert os.listdir(tmp_path) == ["file"]
    path.unlink()
    write_atomically(path, "new", replace=False)
    assert path.read_text() == "new"


def test_a_folder_is_moved_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "result"
    with scratch_folder(folder) as scratch:
        (scratch / "a").write_text("new")
        assert not folder.exists()
        move_folder(scratch, folder)
    assert (folder / "a").read_text() == "new"
    assert os.listdir(folder.parent) == ["result"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_folder_and_no_new_parents(
    tmp_path: Path, error: type[BaseException]
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "a").write_text("old")

    def fail(folder: Path) -> None:
        with scratch_folder(folder) as scratch:
            (scratch / "a").write_text("new")
            raise error

    for folder in (old, tmp_path / "x" / "y" / "result"):
        with pytest.raises(error):
            fail(folder)
    assert (old / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["old"]


def test_a_folder_is_replaced_only_on_request(tmp_path: Path) -> None:
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "old").touch()
    with scratch_folder(folder) as scratch:
        (scratch / "new").touch()
        with pytest.raises(FileExistsError):
            move_folder(scratch, folder)
        assert os.listdir(folder) == ["old"]
        move_folder(scratch, folder, replace=True)
    assert os.listdir(folder) == ["new"]
    assert os.listdir(tmp_path) == ["result"]


def test_a_failed_replacement_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "old").touch()
    rename = Path.rename
    taken = False

    def fail_second(self: Path, target: Path) -> Path:
        if self == scratch and not folder.exists():
            if taken:
                folder.mkdir()
                (folder / "other").touch()
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    with scratch_folder(folder) as scratch:
        (scratch / "new").touch()
        with pytest.raises(OSError, match="Input/output error"):
            move_folder(scratch, folder, replace=True)
        assert os.listdir(folder) == ["old"]
        taken = True
        with pytest.raises(OSError, match="what was there is now ") as caught:
            move_folder(scratch, folder, replace=True)
        assert os.listdir(folder) == ["other"]
        assert os.listdir(str(caught.value).rpartition(" ")[2]) == ["old"]


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    with scratch_folder(tmp_path / "result") as scratch:
        (scratch / "new").touch()
        move_folder(scratch, tmp_path / "result")
    assert os.listdir(tmp_path / "result") == ["new"]


@pytest.mark.process
def test_a_full_disk_is_named_and_nothing_remains_on_it(full_disk: Path) -> None:
    path = full_disk / "file"
    with pytest.raises(OutputError) as caught:
        write_atomically(path, b"x" * 100_000)
    assert caught.value.fields() == {
        "error": f"cannot write {path}: No space left on device",
        "code": "disk_full",
        "mend": "make room on that disk, or name another file",
    }
    assert os.listdir(full_disk) == []
    with (
        pytest.raises(OutputError, match=r"needs about 0\.1 MB and 0\.1 MB are free: make room"),
        scratch_folder(full_disk / "result", room=100_000),
    ):
        raise AssertionError("not to be reached")
    assert os.listdir(full_disk) == []


@pytest.mark.process
def test_a_disk_that_fills_up_during_the_write_keeps_the_old_file(full_disk: Path) -> None:
    path = full_disk / "file"
    path.write_bytes(b"old")

    def fill() -> None:
        with atomic_file(path) as scratch, open(scratch, "wb") as file:
            for _ in range(3):
                file.write(b"x" * 30_000)

    with pytest.raises(OutputError, match="No space left"):
        fill()
    assert path.read_bytes() == b"old"
    assert os.listdir(full_disk) == ["file"]


@pytest.mark.process
def test_a_file_size_limit_is_reported_like_a_full_disk(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from edge_common.files import write_atomically\n"
        "from edge_common.errors import OutputError\n"
        "try: write_atomically(sys.argv[1], b'x' * 100_000)\n"
        "except OutputError as error: print(error)"
    )
    limit = (10_000, 10_000)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert "File too large: name another file" in done.stdout
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("folder", ["/proc/x", "/proc/x/y"])
def test_an_unwritable_folder_is_reported_before_the_work(folder: str) -> None:
    with (
        pytest.raises(OutputError, match=f"cannot write {folder}: .* another folder with --out"),
        scratch_folder(folder),
    ):
        raise AssertionError("not to be reached")


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputError, match=rf"{tmp_path}/file is a file, not a folder: name another"),
        scratch_folder(tmp_path / "file" / "x" / "y"),
    ):
        raise AssertionError("not to be reached")


def test_an_error_without_a_number_counts_as_a_full_disk(tmp_path: Path) -> None:
    """NumPy reports only how many items it has written."""
    with (
        pytest.raises(OutputError, match="3 requested and 0 written: make room on that disk"),
        explain_write_errors(tmp_path),
    ):
        raise OSError("3 requested and 0 written")
