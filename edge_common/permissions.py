"""Whether another user could change a file that must be trusted: keys, settings, engines.

The rule is that of OpenSSH's StrictModes: the file, every link and every folder on the way to it
belong to us or to root, and nobody else may write to them.
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

_LINKS = 40  # as many as Linux follows


def danger(path: Path | str, *, owner: int | None = None, closed: bool = False) -> str | None:
    """Why `path` must not be trusted and the command that mends it; None if it may be.

    A folder with the sticky bit, such as /tmp, may be on the way although everybody can write to
    it: only the owner of what lies in it can replace that. Group write permission is accepted
    where the group holds its owner alone, as on systems that give every user a group. Read-only
    mounts are judged like others, because users of the host may still write there.

    Args:
        owner: uid of another user who may own it, besides us and root.
        closed: `path` is a folder in which others may not even add files, sticky or not.

    Raises:
        OSError: there is no such file, or no way to it.
    """
    path = Path(path)
    *way, last = _way(path)
    for step in way:
        found = judge(step, os.lstat(step), owner, _unmapped(), sticky=True)
        if found:
            return f"{found}, or move {path} to a folder that only you can write to"
    return judge(last, os.lstat(last), owner, sticky=not closed)


def judge(
    path: Path, status: os.stat_result, *owners: int | None, sticky: bool = False
) -> str | None:
    """`danger` of one file or folder by itself, without the way to it.

    Args:
        owners: uids of users who may own it, besides us and root.
        sticky: a folder in which everybody may add files, but replace none of others, is safe.
    """
    quoted = shlex.quote(str(path))
    if status.st_uid not in (0, os.geteuid(), *owners):
        try:
            name = pwd.getpwuid(status.st_uid).pw_name
        except KeyError:
            name = "a user without a name"
        return (
            f"{path} belongs to {name} (uid {status.st_uid}), who could replace what it holds: run "
            f"`sudo chown {os.geteuid()} {quoted}`"
        )
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISLNK(status.st_mode) or not mode & 0o022:
        return None
    if stat.S_ISDIR(status.st_mode) and mode & stat.S_ISVTX and sticky:
        return None
    if not mode & 0o002 and _alone(status.st_uid, status.st_gid) and not _has_acl(path):
        return None
    return (
        f"others may write to {path} (mode {mode:04o}) and could replace what it holds: run "
        f"`chmod go-w {quoted}`"
    )


def _way(path: Path) -> Iterator[Path]:
    """Every folder and link that is passed on the way to `path`, and last the file itself."""
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
    """The uid that stands for all users who don't exist in this user namespace, if there are any.

    In a container without root's rights over the host, folders of the host's root show it.
    """
    try:
        if Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]:
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return None


@functools.cache
def _alone(uid: int, gid: int) -> bool:
    """Whether the group has this user as its only member. Looked up once, for it may be slow."""
    try:
        name, members = pwd.getpwuid(uid).pw_name, set(grp.getgrgid(gid).gr_mem)
    except KeyError:
        return False
    members |= {user.pw_name for user in pwd.getpwall() if user.pw_gid == gid}
    return members == {name}


def _has_acl(path: Path) -> bool:
    """Whether permissions of single users are hidden behind those of the group."""
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except (OSError, AttributeError):  # macOS has no such function
        return False
