"""Checks that no other user could have changed a file that must be trusted: keys, settings,
engines.

The rule is the one of OpenSSH's StrictModes: the file, and every link and folder on the path to it,
belongs to us or to root, and no other user may write to it.
"""

from __future__ import annotations

import functools
import grp
import os
import pwd
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edge_common.errors import EdgeRuntimeError

_LINKS = 40  # as many as Linux follows


class Danger(NamedTuple):
    """Why something must not be trusted, and what repairs that: usually a command."""

    found: str
    mend: str

    def error(self, kind: type[EdgeRuntimeError]) -> EdgeRuntimeError:
        """An error of that class."""
        return kind(self.found, mend=self.mend, code="untrusted")


def why_untrusted(
    path: Path | str, *, owner: int | None = None, closed: bool = False
) -> Danger | None:
    """Say why `path` must not be trusted; None if it is safe.

    A folder with the sticky bit, such as /tmp, may be on the path: everybody can write to it, but
    only the owner of a file in it can replace that file. Group write permission is accepted where
    the owner is the only member of the group, as on systems that give every user a group. Read-only
    mounts follow the same rules, because users of the host may still be able to write there.

    Args:
        owner: uid of another user who may own the file, besides us and root.
        closed: `path` is a folder in which others may not even add files, sticky or not.

    Raises:
        OSError: the file does not exist, or cannot be reached.
    """
    path = Path(path)
    *steps, last = _steps(path)
    for step in steps:
        danger = why_entry_untrusted(step, os.lstat(step), owner, _unmapped(), sticky=True)
        if danger:
            move = f"`{danger.mend}`, or move {path} to a folder that only you can write to"
            return Danger(danger.found, move)
    return why_entry_untrusted(last, os.lstat(last), owner, sticky=not closed)


def why_entry_untrusted(
    path: Path, status: os.stat_result, *owners: int | None, sticky: bool = False
) -> Danger | None:
    """`why_untrusted` for one file or folder alone, without the path to it.

    Args:
        owners: uids of users who may own it, besides us and root.
        sticky: accept a folder with the sticky bit: others may add files but not replace ours.
    """
    quoted = shlex.quote(str(path))
    if status.st_uid not in (0, os.geteuid(), *owners):
        try:
            name = pwd.getpwuid(status.st_uid).pw_name
        except KeyError:
            name = "a user without a name"
        return Danger(
            f"{path} belongs to {name} (uid {status.st_uid}), who could replace what it holds",
            f"sudo chown {os.geteuid()} {quoted}",
        )
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISLNK(status.st_mode) or not mode & 0o022:
        return None
    if stat.S_ISDIR(status.st_mode) and mode & stat.S_ISVTX and sticky:
        return None
    if not mode & 0o002 and _is_private_group(status.st_uid, status.st_gid) and not _has_acl(path):
        return None
    return Danger(
        f"others may write to {path} (mode {mode:04o}) and could replace what it holds",
        f"chmod go-w {quoted}",
    )


def _steps(path: Path) -> Iterator[Path]:
    """Yield every folder and link on the path to `path`, and last the file itself."""
    at = Path("/")
    ahead = [*reversed(path.absolute().parts[1:])]
    links = 0
    yield at
    while ahead:
        part = ahead.pop()
        if part == "..":
            at = at.parent
            continue
        here = at / part
        yield here
        if here.is_symlink() and (links := links + 1) <= _LINKS:
            target = Path(os.readlink(here))
            at = Path("/") if target.is_absolute() else at
            ahead += [part for part in reversed(target.parts) if part != "/"]
        else:
            at = here


@functools.cache
def _unmapped() -> int | None:
    """The uid that stands for all users unknown in this user namespace; None if there are none.

    Folders of the host's root have this uid in a container without root's rights over the host.
    """
    try:
        if Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]:
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return None


@functools.cache
def _is_private_group(uid: int, gid: int) -> bool:
    """True if this user is the only member of the group. Cached, because the lookup may be slow."""
    try:
        name, members = pwd.getpwuid(uid).pw_name, set(grp.getgrgid(gid).gr_mem)
    except KeyError:
        return False
    members |= {user.pw_name for user in pwd.getpwall() if user.pw_gid == gid}
    return members == {name}


def _has_acl(path: Path) -> bool:
    """True if an access control list gives rights that the mode does not show."""
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except (OSError, AttributeError):  # macOS has no such function
        return False
