"""A file counts as safe only if its owner and root alone could have changed it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from edge_common import permissions
from edge_common.permissions import Danger, why_untrusted

OTHER = 12_345


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (tmp_path / "a").chmod(0o755)
    folder.chmod(0o755)
    path = folder / "node.pub"
    path.write_text("x")
    path.chmod(0o644)
    return path


def _foreign(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `path` look like another user's."""
    if os.geteuid() == 0:
        os.chown(path, OTHER, -1, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: OTHER)


def mend(danger: Danger | None) -> str:
    assert danger is not None
    return danger.mend


def test_what_only_its_owner_can_write_is_safe(file: Path) -> None:
    assert why_untrusted(file) is None
    assert why_untrusted(file.parent, closed=True) is None


@pytest.mark.process
@pytest.mark.parametrize("mode", [0o602, 0o646, 0o666])
def test_a_file_writable_by_others_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    found = why_untrusted(file)
    assert found
    assert found.mend == f"chmod go-w {file}"
    subprocess.run(found.mend, shell=True, check=True)
    assert why_untrusted(file) is None


@pytest.mark.parametrize("mode", [0o757, 0o777])
def test_a_parent_folder_writable_by_others_is_refused(file: Path, mode: int) -> None:
    file.parent.parent.chmod(mode)
    found = why_untrusted(file)
    assert found
    assert f"`chmod go-w {file.parent.parent}`" in found.mend
    assert f"or move {file}" in found.mend


@pytest.mark.process
def test_commands_quote_odd_paths(tmp_path: Path) -> None:
    file = tmp_path / "a b$c.pub"
    file.write_text("x")
    file.chmod(0o666)
    found = why_untrusted(file)
    assert found
    subprocess.run(found.mend, shell=True, check=True)
    assert why_untrusted(file) is None


def test_a_sticky_folder_is_safe_as_a_parent_but_not_to_list(file: Path) -> None:
    """Others may add files to it but cannot replace ours."""
    file.parent.chmod(0o1777)
    assert why_untrusted(file) is None
    assert "chmod go-w" in mend(why_untrusted(file.parent, closed=True))


def test_a_file_or_folder_of_another_user_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (file, file.parent):
        with monkeypatch.context() as patch:
            _foreign(path, patch)
            uid = path.stat().st_uid
            found = why_untrusted(file)
            assert found
            assert f"(uid {uid})" in found.found
            assert "chown" in found.mend
            if os.geteuid() == 0:
                assert why_untrusted(file, owner=OTHER) is None
                os.chown(path, 0, -1)
    assert why_untrusted(file) is None


def test_another_users_file_in_a_sticky_folder_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.parent.chmod(0o1777)
    _foreign(file, monkeypatch)
    assert "belongs to" in str(why_untrusted(file))


def test_links_are_judged_together_with_their_targets(file: Path, tmp_path: Path) -> None:
    link, folder = tmp_path / "link.pub", tmp_path / "folder"
    link.symlink_to(os.path.relpath(file, tmp_path))
    folder.symlink_to(file.parent)
    loose = tmp_path / "loose"
    loose.mkdir()
    (loose / "link.pub").symlink_to(file)
    loose.chmod(0o777)
    assert why_untrusted(link) is None
    assert why_untrusted(folder / "node.pub") is None
    assert why_untrusted(folder, closed=True) is None
    assert f"go-w {loose}`" in mend(
        why_untrusted(loose / "link.pub")
    )  # the link itself is replaceable
    file.parent.chmod(0o777)
    for path in (link, folder / "node.pub"):
        assert f"go-w {file.parent}" in mend(why_untrusted(path))
    file.parent.chmod(0o755)
    file.chmod(0o666)
    assert f"go-w {file}" in mend(why_untrusted(link))
    assert "go-w" in mend(why_untrusted(folder / ".." / "b" / "node.pub"))


def test_another_users_link_is_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sticky folder its owner can change the target."""
    link = tmp_path / "link.pub"
    link.symlink_to(file)
    _foreign(link, monkeypatch)
    assert "belongs to" in str(why_untrusted(link))


def test_link_loops_and_missing_files_are_reported(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="loop"):
        why_untrusted(tmp_path / "loop" / "x")
    with pytest.raises(FileNotFoundError):
        why_untrusted(tmp_path / "missing")


@pytest.mark.parametrize("alone", [True, False])
def test_the_owner_s_private_group_counts_as_the_owner(
    file: Path, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """Ubuntu and Fedora give every user a private group and let that group write new files."""
    monkeypatch.setattr(permissions, "_is_private_group", lambda uid, gid: alone)
    for path, mode in ((file, 0o664), (file.parent, 0o775)):
        path.chmod(mode)
        assert (why_untrusted(file) is None) is alone
        path.chmod(0o755)
    file.parent.chmod(0o2775)
    assert (why_untrusted(file.parent, closed=True) is None) is alone
    file.chmod(0o666)
    assert why_untrusted(file)


def test_a_group_is_private_only_without_other_members(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import grp
    import pwd

    def user(name: str, uid: int, gid: int) -> pwd.struct_passwd:
        return pwd.struct_passwd((name, "x", uid, gid, "", "/", "/bin/sh"))

    users = [user("me", 1000, 1000), user("you", 1001, 100), user("it", 1002, 100)]
    members = {1000: [], 1003: ["me"], 1004: ["me", "you"], 1005: ["you"], 1006: []}
    monkeypatch.setattr(pwd, "getpwall", lambda: users)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {u.pw_uid: u for u in users}[uid])
    groups = {g: grp.struct_group((f"g{g}", "x", g, m)) for g, m in members.items()}
    groups[100] = grp.struct_group(("users", "x", 100, []))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: groups[gid])
    permissions._is_private_group.cache_clear()
    try:
        found = {
            gid: permissions._is_private_group(1000, gid)
            for gid in (1000, 1003, 1004, 1005, 1006, 7)
        }
        shared = permissions._is_private_group(1001, 100)
    finally:
        permissions._is_private_group.cache_clear()
    assert found == {1000: True, 1003: True, 1004: False, 1005: False, 1006: False, 7: False}
    assert not shared


def test_an_access_control_list_counts_as_a_permission_of_the_group(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list hides behind the group's bits, so the group's members do not matter."""
    monkeypatch.setattr(permissions, "_is_private_group", lambda uid, gid: True)
    _write_acl(file)
    assert "go-w" in mend(why_untrusted(file))


def _write_acl(path: Path) -> None:
    """Give rw to the owner, to uid 12345 and to the mask, and r to the rest."""
    import struct

    entries = [(1, 6, -1), (2, 6, 12_345), (4, 4, -1), (16, 6, -1), (32, 4, -1)]
    data = struct.pack("<I", 2)
    for tag, rights, who in entries:
        data += struct.pack("<HHI", tag, rights, who & 0xFFFFFFFF)
    try:
        os.setxattr(path, "system.posix_acl_access", data)
    except OSError:
        pytest.skip("this file system has no access control lists")


def test_folders_of_users_outside_a_container_are_accepted_as_parents(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They belong to the host, and the container can't see which of its users owns them."""
    if os.geteuid():
        pytest.skip("only root can change the owner of a file")
    os.chown(file.parent, 65_534, -1)
    assert why_untrusted(file)
    monkeypatch.setattr(permissions, "_unmapped", lambda: 65_534)
    assert why_untrusted(file) is None
    os.chown(file, 65_534, -1)  # the file itself must be ours
    assert why_untrusted(file)
