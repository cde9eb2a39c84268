"""Replicas on a real local Ray cluster: correct outputs, replacement of a killed replica, no tensor
on disk, no process left.

One small local cluster of two replicas serves most tests and ends with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cloud_node import ray_pool
from cloud_node.pool import PoolClosed, WorkerDied, WorkerEvent
from cloud_node.ray_pool import Failures, RayPool, Replica, seal, unseal
from cloud_node.shared_memory import Layout
from cloud_node.worker_messages import Failed, Open
from edge_common.errors import BundleError, ConfigError, EngineError
from engines.bundle import Bundle
from engines.ort import OrtEngine

pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[serve]'")
pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'ray[serve]'")
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/mounts").exists() or not Path("/dev/shm").exists(),
    reason="a node keeps Ray's objects in /dev/shm, which is Linux's",
)

Feeds = dict[str, np.ndarray]
ADDRESS = "127.0.0.1:1"  # nothing listens there


class Running:
    """A started pool, and an event loop in its own thread to call it from."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.events: list[WorkerEvent] = []
        self.pool = RayPool(bundle, address="local", device="cpu", replicas=2, threads=1)
        try:
            self.call(self.pool.start(self.events.append))
        except BaseException:
            self.end()
            raise

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(120)

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def ask(self, feeds: Feeds) -> Feeds:
        """Run a batch and return copies of the outputs."""
        slot = await self.pool.acquire()
        try:
            rows = fill(slot.inputs, feeds)
            return {name: array.copy() for name, array in (await slot.run(rows)).items()}
        finally:
            slot.release()

    def pids(self) -> set[int]:
        """The replicas' pids, as they report them."""

        async def ask() -> set[int]:
            found: set[int] = set()
            for _ in range(200):
                found.add((await self.pool._handle.about.remote())[2])
                if len(found) == 2:
                    break
            return found

        return self.call(ask())  # type: ignore[no-any-return]

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(1200):
            if condition():
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"did not come true; {self.events}")

    def direct(self, feeds: Feeds) -> Feeds:
        with OrtEngine(self.bundle.stage_path("stack"), threads=1, device="cpu") as engine:
            return engine.run(feeds)


def fill(inputs: Feeds, feeds: Feeds) -> int:
    for name, array in feeds.items():
        inputs[name][: len(array)] = array
    return len(next(iter(feeds.values())))


def make_feeds(bundle: Bundle, count: int, seed: int = 0) -> Feeds:
    rng = np.random.default_rng(seed)
    w = bundle.geometry.window_pixels
    return {
        "pixels": rng.integers(0, 256, (count, w, w, 3), dtype=np.uint8),
        "extent": rng.integers(1, w + 1, (count, 2)),
        "window": rng.permutation(bundle.geometry.windows)[:count],
    }


def ray_processes() -> dict[int, str]:
    """All processes of Ray, of any user, by pid."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text.startswith("ray::") or "/ray/core/src/" in text or "/ray/_private/" in text:
                found[int(path.parent.name)] = text
    return found


def folders() -> set[Path]:
    roots = (Path("/dev/shm"), Path(os.environ.get("TMPDIR", "/tmp")))
    return {path for root in roots for path in root.glob("edge-runtime-ray-*")}


def gone(before: dict[int, str]) -> dict[int, str]:
    """Wait until Ray's new processes have ended. The last ones take a moment."""
    left: dict[int, str] = {}
    for _ in range(300):
        left = {pid: text for pid, text in ray_processes().items() if pid not in before}
        if not left:
            break
        time.sleep(0.05)
    return left


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[[str], Path]) -> Bundle:
    """A bundle with batches of about one second, long enough to kill a worker in the middle."""
    return Bundle.load(bundle_of("slower"))


@pytest.fixture(scope="module")
def running(bundle: Bundle) -> Iterator[Running]:
    """A pool of two replicas. Its end checks that nothing remains."""
    before, before_folders = ray_processes(), folders()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_pool.os, "cpu_count", lambda: 4)  # Ray counts so: one more replica fits
        running = Running(bundle)
    late = None
    try:
        yield running
        feeds = make_feeds(bundle, 2, seed=9)

        async def keep() -> Feeds:
            slot = await running.pool.acquire()
            return await slot.run(fill(slot.inputs, feeds))  # the slot is never released

        late = running.call(keep())
        expected = running.direct(feeds)
    finally:
        running.call(running.pool.close(5))
        with pytest.raises(PoolClosed):
            running.call(running.pool.acquire())
        running.end()
    assert late is not None
    np.testing.assert_array_equal(late["tokens"], expected["tokens"])  # valid after the pool's end
    assert running.events[-1].kind != "died"
    assert gone(before) == {}
    assert folders() == before_folders


# With two replicas


@pytest.mark.process
def test_outputs_are_those_of_the_engine_bit_for_bit(running: Running) -> None:
    pool = running.pool
    assert (pool.ready, pool.lanes) == (2, 2)
    assert [event.kind for event in running.events[:4]] == ["started"] * 2 + ["ready"] * 2
    assert {event.lane for event in running.events[:4]} == {0, 1}
    batches = [make_feeds(running.bundle, rows, seed=rows) for rows in (1, 4, pool.max_batch)]

    async def together() -> list[Feeds]:
        return await asyncio.gather(*(running.ask(feeds) for feeds in batches))

    for feeds, found in zip(batches, running.call(together()), strict=True):
        expected = running.direct(feeds)
        assert found["tokens"].dtype == expected["tokens"].dtype
        np.testing.assert_array_equal(found["tokens"], expected["tokens"])


@pytest.mark.process
def test_a_batch_that_fails_costs_only_that_batch(running: Running) -> None:
    feeds = make_feeds(running.bundle, 3)
    wrong = {**feeds, "window": feeds["window"] + running.bundle.geometry.windows}
    pids = running.pids()

    async def both() -> Feeds:
        slot = await running.pool.acquire()
        with pytest.raises(EngineError):
            await slot.run(fill(slot.inputs, wrong))
        fill(slot.inputs, feeds)  # the same slot, with other rows
        outputs = {name: array.copy() for name, array in (await slot.run(3)).items()}
        assert slot.compute_us > 0
        with pytest.raises(RuntimeError, match="after success"):
            await slot.run(3)
        slot.release()
        slot.release()
        return outputs

    found = running.call(both())
    np.testing.assert_array_equal(found["tokens"], running.direct(feeds)["tokens"])
    assert running.pids() == pids


@pytest.mark.process
@pytest.mark.parametrize(
    "change", [lambda array: array[:1], lambda array: array.astype(np.float16)]
)
def test_outputs_of_another_form_fail_only_their_batch(
    running: Running, monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    feeds = make_feeds(running.bundle, 2)

    def opened(sealed: Any, key: bytes) -> Feeds:
        return {name: change(a) for name, a in unseal(sealed, key, result=True).items()}

    with monkeypatch.context() as patch:
        patch.setattr(ray_pool, "_open", opened)
        with pytest.raises(EngineError, match="returned tokens in another form"):
            running.call(running.ask(feeds))
    outputs = running.call(running.ask(feeds))
    np.testing.assert_array_equal(outputs["tokens"], running.direct(feeds)["tokens"])


@pytest.mark.process
def test_a_cancelled_run_gives_its_slot_back_once_it_is_over(running: Running) -> None:
    pool = running.pool
    feeds = make_feeds(running.bundle, 1)

    async def cancel() -> None:
        slot = await pool.acquire()
        task = asyncio.ensure_future(slot.run(fill(slot.inputs, feeds)))
        await asyncio.sleep(0.1)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        slot.release()
        assert len(pool._pending) == 1  # the replica still computes
        assert pool._slots
        await running.until(lambda: not pool._pending)
        assert not pool._slots

    running.call(cancel())


@pytest.mark.process
def test_a_replica_killed_in_a_request_is_replaced(running: Running) -> None:
    pool = running.pool
    feeds = make_feeds(running.bundle, 4)
    victim, survivor = running.pids()
    restarts = running.events[-1].restarts

    async def lose_one() -> list[Any]:
        tasks = [asyncio.ensure_future(running.ask(feeds)) for _ in range(2)]  # one on each replica
        await asyncio.sleep(0.3)
        os.kill(victim, signal.SIGKILL)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        results.append(await running.ask(feeds))  # the next request, on any replica
        await running.until(lambda: pool.ready == 1 or running.events[-1].restarts > restarts)
        await running.until(lambda: pool.ready == 2)
        return results

    *two, after = running.call(lose_one())
    expected = running.direct(feeds)["tokens"]
    lost = [result for result in two if isinstance(result, BaseException)]
    assert [type(error) for error in lost] == [WorkerDied]
    (kept,) = [result for result in two if not isinstance(result, BaseException)]
    for outputs in (kept, after):
        np.testing.assert_array_equal(outputs["tokens"], expected)
    kinds = [event.kind for event in running.events]
    assert kinds[-2:] == ["died", "ready"]
    assert running.events[-1].restarts == restarts + 1
    assert pool.lanes == 2
    pids = running.pids()
    assert len(pids) == 2
    assert survivor in pids
    assert victim not in pids


@pytest.mark.process
def test_ray_sees_only_encrypted_tensors(running: Running, monkeypatch: Any) -> None:
    """Neither Ray's store, which may spill to disk, nor its logs contain a window."""
    import ray

    canary = os.urandom(16)
    feeds = make_feeds(running.bundle, 4)
    flat = feeds["pixels"].reshape(-1)
    flat[:] = np.frombuffer(canary * (flat.size // 16 + 1), np.uint8)[: flat.size]
    stored, returned, put, open_ = [], [], ray_pool._put, ray_pool._open

    def keep(*args: Any) -> Any:
        stored.append(put(*args))
        return stored[-1]

    def look(sealed: Any, key: bytes) -> Feeds:
        returned.append(sealed)
        return open_(sealed, key)

    monkeypatch.setattr(ray_pool, "_put", keep)
    monkeypatch.setattr(ray_pool, "_open", look)
    tokens = running.call(running.ask(feeds))["tokens"].tobytes()
    with pytest.raises(EngineError):  # the same when a batch fails
        running.call(running.ask({**feeds, "window": feeds["window"] + 10_000}))
    assert len(stored) == 2
    for sealed in [ray.get(ref) for ref in stored] + returned:
        for _, _, _, data in sealed.values():
            assert canary not in data.tobytes()
            assert tokens[:16] not in data.tobytes()
    session = running.pool._cluster._folder
    assert session is not None
    files = [path for path in Path(session).rglob("*") if path.is_file()]
    assert any("replica" in path.name for path in files)
    forms = (canary, canary.hex().encode(), repr(canary)[2:-1].encode())
    listed = re.compile(rb"[\[ ,]+".join(str(byte).encode() for byte in canary))
    for path in files:
        content = path.read_bytes()
        assert not any(form in content for form in forms), path
        assert not listed.search(content), path


@pytest.mark.process
def test_the_node_s_own_cluster_is_closed_to_others(running: Running) -> None:
    from ray import serve

    session = running.pool._cluster._folder
    assert session is not None
    assert Path(session).stat().st_mode & 0o077 == 0
    assert os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert serve.status().proxies == {}  # nothing accepts requests over HTTP


@pytest.mark.process
def test_another_process_can_use_the_cluster_and_leave_it_running(
    running: Running, bundle: Bundle, tmp_path: Path
) -> None:
    """It connects, fails on a damaged copy, serves, and removes only its own application."""
    import ray
    from ray import serve

    damaged = tmp_path / "damaged"
    shutil.copytree(bundle.path, damaged)
    script = """
        import asyncio, json, sys
        from cloud_node.ray_pool import RayPool
        from engines.bundle import Bundle
        from edge_common.errors import EdgeRuntimeError

        address, path, options = sys.argv[1:]

        async def attempt():
            bundle = Bundle.load(path)
            if path.endswith("damaged"):
                with (bundle.path / "stack.onnx").open("ab") as file:
                    file.write(b"x")
            chosen = {"device": "cpu", "threads": 1, "start_s": 60.0, **json.loads(options)}
            pool = RayPool(bundle, address=address, name="other", **chosen)
            try:
                await pool.start(lambda event: None)
                slot = await pool.acquire()
                for array in slot.inputs.values():
                    array[:] = 1
                ready, rows = pool.ready, len((await slot.run(2))["tokens"])
                slot.release()
                return [ready, rows]
            except EdgeRuntimeError as error:
                return [type(error).__name__, str(error)]
            finally:
                await pool.close(5)

        print(json.dumps(asyncio.run(attempt())))
    """
    address = ray.get_runtime_context().gcs_address

    def attempt(path: Path, **options: Any) -> Any:
        # Each in its own process, as a node is: Ray may crash in a process that joins it again.
        arguments = [address, str(path), json.dumps(options)]
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), *arguments],
            capture_output=True,
            text=True,
            timeout=150,
            cwd=Path(ray_pool.__file__).resolve().parents[1],
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    kind, message = attempt(damaged)
    assert kind == "BundleError"
    assert "stack.onnx" in message
    assert "on the host" in message
    assert attempt(bundle.path) == [1, 2]
    kind, message = attempt(bundle.path, device="cuda")
    assert kind == "EngineError"
    assert "need 1 GPUs" in message
    assert "need 1000 CPUs" in attempt(bundle.path, replicas=1000)[1]
    assert set(serve.status().applications) == {running.pool.name}
    assert running.pool.ready == 2
    running.call(running.ask(make_feeds(bundle, 1)))


# Without that cluster


@pytest.mark.process
def test_a_node_with_workers_on_ray(
    start_node: Callable[..., Any],
    connect: Callable[..., Any],
    local: Callable[..., Feeds],
    feeds: Feeds,
) -> None:
    """The front over real sockets. A cluster that it starts ends with it."""
    before, before_folders = ray_processes(), folders()
    options = ("--workers", "ray", "--ray-address", "local")
    node = start_node("pixels", *options, "--device", "cpu", "--log-format", "json")
    try:
        found = connect(node).ask(feeds)
        np.testing.assert_array_equal(found["tokens"], local(node, feeds)["tokens"])
    finally:
        status = node.end()
    assert status == 0, node.logged()
    assert "SIGTERM received" not in node.logged()
    for line in node.logged().splitlines():
        json.loads(line)  # Ray logs in its own format
    assert gone(before) == {}
    assert folders() == before_folders


@pytest.mark.process
def test_an_address_where_no_cluster_listens(bundle: Bundle) -> None:
    script = """
        import asyncio, sys
        from cloud_node.ray_pool import RayPool
        from engines.bundle import Bundle
        from edge_common.errors import EngineError

        async def main():
            pool = RayPool(Bundle.load(sys.argv[1]), address=sys.argv[2])
            try:
                await pool.start(lambda event: None)
            except EngineError as error:
                print("refused:", error)

        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(bundle.path), ADDRESS],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(ray_pool.__file__).resolve().parents[1],
    )
    assert f"refused: no Ray cluster is reached at {ADDRESS}" in done.stdout, done.stderr
    assert "ray start" in done.stdout


def test_missing_ray_is_reported(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'ray[serve]'")):
        RayPool(bundle)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"address": "ray://head:10001"}, "expected auto, local or HOST:PORT"),
        ({"replicas": 0}, "expected at least 1"),
        ({"replicas": (3, 2)}, "replicas 3 to 2"),
        ({"threads": 0}, "threads is 0"),
        ({"max_batch": 1}, "max_batch is 1"),
    ],
)
def test_invalid_ray_settings_are_refused(
    bundle: Bundle, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        RayPool(bundle, **options)


# A replica in this process


@pytest.fixture
def request_(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Open:
    monkeypatch.setattr(ray_pool, "disable_core_dumps", lambda: None)
    stage = bundle.stage("stack")
    return Open(
        bundle=str(bundle.path),
        stage=stage.sha256,
        device="cpu",
        threads=1,
        layout=Layout(stage.inputs, stage.outputs, bundle.geometry.windows, 1, 1),
        log_level=30,
    )


def test_a_hung_replica_is_unhealthy(request_: Open, bundle: Bundle) -> None:
    replica = Replica(request_, 30.0)
    replica.check_health()
    replica._engine.slowest_s = 2.0
    replica._began = time.monotonic() - 25
    replica.check_health()
    replica._engine.slowest_s = 4.0
    replica._began = time.monotonic() - 35
    replica.check_health()  # ten times its slowest run is longer
    replica._began = time.monotonic() - 45
    with pytest.raises(RuntimeError, match="hung"):
        replica.check_health()
    feeds = make_feeds(bundle, 1)
    assert not isinstance(replica.run(seal(feeds, b"k" * 16, result=False), b"k" * 16), Failed)
    replica._hang_s = replica._engine.slowest_s = 0.0
    replica.check_health()  # an idle replica does not hang


class Local:
    """An actor in this process, with the methods that `Replica` uses."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        class Method:
            remote = staticmethod(getattr(self.actor, name))

        return Method


def test_the_reason_why_a_replica_cannot_start_is_reported(
    request_: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "get", lambda value, **_: value)
    failures = Failures()
    other = msgspec.structs.replace(request_, stage=request_.stage[:12] + "0" * 52)
    with pytest.raises(RuntimeError, match="cannot be opened"):
        Replica(other, 30.0, Local(failures))
    found = failures.first()
    assert found is not None
    error = found[1].error()
    assert type(error) is BundleError
    assert "restart the node" in str(error)
    assert type(Failed("SystemExit", "x").error()) is EngineError


def test_sealed_tensors_open_only_with_their_key() -> None:
    tensors = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.zeros((1, 0), np.float16)}
    sealed = seal(tensors, b"k" * 16, result=True)
    opened = unseal(sealed, b"k" * 16, result=True)
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in opened.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in tensors.items()
    }
    dtype, _, nonce, data = sealed["a"]
    for wrong, key, result in (
        (sealed, b"x" * 16, True),
        (sealed, b"k" * 16, False),
        ({"a": sealed["b"]}, b"k" * 16, True),
        ({"a": (dtype, (3, 2), nonce, data)}, b"k" * 16, True),
        ({"a": ("<u8", (2, 3), nonce, data)}, b"k" * 16, True),
        ({"a": (dtype, (2, 3), nonce, data ^ 1)}, b"k" * 16, True),
    ):
        with pytest.raises(ValueError, match="were changed"):
            unseal(wrong, key, result=result)


@pytest.mark.slow
def test_no_private_part_of_ray_is_used() -> None:
    text = Path(ray_pool.__file__).read_text()
    assert not re.findall(r"ray\._|_system_config|/proc/", text)
