"""Files and folders that appear whole or not at all, also when the disk is full or a signal comes.

What is being written lies beside its place under a hidden name and is renamed at the end.
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
from edge_common.signals import held, undone

_NO_ROOM = (None, errno.ENOSPC, errno.EDQUOT)
"""Numbers of a full disk. NumPy and Pillow keep the number of a short write to themselves."""
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def whole_file(
    path: str | os.PathLike[str],
    *,
    mode: int | None = None,
    replace: bool = True,
    error: type[EdgeRuntimeError] = OutputError,
    instead: str = "name another file",
) -> Iterator[Path]:
    """An empty scratch file to write to, which becomes ``path`` at the end of the block.

    Args:
        mode: of the file, exactly and from the first instant; None is as the umask says.
        replace: whether an existing file may be replaced. If not, it never is, not even one that
            appears during the block.
        error: what to raise if the disk refuses.
        instead: what the user can do then, besides mending the disk.
    """
    path = Path(path)
    if not replace:
        refuse_existing(path, error, instead)
    scratch = _beside(path)

    def clean() -> None:
        with contextlib.suppress(OSError):
            scratch.unlink()

    with undone(clean), writing(path, error, instead):
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


def write_whole(
    path: str | os.PathLike[str],
    data: bytes | str,
    *,
    mode: int | None = None,
    replace: bool = True,
    error: type[EdgeRuntimeError] = OutputError,
    instead: str = "name another file",
) -> None:
    """Write a file in one go; see :func:`whole_file`."""
    content = data.encode() if isinstance(data, str) else data
    with whole_file(path, mode=mode, replace=replace, error=error, instead=instead) as scratch:
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
    """A hidden folder beside ``folder``, to be moved there with :func:`move_folder`.

    Parent folders are made. At the end, what was not moved is gone, and so are those parents if
    nothing is in them.

    Args:
        mode: of the folder, less the umask.
        room: bytes that must be free on the disk, so that a full one is noticed before the work.
        error, instead: see :func:`whole_file`.
    """
    folder = Path(folder).absolute()
    scratch = _beside(folder)
    made = [parent for parent in folder.parents if not parent.exists()]

    def clean() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # does nothing if something is in it

    for parent in folder.parents:
        if os.path.lexists(parent) and not parent.is_dir():
            raise error(f"{parent} is a file, not a folder: {instead}")
    with undone(clean):
        with writing(folder, error, instead):
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch.mkdir(mode)
            free = shutil.disk_usage(scratch).free
        if free < room:
            raise error(
                f"{folder} needs about {max(room / 1e6, 0.1):,.1f} MB and {free / 1e6:,.1f} MB are "
                f"free: make room on that disk, or {instead}"
            )
        yield scratch


def move_folder(scratch: Path, folder: str | os.PathLike[str], *, replace: bool = False) -> None:
    """Put a finished folder in its place; whoever looks sees the old one or the new one.

    Raises:
        FileExistsError: there is something, other than an empty folder, and ``replace`` is off.
    """
    folder = Path(folder)
    old = _beside(folder)
    with undone(lambda: shutil.rmtree(old, ignore_errors=True)), held():
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
        except BaseException:
            old.rename(folder)
            raise


def refuse_existing(
    path: str | os.PathLike[str], error: type[EdgeRuntimeError], instead: str
) -> None:
    """Raise ``error`` if anything is at ``path``, which is never to be overwritten."""
    if os.path.lexists(path):
        raise error(f"{path} exists and is never overwritten: move it away, or {instead}")


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str],
    error: type[EdgeRuntimeError] = OutputError,
    instead: str = "name another place",
) -> Iterator[None]:
    """Turn a refusal of the disk into one line that names ``path`` and says what to do."""
    try:
        yield
    except OSError as refusal:
        raise error(cannot_write(path, refusal, instead)) from refusal


def cannot_write(path: str | os.PathLike[str], refusal: OSError, instead: str) -> str:
    """One line for a refusal of the disk."""
    reason = refusal.strerror or str(refusal) or "no space left on the disk"
    if refusal.errno in _NO_ROOM:
        remedy = "make room on that disk, or "
    elif refusal.errno in _NOT_ALLOWED:
        remedy = "allow it, or "
    else:
        remedy = ""
    return f"cannot write {path}: {reason}; {remedy}{instead}"


def _rename_to_new(scratch: Path, path: Path) -> None:
    """Raises FileExistsError if the name is taken."""
    try:
        os.link(scratch, path)  # unlike a rename, this fails if the name is taken
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        with held():  # a disk without links, such as a memory card: take the name first
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            scratch.replace(path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:80]}.{secrets.token_hex(8)}")
