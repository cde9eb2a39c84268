"""Replicas on a real local Ray cluster: right outputs, one killed, nothing on a disk, none left.

One cluster of two replicas serves most tests; it is small, of this machine, and ends with them.
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

import numpy as np
import pytest

from cloud_node import ray_pool
from cloud_node import worker as wire
from cloud_node.pool import PoolClosed, WorkerDied, WorkerEvent
from cloud_node.ray_pool import RayPool, Replica
from cloud_node.shared_memory import Layout
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
ADDRESS = "127.0.0.1:1"  # nobody listens there


class Running:
    """A started pool, and an event loop in a thread of its own to call it from."""

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
        """Run a batch and keep a copy of what comes back."""
        slot = await self.pool.acquire()
        try:
            rows = fill(slot.inputs, feeds)
            return {name: array.copy() for name, array in (await slot.run(rows)).items()}
        finally:
            slot.release()

    def pids(self) -> set[int]:
        """Of the replicas, as they say themselves."""

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
    """Processes of Ray, of whomever, by pid."""
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
    """What Ray left that was not there before; its last processes take a moment to end."""
    left: dict[int, str] = {}
    for _ in range(300):
        left = {pid: text for pid, text in ray_processes().items() if pid not in before}
        if not left:
            break
        time.sleep(0.05)
    return left


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[[str], Path]) -> Bundle:
    """Takes a good second for a batch: time to be killed in."""
    return Bundle.load(bundle_of("slower"))


@pytest.fixture(scope="module")
def running(bundle: Bundle) -> Iterator[Running]:
    """A pool of two replicas; the end checks that nothing of it is left."""
    before, before_folders = ray_processes(), folders()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_pool.os, "cpu_count", lambda: 4)  # as Ray counts: one replica more fits
        running = Running(bundle)
    late = None
    try:
        yield running
        feeds = make_feeds(bundle, 2, seed=9)

        async def keep() -> Feeds:
            slot = await running.pool.acquire()
            return await slot.run(fill(slot.inputs, feeds))  # never released

        late = running.call(keep())
        expected = running.direct(feeds)
    finally:
        running.call(running.pool.close(5))
        with pytest.raises(PoolClosed):
            running.call(running.pool.acquire())
        running.end()
    assert late is not None
    np.testing.assert_array_equal(late["tokens"], expected["tokens"])  # valid after the end
    assert running.events[-1].kind != "died"
    assert gone(before) == {}
    assert folders() == before_folders


# With two replicas


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
        with pytest.raises(RuntimeError, match="none after success"):
            await slot.run(3)
        slot.release()
        slot.release()
        return outputs

    found = running.call(both())
    np.testing.assert_array_equal(found["tokens"], running.direct(feeds)["tokens"])
    assert running.pids() == pids


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
        assert len(pool._flights) == 1  # the replica still reads what it was sent
        await running.until(lambda: not pool._flights)
        assert not pool._filling
        assert pool._lent == 0

    running.call(cancel())


def test_a_replica_killed_in_a_request_is_replaced(running: Running) -> None:
    pool = running.pool
    feeds = make_feeds(running.bundle, 4)
    victim, survivor = running.pids()
    restarts = running.events[-1].restarts

    async def lose_one() -> list[Any]:
        tasks = [asyncio.ensure_future(running.ask(feeds)) for _ in range(2)]  # one on each
        await asyncio.sleep(0.3)
        os.kill(victim, signal.SIGKILL)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        results.append(await running.ask(feeds))  # the next, by whoever is there
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


def test_what_edges_send_is_in_no_file_of_ray(running: Running) -> None:
    """Not even when objects outgrow the store."""
    import ray

    canary = os.urandom(16)
    feeds = make_feeds(running.bundle, 4)
    flat = feeds["pixels"].reshape(-1)
    flat[:] = np.frombuffer(canary * (flat.size // 16 + 1), np.uint8)[: flat.size]
    running.call(running.ask(feeds))
    with pytest.raises(EngineError):  # also where it fails, and is told of
        running.call(running.ask({**feeds, "window": feeds["window"] + 10_000}))
    memory, session = running.pool._cluster._folders
    held = [ray.put(np.frombuffer(canary * (40 << 16), np.uint8)) for _ in range(6)]
    (raylet,) = [
        pid for pid, text in ray_processes().items() if f"--fallback_directory={memory}" in text
    ]
    maps = Path(f"/proc/{raylet}/maps").read_text()
    assert f"{memory}/" in maps  # the store is full, what is over lies there
    assert f"{session}/" not in maps
    files = [path for path in Path(session).rglob("*") if path.is_file()]
    assert any("replica" in path.name for path in files)
    forms = (canary, canary.hex().encode(), repr(canary)[2:-1].encode())
    listed = re.compile(rb"[\[ ,]+".join(str(byte).encode() for byte in canary))
    for path in files:
        content = path.read_bytes()
        assert not any(form in content for form in forms), path
        assert not listed.search(content), path
    del held


def test_ray_keeps_objects_in_memory_and_tells_nobody(running: Running) -> None:
    import ray
    from ray import serve
    from ray._common.usage import usage_lib
    from ray._private.state import state

    memory, session = running.pool._cluster._folders
    raylets = [text for text in ray_processes().values() if f"--temp-dir={session}/" in text]
    (raylet,) = [text for text in raylets if "/raylet --" in text]
    assert "--plasma_directory=/dev/shm" in raylet
    assert f"--fallback_directory={memory}" in raylet
    assert memory.startswith("/dev/shm/")
    assert Path(memory).stat().st_mode & 0o077 == 0
    assert Path(session).stat().st_mode & 0o077 == 0
    assert state.get_system_config()["automatic_object_spilling_enabled"] is False
    log = next(Path(session).glob("ray/session_2*/logs/raylet.out")).read_text()
    assert "Object spilling is disabled" in log
    assert ray.cluster_resources()["object_store_memory"] <= 256 << 20
    assert not usage_lib.usage_stats_enabled()
    assert not ray._private.worker.global_worker.node.webui_url  # no dashboard
    assert serve.status().proxies == {}  # and nobody who takes requests over HTTP


def test_another_process_uses_the_cluster_and_leaves_it(
    running: Running, bundle: Bundle, tmp_path: Path
) -> None:
    """Connects, fails on a damaged copy, serves, and takes only its own application away."""
    import ray
    from ray import serve

    damaged = tmp_path / "damaged"
    shutil.copytree(bundle.path, damaged)
    script = """
        import asyncio, json, sys
        from cloud_node.ray_pool import RayPool
        from engines.bundle import Bundle
        from edge_common.errors import EdgeRuntimeError

        address, good, damaged = sys.argv[1:]

        async def attempt(path, spoil=False, **options):
            bundle = Bundle.load(path)
            if spoil:
                with (bundle.path / "stack.onnx").open("ab") as file:
                    file.write(b"x")
            options = {"device": "cpu", "threads": 1, "start_s": 30.0, **options}
            pool = RayPool(bundle, address=address, name="other", **options)
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

        async def main():
            return [
                await attempt(damaged, spoil=True),
                await attempt(good),
                await attempt(good, device="cuda"),
                await attempt(good, replicas=1000),
            ]

        print(json.dumps(asyncio.run(main())))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [*command, address, str(bundle.path), str(damaged)],
        capture_output=True,
        text=True,
        timeout=150,
        cwd=Path(ray_pool.__file__).resolve().parents[1],
    )
    assert done.returncode == 0, done.stderr
    spoilt, served, no_gpu, too_many = json.loads(done.stdout.splitlines()[-1])
    assert spoilt[0] == "BundleError", spoilt
    assert "stack.onnx" in spoilt[1]
    assert "on the host" in spoilt[1]
    assert served == [1, 2]
    assert no_gpu[0] == "EngineError"
    assert "need 1 GPUs" in no_gpu[1]
    assert "need 1000 CPUs" in too_many[1]
    assert set(serve.status().applications) == {running.pool.name}
    assert running.pool.ready == 2
    running.call(running.ask(make_feeds(bundle, 1)))


# Without that cluster


def test_a_node_with_workers_on_ray(
    start_node: Callable[..., Any],
    connect: Callable[..., Any],
    local: Callable[..., Feeds],
    feeds: Feeds,
) -> None:
    """The front over real sockets; a cluster that it starts ends with it."""
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
        json.loads(line)  # Ray has its own way to log
    assert gone(before) == {}
    assert folders() == before_folders


def test_a_cluster_that_spills_is_refused() -> None:
    """The cluster that Ray starts by default."""
    script = """
        import tempfile
        import ray
        from cloud_node import ray_pool
        from edge_common.errors import ConfigError

        with tempfile.TemporaryDirectory() as folder:
            ray.init(
                address="local", num_cpus=1, object_store_memory=80 << 20, include_dashboard=False,
                _temp_dir=folder, _node_ip_address="127.0.0.1",
            )
            def attempt(check):
                try:
                    check()
                except ConfigError as error:
                    print("refused:", error)
                else:
                    print("passed")
            attempt(ray_pool._Cluster()._check_spilling)
            attempt(lambda: ray.get(ray.remote(on_host).remote()))
            ray.shutdown()
    """
    on_host = "def on_host():\n    from cloud_node import ray_pool\n    ray_pool._check_store()\n"
    done = subprocess.run(
        [sys.executable, "-c", on_host + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(ray_pool.__file__).resolve().parents[1],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("refused", "passed"))]
    assert len(lines) == 2
    assert "automatic_object_spilling_enabled" in lines[0]
    assert lines[1].startswith("refused"), lines


def test_nobody_at_the_address(bundle: Bundle) -> None:
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


def test_ray_that_is_not_installed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_settings_that_cannot_be(bundle: Bundle, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        RayPool(bundle, **options)


# A replica, here


@pytest.fixture
def request_(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> wire.Open:
    monkeypatch.setattr(ray_pool, "disable_core_dumps", lambda: None)
    monkeypatch.setattr(ray_pool, "_check_store", lambda: None)
    stage = bundle.stage("stack")
    return wire.Open(
        bundle=str(bundle.path),
        stage=stage.sha256,
        device="cpu",
        threads=1,
        layout=Layout(stage.inputs, stage.outputs, bundle.geometry.windows, 1, 1),
        log_level=30,
    )


def test_a_replica_that_hangs_is_not_well(request_: wire.Open) -> None:
    replica = Replica(request_, 30.0)
    replica.check_health()
    replica._slowest_s = 2.0
    replica._began = time.monotonic() - 25
    replica.check_health()
    replica._slowest_s = 4.0
    replica._began = time.monotonic() - 35
    replica.check_health()  # ten times its slowest run is longer
    replica._began = time.monotonic() - 45
    with pytest.raises(RuntimeError, match="hung"):
        replica.check_health()


def test_a_replica_refuses_another_stack_than_the_node_serves(request_: wire.Open) -> None:
    wire_request = wire.Open(
        **{name: getattr(request_, name) for name in request_.__struct_fields__ if name != "stage"},
        stage="0" * 64,
    )
    with pytest.raises(RuntimeError, match="<<edge-runtime BundleError: on the host") as caught:
        Replica(wire_request, 30.0)
    error = ray_pool._replica_failure(f"Traceback …\n{caught.value}\nmore")
    assert type(error) is BundleError
    assert "this node was started with 000000000000" in str(error)


def test_a_failure_that_ray_tells_of() -> None:
    error = ray_pool._replica_failure(
        "Deploying application x failed:\n  No module named 'engines'"
    )
    assert type(error) is EngineError
    assert str(error).endswith("No module named 'engines'")


@pytest.mark.parametrize(
    ("command", "mounts", "refusal"),
    [
        ("raylet\0--plasma_directory=/dev/shm\0--fallback_directory=/dev/shm/x\0", None, None),
        (
            "raylet\0--plasma_directory=/dev/shm\0--fallback_directory=/tmp/ray\0",
            None,
            "/tmp/ray (ext4)",
        ),
        (
            "raylet\0--plasma_directory=/dev/shm\0--fallback_directory=/dev/shm/x\0",
            "none / ext4 rw 0 0\n",
            "/dev/shm (ext4)",
        ),
        ("raylet\0--plasma_directory=/dev/shm\0", None, "does not tell its fallback_directory"),
        ("raylet\0", None, "does not tell its plasma_directory"),
    ],
)
def test_where_a_host_keeps_objects(command: str, mounts: str | None, refusal: str | None) -> None:
    mounts = mounts or "none / ext4 rw 0 0\ntmpfs /dev/shm tmpfs rw 0 0\n"

    def read(path: Path) -> str:
        return command if path.name == "cmdline" else str(mounts)

    if refusal is None:
        ray_pool._check_store(read)
    else:
        with pytest.raises(ConfigError, match=re.escape(refusal)):
            ray_pool._check_store(read)
