"""Files and folders that appear whole or not at all, also when the disk is full or a signal comes.

Work in progress lies beside its final place under a hidden name and is renamed at the end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from edge_common.errors import EdgeRuntimeError, OutputError
from edge_common.signals import cleanup_on_exit, defer_signals

# None: NumPy and Pillow drop the number of the error after a short write.
_DISK_FULL = (None, errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def atomic_file(
    path: str | os.PathLike[str],
    *,
    mode: int | None = None,
    replace: bool = True,
    error: type[EdgeRuntimeError] = OutputError,
    instead: str = "name another file",
) -> Iterator[Path]:
    """Yield an empty scratch file to write to; it becomes ``path`` at the end of the block.

    Args:
        mode: permissions of the file from its first instant; None leaves them to the umask.
        replace: whether an existing file may be replaced. If not, a file that appears during the
            block is not replaced either.
        error: class of the error to raise when the disk refuses.
        instead: what the user can do other than repair the disk; ends the error's `mend`.
    """
    path = Path(path)
    if not replace:
        refuse_existing(path, error, instead)
    scratch = _hidden_name(path)

    def remove() -> None:
        with contextlib.suppress(OSError):
            scratch.unlink()

    with cleanup_on_exit(remove), explain_write_errors(path, error, instead):
        first = 0o666 if mode is None else mode
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, first)
        try:
            if mode is not None:
                os.fchmod(descriptor, mode)  # a strict umask must not make it unreadable to us
            yield scratch
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if replace:
            scratch.replace(path)
        else:
            try:
                _rename_to_new(scratch, path)
            except FileExistsError:
                refuse_existing(path, error, instead)
                raise


def write_atomically(
    path: str | os.PathLike[str],
    data: bytes | str,
    *,
    mode: int | None = None,
    replace: bool = True,
    error: type[EdgeRuntimeError] = OutputError,
    instead: str = "name another file",
) -> None:
    """Write a whole file at once; for the arguments see :func:`atomic_file`."""
    content = data.encode() if isinstance(data, str) else data
    with atomic_file(path, mode=mode, replace=replace, error=error, instead=instead) as scratch:
        scratch.write_bytes(content)


@contextlib.contextmanager
def scratch_folder(
    folder: str | os.PathLike[str],
    *,
    room: int = 0,
    mode: int = 0o777,
    error: type[EdgeRuntimeError] = OutputError,
    instead: str = "name another folder with --out",
) -> Iterator[Path]:
    """Yield a hidden folder beside ``folder``, to be moved there with :func:`move_folder`.

    Missing parent folders are made. The end of the block removes the hidden folder, unless it was
    moved, and the parents it made, unless something is in them.

    Args:
        mode: permissions of the folder, less the umask.
        room: bytes that must be free on the disk, so that a full disk is found before the work.
        error, instead: see :func:`atomic_file`.
    """
    folder = Path(folder).absolute()
    scratch = _hidden_name(folder)
    made = [parent for parent in folder.parents if not parent.exists()]

    def remove() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # does nothing if something is in it

    for parent in folder.parents:
        if os.path.lexists(parent) and not parent.is_dir():
            raise error(f"{parent} is a file, not a folder", mend=instead)
    with cleanup_on_exit(remove):
        with explain_write_errors(folder, error, instead):
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch.mkdir(mode)
            free = shutil.disk_usage(scratch).free
        if free < room:
            raise error(
                f"{folder} needs about {max(room / 1e6, 0.1):,.1f} MB and {free / 1e6:,.1f} MB are "
                "free",
                mend=f"make room on that disk, or {instead}",
                code="disk_full",
            )
        yield scratch


def move_folder(scratch: Path, folder: str | os.PathLike[str], *, replace: bool = False) -> None:
    """Put a finished folder in its place. If that fails, the old folder is back in its place.

    Raises:
        FileExistsError: something other than an empty folder is there, and ``replace`` is off.
    """
    folder = Path(folder)
    old = _hidden_name(folder)
    replaced = False

    def remove_old() -> None:
        if replaced:
            shutil.rmtree(old, ignore_errors=True)

    with cleanup_on_exit(remove_old), defer_signals():
        try:
            scratch.rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if not replace:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), folder) from error
        folder.rename(old)
        try:
            scratch.rename(folder)
        except OSError as error:
            try:
                old.rename(folder)
            except OSError:  # something else has taken the name meanwhile
                text = f"{error.strerror}, and what was there is now {old}"
                raise OSError(error.errno, text) from error
            raise
        replaced = True


def refuse_existing(
    path: str | os.PathLike[str], error: type[EdgeRuntimeError], instead: str
) -> None:
    """Raise ``error`` if anything is at ``path``."""
    if os.path.lexists(path):
        mend = f"move it away, or {instead}"
        raise error(f"{path} exists and is never overwritten", mend=mend, code="exists")


@contextlib.contextmanager
def explain_write_errors(
    path: str | os.PathLike[str],
    error: type[EdgeRuntimeError] = OutputError,
    instead: str = "name another place",
) -> Iterator[None]:
    """Turn an OSError in the block into an ``error`` that names ``path`` and says what to do."""
    try:
        yield
    except OSError as refusal:
        reason = refusal.strerror or str(refusal) or "no space left on the disk"
        full = refusal.errno in _DISK_FULL
        denied = refusal.errno in _NOT_ALLOWED
        first = "make room on that disk, or " if full else "allow it, or " if denied else ""
        raise error(
            f"cannot write {path}: {reason}",
            mend=first + instead,
            code="disk_full" if full else None,
        ) from refusal


def flush_to_disk(path: str | os.PathLike[str]) -> None:
    """Flush a file's content, or a folder's list of names, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_to_new(scratch: Path, path: Path) -> None:
    """Raises FileExistsError if the name is taken."""
    try:
        os.link(scratch, path)  # unlike a rename, this fails if the name is taken
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        with defer_signals():  # a disk without links, such as a memory card: take the name first
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            scratch.replace(path)


def _hidden_name(path: Path) -> Path:
    return path.with_name(f".{path.name[:80]}.{secrets.token_hex(8)}")
