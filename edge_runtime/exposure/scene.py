"""Follows the scenes of one stream: places every frame under one budget, and keeps the record."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_common.errors import PlacementError
from edge_runtime.exposure.frames import FramePlacer
from edge_runtime.exposure.ledger import ExposureLedger
from edge_runtime.exposure.mosaic import Mosaic
from edge_runtime.exposure.motion import Look, Position, Tracker, changed, look_at
from edge_runtime.exposure.placement import Placement
from edge_runtime.exposure.store import ExposureStore, SceneRecord
from engines.geometry import Geometry

_STILL_FRAMES = 30
"""After so many frames of a camera that did not move, an exact record replaces the blanket."""
_DISK_S = 2.0
_POLL_S = 0.002


@dataclass(frozen=True)
class FramePlan:
    """Where one frame's windows may go.

    Attributes:
        scene: number of the scene in this stream, from 0.
        position: of the frame in the scene.
        shares: party -> the share of the scene that it may have seen, this frame included.
    """

    ledger: ExposureLedger
    scene: int
    position: Position
    shares: dict[str, float]


class SceneKeeper:
    """The scenes of one stream.

    What no party may see is placed at home. If the edge does not compute such windows
    (`fallback`), the frame is refused. Call :meth:`frame` for one frame after the other; other
    threads may use the plans meanwhile.

    Args:
        stream: the user's name for the camera or video.
        geometry: of the bundle.
        max_exposure: the largest share of a scene that a party may see, over all its frames.
        secret: of the edge.
        nodes: party -> names of its nodes.
        store: the durable record. None: the budget is forgotten when the process ends.
        fallback: whether the edge computes windows that no party may see.

    Attributes:
        scene: number of the scene, from 0.

    Raises:
        RecordError: the record of this stream cannot be used.
    """

    def __init__(
        self,
        stream: str,
        geometry: Geometry,
        max_exposure: float,
        secret: bytes,
        nodes: Mapping[str, Sequence[str]],
        store: ExposureStore | None = None,
        *,
        fallback: bool = False,
    ) -> None:
        self.scene = -1
        self._stream, self._geometry, self._max_exposure = stream, geometry, max_exposure
        self._secret, self._nodes, self._store, self._fallback = secret, nodes, store, fallback
        self._lock = threading.Lock()
        self._look: Look | None = None  # of the last frame
        self._placement: Placement | None = None
        self._version: int | None
        self._placer: FramePlacer
        self._first_part: int
        self._tracker: Tracker
        self._still: int
        self._record: SceneRecord | None = store.resume(stream) if store else None
        if self._record is None:
            self._begin()
        else:
            # An earlier process saw the beginning of this scene. How the camera moved since is not
            # known, so this process's frames are parts of their own.
            snapshot = self._record.snapshot
            self._start(Mosaic.from_bytes(snapshot) if snapshot else Mosaic(geometry.image_size))

    @property
    def blanket(self) -> bool:
        """True if nothing more of this scene may be sent: an earlier process was killed before what
        the parties had seen was on record."""
        return self._record is not None and self._record.blanket

    def frame(
        self, image: np.ndarray, parties: Collection[str], keep_local: Collection[int] = ()
    ) -> FramePlan:
        """Place the next frame.

        Args:
            image: uint8 ``[h, w, 3]``, the resized frame.
            parties: those of which a node can be used now.
            keep_local: windows that never leave the edge.

        Raises:
            PlacementError: windows may go to nobody and may not be computed here.
        """
        look = look_at(image)
        with self._lock:
            if self._look is not None and changed(self._look, look):
                self._begin()
            self._look = look
            scene, placer, record = self.scene, self._placer, self._record
            found = self._tracker.follow(look)
            position = found._replace(part=found.part + self._first_part)
            usable = [] if self.blanket else sorted(set(parties) & self._nodes.keys())
            size = (image.shape[0], image.shape[1])
            placement = placer.place(size, position, usable, keep_local)
            self._still = self._still + 1 if placement is self._placement else 0
            self._placement = placement
            version = self._reserve()
            if not self._fallback and set(placement.home) - set(keep_local):
                raise self._refusal(placement)
            shares = {party: placer.mosaic.share(party) for party in self._nodes}
        self._wait_for(record, version)
        nodes = {party: self._nodes[party] for party in placement.assignment}

        def extra(party: str, windows: tuple[int, ...]) -> str | None:
            with self._lock:  # in the scene of this frame, which may be over
                allowed = placer.use(placement, party, windows)
            return None if allowed else "its share of the scene has no room for them"

        return FramePlan(ExposureLedger(placement, nodes, extra), scene, position, shares)

    def new_scene(self) -> None:
        """The stream shows another scene now, says a person or a program that knows."""
        with self._lock:
            self._begin()

    def close(self) -> None:
        """Leave an exact record, with which the scene goes on after a restart.

        Second choices of the frames so far are not permitted any more. Further frames may follow.
        """
        with self._lock:
            self._placer.forget_frames()
            self._placement = None  # so that the next frame is put on record anew
            if self._record is not None and not self.blanket:
                self._version = self._record.reserve(self._placer.mosaic.to_bytes())

    def _begin(self) -> None:
        if self._store is not None:
            self._record = self._store.begin_scene(self._stream)
        self._start(Mosaic(self._geometry.image_size))

    def _start(self, mosaic: Mosaic) -> None:
        self.scene += 1
        self._tracker = Tracker()
        self._look = self._placement = None
        self._first_part = max([-1, *mosaic.parts]) + 1
        self._still = 0
        # Of the exact record; None while there is a blanket.
        self._version = 0 if self._record is not None and self._record.snapshot else None
        key = secrets.token_bytes(16)
        self._placer = FramePlacer(self._geometry, self._max_exposure, self._secret, key, mosaic)

    def _reserve(self) -> int | None:
        """Have on record what this frame may show. Returns the version to wait for.

        While the camera moves, the blanket covers every frame. An exact record must be replaced
        before a frame shows more than it says.
        """
        record = self._record
        if record is None or self.blanket:
            return None
        if self._version is None:
            if self._still < _STILL_FRAMES:
                return 0
        elif self._still:
            return self._version
        self._version = record.reserve(self._placer.with_seconds().to_bytes())
        return self._version

    def _wait_for(self, record: SceneRecord | None, version: int | None) -> None:
        """Wait until a new exact record, or the first blanket, is on the disk.

        Only the first frame of the first scene waits, and the first one that moves after a camera
        has been still for long.
        """
        if version is None or record is None:
            return
        give_up = time.monotonic() + _DISK_S
        while not record.reserved(version):
            if time.monotonic() > give_up:
                assert self._store is not None
                raise PlacementError(
                    "what the nodes may see could not be put on record "
                    f"({self._store.problem or f'not within {_DISK_S:g} s'}), so nothing was sent",
                    mend="free some space on the disk of the exposure record",
                    code="record",
                )
            time.sleep(_POLL_S)

    def _refusal(self, placement: Placement) -> PlacementError:
        windows = len(placement.home)
        if self.blanket:
            return PlacementError(
                f"nothing more of the scene of {self._stream!r} may be sent, because an earlier "
                "process was killed before what the nodes had seen was on record",
                mend="wait until the picture changes, say `edge-runtime exposure --new-scene "
                f"{self._stream}` if it has, or allow --fallback local",
            )
        if not placement.assignment:
            return PlacementError(
                "no node can be sent this frame now",
                mend="`edge-runtime nodes` checks every node; with --fallback local the edge "
                "computes what nodes do not",
            )
        return PlacementError(
            f"{windows} of {len(placement.areas)} windows may go to none of the "
            f"{len(placement.assignment)} parties: each may see {self._max_exposure:g} of the "
            "scene",
            mend="add nodes of other parties (`edge-runtime plan` says how many), raise "
            "max_exposure, or have the edge compute such windows with --fallback local",
        )
