"""The folder of authorised keys: which files count, and how changes are noticed."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_common import permissions
from edge_common.errors import KeyFileError
from transport import allow_list
from transport.allow_list import AllowList
from transport.keys import KeyPair, make_directory, write_public

NewPair = Callable[[str], KeyPair]


def test_keys_authorize_writes_to_the_allow_list_s_folder(authorized: Path, tmp_path: Path) -> None:
    told = AllowList(authorized).command("k.pub")
    assert told == f"edge-runtime keys authorize --dir {tmp_path} k.pub"
    elsewhere = authorized.rename(tmp_path / "edges")
    assert AllowList(elsewhere).command("k.pub") == f"cp k.pub {elsewhere}"


def test_the_folder_must_exist_and_be_closed_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        permissions, "_is_private_group", lambda uid, gid: False
    )  # its group has other members
    with pytest.raises(KeyFileError, match="edge-runtime keys node"):
        AllowList(tmp_path / "nowhere")
    for mode in (0o770, 0o702, 0o777, 0o1777):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        with pytest.raises(KeyFileError, match=f"chmod go-w {folder}"):
            AllowList(folder)


def test_a_parent_folder_writable_by_others_is_refused(tmp_path: Path, new_pair: NewPair) -> None:
    """Anybody who may write to the parent folder can replace the folder itself."""
    above = tmp_path / "above"
    folder = make_directory(above / "authorized")
    write_public(folder / "edge.pub", new_pair("edge").public, "edge")
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert len(AllowList(folder)) == len(AllowList(link)) == 1
    allowed = AllowList(folder)
    above.chmod(0o777)
    for path in (folder, link):
        with pytest.raises(KeyFileError, match=f"chmod go-w {above}"):
            AllowList(path)
    with pytest.raises(KeyFileError, match="go-w"):
        allowed.reload()
    above.chmod(0o700)
    assert len(allowed.reload()) == 1


def test_a_key_file_writable_by_others_excludes_only_its_holder(
    authorized: Path,
    authorise: Any,
    new_pair: NewPair,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept, loose, linked = map(new_pair, ("kept", "loose", "linked"))
    authorise(kept)
    authorise(loose)
    target = make_directory(tmp_path / "elsewhere") / "linked"
    write_public(target, linked.public, "linked")
    (authorized / "linked.pub").symlink_to(target)
    later = time.time_ns() + 3_000_000_000  # no file is read again for being recent
    monkeypatch.setattr(time, "time_ns", lambda: later)
    allowed = AllowList(authorized)
    assert sorted(allowed.reload().values()) == ["kept", "linked", "loose"]
    (authorized / "loose.pub").chmod(0o646)
    with caplog.at_level(logging.WARNING):
        assert sorted(allowed.reload().values()) == ["kept", "linked"]
    assert f"chmod go-w {authorized / 'loose.pub'}" in caplog.text
    target.parent.chmod(0o777)  # nothing about the link or its target has changed
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert sorted(allowed.reload().values()) == ["kept"]
    assert caplog.text.count(f"chmod go-w {target.parent}") == 1  # logged once
    target.parent.chmod(0o700)
    (authorized / "loose.pub").chmod(0o644)
    assert len(allowed.reload()) == 3


def test_another_user_s_key_file_admits_no_edge(
    authorized: Path, authorise: Any, new_pair: NewPair
) -> None:
    if os.geteuid():
        pytest.skip("only root can change the owner of a file")
    pair = new_pair("edge")
    authorise(pair)
    os.chown(authorized / "edge.pub", 12_345, -1)
    assert AllowList(authorized).name_of(pair.public) is None
    assert AllowList(authorized, owner=12_345).name_of(pair.public) == "edge"
    os.chown(authorized, 12_345, -1)
    with pytest.raises(KeyFileError, match="belongs to"):
        AllowList(authorized)


def _replace_in_place(file: Path, public: str) -> None:
    """Write another key into a file and keep its size and time."""
    before = file.stat()
    file.write_text(file.read_text().splitlines()[0] + f"\npublic-key {public}\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )


def test_a_key_replaced_in_place_with_equal_size_and_time_is_noticed(
    authorized: Path, authorise: Any, new_pair: NewPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = new_pair("edge"), new_pair("edge")
    authorise(old)
    later = time.time_ns() + 3_000_000_000  # the file is not read again for being recent
    monkeypatch.setattr(time, "time_ns", lambda: later)
    file = authorized / "edge.pub"
    allowed = AllowList(authorized)
    before = file.stat().st_ctime_ns
    while file.stat().st_ctime_ns == before:  # the file system's clock may tick slowly
        _replace_in_place(file, new.public)
    assert allowed.reload() == {new.public: "edge"}
    assert allowed.name_of(old.public) is None


def test_a_key_replaced_within_one_tick_of_the_file_system_s_clock_is_noticed(
    authorized: Path, authorise: Any, new_pair: NewPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the content of the file has changed."""
    stamp = allow_list._stamp
    second = 1_000_000_000
    monkeypatch.setattr(
        allow_list,
        "_stamp",
        lambda entry: tuple(n - n % second if n > second else n for n in stamp(entry)),
    )
    old, new = new_pair("edge"), new_pair("edge")
    file = authorized / "edge.pub"
    for _ in range(20):
        authorise(old)
        allowed = AllowList(authorized)
        before = allow_list._stamp(file)
        _replace_in_place(file, new.public)
        if allow_list._stamp(file) == before:  # both within one second
            break
        file.unlink()
    else:
        pytest.fail("this machine is too slow to write two files in a second")
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 3 * second)
    assert allowed.reload() == {new.public: "edge"}


def test_only_files_that_changed_are_read_again(
    authorized: Path, authorise: Any, new_pair: NewPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [new_pair(f"edge{i}") for i in range(20)]
    for pair in pairs:
        authorise(pair)
    later = time.time_ns() + 3_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    allowed = AllowList(authorized)
    read: list[Path] = []
    real = allow_list.read_public
    monkeypatch.setattr(allow_list, "read_public", lambda path: read.append(path) or real(path))
    for _ in range(3):
        assert len(allowed.reload()) == 20
    assert not read
    (authorized / "edge3.pub").unlink()
    authorise(new_pair("another"))
    os.utime(authorized / "edge5.pub")
    assert len(allowed.reload()) == 20
    assert sorted(path.name for path in read) == ["another.pub", "edge5.pub"]


def test_only_pub_files_count(authorized: Path, authorise: Any, new_pair: NewPair) -> None:
    kept, other = new_pair("kept"), new_pair("other")
    authorise(kept)
    for name in ("other.txt", ".other.pub", "other.pub~"):
        (authorized / name).write_text(f"public-key {other.public}\n")
    allowed = AllowList(authorized)
    assert len(allowed) == 1
    assert allowed.name_of(kept.public) == "kept"
    assert allowed.name_of(other.public) is None


def test_a_key_in_two_files_has_the_first_name(
    authorized: Path, authorise: Any, new_pair: NewPair
) -> None:
    """Another file after it renames nobody: whoever is connected under the name stays."""
    pair = new_pair("edge")
    authorise(pair)
    allowed = AllowList(authorized)
    write_public(authorized / "later.pub", pair.public, "later")
    assert allowed.reload() == {pair.public: "edge"}
    assert allowed.name_of(pair.public) == "edge"


def test_a_dangling_link_is_skipped_until_its_target_exists(
    authorized: Path,
    authorise: Any,
    new_pair: NewPair,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept, linked = new_pair("kept"), new_pair("linked")
    authorise(kept)
    (authorized / "linked.pub").symlink_to(tmp_path / "later")
    (authorized / "loop.pub").symlink_to(authorized / "loop.pub")
    with caplog.at_level(logging.WARNING):
        allowed = AllowList(authorized)
    for name in ("linked.pub", "loop.pub"):
        assert name in caplog.text
    assert allowed.name_of(kept.public) == "kept"
    assert allowed.name_of(linked.public) is None
    write_public(tmp_path / "later", linked.public, "linked")
    allowed.reload()
    assert allowed.name_of(linked.public) == "linked"
    assert allowed.name_of(kept.public) == "kept"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_shortage_of_descriptors_or_memory_excludes_no_edge(
    authorized: Path,
    authorise: Any,
    new_pair: NewPair,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    pair, other = new_pair("edge"), new_pair("other")
    authorise(pair)
    allowed = AllowList(authorized)

    def fail(path: object) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        authorise(other)
        assert allowed.reload() == {pair.public: "edge"}
        with pytest.raises(KeyFileError):
            AllowList(authorized)  # nothing was read before, so there is no list to keep
    assert allowed.reload()[other.public] == "other"
