"""The files of the exposure record: rows of bytes in SQLite, a lock, and marks in shared memory.

SQLite makes each change atomic and durable, but it has no checksums. Here the sum of all rows'
digests is kept with them, so that damage shows when the file is opened. The journal is a rollback
journal: where a write-ahead log is damaged, SQLite silently returns to an older state.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import secrets
import shlex
import sqlite3
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from edge_common.errors import RecordError
from edge_common.files import explain_write_errors, flush_to_disk
from edge_common.permissions import why_untrusted

FILE = "exposure.db"
_LOCK, _NEW = "lock", "new.db"
_APPLICATION, _SCHEMA = 0x65727478, 1  # "ertx"
_TABLE = "CREATE TABLE rows (id BLOB PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID"
_TOTAL = b""  # id of the row that holds the sum of the digests of all others
_SESSION = b"session"  # id of the row that names the process that wrote last
_BUSY_S = 2.0
"""How long to wait for a command that is reading the record."""
_MOST_BYTES = 1 << 30
_ID_BYTES = 16
_PAGE = 4096
_SHARED_MEMORY = Path("/dev/shm")
_LOCK_TRIES, _LOCK_PAUSE_S = 10, 0.05  # a command that reads has the lock for an instant


class RecordFile:
    """The record, open for writing. One process at a time has it. Not for several threads at once.

    Args:
        folder: made if it is not there. It holds nothing else.

    Attributes:
        rows: all rows when it was opened, id -> body.
        began: ids that the last writer had marked; None if that is not known, for example because
            the machine was started again since.

    Raises:
        RecordError: another process has it, others may read or write it, it is damaged or of
            another program, or the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        with contextlib.ExitStack() as opened, explain_write_errors(folder, RecordError):
            if not folder.exists():
                folder.mkdir(mode=0o700, parents=True)
                folder.chmod(0o700)  # a strict umask must not close it to us
            _refuse_exposed(folder)
            opened.enter_context(_locked(folder, _LOCK_TRIES))
            (folder / _LOCK).write_text(f"{os.getpid()}\n")  # for the error below
            if not os.path.lexists(self._path):
                _create(folder)
            _refuse_exposed(self._path)
            with _explained(self._path):
                self._connection = opened.enter_context(_connected(self._path))
                self.rows = _all_rows(self._connection, self._path)
            self._marks = opened.enter_context(contextlib.closing(Marks(folder, os.O_CREAT)))
            self.began = self._marks.began(self.rows.pop(_SESSION, b""))
            self._opened = opened.pop_all()

    def start_session(self, changes: Mapping[bytes, bytes | None]) -> None:
        """Make `changes` and drop all marks. Until then those of the last writer count.

        Raises:
            RecordError: see :meth:`write`.
        """
        session = secrets.token_bytes(_ID_BYTES)
        self.write({**changes, _SESSION: session})
        self._marks.start(session)

    def write(self, changes: Mapping[bytes, bytes | None]) -> None:
        """Put these rows on the disk, all or none; None deletes a row. Returns when they are there.

        Raises:
            RecordError: the disk refuses or the file is damaged. The rows may be there or not.
        """
        with _explained(self._path), _transaction(self._connection) as connection:

            def body(key: bytes) -> bytes | None:
                row = connection.execute("SELECT body FROM rows WHERE id = ?", (key,)).fetchone()
                return None if row is None else bytes(row[0])

            total = int.from_bytes(body(_TOTAL) or b"", "big")
            for key, after in changes.items():
                if (before := body(key)) is not None:
                    total -= _digest(key, before)
                if after is None:
                    connection.execute("DELETE FROM rows WHERE id = ?", (key,))
                else:
                    total += _digest(key, after)
                    connection.execute("REPLACE INTO rows VALUES (?, ?)", (key, after))
            connection.execute("REPLACE INTO rows VALUES (?, ?)", (_TOTAL, _as_bytes(total)))

    def mark(self, key: bytes) -> None:
        """Note an id (16 bytes) at once, without the disk."""
        self._marks.add(key)

    def close(self, *, clean: bool) -> None:
        """Close the file and release the lock.

        Args:
            clean: the rows say all that the marks do.
        """
        if clean:
            self._marks.remove()
        self._opened.close()


def read_rows(folder: Path) -> tuple[dict[bytes, bytes], set[bytes] | None, bool]:
    """All rows of a record that another process may be writing to.

    Returns:
        the rows (none if there is no record), `RecordFile.began`, and whether a process has it
        open.

    Raises:
        RecordError: it is damaged, of another program, or others may read or write it.
    """
    path = folder / FILE
    if not os.path.lexists(path):
        return {}, set(), False
    with explain_write_errors(folder, RecordError):
        _refuse_exposed(folder)
        _refuse_exposed(path)
        in_use = False
        try:
            with _locked(folder):
                pass
        except RecordError:
            in_use = True
        with _explained(path), _connected(path) as connection:
            rows = _all_rows(connection, path)
        with contextlib.closing(Marks(folder)) as marks:
            return rows, marks.began(rows.pop(_SESSION, b"")), in_use


class Marks:
    """A few ids in shared memory: written in microseconds, they outlive the process, but not a
    restart of the machine. Where there is no such memory, they are not known afterwards.
    """

    def __init__(self, folder: Path, create: int = 0) -> None:
        name = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=12).hexdigest()
        self._path = _SHARED_MEMORY / f"edge-runtime-{os.geteuid()}-{name}"
        self._memory: mmap.mmap | None = None
        self._count = 0
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | create
        with contextlib.suppress(OSError, ValueError):
            descriptor = os.open(self._path, flags, 0o600)
            try:
                if create:
                    os.fchmod(descriptor, 0o600)  # fails on another user's file
                status = os.fstat(descriptor)
                ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
                if ours and not status.st_mode & 0o077:
                    if create:  # a page that cannot be had would end the process later
                        os.posix_fallocate(descriptor, 0, _PAGE)
                    self._memory = mmap.mmap(descriptor, _PAGE)
            finally:
                os.close(descriptor)

    def began(self, session: bytes) -> set[bytes] | None:
        """The ids of the process that wrote with `session`; None if they are not known."""
        if self._memory is None or not session or self._memory[:_ID_BYTES] != session:
            return None
        return {self._memory[at : at + _ID_BYTES] for at in range(_ID_BYTES, _PAGE, _ID_BYTES)}

    def start(self, session: bytes) -> None:
        if self._memory is not None:
            self._memory[:] = session.ljust(_PAGE, b"\0")

    def add(self, key: bytes) -> None:
        """Note an id of 16 bytes. The last 255 are kept."""
        if self._memory is not None:
            at = _ID_BYTES * (1 + self._count % (_PAGE // _ID_BYTES - 1))
            self._memory[at : at + _ID_BYTES] = key
            self._count += 1

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()

    def close(self) -> None:
        if self._memory is not None:
            self._memory.close()


def _refuse_exposed(path: Path) -> None:
    """Raise RecordError if other users may read or write a file or folder, or it is not ours."""
    if danger := why_untrusted(path, closed=True):
        raise danger.error(RecordError)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        strict = "700" if path.is_dir() else "600"
        raise RecordError(
            f"others may read {path} (mode {mode:04o}), expected {strict}",
            mend=f"chmod {strict} {shlex.quote(str(path))}",
            code="untrusted",
        )


@contextlib.contextmanager
def _locked(folder: Path, tries: int = 1) -> Iterator[None]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(folder / _LOCK, flags, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        for left in reversed(range(tries)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    other = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
                    raise RecordError(
                        f"another process ({other or 'unknown'}) has the exposure record {folder}",
                        mend="end that process, or name another folder: two records do not add up",
                        code="in_use",
                    ) from None
                time.sleep(_LOCK_PAUSE_S)
        yield
    finally:
        os.close(descriptor)


def _create(folder: Path) -> None:
    """Make an empty record. It gets its name when it is whole."""
    new = folder / _NEW
    new.unlink(missing_ok=True)
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    new.chmod(0o600)
    with _explained(folder / FILE), contextlib.closing(sqlite3.connect(new)) as connection:
        connection.executescript(
            f"PRAGMA journal_mode = MEMORY; PRAGMA application_id = {_APPLICATION};"
            f"PRAGMA user_version = {_SCHEMA}; {_TABLE};"
        )
        connection.execute("INSERT INTO rows VALUES (?, ?)", (_TOTAL, _as_bytes(0)))
        connection.commit()
    flush_to_disk(new)
    new.rename(folder / FILE)
    flush_to_disk(folder)


@contextlib.contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode=rw",
        uri=True,
        isolation_level=None,
        timeout=_BUSY_S,
        check_same_thread=False,
    )
    with contextlib.closing(connection):
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (schema,) = connection.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION:
            raise _damaged(path, "is not an exposure record")
        if schema != _SCHEMA:
            raise RecordError(
                f"{path} has schema {schema}, expected {_SCHEMA}: another version of edge-runtime "
                "wrote it",
                mend="use that version",
            )
        # TRUNCATE with FULL flushes the journal's end too, so a commit survives a power cut.
        for setting in ("journal_mode = TRUNCATE", "synchronous = FULL", "temp_store = MEMORY"):
            connection.execute(f"PRAGMA {setting}").fetchall()
        yield connection


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # SQLite may have rolled back already
            connection.execute("ROLLBACK")
        raise


def _all_rows(connection: sqlite3.Connection, path: Path) -> dict[bytes, bytes]:
    """Check and read the whole file."""
    if path.stat().st_size > _MOST_BYTES:
        raise _damaged(path, f"is larger than {_MOST_BYTES:,} bytes")
    connection.execute("BEGIN")
    try:
        schema = connection.execute("SELECT sql FROM sqlite_master").fetchall()
        checked = connection.execute("PRAGMA integrity_check(1)").fetchall()
        rows = dict(connection.execute("SELECT id, body FROM rows").fetchall())
    finally:
        connection.execute("COMMIT")
    total = rows.pop(_TOTAL, None)
    sound = (
        schema == [(_TABLE,)]
        and checked == [("ok",)]
        and all(type(part) is bytes for row in rows.items() for part in row)
        and total == _as_bytes(sum(_digest(*row) for row in rows.items()))
    )
    if not sound:
        raise _damaged(path, "is damaged")
    return rows


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into RecordErrors."""
    try:
        yield
    except sqlite3.OperationalError as error:
        full = "full" in str(error)
        raise RecordError(
            f"cannot write {path}: {error}",
            mend="make room on that disk" if full else "see that the disk works and is not full",
            code="disk_full" if full else None,
        ) from error
    except sqlite3.Error as error:
        raise _damaged(path, f"is damaged: {error}") from error


def _damaged(path: Path, found: str) -> RecordError:
    folder, away = (shlex.quote(str(path.parent) + end) for end in ("", ".damaged"))
    return RecordError(
        f"{path} {found}",
        mend=f"`mv {folder} {away}` starts an empty record; what nodes have seen until now then no "
        "longer counts",
        code="damaged",
    )


def _digest(key: bytes, body: bytes) -> int:
    message = len(key).to_bytes(4, "big") + key + body
    return int.from_bytes(hashlib.blake2b(message, digest_size=16).digest(), "big")


def _as_bytes(total: int) -> bytes:
    return (total % (1 << 128)).to_bytes(16, "big")
