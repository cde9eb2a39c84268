"""The record's file: damage always shows, nobody else can read it, one process writes it."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_common.errors import RecordError
from edge_runtime.exposure import record_file
from edge_runtime.exposure.record_file import FILE, RecordFile, read_rows

ROWS = {b"row-%03d" % i: bytes([i]) * (i * 150) for i in range(40)}


@pytest.fixture(autouse=True)
def _shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks go to a folder of the test."""
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(record_file, "_SHARED_MEMORY", tmp_path / "memory")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A record with some rows."""
    folder = tmp_path / "exposure"
    file = RecordFile(folder)
    file.write(ROWS)
    file.close(clean=True)
    return folder


def rows(folder: Path) -> dict[bytes, bytes]:
    file = RecordFile(folder)
    file.close(clean=True)
    assert read_rows(folder)[0] == file.rows
    return file.rows


def test_rows_are_changed_and_deleted_together(folder: Path) -> None:
    file = RecordFile(folder)
    assert file.rows == ROWS
    file.write({b"row-001": b"new", b"row-002": None, b"more": b"", b"never": None})
    file.close(clean=True)
    expected = {**ROWS, b"row-001": b"new", b"more": b""}
    del expected[b"row-002"]
    assert rows(folder) == expected


@pytest.mark.parametrize("umask", [0, 0o777])
def test_files_are_closed_to_others_under_any_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        file = RecordFile(tmp_path / "exposure")
        file.write(ROWS)
        file.start_session({})
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*/*")}
        folder = (tmp_path / "exposure").stat().st_mode & 0o777
        file.close(clean=True)
    finally:
        os.umask(before)
    assert folder == 0o700
    assert len(modes) == 4  # the database, its journal, the lock, the marks
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize("name", ["", FILE])
@pytest.mark.parametrize("mode", [0o044, 0o022])
def test_a_record_that_others_can_reach_is_refused(folder: Path, name: str, mode: int) -> None:
    path = folder / name
    path.chmod(path.stat().st_mode | mode)
    for read in (RecordFile, read_rows):
        with pytest.raises(RecordError, match="others may") as caught:
            read(folder)
        assert caught.value.code == "untrusted"
        assert caught.value.mend.startswith("chmod ")


def test_the_second_writer_is_refused_and_a_reader_is_not(folder: Path) -> None:
    file = RecordFile(folder)
    with pytest.raises(RecordError, match=f"another process \\({os.getpid()}\\)") as caught:
        RecordFile(folder)
    assert caught.value.code == "in_use"
    file.write({b"more": b"1"})
    found, _, in_use = read_rows(folder)
    assert in_use
    assert found == {**ROWS, b"more": b"1"}
    file.write({b"more": b"2"})  # the reader has not disturbed it
    file.close(clean=True)
    assert read_rows(folder)[2] is False
    assert rows(folder)[b"more"] == b"2"


def damages(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The file with each page wiped, swapped, cut off, or with bytes flipped at its borders."""
    for at in range(0, len(data), 4096):
        yield f"cut at {at}", data[:at]
        yield f"cut after {at}", data[: at + 100]
        yield f"wiped {at}", data[:at] + bytes(4096) + data[at + 4096 :]
        yield f"ones {at}", data[:at] + b"\xff" * 4096 + data[at + 4096 :]
        for near in (at - 1, at, at + 1, at + 7, at + 8, at + 13, at + 2048, at + 4095):
            if near >= 0:
                yield f"flip {near}", data[:near] + bytes([data[near] ^ 1]) + data[near + 1 :]


def test_damage_is_an_error_or_changes_nothing(folder: Path) -> None:
    data = (folder / FILE).read_bytes()
    assert len(data) > 20 * 4096
    harmless = []
    for what, damaged in damages(data):
        (folder / FILE).write_bytes(damaged)
        for rest in folder.glob("*-journal"):
            rest.unlink()
        try:
            found = rows(folder)
        except RecordError as error:
            assert error.mend, what  # noqa: PT017
        else:
            assert found == ROWS, what
            harmless.append(what)
    assert {what.split()[0] for what in harmless} == {"flip"}  # of bytes that hold nothing


def test_damage_to_free_pages_shows_before_they_are_used(folder: Path) -> None:
    file = RecordFile(folder)
    file.write(dict.fromkeys(list(ROWS)[10:]))
    file.close(clean=True)
    data = (folder / FILE).read_bytes()
    trunk = (int.from_bytes(data[32:36], "big") - 1) * 4096  # the first page of the free list
    assert trunk > 0
    (folder / FILE).write_bytes(data[:trunk] + bytes(4096) + data[trunk + 4096 :])
    with pytest.raises(RecordError, match="is damaged"):
        RecordFile(folder)


def test_a_commit_reaches_the_disk_before_it_returns(folder: Path) -> None:
    file = RecordFile(folder)
    settings = [
        file._connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("synchronous", "journal_mode")
    ]
    file.close(clean=True)
    assert settings == [2, "truncate"]  # 2: FULL


@pytest.mark.parametrize("content", [b"", b"some text", b"SQLite format 3\0" + bytes(4080)])
def test_a_foreign_file_is_refused_with_a_remedy(folder: Path, content: bytes) -> None:
    (folder / FILE).write_bytes(content)
    for read in (RecordFile, read_rows):
        with pytest.raises(RecordError) as caught:
            read(folder)
        assert caught.value.code == "damaged"
        assert caught.value.mend.startswith(f"`mv {folder} ")
    assert (folder / FILE).read_bytes() == content


def test_a_record_of_another_version_is_refused(folder: Path) -> None:
    with sqlite3.connect(folder / FILE) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(RecordError, match="schema 2, expected 1"):
        RecordFile(folder)


def test_rows_changed_by_another_program_are_noticed(folder: Path) -> None:
    for change in ("DELETE FROM rows WHERE id = ?", "UPDATE rows SET body = x'00' WHERE id = ?"):
        copy = folder.parent / "copy"
        shutil.copytree(folder, copy)
        with sqlite3.connect(copy / FILE) as connection:
            assert connection.execute(change, (b"row-007",)).rowcount == 1
        connection.close()
        with pytest.raises(RecordError, match="is damaged"):
            RecordFile(copy)
        shutil.rmtree(copy)


def test_marks_count_for_the_session_that_made_them(folder: Path, tmp_path: Path) -> None:
    assert RecordFile(folder).began is None  # closed cleanly: no marks are left
    file = RecordFile(folder)
    file.start_session({})
    file.mark(b"a" * 16)
    file.close(clean=False)  # as after a crash
    file = RecordFile(folder)
    assert file.began is not None
    assert b"a" * 16 in file.began
    file.start_session({})
    file.close(clean=False)
    assert b"a" * 16 not in (read_rows(folder)[1] or ())
    (memory,) = (tmp_path / "memory").iterdir()
    memory.write_bytes(b"x" * 16 + memory.read_bytes()[16:])  # of another session
    assert read_rows(folder)[1] is None
    memory.unlink()  # the machine was started again
    assert read_rows(folder)[1] is None


def test_marks_of_another_user_or_through_a_link_are_not_used(folder: Path, tmp_path: Path) -> None:
    file = RecordFile(folder)
    file.start_session({})
    file.close(clean=False)
    (memory,) = (tmp_path / "memory").iterdir()
    memory.chmod(0o644)
    assert read_rows(folder)[1] is None
    memory.chmod(0o600)
    assert read_rows(folder)[1] is not None
    memory.rename(tmp_path / "elsewhere")
    memory.symlink_to(tmp_path / "elsewhere")
    assert read_rows(folder)[1] is None
    file = RecordFile(folder)  # works without
    file.start_session({})
    file.mark(b"a" * 16)
    file.close(clean=True)


def test_no_record_reads_as_empty_and_is_not_made(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "exposure") == ({}, set(), False)
    assert not (tmp_path / "exposure").exists()


def test_leftovers_of_an_interrupted_start_do_no_harm(folder: Path) -> None:
    (folder / "new.db").write_bytes(b"half")
    (folder / FILE).unlink()
    assert rows(folder) == {}
