"""The durable record of what each party may have seen, per scene of a stream and per photo.

A thread of its own does all writing. Nothing else here waits for the disk: callers ask whether what
they are about to send is on record, and do not send it if not.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from edge_common.errors import EdgeRuntimeError, RecordError
from edge_common.logs import LogLimiter
from edge_runtime.exposure.placement import DEFAULT_MAX_EXPOSURE
from edge_runtime.exposure.record_file import RecordFile, read_rows

MOST_STREAMS = 64
MOST_SCENES = 200
"""Of the past; those that still go on come on top."""
MOST_PHOTOS = 10_000
MOST_SNAPSHOT_BYTES = 4 << 20
_MOST_PAST_BYTES = 64 << 20
_NAME_CHARACTERS = 200
_RETRY_S = 1.0
"""Pause after a failed write."""
_CLOSE_S = 5.0
_SCENE, _PHOTO = b"s", b"p"  # first byte of the ids

log = logging.getLogger(__name__)


class Scene(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is on record about a scene.

    Attributes:
        turn: scenes and photos with a higher one changed later, whatever the clock said.
        stream: the user's name for the camera or video.
        begun: wall-clock time, seconds since 1970. 0: it has not begun.
        max_exposure: the budget it began with.
        state: ``ready``: prepared for the stream's next scene. ``live``: goes on. ``past``.
        blanket: the parties may have seen all they were allowed to; which part is not known.
        snapshot: ``Mosaic.to_bytes()`` of what they may have seen, if that is known.
    """

    turn: int
    stream: str
    begun: float
    max_exposure: float
    state: Literal["ready", "live", "past"]
    blanket: bool
    snapshot: bytes = b""


class Photo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is on record about a photo.

    Attributes:
        turn, begun, max_exposure: as of :class:`Scene`.
        size: rows and columns of the resized photo.
        window: side of a window, in pixels of the resized photo.
        first: party -> windows of the first placement, ascending.
        extra: party -> windows that it was permitted beyond that, for retries and hedges.
    """

    turn: int
    begun: float
    max_exposure: float
    size: tuple[int, int]
    window: int
    first: dict[str, tuple[int, ...]]
    extra: dict[str, tuple[int, ...]]

    def seen(self) -> dict[str, set[int]]:
        """Party -> all windows it may have seen."""
        parties = sorted(self.first.keys() | self.extra.keys())
        return {p: {*self.first.get(p, ()), *self.extra.get(p, ())} for p in parties}

    def rect(self, window: int) -> tuple[int, int, int, int]:
        """First row and column of a window and those after its last, inside the photo."""
        height, width = self.size
        row, column = divmod(window, -(-max(self.size) // self.window))
        y, x = row * self.window, column * self.window
        return y, x, max(y, min(y + self.window, height)), max(x, min(x + self.window, width))

    def share(self, windows: Iterable[int]) -> float:
        """The share of the photo's area that lies in these windows."""
        rects = map(self.rect, windows)
        return sum((y1 - y0) * (x1 - x0) for y0, x0, y1, x1 in rects) / math.prod(self.size)


class Contents(msgspec.Struct, frozen=True):
    """All that is on record: by id (hexadecimal), those that changed last at the end.

    ``in_use``: a process has the record open, so scenes may be going on.
    """

    scenes: dict[str, Scene]
    photos: dict[str, Photo]
    in_use: bool


class _Entry:
    """Something whose latest state is written in the background.

    Its states are numbered. One is on record when it or a later one is on the disk.
    """

    def __init__(self, store: ExposureStore, key: bytes, turn: int) -> None:
        self._store = store
        self._key = key
        self._turn = turn
        self._version = 0
        self._durable = -1  # the highest version that is on the disk

    def _changed(self) -> int:
        self._version += 1
        self._turn = self._store._queue(self._key, self)
        return self._version

    def _state(self) -> Scene | Photo:
        raise NotImplementedError

    def _writing(self, state: Scene | Photo) -> None:
        """This state may be on the disk from now on."""

    def _written(self, version: int, state: Scene | Photo) -> None:
        self._durable = version


class SceneRecord(_Entry):
    """A scene of a stream. :class:`ExposureStore` makes them.

    Before the first :meth:`reserve`, the record on disk is a *blanket*: it says that the parties
    may have seen all they were allowed to. It was written while the last scene went on, so the
    first frame of a new scene may be sent at once.

    Attributes:
        id: random, hexadecimal.
        stream, begun, max_exposure: see :class:`Scene`.
        blanket: an earlier process left this scene, and which part the parties have seen is not
            known. It stays so: nothing more of it may be sent.
        snapshot: of the last :meth:`reserve`, also of an earlier process; None: there was none.
    """

    def __init__(
        self, store: ExposureStore, key: bytes, scene: Scene, *, on_disk: bool = False
    ) -> None:
        super().__init__(store, key, scene.turn)
        self.id = key.hex()
        self.stream, self.begun, self.max_exposure = scene.stream, scene.begun, scene.max_exposure
        self.blanket = on_disk and scene.blanket
        self.snapshot = scene.snapshot or None
        self._phase = scene.state
        self._durable = 0 if on_disk else -1
        self._blanket_on_disk = self.blanket
        self._risked: int | None = None  # the lowest exact version that may have replaced it

    def reserve(self, snapshot: bytes) -> int:
        """Queue a snapshot to be put on record in place of the blanket or of the last one.

        Args:
            snapshot: all that any party may have seen, and all that it may be sent before the next
                snapshot is on record.

        Returns:
            its version, for :meth:`reserved`.

        Raises:
            RecordError: it is larger than 4 MiB.
        """
        if len(snapshot) > MOST_SNAPSHOT_BYTES:
            raise RecordError(
                f"a scene's snapshot has {len(snapshot):,} bytes, expected at most "
                f"{MOST_SNAPSHOT_BYTES:,}",
                mend="begin another scene",
            )
        with self._store._lock:
            self.snapshot = snapshot
            return self._changed()

    def reserved(self, version: int | None = None) -> bool:
        """True if what that snapshot permits may be sent: a crash now would not forget it.

        Args:
            version: None is the latest. Before the first `reserve` it is the blanket.
        """
        with self._store._lock:
            version = self._version if version is None else version
            if version <= self._durable:
                return True
            # If an earlier snapshot is being written, the blanket may be gone at any moment.
            return self._blanket_on_disk and (self._risked is None or version <= self._risked)

    def close(self, snapshot: bytes | None = None) -> None:
        """The picture has really changed, so this scene is over; `snapshot` is its last one."""
        if snapshot is not None:
            self.reserve(snapshot)
        self._store._end(self)

    def _state(self) -> Scene:
        blanket = self.blanket or self.snapshot is None
        return Scene(
            self._turn,
            self.stream,
            self.begun,
            self.max_exposure,
            self._phase,
            blanket,
            self.snapshot or b"",
        )

    def _writing(self, state: Scene | Photo) -> None:
        if isinstance(state, Scene) and not state.blanket and self._risked is None:
            self._risked = self._version

    def _written(self, version: int, state: Scene | Photo) -> None:
        super()._written(version, state)
        self._blanket_on_disk = isinstance(state, Scene) and state.blanket
        self._risked = None


class PhotoRecord(_Entry):
    """A photo. :class:`ExposureStore` makes them. Keep it while windows of the photo are sent."""

    def __init__(self, store: ExposureStore, key: bytes, photo: Photo, *, on_disk: bool) -> None:
        super().__init__(store, key, photo.turn)
        self._photo = photo
        self._durable = 0 if on_disk else -1

    @property
    def windows(self) -> dict[str, set[int]]:
        """Party -> windows it was ever permitted."""
        with self._store._lock:
            return self._photo.seen()

    def place(self, party: str, windows: Iterable[int]) -> None:
        """Record windows of the photo's own placement.

        A repeat of the photo gives them to the same party again, so they may be sent at once.
        """
        self._add("first", party, windows)

    def grant(self, party: str, windows: Iterable[int]) -> None:
        """Record windows beyond the placement. Send them once :meth:`durable` is true."""
        self._add("extra", party, windows)

    def durable(self) -> bool:
        """True if all that was granted so far is on the disk."""
        with self._store._lock:
            return self._version <= self._durable

    def _add(self, field: Literal["first", "extra"], party: str, windows: Iterable[int]) -> None:
        added = {int(window) for window in windows}
        with self._store._lock:
            known: dict[str, tuple[int, ...]] = getattr(self._photo, field)
            if added <= set(known.get(party, ())) and self._version:
                return
            more = {**known, party: tuple(sorted(added | set(known.get(party, ()))))}
            self._photo = msgspec.structs.replace(self._photo, **{field: more})
            self._changed()

    def _state(self) -> Photo:
        return msgspec.structs.replace(self._photo, turn=self._turn)


class ExposureStore:
    """The record of one edge, open for writing. Any thread may call it; no call waits for the disk,
    apart from opening, :meth:`flush` and :meth:`close`.

    Use it as a context manager, or call :meth:`close`. Scenes that go on stay open for
    :meth:`resume`.

    Args:
        folder: of the record, 0700; made if it is not there.
        max_exposure: the budget of scenes and photos that begin.
        ahead: keep a blanket on disk for each stream's next scene. Without it, nothing of a new
            scene may be sent for the milliseconds until it is written, but no scene is unknown
            after a power cut: use that for cameras whose picture hardly ever changes.
        most_scenes: of the past, that are kept; those that go on come on top.
        most_photos: that are kept.
        clock: wall-clock time in seconds since 1970.

    Attributes:
        problem: why the last write failed; None if it did not. Meanwhile nothing new is on record.

    Raises:
        RecordError: another process has the record, others may read it, it is damaged, or the disk
            refuses.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        max_exposure: float = DEFAULT_MAX_EXPOSURE,
        *,
        ahead: bool = True,
        most_scenes: int = MOST_SCENES,
        most_photos: int = MOST_PHOTOS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.problem: str | None = None
        self._folder = Path(folder)
        self._max_exposure = max_exposure
        self._ahead = ahead
        self._most_scenes, self._most_photos = most_scenes, most_photos
        self._clock = clock
        self._lock = threading.Condition()
        self._closing = self._busy = False
        self._queued: dict[bytes, _Entry] = {}
        self._dropped: set[bytes] = set()  # ids to be deleted from the disk
        self._ready: dict[str, SceneRecord] = {}
        self._live: dict[str, SceneRecord] = {}
        self._past: dict[bytes, int] = {}  # scenes that are over -> size; the oldest first
        # Photos without and with extra windows -> the row; those used longest ago first.
        self._photos: tuple[dict[bytes, bytes], dict[bytes, bytes]] = {}, {}
        self._open_photos: weakref.WeakValueDictionary[bytes, PhotoRecord] = (
            weakref.WeakValueDictionary()
        )
        self._limiter = LogLimiter()
        self._file = RecordFile(self._folder)
        try:
            self._load()
        except BaseException:
            self._file.close(clean=False)
            raise
        self._thread = threading.Thread(target=self._write_all, name="exposure", daemon=True)
        self._thread.start()

    def resume(self, stream: str) -> SceneRecord | None:
        """The scene of that stream that goes on, from this process or an earlier one.

        Also prepares the stream's next scene: call it before the first frame.

        Raises:
            RecordError: the name cannot be used, or there are too many streams.
        """
        with self._lock:
            self._prepare(stream)
            return self._live.get(stream)

    def begin_scene(self, stream: str) -> SceneRecord:
        """A new scene; the stream's last one is over. Its blanket is on disk already, unless two
        scenes follow one another at once, `ahead` is off or the disk refuses: `reserved()` says so.

        Raises:
            RecordError: the name cannot be used, or there are too many streams.
        """
        with self._lock:
            self._prepare(stream)
            if stream in self._live:
                self._end(self._live[stream])
            record = self._ready.pop(stream)
            # Shared memory says at once that it has begun, the disk a little later.
            self._file.mark(record._key)
            record._phase, record.begun = "live", self._clock()
            record._changed()
            self._live[stream] = record
            self._prepare(stream)
            return record

    def new_scene(self, stream: str) -> bool:
        """A person says that the stream shows another scene. False: it had none that goes on."""
        with self._lock:
            if (record := self._live.get(stream)) is not None:
                self._end(record)
            return record is not None

    def photo(self, key: bytes, size: tuple[int, int], window: int) -> PhotoRecord:
        """The record of a photo, new or as it was.

        Args:
            key: see :func:`photo_key`.
            size: rows and columns of the resized photo.
            window: side of a window, in its pixels.
        """
        key = _PHOTO + key
        with self._lock:
            record = self._open_photos.get(key)
            if record is None:
                body = self._photos[0].get(key) or self._photos[1].get(key)
                if body is None:
                    photo = Photo(0, self._clock(), self._max_exposure, size, window, {}, {})
                else:
                    photo = msgspec.msgpack.decode(body, type=Photo)
                record = PhotoRecord(self, key, photo, on_disk=body is not None)
                self._open_photos[key] = record
            return record

    def flush(self, timeout_s: float = _CLOSE_S) -> bool:
        """Wait until all that is queued is on the disk; False: it is not."""
        with self._lock:
            return self._lock.wait_for(
                lambda: not (self._queued or self._dropped or self._busy), timeout_s
            )

    def close(self) -> None:
        """Write what is queued, and release the record. Closing twice is allowed.

        If the disk hangs, this gives up after five seconds, and the record is released when the
        process ends.
        """
        with self._lock:
            for record in self._ready.values():  # they have not begun
                self._queued.pop(record._key, None)
                self._dropped.add(record._key)
            self._ready.clear()
            self._closing = True
            self._lock.notify_all()
        self._thread.join(_CLOSE_S)

    def __enter__(self) -> ExposureStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Called with the lock held.

    def _prepare(self, stream: str) -> None:
        """Have a blanket written for the stream's next scene."""
        if self._closing:
            raise RecordError("the exposure record is closed", code="closed")
        if stream in self._ready:
            return
        if not stream or len(stream) > _NAME_CHARACTERS or not stream.isprintable():
            raise RecordError(
                f"a stream cannot be called {stream!r}",
                mend=f"use 1 to {_NAME_CHARACTERS} printable characters",
            )
        known = self._ready.keys() | self._live.keys()
        if len(known - {stream}) >= MOST_STREAMS:
            oldest = min(self._live.values(), key=lambda live: live._turn, default=None)
            name = oldest.stream if oldest else "NAME"
            raise RecordError(
                f"the exposure record has {len(known)} streams, expected at most {MOST_STREAMS}",
                mend=f"end one that is not used any more: edge-runtime exposure --new-scene {name}",
            )
        key = _SCENE + secrets.token_bytes(15)
        scene = Scene(0, stream, 0.0, self._max_exposure, "ready", True)
        record = self._ready[stream] = SceneRecord(self, key, scene)
        if self._ahead:
            self._queue(key, record)

    def _queue(self, key: bytes, entry: _Entry) -> int:
        """Have the entry's latest state written; the number of this change."""
        self._turn += 1
        self._queued[key] = entry
        self._dropped.discard(key)
        self._lock.notify_all()
        return self._turn

    def _end(self, record: SceneRecord) -> None:
        with self._lock:
            if record._phase == "live":
                record._phase = "past"
                record._changed()
                self._live.pop(record.stream, None)

    def _load(self) -> None:
        """Take over what the last process left."""
        folder = self._folder
        scenes, photos = _decoded(self._file.rows, folder)
        settled = settle(scenes, self._file.began)
        changes: dict[bytes, bytes | None] = dict.fromkeys(scenes.keys() - settled.keys())
        changes |= {
            key: msgspec.msgpack.encode(scene)
            for key, scene in settled.items()
            if scene != scenes[key]
        }
        self._file.start_session(changes)
        turns = [scene.turn for scene in settled.values()] + [p.turn for p in photos.values()]
        self._turn = max(turns, default=0)
        for key, scene in sorted(settled.items(), key=lambda item: item[1].turn):
            if scene.state == "past":
                self._past[key] = len(scene.snapshot)
            else:
                self._live[scene.stream] = SceneRecord(self, key, scene, on_disk=True)
        for key, photo in sorted(photos.items(), key=lambda item: item[1].turn):
            self._photos[bool(photo.extra)][key] = self._file.rows[key]
        self._file.rows.clear()

    def _choose_dropped(self) -> None:
        """Drop what is over and oldest until the rest is within the limits.

        Photos without extra windows go first: repeating them shows nobody anything new.
        """
        while self._past and (
            len(self._past) > self._most_scenes or sum(self._past.values()) > _MOST_PAST_BYTES
        ):
            key = next(iter(self._past))
            del self._past[key]
            self._dropped.add(key)
        for photos in self._photos:
            while sum(map(len, self._photos)) > self._most_photos:
                unused = (key for key in photos if key not in self._open_photos)
                if (oldest := next(unused, None)) is None:
                    break
                del photos[oldest]
                self._dropped.add(oldest)

    # The thread that writes.

    def _write_all(self) -> None:
        done = False
        try:
            while not done:
                with self._lock:
                    if self.problem is not None:
                        self._lock.wait_for(lambda: self._closing, _RETRY_S)
                    self._lock.wait_for(lambda: self._queued or self._dropped or self._closing)
                    done = self._closing
                try:
                    self._write_queued()
                    with self._lock:  # now, because photos that are being written are in use
                        self._choose_dropped()
                except Exception as error:
                    self._failed(error)
        finally:
            self._file.close(clean=self.problem is None)

    def _write_queued(self) -> None:
        with self._lock:
            entries, self._queued = self._queued, {}
            self._busy = True
            batch = []
            changes: dict[bytes, bytes | None] = {}
            for key, entry in entries.items():
                state = entry._state()
                entry._writing(state)
                body = msgspec.msgpack.encode(state)
                changes[key] = body
                batch.append((entry, entry._version, state))
                if isinstance(state, Photo):
                    for photos in self._photos:
                        photos.pop(key, None)
                    self._photos[bool(state.extra)][key] = body
                elif state.state == "past":
                    self._past[key] = len(body)
            dropped = frozenset(self._dropped)
            changes |= dict.fromkeys(dropped)
        try:
            if changes:
                self._file.write(changes)
        except BaseException:
            with self._lock:
                self._queued = {**entries, **self._queued}
                self._busy = False
                self._lock.notify_all()
            raise
        with self._lock:
            for entry, version, state in batch:
                entry._written(version, state)
            self._dropped -= dropped
            self._busy = False
            self.problem = None
            self._lock.notify_all()

    def _failed(self, error: Exception) -> None:
        self.problem = error.found if isinstance(error, EdgeRuntimeError) else repr(error)
        if self._limiter.allows("write"):
            log.error(
                "%s. Until the exposure record can be written, nothing is sent that is not in it",
                self.problem,
            )


def settle(scenes: Mapping[bytes, Scene], began: Collection[bytes] | None) -> dict[bytes, Scene]:
    """What is known about scenes after the process that wrote them has ended, however that was.

    A scene that had been prepared may have begun since. If that is not known, it counts as begun:
    its blanket holds for whatever the stream shows now.

    Args:
        began: ids of prepared scenes that had begun; None if that is not known.
    """
    found: dict[bytes, Scene] = {}
    turn = max((scene.turn for scene in scenes.values()), default=0)
    for key, scene in scenes.items():
        if scene.state != "ready":
            found[key] = scene
        elif began is None or key in began:
            turn += 1
            found[key] = msgspec.structs.replace(scene, turn=turn, state="live")
    last: dict[str, int] = {}
    for scene in found.values():
        last[scene.stream] = max(scene.turn, last.get(scene.stream, 0))
    for key, scene in found.items():
        if scene.state == "live" and scene.turn != last[scene.stream]:
            found[key] = msgspec.structs.replace(scene, state="past")
    return found


def read_contents(folder: str | os.PathLike[str]) -> Contents:
    """All that is on record, also while a process writes it. Empty if there is no record.

    Raises:
        RecordError: it is damaged, or others may read or write it.
    """
    rows, began, in_use = read_rows(Path(folder))
    scenes, photos = _decoded(rows, Path(folder))
    if in_use:
        scenes = {key: scene for key, scene in scenes.items() if scene.state != "ready"}
    else:
        scenes = settle(scenes, began)
    return Contents(
        {k.hex(): s for k, s in sorted(scenes.items(), key=lambda item: item[1].turn)},
        {k[1:].hex(): p for k, p in sorted(photos.items(), key=lambda item: item[1].turn)},
        in_use,
    )


def photo_key(secret: bytes, image_hash: bytes) -> bytes:
    """What a photo is known by: without the edge's secret it says nothing about the photo."""
    key = hashlib.blake2b(secret, digest_size=32, person=b"ert.exposure").digest()
    return hashlib.blake2b(image_hash, key=key, digest_size=32).digest()


def _decoded(
    rows: Mapping[bytes, bytes], folder: Path
) -> tuple[dict[bytes, Scene], dict[bytes, Photo]]:
    scenes, photos = {}, {}
    try:
        for key, body in rows.items():
            if key.startswith(_SCENE):
                scenes[key] = msgspec.msgpack.decode(body, type=Scene)
            else:
                photos[key] = msgspec.msgpack.decode(body, type=Photo)
    except msgspec.MsgspecError as error:
        raise RecordError(
            f"the exposure record {folder} holds a row that is none of its own: {error}",
            mend="another version of edge-runtime wrote it: use that one",
            code="damaged",
        ) from None
    return scenes, photos
