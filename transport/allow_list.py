"""The allow-list: every ``NAME.pub`` in a folder admits the holder of its key as NAME."""

from __future__ import annotations

import errno
import logging
import operator
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path

from edge_common.errors import KeyFileError
from edge_common.permissions import why_entry_untrusted, why_untrusted
from transport.keys import AUTHORIZED, read_public

log = logging.getLogger(__name__)

_COARSE_NS = 2_000_000_000  # the clocks of file systems are finer
_Stamp = tuple[int, ...]
_Entry = tuple["_Stamp | None", "str | KeyFileError"]
"""A key file: its stamp, None if it must be read again, and its key or why it does not count."""
_stamp_of: Callable[[os.stat_result], _Stamp] = operator.attrgetter(
    "st_ctime_ns", "st_mtime_ns", "st_size", "st_ino", "st_dev", "st_mode", "st_uid", "st_gid"
)
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class AllowList:
    """The public keys in a folder, as of the last `reload`."""

    def __init__(self, folder: Path | str, *, owner: int | None = None) -> None:
        """Read the folder.

        Args:
            owner: uid of another user whose files count, besides ours and root's.

        Raises:
            KeyFileError: it is missing, or others could change it and so let themselves in.
        """
        self.folder = Path(folder)
        self._owner = owner
        self._names: dict[str, str] = {}
        self._files: dict[str, _Entry] = {}
        self.reload()

    def reload(self) -> dict[str, str]:
        """Names by Z85 public key. Only files that may have changed are read again.

        A malformed file, or one that others may write to, admits no edge. A process short of
        descriptors or memory keeps the names it read last: otherwise an attacker who exhausts
        descriptors locks everyone out.

        Raises:
            KeyFileError: as when made. Then the list is empty.
        """
        try:
            files = self._scan()
        except OSError as error:
            if error.errno in _SHORTAGES and self._names:
                return self._names
            self._names, self._files = {}, {}
            raise KeyFileError(
                f"cannot read the folder of authorised keys {self.folder}: {error.strerror}",
                mend="`edge-runtime keys node` makes one",
            ) from None
        except KeyFileError:
            self._names, self._files = {}, {}
            raise
        names: dict[str, str] = {}
        for name, (_, key) in files.items():
            if isinstance(key, str):
                names.setdefault(key, name.removesuffix(".pub"))
        self._names, self._files = names, files
        return names

    def name_of(self, public: str) -> str | None:
        """The name that a Z85 public key is enrolled under, None if it is not."""
        return self._names.get(public)

    def command(self, file: str) -> str:
        """The command that puts a .pub file into the folder."""
        if self.folder.name == AUTHORIZED:
            return (
                f"edge-runtime keys authorize --dir {shlex.quote(str(self.folder.parent))} {file}"
            )
        return f"cp {file} {shlex.quote(str(self.folder))}"

    def __len__(self) -> int:
        return len(self._names)

    def _scan(self) -> dict[str, _Entry]:
        """The entries of all key files, in the order of their names.

        Raises:
            KeyFileError: others may change the folder.
            OSError: it can't be read.
        """
        if danger := why_untrusted(self.folder, owner=self._owner, closed=True):
            raise danger.error(KeyFileError)
        with os.scandir(self.folder) as entries:
            stamps = {
                entry.name: _stamp(entry)
                for entry in entries
                if entry.name.endswith(".pub") and not entry.name.startswith(".")
            }
        return {name: self._read(name, stamps[name]) for name in sorted(stamps)}

    def _read(self, name: str, stamp: _Stamp | None) -> _Entry:
        """The entry of a file, read again unless it looks the same and a change would show.

        Raises:
            OSError: a shortage.
        """
        before = self._files.get(name)
        if before and stamp and before[0] == stamp:
            return before
        path = self.folder / name
        try:
            key: str | KeyFileError = _key(path, self._owner)
        except KeyFileError as error:
            key = error
            if not before or str(key) != str(before[1]):
                log.warning("ignored authorised key: %s", key)
        # A change within the same tick of the file system's clock does not show, and neither does
        # one of a folder that a link leads to.
        settled = stamp and abs(time.time_ns() - stamp[0]) >= _COARSE_NS and not path.is_symlink()
        return (stamp if settled else None), key


def _key(path: Path, owner: int | None) -> str:
    """The key in a file.

    Raises:
        KeyFileError: why it does not count.
        OSError: a shortage.
    """
    try:
        path.name.encode()
        public = read_public(path)
        # The folder has been judged; what a link leads to has not.
        linked = path.is_symlink()
        danger = (
            why_untrusted(path, owner=owner)
            if linked
            else why_entry_untrusted(path, os.lstat(path), owner)
        )
    except UnicodeEncodeError:  # libzmq takes UTF-8 names only
        raise KeyFileError(
            f"the file name {path.name!r} is not UTF-8", mend="rename the file"
        ) from None
    except (KeyFileError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in _SHORTAGES:
            raise cause from None
        raise (error if isinstance(error, KeyFileError) else KeyFileError(str(error))) from None
    if danger:
        raise danger.error(KeyFileError)
    return public


def _stamp(entry: os.DirEntry[str]) -> _Stamp | None:
    """The parts of a key file's status that change with the file. None for a dangling link.

    A program that replaces a file's content can keep its size and modification time, but not its
    change time.
    """
    try:
        return _stamp_of(entry.stat())
    except OSError:
        return None
