"""The record of scenes and photos: nothing that was sent is forgotten, and nothing waits for it."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_common.errors import RecordError
from edge_runtime.exposure import record_file, store
from edge_runtime.exposure.record_file import FILE, Marks
from edge_runtime.exposure.store import (
    ExposureStore,
    PhotoRecord,
    Scene,
    photo_key,
    read_contents,
    settle,
)

SIZE, WINDOW = (576, 1024), 224


@pytest.fixture(autouse=True)
def _shared_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_file, "_SHARED_MEMORY", tmp_path_factory.mktemp("memory"))
        yield


def crashed(record: ExposureStore, folder: Path, *, restarted: bool = False) -> Path:
    """A copy of what a process leaves that is killed now; `restarted`: with the machine."""
    original = record._folder
    with record._lock:
        assert record._lock.wait_for(lambda: not record._busy, 10)
        shutil.copytree(original, folder)
        shutil.copy(Marks(original)._path, Marks(folder)._path)
    if restarted:
        Marks(folder)._path.unlink()
    return folder


@contextlib.contextmanager
def stuck(record: ExposureStore) -> Iterator[None]:
    """Nobody can write to the record: a reader does not let go of the file."""
    with contextlib.closing(sqlite3.connect(record._folder / FILE)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM rows").fetchall()
        yield


def photo(record: ExposureStore, number: int) -> PhotoRecord:
    return record.photo(number.to_bytes(32, "big"), SIZE, WINDOW)


def wait_until(happened: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def test_a_scene_is_on_record_before_it_begins(tmp_path: Path) -> None:
    with ExposureStore(tmp_path / "a", 0.4, clock=lambda: 1234.5) as record:
        assert record.resume("cam") is None
        assert record.flush()
        with stuck(record):
            first = record.begin_scene("cam")
            assert first.reserved()
            # The scene after that cannot have been prepared, so nothing of it is sent.
            assert not record.begin_scene("cam").reserved()
            left = crashed(record, tmp_path / "b")
    with ExposureStore(left) as record:
        again = record.resume("cam")
        assert again is not None
        assert (again.id, again.blanket, again.snapshot) == (first.id, True, None)
        assert again.max_exposure == 0.4


def test_an_exact_snapshot_replaces_the_blanket(tmp_path: Path) -> None:
    with ExposureStore(tmp_path / "a", clock=lambda: 1234.5) as record:
        scene = record.begin_scene("cam")
        version = scene.reserve(b"one")
        assert record.flush()
        assert scene.reserved(version)
        left = crashed(record, tmp_path / "b")
        later = scene.reserve(b"two")
        assert record.flush()
        assert scene.reserved(later)
    with ExposureStore(left) as record:  # killed while the next scene was prepared, not begun
        again = record.resume("cam")
        assert again is not None
        assert (again.id, again.blanket, again.snapshot) == (scene.id, False, b"one")
        assert again.begun == 1234.5
        assert again.reserved()
        assert not again.reserved(again.reserve(b"more"))  # no blanket covers it any more
    with ExposureStore(tmp_path / "a") as record:
        again = record.resume("cam")
        assert again is not None
        assert (again.id, again.blanket, again.snapshot) == (scene.id, False, b"two")


def test_after_a_restart_of_the_machine_the_next_scene_may_have_begun(tmp_path: Path) -> None:
    with ExposureStore(tmp_path / "a") as record:
        scene = record.begin_scene("cam")
        scene.reserve(b"one")
        assert record.flush()
        left = crashed(record, tmp_path / "b", restarted=True)
    with ExposureStore(left) as record:
        again = record.resume("cam")
        assert again is not None
        assert again.id != scene.id
        assert again.blanket


def test_without_a_blanket_ahead_no_restart_makes_a_scene_unknown(tmp_path: Path) -> None:
    with ExposureStore(tmp_path / "a", ahead=False) as record:
        record.resume("cam")
        assert record.flush()
        with stuck(record):
            scene = record.begin_scene("cam")
            scene.reserve(b"one")
            assert not scene.reserved()
        assert record.flush(30)
        assert scene.reserved()
        left = crashed(record, tmp_path / "b", restarted=True)
    with ExposureStore(left, ahead=False) as record:
        again = record.resume("cam")
        assert again is not None
        assert (again.id, again.blanket, again.snapshot) == (scene.id, False, b"one")


def test_a_blanket_stays_a_blanket(tmp_path: Path) -> None:
    with ExposureStore(tmp_path / "a") as record:
        record.begin_scene("cam")
        assert record.flush()
        left = crashed(record, tmp_path / "b")
    for _ in range(2):
        with ExposureStore(left) as record:
            again = record.resume("cam")
            assert again is not None
            assert again.blanket
            again.reserve(b"what this process has sent")
            assert record.flush()
    (scene,) = read_contents(left).scenes.values()
    assert scene.blanket


def test_only_a_scene_change_or_a_person_ends_a_scene(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with ExposureStore(folder) as record:
        record.begin_scene("cam").reserve(b"cam")
        record.begin_scene("door").reserve(b"door")
        record.begin_scene("film").close(b"end")
    with ExposureStore(folder) as record:
        assert record.resume("film") is None
        assert record.resume("cam") is not None
        assert record.new_scene("cam")
        assert not record.new_scene("cam")
        assert record.resume("cam") is None
    with ExposureStore(folder) as record:
        assert record.resume("cam") is None
        door = record.resume("door")
        assert door is not None
        assert door.snapshot == b"door"
    found = read_contents(folder)
    assert not found.in_use
    states = {scene.stream: (scene.state, scene.snapshot) for scene in found.scenes.values()}
    assert states == {
        "cam": ("past", b"cam"),
        "door": ("live", b"door"),
        "film": ("past", b"end"),
    }


def test_no_call_waits_for_the_disk(tmp_path: Path) -> None:
    with ExposureStore(tmp_path / "a") as record:
        scene = record.begin_scene("cam")
        scene.reserve(b"0")
        assert record.flush()
        with stuck(record):  # all these calls return
            versions = [scene.reserve(b"%d" % i) for i in range(1000)]
            assert not any(map(scene.reserved, versions))
            picture = photo(record, 1)
            picture.place("a", [1])
            picture.grant("b", [2])
            assert not picture.durable()
            assert picture.windows == {"a": {1}, "b": {2}}
            others = [record.begin_scene("cam") for _ in range(10)]
            assert not record.flush(0.01)
        assert record.flush(30)
        assert picture.durable()
        assert all(map(scene.reserved, versions))
        assert all(other.reserved() for other in others)


def test_while_a_snapshot_is_written_the_blanket_does_not_cover_the_next(tmp_path: Path) -> None:
    with ExposureStore(tmp_path / "a") as record:
        scene = record.begin_scene("cam")
        assert record.flush()
        with stuck(record):
            first = scene.reserve(b"1")
            wait_until(lambda: scene._risked == first)
            assert scene.reserved(first)  # the disk holds the blanket or this snapshot
            assert not scene.reserved(scene.reserve(b"2"))
        assert record.flush(30)
        assert scene.reserved()


@contextlib.contextmanager
def no_room(limit: int) -> Iterator[None]:
    """Files of this process cannot grow above that size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_while_the_disk_is_full_nothing_new_is_on_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ExposureStore(tmp_path / "a") as record, caplog.at_level(logging.ERROR):
        scene, other = record.begin_scene("cam"), record.begin_scene("door")
        version = scene.reserve(b"small")
        assert record.flush()
        with no_room(64 << 10):
            other.reserve(b"z" * 100_000)
            larger = scene.reserve(b"x" * 100_000)
            wait_until(lambda: record.problem is not None)
            assert scene.reserved(version)
            assert not scene.reserved(larger)
            for _ in range(3):
                scene.reserve(b"y" * 100_000)
        assert record.flush(30)
        assert record.problem is None
        assert scene.reserved()
        assert other.reserved()
        found = read_contents(tmp_path / "a").scenes.values()
        assert {each.snapshot[:1] for each in found} == {b"y", b"z"}  # neither was given up
    assert len([line for line in caplog.messages if "nothing is sent" in line]) == 1


@pytest.mark.process
def test_a_full_disk_loses_nothing_that_was_on_record(full_disk: Path) -> None:
    with ExposureStore(full_disk / "a") as record:
        scene = record.begin_scene("cam")
        scene.reserve(b"small")
        assert record.flush()
        (full_disk / "other").write_bytes(b"x" * 1000)
        with contextlib.suppress(OSError), (full_disk / "rest").open("wb", 0) as rest:
            while True:
                rest.write(b"x" * 1024)
        assert not scene.reserved(scene.reserve(b"x" * 30_000))
        wait_until(lambda: record.problem is not None)
        assert not scene.reserved()
        assert "full" in record.problem
    (found,) = read_contents(full_disk / "a").scenes.values()
    assert (found.snapshot, found.blanket) == (b"small", False)
    with pytest.raises(RecordError) as caught:
        ExposureStore(full_disk / "b")
    assert caught.value.code == "disk_full"
    (full_disk / "rest").unlink()
    ExposureStore(full_disk / "b").close()  # what was left of the first try is in nobody's way


def test_a_photo_is_known_again_by_its_key_alone(tmp_path: Path) -> None:
    key = photo_key(b"s" * 32, b"hash of the picture")
    assert key != photo_key(b"t" * 32, b"hash of the picture")
    with ExposureStore(tmp_path / "a", 0.4, clock=lambda: 5.0) as record:
        first = record.photo(key, SIZE, WINDOW)
        first.place("a", [3, 1])
        first.place("b", [2])
        first.grant("b", [1])
        assert record.photo(key, SIZE, WINDOW) is first
    with ExposureStore(tmp_path / "a") as record:
        assert record.photo(key, SIZE, WINDOW).windows == {"a": {1, 3}, "b": {1, 2}}
        assert record.photo(photo_key(b"s" * 32, b"other"), SIZE, WINDOW).windows == {}
    (found,) = read_contents(tmp_path / "a").photos.items()
    assert found == (
        key.hex(),
        msgspec.structs.replace(
            found[1],
            begun=5.0,
            max_exposure=0.4,
            size=SIZE,
            window=WINDOW,
            first={"a": (1, 3), "b": (2,)},
            extra={"b": (1,)},
        ),
    )


def test_the_record_is_bounded_and_drops_first_what_a_repeat_does_not_need(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with ExposureStore(folder, most_photos=200, most_scenes=10) as record:
        kept = photo(record, 0)
        kept.place("a", [1])
        for number in range(1, 10_001):
            each = photo(record, number)
            each.place("a", range(number % 25))
            if number % 100 == 0:
                each.grant("b", [number % 7])
                record.begin_scene("cam").reserve(bytes(number))
            if number % 500 == 0:
                assert record.flush(30)
        del each
        assert record.flush(30)
        assert kept.durable()
        assert sum(map(len, record._photos)) == 200
    assert (folder / FILE).stat().st_size < 1_000_000
    found = read_contents(folder)
    assert (0).to_bytes(32, "big").hex() in found.photos  # it was in use
    with_extra = {int(key, 16) for key, each in found.photos.items() if each.extra}
    assert with_extra == set(range(100, 10_001, 100))
    assert len(found.photos) == 200
    assert [scene.state for scene in found.scenes.values()] == ["past"] * 10 + ["live"]
    assert len(next(reversed(found.scenes.values())).snapshot) == 10_000
    with ExposureStore(folder) as record:  # the same order after a restart
        assert list(record._photos[1]) == [
            n.to_bytes(33, "big").replace(b"\0", b"p", 1) for n in sorted(with_extra)
        ]


def test_a_photo_that_is_used_again_before_it_is_dropped_from_the_disk_is_kept(
    tmp_path: Path,
) -> None:
    with ExposureStore(tmp_path / "a", most_photos=1) as record:
        photo(record, 1).grant("a", [1])
        assert record.flush()
        with record._lock:  # the writing thread waits for it
            record._most_photos = 0
            record._choose_dropped()
            record._most_photos = 1
            assert record._dropped
            again = photo(record, 1)
            assert again.windows == {}
            again.grant("b", [3])
        assert record.flush()
        assert again.durable()
    (found,) = read_contents(tmp_path / "a").photos.values()
    assert found.extra == {"b": (3,)}


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "\x1b[31m"])
def test_a_stream_needs_a_name(tmp_path: Path, name: str) -> None:
    with ExposureStore(tmp_path / "a") as record:
        for call in (record.resume, record.begin_scene):
            with pytest.raises(RecordError, match="cannot be called"):
                call(name)


def test_there_is_a_limit_on_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOST_STREAMS", 3)
    with ExposureStore(tmp_path / "a") as record:
        for name in ("one", "two", "three"):
            record.begin_scene(name)
        with pytest.raises(RecordError, match="--new-scene one"):
            record.resume("four")
        record.begin_scene("one")
    with ExposureStore(tmp_path / "a") as record:
        record.new_scene("two")
        assert record.resume("four") is None
        with pytest.raises(RecordError, match="expected at most 3"):
            record.resume("five")


def test_a_snapshot_has_a_limit(tmp_path: Path) -> None:
    with ExposureStore(tmp_path / "a") as record:
        scene = record.begin_scene("cam")
        with pytest.raises(RecordError, match="expected at most"):
            scene.reserve(bytes(store.MOST_SNAPSHOT_BYTES + 1))


def test_a_row_of_another_version_is_an_error(tmp_path: Path) -> None:
    file = record_file.RecordFile(tmp_path / "a")
    file.write({b"s" * 16: msgspec.msgpack.encode({"stream": "cam"})})
    file.close(clean=True)
    for read in (ExposureStore, read_contents):
        with pytest.raises(RecordError, match="none of its own"):
            read(tmp_path / "a")


def test_a_closed_record_can_be_opened_again_and_not_used(tmp_path: Path) -> None:
    record = ExposureStore(tmp_path / "a")
    record.close()
    record.close()
    with pytest.raises(RecordError, match="closed"):
        record.begin_scene("cam")
    ExposureStore(tmp_path / "a").close()


def scene(turn: int, stream: str, state: str) -> Scene:
    return Scene(turn, stream, 1.0, 0.5, state, state == "ready")  # type: ignore[arg-type]


def test_what_is_left_is_settled() -> None:
    left = {
        b"a": scene(1, "cam", "past"),
        b"b": scene(5, "cam", "live"),
        b"c": scene(6, "cam", "ready"),
        b"d": scene(7, "door", "ready"),
        b"e": scene(8, "film", "live"),
    }
    states = {key: found.state for key, found in settle(left, set()).items()}
    assert states == {b"a": "past", b"b": "live", b"e": "live"}
    states = {key: found.state for key, found in settle(left, {b"c"}).items()}
    assert states == {b"a": "past", b"b": "past", b"c": "live", b"e": "live"}
    states = {key: found.state for key, found in settle(left, None).items()}
    assert states == {b"a": "past", b"b": "past", b"c": "live", b"d": "live", b"e": "live"}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "send", "close", "person", "flush", "kill", "restart", "stop"]),
        st.sampled_from(["cam", "door"]),
    ),
    max_size=16,
)


@given(STEPS)
@settings(max_examples=15)
def test_no_order_of_scenes_crashes_and_restarts_forgets_what_was_sent(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]]
) -> None:
    """The model counts what was sent of each stream's scene; None: no scene, a new budget."""
    folder, copies = tmp_path_factory.mktemp("record"), 0
    folder.chmod(0o700)
    record = ExposureStore(folder)
    scenes = {name: record.resume(name) for name in ("cam", "door")}
    sent: dict[str, int | None] = dict.fromkeys(scenes)
    try:
        for step, name in steps:
            current = scenes[name]
            if step == "begin":
                scenes[name] = record.begin_scene(name)
                sent[name] = 0
            elif step == "send" and current is not None and not current.blanket:
                count = int(current.snapshot or b"0") + 1
                if current.reserved(current.reserve(b"%d" % count)):
                    sent[name] = count
            elif step == "close" and current is not None:
                current.close()
                scenes[name] = sent[name] = None
            elif step == "person":
                record.new_scene(name)
                scenes[name] = sent[name] = None
                record.flush()
            elif step == "flush":
                assert record.flush()
            elif step in ("kill", "restart", "stop"):
                if step == "stop":
                    record.close()
                else:
                    copies += 1
                    copy = folder.with_name(f"{folder.name}-{copies}")
                    left = crashed(record, copy, restarted=step == "restart")
                    record.close()
                    folder = left
                record = ExposureStore(folder)
                scenes = {name: record.resume(name) for name in scenes}
                for each, count in sent.items():
                    again = scenes[each]
                    if count:
                        assert again is not None
                        assert again.blanket or int(again.snapshot or b"0") >= count
    finally:
        record.close()


CHILD = """
import sys
from edge_runtime.exposure import record_file
from edge_runtime.exposure.store import ExposureStore
from pathlib import Path
record_file._SHARED_MEMORY = Path(sys.argv[2])
record = ExposureStore(sys.argv[1])
scene = record.resume("cam")
print("open", flush=True)
number = 0
while True:
    if scene is None or scene.blanket or number % 7 == 6:
        scene = record.begin_scene("cam")
    number += 1
    version = scene.reserve(b"%d" % number)
    picture = record.photo(number.to_bytes(32, "big"), (576, 1024), 224)
    picture.grant("b", [number % 25])
    if number % 3 == 0:
        record.flush()
    if scene.reserved(version):
        print("sent", scene.id, number, flush=True)
    if picture.durable():
        print("photo", number, flush=True)
"""


@pytest.mark.process
def test_a_kill_at_any_instant_forgets_nothing(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    record_file._SHARED_MEMORY = memory
    generator = random.Random(11)
    blankets = exact = photos = 0
    for number in range(6):
        folder = tmp_path / f"record-{number // 3}"  # each is killed three times
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), str(memory)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        with pytest.raises(RecordError, match=f"another process \\({child.pid}\\)"):
            ExposureStore(folder)
        time.sleep(generator.random() * 0.15)
        child.send_signal(signal.SIGKILL)
        lines = [line.split() for line in child.stdout if line.endswith("\n")]
        child.wait()
        if number % 3 == 2:  # the machine was started again
            Marks(folder)._path.unlink()
        sent = [line for line in lines if line[0] == "sent"]
        with ExposureStore(folder) as record:
            scene = record.resume("cam")
            for _, name, count in sent[-1:]:
                assert scene is not None
                recorded = int(scene.snapshot or b"0")  # numbers go on from scene to scene
                same = scene.id == name
                assert scene.blanket or recorded > int(count) or (same and recorded == int(count))
            blankets += scene is not None and scene.blanket
            exact += scene is not None and not scene.blanket
            for line in lines:
                if line[0] == "photo":
                    found = record.photo(int(line[1]).to_bytes(32, "big"), SIZE, WINDOW)
                    assert found.windows == {"b": {int(line[1]) % 25}}
                    photos += 1
    assert blankets
    assert exact
    assert photos


def test_the_record_holds_no_names_and_no_secret(tmp_path: Path) -> None:
    secret = os.urandom(32)
    with ExposureStore(tmp_path / "a") as record:
        record.photo(photo_key(secret, b"HASH" * 8), SIZE, WINDOW).grant("party", [1])
        assert record.flush()
        data = b"".join(path.read_bytes() for path in (tmp_path / "a").iterdir())
    assert b"party" in data
    assert b"HASH" not in data
    assert secret not in data
