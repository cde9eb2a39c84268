"""Segments the frames of a camera or a video: several are under way at a time, results in order.

While the tail of one frame runs, the next is with the nodes and another one is being cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from edge_common.errors import EdgeRuntimeError, ImageError, OffloadError
from edge_runtime.config import Region, check_region
from edge_runtime.exposure.ledger import ExposureLedger
from edge_runtime.exposure.regions import windows_in
from edge_runtime.exposure.scene import FramePlan, SceneKeeper
from edge_runtime.imaging.images import resize_longest
from edge_runtime.offload.mode import Choice, ModeChooser
from edge_runtime.offload.offloader import Computed, Offloader
from edge_runtime.offload.report import OffloadReport, RunRecord
from edge_runtime.offload.reuse import HOME, TokenCache
from edge_runtime.predictor import EncodedImage, OffloadPredictor
from engines.pipeline import Encoding
from engines.windows import Windows, cut

Policy = Literal["latest", "every"]
DEFAULT_DEPTH = 3
_CACHE_BYTES = 256 << 20


class Frame(NamedTuple):
    """A picture of a stream.

    Attributes:
        image: uint8 ``[H, W, 3]``, RGB. Do not change it afterwards: give each frame its own array.
        keep_local: regions of it that never leave the edge, besides those of the settings.
    """

    image: np.ndarray
    keep_local: tuple[Region, ...] = ()


class FrameReport(msgspec.Struct, frozen=True):
    """How one frame was made.

    Attributes:
        number: of the frame in the source, from 0.
        scene: number of the scene that it shows, from 0; -1 with ``budget = "frame"``.
        choice: where its window layers were computed, and why.
        reused: windows whose pixels had not changed, so that nothing was computed for them.
        shares: party -> the share of the scene that it may have seen so far; with ``budget =
            "frame"`` the share of this frame alone, and over time it may see all of the scene.
        offload: which node saw what of this frame; None if nothing was sent.
        total_ms: from when the frame was taken from the source until its embedding was there.
    """

    number: int
    scene: int
    choice: Choice
    reused: tuple[int, ...]
    shares: dict[str, float]
    offload: OffloadReport | None
    total_ms: float


class FrameResult(NamedTuple):
    """A frame that can be segmented, or the reason why it can't.

    Attributes:
        number: of the frame in the source, from 0. With the policy ``latest`` some are left out.
        frame: as it came from the source.
        encoded: answers prompts; None if the frame was refused.
        error: why it was refused; None if it was not.
        report: None if the frame was refused before it was placed.
    """

    number: int
    frame: Frame
    encoded: EncodedImage | None
    error: EdgeRuntimeError | None
    report: FrameReport | None


Source = Iterable["np.ndarray | Frame"] | AsyncIterable["np.ndarray | Frame"]


class _Prepared(NamedTuple):
    windows: Windows
    plan: FramePlan | None
    ledger: ExposureLedger | None
    choice: Choice
    known: Mapping[int, Mapping[str, np.ndarray]]  # row -> tokens from an earlier frame
    waits: Mapping[int, tuple[asyncio.Future[Computed], int]]  # row -> a frame's, and its row
    windows_ms: float


class FrameStream:
    """The frames of one source, encoded in order.

    Example::

        async with FrameStream(predictor, "door") as stream:
            async for result in stream.results(frames):
                if result.encoded is not None:
                    masks, iou, low_res = result.encoded.predict(box=box)

    Args:
        predictor: with a configuration, or without one to compute everything here.
        name: of the stream, for the exposure record: frames of one camera share a budget.
        policy: ``latest``: when frames come faster than they can be encoded, older ones are left
            out. ``every``: the source waits.
        depth: frames under way at a time.

    Raises:
        RecordError: the exposure record of this stream cannot be used, or a stream of that name is
            open already.
    """

    def __init__(
        self,
        predictor: OffloadPredictor,
        name: str = "stream",
        *,
        policy: Policy = "every",
        depth: int = DEFAULT_DEPTH,
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}, expected at least 1")
        self._predictor, self._policy, self._depth = predictor, policy, depth
        self._name, self._closed = name, False
        self._pipeline = predictor.pipeline
        self._offloader: Offloader | None = predictor.offloader
        self._config = self._offloader.config if self._offloader else None
        config = self._config
        self._chooser = ModeChooser(config.mode if config else "local")
        self._caching = threading.Lock()  # frames are prepared in threads
        self._cache = TokenCache(_CACHE_BYTES, config.reuse_tolerance if config else 0)
        self._scenes: SceneKeeper | None = None
        if self._offloader is not None and config is not None and config.budget == "scene":
            self._scenes = self._offloader.scenes(name)
        self._scene = -1
        self._in_order: asyncio.Lock  # of the event loop that reads the results
        self._tasks: set[asyncio.Task[object]] = set()  # of :meth:`results`
        # Frames whose tokens are not there yet, by number: a window that did not change since then
        # waits for theirs.
        self._flying: dict[int, tuple[Windows, asyncio.Future[Computed]]] = {}

    async def results(self, source: Source) -> AsyncIterator[FrameResult]:
        """Encode the frames of a source.

        Every frame that is taken yields one result: an embedding, or the error that refused it.

        Raises:
            RuntimeError: this stream's results are being read already.
        """
        if self._tasks:
            raise RuntimeError("the results of this stream are being read already")
        self._in_order = asyncio.Lock()
        tasks: asyncio.Queue[asyncio.Task[FrameResult] | None] = asyncio.Queue(self._depth)
        room = asyncio.Semaphore(self._depth)

        async def feed() -> None:
            try:
                async with contextlib.aclosing(_taken(source, self._policy, room)) as frames:
                    async for number, frame in frames:
                        task = asyncio.create_task(self._one(number, frame))
                        self._tasks.add(task)
                        await tasks.put(task)
            finally:
                # After an error of the source, the frames before it are still given.
                await asyncio.shield(tasks.put(None))

        feeding = asyncio.create_task(feed())
        self._tasks.add(feeding)
        try:
            while (task := await tasks.get()) is not None:
                result = await task
                self._tasks.discard(task)
                room.release()
                yield result
            await feeding  # raises the source's error
        finally:
            while not tasks.empty():
                tasks.get_nowait()
            await self._cancel()

    async def _cancel(self) -> None:
        while self._tasks:
            left = [*self._tasks]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            self._tasks.difference_update(left)

    async def _one(self, number: int, frame: Frame) -> FrameResult:
        began = time.perf_counter()
        record = RunRecord()
        prepared: _Prepared | None = None
        flying: asyncio.Future[Computed] = asyncio.get_running_loop().create_future()
        try:
            async with self._in_order:  # scenes and the cache see the frames in order
                prepared = await asyncio.to_thread(self._prepare, frame)
                self._flying[number] = prepared.windows, flying
            if self._pipeline.bundle.has("stack"):
                prepared = await self._with_flying(prepared)
                encoding = await self._encode(number, prepared, record, flying)
            else:
                encoding = await asyncio.to_thread(self._pipeline.encode, prepared.windows)
        except EdgeRuntimeError as error:
            report = prepared and self._report(number, prepared, record, began)
            return FrameResult(number, frame, None, error, report)
        finally:
            self._flying.pop(number, None)
            flying.cancel()
        size = (frame.image.shape[0], frame.image.shape[1])
        windows, windows_ms = prepared.windows, prepared.windows_ms
        encoded = EncodedImage(self._pipeline, encoding, windows, size, windows_ms)
        return FrameResult(
            number, frame, encoded, None, self._report(number, prepared, record, began)
        )

    async def _encode(
        self,
        number: int,
        prepared: _Prepared,
        record: RunRecord,
        flying: asyncio.Future[Computed],
    ) -> Encoding:
        computed, stack_ms = await self._stack(prepared, record)
        self._store(prepared, computed, number)
        flying.set_result(computed)
        began = time.perf_counter()
        embedding = await asyncio.to_thread(self._pipeline.tail, computed.outputs, prepared.windows)
        tail_ms = (time.perf_counter() - began) * 1000
        return Encoding(embedding, computed.outputs, stack_ms, tail_ms)

    def _prepare(self, frame: Frame) -> _Prepared:
        """Resize, cut, choose and place. Runs in a thread."""
        began = time.perf_counter()
        if self._closed:
            raise OffloadError(f"the stream {self._name!r} was closed", code="closed")
        if not isinstance(frame.image, np.ndarray):
            found = type(frame.image).__name__
            raise ImageError(f"a frame is {found}, expected a uint8 array")
        geometry = self._predictor.bundle.geometry
        for region in frame.keep_local:
            check_region(region)
        small = resize_longest(frame.image, geometry.image_size)
        windows = cut(small, geometry)
        regions = [*frame.keep_local, *(self._config.keep_local if self._config else ())]
        local = windows_in(regions, frame.image.shape[:2], windows.size, geometry)
        usable = self._offloader.usable() if self._offloader else set()
        each_s = self._offloader.local_s if self._offloader else None
        choice = self._chooser.choose(
            edge_ms=each_s and each_s * 1000 * len(windows), usable_nodes=len(usable)
        )
        plan, ledger = None, None
        if self._offloader is not None and choice.place == "nodes":
            if self._scenes is not None:
                plan = self._scenes.frame(small, usable, local)
                ledger = plan.ledger
                if plan.scene != self._scene:
                    self._scene = plan.scene
                    with self._caching:
                        self._cache.clear()
            else:
                ledger = self._offloader.place_photo(windows, local)
        known: dict[int, Mapping[str, np.ndarray]] = {}
        waits: dict[int, tuple[asyncio.Future[Computed], int]] = {}
        if not (self._config and self._config.constant_rate):
            with self._caching:
                for liar in self._shut_out():
                    self._cache.forget(liar)
                found = self._cache.lookup(windows)
            known = {row: each.outputs for row, each in found.items()}
            for earlier, future in [*self._flying.values()]:
                for row, same in _unchanged(windows, earlier).items():
                    if row not in known:
                        waits[row] = future, same
        windows_ms = (time.perf_counter() - began) * 1000
        return _Prepared(windows, plan, ledger, choice, known, waits, windows_ms)

    async def _with_flying(self, prepared: _Prepared) -> _Prepared:
        """Wait for the earlier frames that this one shares windows with."""
        futures = {future for future, _ in prepared.waits.values()}
        if not futures:
            return prepared
        await asyncio.wait(futures)
        known = dict(prepared.known)
        for row, (future, same) in prepared.waits.items():
            if not future.cancelled():  # else that frame failed
                outputs = future.result().outputs
                known[row] = {name: array[same] for name, array in outputs.items()}
        return prepared._replace(known=known)

    async def _stack(self, prepared: _Prepared, record: RunRecord) -> tuple[Computed, float]:
        began = time.perf_counter()
        windows, known = prepared.windows, prepared.known
        if prepared.ledger is not None and self._offloader is not None:
            ledger = prepared.ledger
            running = self._offloader.submit(windows, record, lambda: ledger, known)
            waiting = asyncio.wrap_future(running)
            try:
                await asyncio.wait({waiting})
            finally:
                waiting.cancel()  # if this frame was
            if waiting.cancelled():
                raise OffloadError("the offloader was closed meanwhile", code="closed")
            computed = waiting.result()
        else:
            computed = await asyncio.to_thread(self._at_home, windows, known)
        ms = (time.perf_counter() - began) * 1000
        if not known:  # otherwise it says little about a whole frame
            self._chooser.measured(prepared.choice.place, ms)
        return computed, ms

    def _at_home(self, windows: Windows, known: Mapping[int, Mapping[str, np.ndarray]]) -> Computed:
        feeds = self._pipeline.stack_inputs(windows)
        rest = [row for row in range(len(windows)) if row not in known]
        outputs: dict[str, np.ndarray] = {}
        if rest:
            part = self._pipeline.stack({name: array[rest] for name, array in feeds.items()}, 1)
            for name, array in part.items():
                outputs[name] = np.empty((len(windows), *array.shape[1:]), array.dtype)
                outputs[name][rest] = array
        for row, tokens in known.items():
            for name, array in tokens.items():
                outputs.setdefault(name, np.empty((len(windows), *array.shape), array.dtype))
                outputs[name][row] = array
        return Computed(outputs, dict.fromkeys(rest, HOME))

    def _store(self, prepared: _Prepared, computed: Computed, number: int) -> None:
        shut_out = self._shut_out()
        for row, source in computed.sources.items():
            if source in shut_out:
                continue
            tokens = {name: array[row] for name, array in computed.outputs.items()}
            with self._caching:
                self._cache.store(prepared.windows, row, tokens, source, number)

    def _shut_out(self) -> frozenset[str]:
        """Nodes that were turned away: their tokens are not used again."""
        return self._offloader.shut_out if self._offloader else frozenset()

    def _report(
        self, number: int, prepared: _Prepared, record: RunRecord, began: float
    ) -> FrameReport:
        ledger = prepared.ledger
        shares = prepared.plan.shares if prepared.plan else ledger.exposure() if ledger else {}
        return FrameReport(
            number,
            prepared.plan.scene if prepared.plan else -1,
            prepared.choice,
            tuple(sorted(int(prepared.windows.window[row]) for row in prepared.known)),
            shares,
            record.report(),
            (time.perf_counter() - began) * 1000,
        )

    def new_scene(self) -> None:
        """The source shows something else from the next frame on, says who knows it."""
        if self._scenes is not None:
            self._scenes.new_scene()

    def close(self) -> None:
        """Put on record what the parties have seen. Further frames are refused.

        The predictor stays open. Closing twice is allowed.
        """
        if not self._closed and self._offloader is not None and self._scenes is not None:
            self._offloader.end_stream(self._name)
        self._closed = True

    async def __aenter__(self) -> FrameStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._cancel()  # results that nobody reads to their end
        self.close()


async def _taken(
    source: Source, policy: Policy, room: asyncio.Semaphore
) -> AsyncGenerator[tuple[int, Frame], None]:
    """Frames with their numbers, each when there is room for it."""
    frames = source if isinstance(source, AsyncIterable) else _threaded(source)
    number = 0
    if policy == "every":
        await room.acquire()
        async for item in frames:
            yield number, _frame(item)
            number += 1
            await room.acquire()
        return
    newest: list[tuple[int, Frame]] = []
    changed, ended = asyncio.Event(), False

    async def read() -> None:
        nonlocal number, ended
        try:
            async for item in frames:
                newest[:] = [(number, _frame(item))]
                number += 1
                changed.set()
                await asyncio.sleep(0)  # a source that never waits must not stop everything else
        finally:
            ended = True
            changed.set()

    reading = asyncio.create_task(read())
    try:
        while True:
            await room.acquire()
            while not newest and not ended:
                changed.clear()
                await changed.wait()
            if not newest:
                await reading  # raises its error
                return
            yield newest.pop()
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _threaded(source: Iterable[np.ndarray | Frame]) -> AsyncIterator[np.ndarray | Frame]:
    """The items of an iterable that may block."""
    iterator, nothing = iter(source), object()
    while True:
        item = await asyncio.to_thread(next, iterator, nothing)
        if item is nothing:
            return
        yield item  # type: ignore[misc]


def _unchanged(windows: Windows, earlier: Windows) -> dict[int, int]:
    """Row -> row of an earlier frame with the same window and the same pixels."""
    if windows.size != earlier.size:
        return {}
    same = (windows.pixels == earlier.pixels).all(axis=(1, 2, 3))
    return {int(row): int(row) for row in np.flatnonzero(same)}


def _frame(item: np.ndarray | Frame) -> Frame:
    return item if isinstance(item, Frame) else Frame(item)
