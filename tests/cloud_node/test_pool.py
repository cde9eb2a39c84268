"""A pool of real worker processes: correct outputs, and every way to lose a worker."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud_node import pool as pool_module
from cloud_node.pool import (
    LocalPool,
    PoolClosed,
    QueuedPool,
    Slot,
    WorkerDied,
    WorkerEvent,
    _Pending,
    parse_device,
    visible_devices,
)
from edge_common.errors import BundleError, ConfigError, EngineError
from engines.bundle import Bundle
from engines.ort import OrtEngine

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")

Feeds = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After each test, no worker (zombies included), descriptor or mapping remains."""
    gc.collect()
    _others.clear()
    _others.update(_children())
    before = _holdings()
    yield
    gc.collect()
    assert _children() == []
    assert _holdings() == before


_others: set[int] = set()
"""Processes of earlier tests' fixtures."""


def _children() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = int(path.parent.name), path.read_text().rpartition(")")[2].split()
            command = (path.parent / "cmdline").read_bytes()
            if int(rest[1]) == os.getpid() and (rest[0] == "Z" or b"cloud_node" in command):
                found.append(pid)
    return [pid for pid in found if pid not in _others]


def _holdings() -> tuple[int, int]:
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("memfd:edge-runtime")


class Watched(LocalPool):
    """A pool that records its events."""

    def __init__(self, bundle: Bundle, **options: Any) -> None:
        settings: dict[str, Any] = {"devices": ["cpu"], "threads": 1, "retry_s": (0.05, 0.4)}
        super().__init__(bundle, **{**settings, **options})
        self.events: list[WorkerEvent] = []

    def pids(self) -> list[int]:
        """Pids of the ready workers, by lane."""
        last = {e.lane: e for e in self.events if e.kind in ("ready", "died")}
        return [last[lane].pid for lane in sorted(last) if last[lane].kind == "ready"]

    def kinds(self, lane: int = 0) -> list[str]:
        return [event.kind for event in self.events if event.lane == lane]

    async def wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(bundle: Path | Bundle, **options: Any) -> AsyncIterator[Watched]:
    pool = Watched(bundle if isinstance(bundle, Bundle) else Bundle.load(bundle), **options)
    await pool.start(pool.events.append)
    try:
        yield pool
    finally:
        await pool.close(0)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run with a time limit, so that a fault fails the test and does not hang it."""
    asyncio.run(asyncio.wait_for(main, 90))


def fill(slot: Slot, feeds: Feeds) -> int:
    assert slot.inputs.keys() == feeds.keys()
    for name, array in feeds.items():
        slot.inputs[name][: len(array)] = array
    return len(feeds["window"])


async def ask(pool: LocalPool, feeds: Feeds) -> Feeds:
    """Run one batch and return copies of the outputs."""
    slot = await pool.acquire()
    try:
        outputs = await slot.run(fill(slot, feeds))
        return {name: array.copy() for name, array in outputs.items()}
    finally:
        slot.release()


@pytest.fixture
def batch(bundle_of: Callable[[str], Path]) -> Callable[..., Feeds]:
    """Random rows that fit the stacks of kind ``pixels`` and similar ones."""
    geometry = Bundle.load(bundle_of("pixels")).geometry
    side = geometry.window_pixels

    def make(rows: int, seed: int = 0) -> Feeds:
        rng = np.random.default_rng(seed)
        return {
            "pixels": rng.integers(0, 256, (rows, side, side, 3), dtype=np.uint8),
            "extent": rng.integers(1, side + 1, (rows, 2)),
            "window": rng.integers(0, geometry.windows, rows),
        }

    return make


@pytest.fixture
def direct(bundle_of: Callable[[str], Path]) -> Iterator[Callable[[Feeds], Feeds]]:
    """Run the stack of ``pixels`` in this process."""
    with OrtEngine(bundle_of("pixels") / "stack.onnx", threads=1, device="cpu") as engine:
        yield engine.run


# Outputs


@pytest.mark.process
def test_outputs_are_bit_equal_to_a_direct_run(
    bundle_of: Any, batch: Any, direct: Callable[[Feeds], Feeds]
) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels")) as pool:
            assert (pool.max_batch, pool.lanes, pool.ready) == (9, 1, 1)
            for rows in [*range(1, 10), 1]:
                feeds = batch(rows, seed=rows)
                outputs = await ask(pool, feeds)
                expected = direct(feeds)
                assert outputs.keys() == expected.keys()
                assert outputs["tokens"].tobytes() == expected["tokens"].tobytes()

    run(main())


@pytest.mark.process
def test_a_batch_may_have_more_rows_than_an_image_has_windows(
    bundle_of: Any, batch: Any, direct: Callable[[Feeds], Feeds]
) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels"), max_batch=40) as pool:
            feeds = batch(40)
            assert (await ask(pool, feeds))["tokens"].tobytes() == direct(feeds)["tokens"].tobytes()

    run(main())


@pytest.mark.process
def test_hidden_states(bundle_of: Any) -> None:
    rng = np.random.default_rng(0)
    feeds = {"hidden": rng.normal(size=(3, 4, 8)).astype(np.float32), "window": np.array([8, 0, 3])}

    async def main() -> None:
        async with running(bundle_of("hidden")) as pool:
            with OrtEngine(bundle_of("hidden") / "stack.onnx", threads=1, device="cpu") as engine:
                expected = engine.run(feeds)["tokens"]
            assert (await ask(pool, feeds))["tokens"].tobytes() == expected.tobytes()

    run(main())


@pytest.mark.process
def test_outputs_are_read_only_and_timed(bundle_of: Any, batch: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels")) as pool:
            slot = await pool.acquire()
            outputs = await slot.run(fill(slot, batch(2)))
            assert slot.compute_us > 0
            with pytest.raises(ValueError, match="read-only"):
                outputs["tokens"][:] = 0
            slot.release()

    run(main())


@pytest.mark.process
def test_outputs_stay_until_released_and_block_no_other_batch(
    bundle_of: Any, batch: Any, direct: Callable[[Feeds], Feeds]
) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels"), devices=["cpu", "cpu"]) as pool:
            feeds = batch(4, 99)
            slot = await pool.acquire()
            outputs = await slot.run(fill(slot, feeds))
            assert not outputs["tokens"].flags.owndata  # the pool makes no copy
            for seed in range(12):
                other = batch(4, seed)
                assert (await ask(pool, other))["tokens"].tobytes() == direct(other)[
                    "tokens"
                ].tobytes()
            assert outputs["tokens"].tobytes() == direct(feeds)["tokens"].tobytes()
            slot.release()

    run(main())


@pytest.mark.process
def test_outputs_outlive_the_worker_and_the_pool(
    bundle_of: Any, batch: Any, direct: Callable[[Feeds], Feeds]
) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels")) as pool:
            first, second = batch(9, 1), batch(9, 2)
            slot = await pool.acquire()
            before = await slot.run(fill(slot, first))
            os.kill(pool.pids()[0], signal.SIGKILL)
            await pool.wait(lambda: pool.kinds().count("ready") == 2)
            after = await ask(pool, second)
        assert before["tokens"].tobytes() == direct(first)["tokens"].tobytes()
        assert after["tokens"].tobytes() == direct(second)["tokens"].tobytes()
        slot.release()

    run(main())


@pytest.mark.process
def test_noop_answers_without_an_engine(bundle_of: Any, batch: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels"), noop=True) as pool:
            assert pool.events[-1].text == "noop"
            outputs = await ask(pool, batch(3))
            assert outputs["tokens"].shape == (3, 4, 8)

    run(main())


# Failures that the worker survives


@pytest.mark.process
def test_a_failed_batch_costs_only_itself(
    bundle_of: Any, batch: Any, direct: Callable[[Feeds], Feeds]
) -> None:
    async def main() -> None:
        async with running(bundle_of("broken")) as pool:
            pids = pool.pids()
            poisoned = {**batch(3), "window": np.array([0, 8, 1])}  # the table is one row short
            good = {**batch(3), "window": np.array([0, 7, 1])}
            with OrtEngine(bundle_of("broken") / "stack.onnx", threads=1, device="cpu") as engine:
                expected = engine.run(good)["tokens"].tobytes()
            for _ in range(3):
                slot = await pool.acquire()
                with pytest.raises(EngineError, match="Gather"):
                    await slot.run(fill(slot, poisoned))
                outputs = await slot.run(fill(slot, good))  # the same slot, with the remaining rows
                assert outputs["tokens"].tobytes() == expected
                slot.release()
            assert pool.pids() == pids
            assert pool.kinds() == ["started", "ready"]

    run(main())


# Losing workers


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_fails_its_run_and_is_replaced(
    bundle_of: Any, batch: Any, direct: Callable[[Feeds], Feeds], number: int
) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels")) as pool:
            (pid,) = pool.pids()
            os.kill(pid, signal.SIGSTOP)  # the run can't finish before this
            slot = await pool.acquire()
            going = asyncio.ensure_future(slot.run(fill(slot, batch(2))))
            await asyncio.sleep(0)
            os.kill(pid, number)
            if number != signal.SIGKILL:
                os.kill(pid, signal.SIGCONT)
            with pytest.raises(WorkerDied) as lost:
                await going
            assert lost.value.began
            with pytest.raises(WorkerDied) as lost:
                await slot.run(1)
            assert not lost.value.began
            slot.release()
            feeds = batch(5, 1)
            assert (await ask(pool, feeds))["tokens"].tobytes() == direct(feeds)["tokens"].tobytes()
            assert pool.kinds() == ["started", "ready", "died", "started", "ready"]
            assert signal.Signals(number).name in pool.events[2].text
            assert pool.events[-1].restarts == 1
            assert pool.pids() != [pid]
            assert not Path(f"/proc/{pid}").exists()

    run(main())


@pytest.mark.process
def test_a_run_that_the_node_cannot_handle_is_lost_with_its_worker(
    bundle_of: Any, batch: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels"), noop=True) as pool:
            with monkeypatch.context() as patch:
                patch.setattr(pool_module._Lane, "_end_run", lambda *_: 1 // 0)
                slot = await pool.acquire()
                with pytest.raises(WorkerDied):
                    await slot.run(fill(slot, batch(2)))
                slot.release()
            assert "ZeroDivisionError" in caplog.text
            caplog.clear()  # log records keep the arrays of their errors alive
            assert (await ask(pool, batch(2))).keys() == {"tokens"}

    run(main())


@pytest.mark.process
def test_an_unsupervised_lane_ends_the_pool(
    bundle_of: Any, batch: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels"), devices=["cpu", "cpu"], noop=True) as pool:
            following = asyncio.ensure_future(pool.follow())
            (pid, _) = pool.pids()
            os.kill(pid, signal.SIGSTOP)  # the run can't finish before this
            slots = [await pool.acquire() for _ in range(2)]
            runs = [asyncio.ensure_future(slot.run(fill(slot, batch(2)))) for slot in slots]
            monkeypatch.setattr(
                pool_module._Lane, "_fail_runs", _once(pool_module._Lane._fail_runs)
            )
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(following, 60)
            ended = await asyncio.wait_for(asyncio.gather(*runs, return_exceptions=True), 60)
            assert [isinstance(end, WorkerDied) for end in ended].count(True) == 1
            for slot in slots:
                slot.release()
            caplog.clear()

    run(main())


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, failing on its first call."""
    failures = iter([1])

    def failing(*args: Any) -> Any:
        for number in failures:
            number // 0
        return function(*args)

    return failing


@pytest.mark.process
def test_an_idle_worker_that_dies_is_replaced(bundle_of: Any, batch: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels")) as pool:
            for restarts in range(1, 4):
                os.kill(pool.pids()[0], signal.SIGKILL)
                await pool.wait(lambda n=restarts: pool.kinds().count("ready") == n + 1)
                await ask(pool, batch(1))

    run(main())


@pytest.mark.process
def test_a_slot_of_a_dead_worker_is_not_given_out_twice(bundle_of: Any, batch: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels"), noop=True) as pool:
            stale = await pool.acquire()
            stale.inputs["pixels"][:] = 7
            os.kill(pool.pids()[0], signal.SIGKILL)
            await pool.wait(lambda: pool.kinds().count("ready") == 2)
            fresh = await pool.acquire()
            assert not np.shares_memory(stale.inputs["pixels"], fresh.inputs["pixels"])
            waiting = asyncio.ensure_future(pool.acquire())
            await asyncio.sleep(0.05)
            assert not waiting.done()
            with pytest.raises(WorkerDied):
                await stale.run(1)
            stale.release()
            (await waiting).release()
            fresh.release()

    run(main())


@pytest.mark.process
def test_a_slot_of_a_dead_worker_does_not_hold_up_the_next(bundle_of: Any, batch: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels")) as pool:
            stale = await pool.acquire()
            os.kill(pool.pids()[0], signal.SIGKILL)
            await pool.wait(lambda: pool.kinds().count("ready") == 2)
            await ask(pool, batch(1))
            stale.release()

    run(main())


@pytest.mark.process
def test_a_hung_worker_is_killed(bundle_of: Any, batch: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels"), hang_s=0.3) as pool:
            (pid,) = pool.pids()
            slot = await pool.acquire()
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(WorkerDied):
                await slot.run(fill(slot, batch(1)))
            slot.release()
            await ask(pool, batch(1))
            assert "hung" in pool.events[2].text
            assert not Path(f"/proc/{pid}").exists()

    run(main())


@pytest.mark.process
def test_a_slow_worker_is_not_hung(bundle_of: Any, batch: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("slow"), hang_s=0.05) as pool:
            await ask(pool, batch(9))
            assert pool.kinds() == ["started", "ready"]

    run(main())


@pytest.mark.process
def test_an_idle_worker_is_not_hung(bundle_of: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels"), hang_s=0.5) as pool:
            await asyncio.sleep(1.5)
            assert pool.kinds() == ["started", "ready"]

    run(main())


@pytest.mark.process
def test_a_worker_that_always_has_a_batch_is_not_hung(bundle_of: Any, batch: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels"), noop=True, hang_s=0.5) as pool:
            (lane,), loop = pool._lanes, asyncio.get_running_loop()
            other: Any = await pool.acquire()
            lane.runs[0] = _Pending(other, 1, loop.create_future())  # as if it always came next
            end = loop.time() + 1.5
            while loop.time() < end:
                await ask(pool, batch(1))
            assert pool.kinds() == ["started", "ready"]
            del lane.runs[0]
            other.release()

    run(main())


@pytest.mark.process
def test_time_in_which_the_whole_node_was_suspended_is_no_hang(bundle_of: Any, batch: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels"), hang_s=1.0) as pool:
            slot = await pool.acquire()
            os.kill(pool.pids()[0], signal.SIGSTOP)  # Ctrl-Z or a closed laptop lid stops both
            going = asyncio.ensure_future(slot.run(fill(slot, batch(1))))
            await asyncio.sleep(0)
            time.sleep(1.5)
            os.kill(pool.pids()[0], signal.SIGCONT)
            await going
            slot.release()
            assert pool.kinds() == ["started", "ready"]

    run(main())


@pytest.mark.process
def test_a_worker_that_never_becomes_ready_is_killed(bundle_of: Any) -> None:
    async def main() -> None:
        pool = Watched(Bundle.load(bundle_of("pixels")), start_s=0.01)
        with pytest.raises(EngineError, match=r"not ready within 0.01 s"):
            await pool.start(pool.events.append)

    run(main())


@pytest.mark.process
def test_the_pool_survives_the_loss_of_one_of_two_workers(
    bundle_of: Any, batch: Any, direct: Callable[[Feeds], Feeds]
) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels"), devices=["cpu", "cpu"]) as pool:
            assert (pool.lanes, pool.ready) == (2, 2)
            frozen = pool.pids()[1]
            os.kill(frozen, signal.SIGSTOP)
            stuck = [await pool.acquire() for _ in range(2)]  # one on each worker
            runs = [asyncio.ensure_future(slot.run(fill(slot, batch(1)))) for slot in stuck]
            done, pending = await asyncio.wait(runs, return_when=asyncio.FIRST_COMPLETED)
            assert (len(done), len(pending)) == (1, 1)
            stuck[runs.index(done.pop())].release()
            for seed in range(5):
                feeds = batch(3, seed)
                outputs = await ask(pool, feeds)
                assert outputs["tokens"].tobytes() == direct(feeds)["tokens"].tobytes()
            os.kill(frozen, signal.SIGKILL)
            with pytest.raises(WorkerDied):
                await pending.pop()
            for slot in stuck:
                slot.release()
            await pool.wait(lambda: pool.kinds(1).count("ready") == 2)
            assert pool.kinds(0) == ["started", "ready"]
            assert pool.ready == 2

    run(main())


# Starts that fail


@pytest.mark.process
def test_the_error_of_a_failed_first_start_is_raised(bundle_of: Any, tmp_path: Path) -> None:
    damaged = shutil.copytree(bundle_of("pixels"), tmp_path / "damaged")
    with (damaged / "stack.onnx").open("ab") as file:
        file.write(b"x")

    async def main() -> None:
        for devices in (["cpu"], ["cpu", "cpu", "cpu"]):
            pool = Watched(Bundle.load(damaged), devices=devices)
            with pytest.raises(BundleError, match=r"stack.onnx is damaged"):
                await pool.start(pool.events.append)
            assert pool.ready == 0
            with pytest.raises(PoolClosed):
                await pool.acquire()
            assert _children() == []

    run(main())


@pytest.mark.process
def test_a_process_that_cannot_start_is_reported(
    bundle_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")

    async def main() -> None:
        pool = Watched(Bundle.load(bundle_of("pixels")))
        with pytest.raises(EngineError, match="cannot be started: No such file"):
            await pool.start(pool.events.append)

    run(main())


@pytest.mark.process
def test_later_starts_are_tried_until_one_succeeds(
    bundle_of: Any, tmp_path: Path, batch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(bundle_of("pixels"), tmp_path / "copy")

    async def main() -> None:
        async with running(copy, retry_s=(0.01, 0.04)) as pool:
            (copy / "stack.onnx").rename(copy / "away")
            os.kill(pool.pids()[0], signal.SIGKILL)
            await pool.wait(lambda: pool.kinds().count("died") >= 5)
            assert pool.ready == 0
            waiting = asyncio.ensure_future(ask(pool, batch(1)))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            (copy / "away").rename(copy / "stack.onnx")
            await waiting
            died = [event for event in pool.events if event.kind == "died"]
            assert [event.seconds for event in died[:5]] == [0.01, 0.02, 0.04, 0.04, 0.04]
            assert "SIGKILL" in died[0].text
            assert "stack.onnx is missing" in died[1].text

    run(main())
    assert "4 failed starts in a row, the last because" in caplog.text


@pytest.mark.process
def test_a_replaced_bundle_is_not_served(bundle_of: Any, tmp_path: Path, batch: Any) -> None:
    copy = shutil.copytree(bundle_of("pixels"), tmp_path / "copy")

    async def main() -> None:
        async with running(copy) as pool:
            shutil.copytree(bundle_of("other"), copy, dirs_exist_ok=True)
            os.kill(pool.pids()[0], signal.SIGKILL)
            await pool.wait(lambda: pool.kinds().count("died") >= 2)
            assert "restart the node" in pool.events[-1].text
            assert pool.ready == 0

    run(main())


# Slots


@pytest.mark.process
def test_slots_are_given_out_in_order_and_cancelled_waits_lose_none(
    bundle_of: Any, batch: Any
) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels")) as pool:
            slot = await pool.acquire()
            order: list[int] = []

            async def wait(number: int) -> None:
                waited = await pool.acquire()
                order.append(number)
                waited.release()

            waiting = [asyncio.ensure_future(wait(number)) for number in range(6)]
            await asyncio.sleep(0.02)
            assert order == []
            waiting[0].cancel()
            waiting[3].cancel()
            await asyncio.sleep(0)
            slot.release()
            waiting[1].cancel()  # the caller whose turn is next
            await asyncio.wait(waiting)
            assert order == [2, 4, 5]

    run(main())


class OneSlot(QueuedPool):
    """A pool that hands out `slot`, if there is one."""

    slot: Any = None
    ready = 1
    _runs = 0

    def _free_slot(self) -> Any:
        slot, self.slot = self.slot, None
        return slot

    async def start(self, on_event: Any) -> None: ...
    async def follow(self) -> None: ...
    async def close(self, drain_s: float) -> None: ...


def test_a_caller_woken_without_a_slot_keeps_its_place(bundle_of: Any) -> None:
    """This happens when a worker dies in the moment in which its slot becomes free."""

    async def main() -> None:
        pool = OneSlot(Bundle.load(bundle_of("pixels")), None, None)
        first, second = (asyncio.ensure_future(pool.acquire()) for _ in range(2))
        await asyncio.sleep(0)
        pool.wake()
        await asyncio.sleep(0.01)
        pool.slot = object()
        pool.wake()
        await asyncio.sleep(0.01)
        assert (first.done(), second.done()) == (True, False)
        second.cancel()

    run(main())


@pytest.mark.process
def test_a_cancelled_run_keeps_its_memory_until_the_worker_has_finished(
    bundle_of: Any, batch: Any
) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels")) as pool:
            (pid,) = pool.pids()
            os.kill(pid, signal.SIGSTOP)
            slot = await pool.acquire()
            going = asyncio.ensure_future(slot.run(fill(slot, batch(1))))
            await asyncio.sleep(0)
            going.cancel()
            with pytest.raises(asyncio.CancelledError):
                await going
            slot.release()
            waiting = asyncio.ensure_future(pool.acquire())
            await asyncio.sleep(0.05)
            assert not waiting.done()
            os.kill(pid, signal.SIGCONT)
            (await waiting).release()
            assert pool.pids() == [pid]

    run(main())


@pytest.mark.process
def test_a_gpu_gets_its_next_batch_while_it_computes(bundle_of: Any, batch: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels"), noop=True) as pool:  # the pool treats it as a GPU
            (pid,) = pool.pids()
            os.kill(pid, signal.SIGSTOP)
            slots = [await pool.acquire(), await pool.acquire()]
            runs = [asyncio.ensure_future(slot.run(fill(slot, batch(1)))) for slot in slots]
            third = asyncio.ensure_future(pool.acquire())
            await asyncio.sleep(0.05)
            assert not third.done()
            os.kill(pid, signal.SIGCONT)
            await asyncio.gather(*runs)
            for slot in slots:
                slot.release()
            (await third).release()

    run(main())


@pytest.mark.process
def test_a_batch_not_begun_by_its_dead_worker_is_marked(bundle_of: Any, batch: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels"), noop=True) as pool:
            slots = [await pool.acquire(), await pool.acquire()]
            os.kill(pool.pids()[0], signal.SIGSTOP)
            runs = [asyncio.ensure_future(slot.run(fill(slot, batch(1)))) for slot in slots]
            await asyncio.sleep(0)
            os.kill(pool.pids()[0], signal.SIGKILL)
            errors = await asyncio.gather(*runs, return_exceptions=True)
            assert [getattr(error, "began", None) for error in errors] == [True, False]
            for slot in slots:
                slot.release()

    run(main())


@pytest.mark.process
def test_a_slot_may_be_released_from_another_thread_and_twice(bundle_of: Any, batch: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels")) as pool:
            for _ in range(20):
                slot = await pool.acquire()
                await slot.run(fill(slot, batch(1)))
                threads = [threading.Thread(target=slot.release) for _ in range(2)]
                for thread in threads:
                    thread.start()
                slot.release()
                for thread in threads:
                    thread.join()
            one = await pool.acquire()
            two = asyncio.ensure_future(pool.acquire())
            await asyncio.sleep(0.05)
            assert not two.done()  # a second release hands out nothing
            one.release()
            (await two).release()

    run(main())


@pytest.mark.process
def test_misuse_of_a_slot_raises(bundle_of: Any, batch: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels")) as pool:
            slot = await pool.acquire()
            for rows in (0, -1, 10):
                with pytest.raises(ValueError, match="expected 1 to 9"):
                    await slot.run(rows)
            await slot.run(fill(slot, batch(1)))
            with pytest.raises(RuntimeError, match="after success"):
                await slot.run(1)
            slot.release()
            with pytest.raises(RuntimeError, match="release"):
                await slot.run(1)

    run(main())


# Closing


@pytest.mark.process
def test_close_lets_runs_end(bundle_of: Any, batch: Any, direct: Callable[[Feeds], Feeds]) -> None:
    async def main() -> None:
        async with running(bundle_of("slow")) as pool:
            slot = await pool.acquire()
            feeds = batch(2)
            going = asyncio.ensure_future(slot.run(fill(slot, feeds)))
            waiting = asyncio.ensure_future(pool.acquire())
            await asyncio.sleep(0.01)
            closing = asyncio.ensure_future(pool.close(600))
            with pytest.raises(PoolClosed):
                await waiting
            outputs = await going
            await closing
            assert np.array_equal(outputs["tokens"], direct(feeds)["tokens"])
            slot.release()
            assert pool.kinds() == ["started", "ready", "stopped"]
            assert _children() == []

    run(main())


@pytest.mark.process
@pytest.mark.parametrize("again", [False, True])
def test_a_short_grace_or_a_second_close_kills_the_workers(
    bundle_of: Any, batch: Any, again: bool
) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels")) as pool:
            slot = await pool.acquire()
            os.kill(pool.pids()[0], signal.SIGSTOP)
            going = asyncio.ensure_future(slot.run(fill(slot, batch(2))))
            await asyncio.sleep(0.01)
            closing = asyncio.ensure_future(pool.close(10_000 if again else 0.05))
            await asyncio.sleep(0.01)
            if again:
                await pool.close(10_000)
            with pytest.raises(PoolClosed):
                await going
            await closing
            slot.release()
            assert _children() == []

    run(main())


@pytest.mark.process
def test_closing_while_starting_and_while_waiting_to_restart(bundle_of: Any) -> None:
    async def main() -> None:
        pool = Watched(Bundle.load(bundle_of("pixels")), devices=["cpu", "cpu"])
        starting = asyncio.ensure_future(pool.start(pool.events.append))
        await pool.wait(lambda: len(pool.events) == 2)
        await pool.close(100)
        with pytest.raises(PoolClosed):
            await starting
        assert _children() == []
        async with running(bundle_of("pixels"), retry_s=(1000, 1000)) as pool:
            os.kill(pool.pids()[0], signal.SIGKILL)
            await pool.wait(lambda: pool.kinds()[-1] == "died")

    run(main())


@pytest.mark.process
def test_start_may_be_cancelled(bundle_of: Any) -> None:
    async def main() -> None:
        pool = Watched(Bundle.load(bundle_of("slow")))
        starting = asyncio.ensure_future(pool.start(pool.events.append))
        await pool.wait(lambda: bool(pool.events))
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    run(main())


@pytest.mark.process
def test_an_unclosed_pool_leaves_no_worker(bundle_of: Any) -> None:
    async def main() -> None:
        pool = Watched(Bundle.load(bundle_of("pixels")), devices=["cpu", "cpu"])
        await pool.start(pool.events.append)

    run(main())


@pytest.mark.process
def test_workers_die_with_their_parent(bundle_of: Any) -> None:
    code = f"""
        import asyncio
        from cloud_node.pool import LocalPool
        from engines.bundle import Bundle

        async def main():
            pool = LocalPool(Bundle.load({str(bundle_of("slow"))!r}), devices=["cpu", "cpu"])
            await pool.start(lambda event: print(event.pid, flush=True))
            slots = [await pool.acquire() for _ in range(2)]
            for slot in slots:
                for array in slot.inputs.values():
                    array[:] = 1
            runs = [asyncio.ensure_future(slot.run(9)) for slot in slots]
            await asyncio.sleep(0)
            print("running", flush=True)
            await asyncio.gather(*runs)
            await asyncio.sleep(1000)

        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    root = Path(pool_module.__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout
        pids = set()
        while (line := parent.stdout.readline().strip()) != "running":
            assert line, "it ended"
            pids.add(int(line))
        assert len(pids) == 2
        assert all(_command(pid) for pid in pids)
        os.kill(min(pids), signal.SIGSTOP)  # a stopped worker can't notice by itself
        parent.kill()
    while any(b"cloud_node.worker_start" in _command(pid) for pid in pids):
        time.sleep(0.01)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# Over a long time


@pytest.mark.process
def test_a_thousand_runs_cost_no_memory_and_no_descriptors(bundle_of: Any, batch: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels")) as pool:
            (pid,) = pool.pids()

            async def some(count: int) -> tuple[int, int]:
                for seed in range(count):
                    slot = await pool.acquire()
                    try:
                        await slot.run(fill(slot, batch(seed % 9 + 1, seed)))
                    finally:
                        slot.release()
                return len(os.listdir("/proc/self/fd")), _resident(pid)

            fds, resident = await some(300)
            later_fds, later_resident = await some(1000)
            assert later_fds == fds
            assert later_resident < resident + (4 << 20)
            assert pool.pids() == [pid]

    run(main())


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.process
def test_many_restarts_leave_nothing_behind(bundle_of: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels"), noop=True, retry_s=(0.001, 0.001)) as pool:
            fds = len(os.listdir("/proc/self/fd"))
            for restarts in range(1, 9):
                slot = await pool.acquire()
                os.kill(pool.pids()[0], signal.SIGKILL)
                with contextlib.suppress(WorkerDied):  # or the run finished first
                    await slot.run(1)
                slot.release()
                await pool.wait(lambda n=restarts: pool.kinds().count("ready") == n + 1)
            assert len(os.listdir("/proc/self/fd")) == fds
            slots = [await pool.acquire(), await pool.acquire()]  # no slot was lost on the way
            for slot in slots:
                slot.release()

    run(main())


@pytest.mark.process
def test_outputs_stay_separate_under_cancellations_and_crashes(
    bundle_of: Any, batch: Any, direct: Callable[[Feeds], Feeds]
) -> None:
    """Clients cancel, hold slots and release them late, while workers are killed and frozen."""
    rng = np.random.default_rng(3)
    died = answered = 0

    async def client(pool: Watched, rounds: int) -> None:
        nonlocal died, answered
        for _ in range(rounds):
            slot = await pool.acquire()
            try:
                feeds = batch(int(rng.integers(1, 10)), int(rng.integers(1 << 30)))
                going = asyncio.ensure_future(slot.run(fill(slot, feeds)))
                if rng.random() < 0.2:
                    await asyncio.sleep(float(rng.random()) * 0.002)
                    going.cancel()
                outputs = await going
                await asyncio.sleep(float(rng.random()) * 0.01)
                assert outputs["tokens"].tobytes() == direct(feeds)["tokens"].tobytes()
                answered += 1
            except WorkerDied:
                died += 1
            except asyncio.CancelledError:
                pass
            finally:
                slot.release()

    async def vandal(pool: Watched) -> None:
        while True:
            await asyncio.sleep(float(rng.random()) * 0.1)
            for pid in pool.pids():
                if rng.random() < 0.3:
                    # the process is gone but not yet reported
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGSTOP)
                        await asyncio.sleep(0.02)
                        if pid in pool.pids():
                            os.kill(pid, rng.choice([signal.SIGCONT, signal.SIGKILL]))

    async def main() -> None:
        options = {"devices": ["cpu", "cpu"], "retry_s": (0.01, 0.01)}
        async with running(bundle_of("pixels"), **options) as pool:
            spoiling = asyncio.ensure_future(vandal(pool))
            while died < 5:
                await asyncio.gather(*(client(pool, 50) for _ in range(8)))
                if spoiling.done():
                    spoiling.result()
            spoiling.cancel()
            await asyncio.wait([spoiling])
            for pid in pool.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            await asyncio.gather(*(client(pool, 10) for _ in range(8)))
            assert answered > 100
            for lane in pool._lanes:  # all slots are back
                assert sorted(lane._free_places) == [0, 1]
                assert (lane._slots, lane.runs) == (set(), {})

    run(main())


# Events and settings


@pytest.mark.process
def test_a_failing_event_listener_does_no_harm(bundle_of: Any, batch: Any) -> None:
    async def main() -> None:
        pool = LocalPool(Bundle.load(bundle_of("pixels")), devices=["cpu"], threads=1)

        def fail(event: WorkerEvent) -> None:
            raise OSError("no more disk")

        await pool.start(fail)
        await ask(pool, batch(1))
        await pool.close(0)

    run(main())


@pytest.mark.process
def test_events_carry_lane_and_duration(bundle_of: Any) -> None:
    async def main() -> None:
        async with running(bundle_of("pixels")) as pool:
            started, ready = pool.events
            assert (started.kind, started.lane, started.device) == ("started", 0, "cpu")
            assert started.pid == ready.pid == _children()[0]
            assert ready.seconds > 0
            assert ready.text == "cpu"

    run(main())


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"max_batch": 8}, "expected at least 9"),
        ({"devices": []}, "no devices"),
        ({"devices": ["gpu"]}, "device 'gpu'"),
        ({"devices": ["cuda:x"]}, "device 'cuda:x'"),
        ({"devices": ["cpu:1"]}, "without a number"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_invalid_settings_are_refused(bundle_of: Any, options: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        LocalPool(Bundle.load(bundle_of("pixels")), **options)


def test_devices_become_lanes() -> None:
    assert parse_device("auto") == ("auto", 0)
    assert parse_device("cuda") == parse_device("cuda:0") == ("cuda", 0)
    assert parse_device("tensorrt:12") == ("tensorrt", 12)


def test_a_worker_sees_only_its_own_gpu() -> None:
    assert visible_devices(3, None) == "3"
    assert visible_devices(1, "GPU-aa, 5") == "5"
    with pytest.raises(ConfigError, match="shows 2"):
        visible_devices(2, "0,1")
