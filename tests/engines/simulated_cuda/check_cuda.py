from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import simulated_driver as driver

from edge_common.errors import EngineError
from engines import cuda

pytestmark = pytest.mark.process  # some do; all run in one of their own


@pytest.fixture
def gpu() -> cuda.Context:
    return cuda.context()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_facts_of_the_gpu() -> None:
    found = cuda.facts()
    assert (found.name, found.compute_capability) == ("Simulated GPU", "8.7")
    assert (found.cuda, found.memory_bytes, found.integrated) == ("12.6", driver.MEMORY, False)
    assert cuda.device_count() == 1
    with pytest.raises(EngineError, match=r"no GPU 3: this process may use 1"):
        cuda.facts(3)


def test_facts_of_another_gpu() -> None:
    done = run_python(
        "from engines import cuda; print(cuda.facts(1))",
        SIMULATED_CUDA_NAME="Orin",
        SIMULATED_CUDA_CAPABILITY="11.0",
        SIMULATED_CUDA_INTEGRATED="1",
        SIMULATED_CUDA_DEVICES="2",
    )
    assert "name='Orin', compute_capability='11.0'" in done.stdout, done.stderr
    assert "integrated=True" in done.stdout


def test_a_missing_gpu_is_one_clear_line() -> None:
    code = (
        "from engines import cuda\nprint(cuda.device_count())\n"
        "try: cuda.context()\nexcept cuda.EngineError as error: print(error)"
    )
    done = run_python(code, SIMULATED_CUDA_DEVICES="0")
    assert done.stdout.startswith("0\nno NVIDIA GPU is visible"), done.stderr
    assert "CUDA_VISIBLE_DEVICES" in done.stdout
    # `edge-runtime build` raises this too and has no such option
    assert "--device" not in done.stdout


@pytest.mark.parametrize(
    "make", ["cuda.context()", "t = threading.Thread(target=cuda.context); t.start(); t.join()"]
)
def test_the_primary_context_is_released_at_the_end(make: str) -> None:
    code = (
        "import atexit, threading, simulated_driver as driver\n"
        "atexit.register(lambda: print('at the end', driver.count('retains')))\n"
        f"from engines import cuda\n{make}\nprint(driver.count('retains'))"
    )
    done = run_python(code, PYTHONPATH=os.pathsep.join(sys.path))
    # Handlers run in reverse order, so the context's handler has already run.
    assert done.stdout.splitlines() == ["1", "at the end 0"]
    assert done.stderr == ""


def test_a_failing_driver_is_named(gpu: cuda.Context) -> None:
    with (
        driver.failing(1, 999),
        pytest.raises(EngineError, match=r"cuDeviceGetCount: .*999"),
    ):
        cuda.facts()
    with (
        pytest.raises(EngineError, match=r"Simulated GPU failed: cuStreamCreate failed: .*dmesg"),
        gpu.active(),
        driver.failing(1, 719),
    ):
        gpu.stream()


def test_the_context_is_current_only_inside_the_block(gpu: cuda.Context) -> None:
    with gpu.active():
        assert driver.count("depth") == 1
        with gpu.active():
            gpu.free_bytes()
        gpu.free_bytes()
    assert driver.count("depth") == 0
    with pytest.raises(ZeroDivisionError), gpu.active():
        _ = 1 / 0
    assert driver.count("depth") == 0


def test_every_thread_may_use_the_gpu_and_free_memory_of_another(gpu: cuda.Context) -> None:
    buffers: list[cuda.Buffer] = []

    def allocate() -> None:
        with gpu.active():
            buffers.append(cuda.Buffer(gpu, 100, "a test"))

    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    assert driver.live() == {"allocations": 1, "host_allocations": 1, "used": 100}
    with gpu.active():
        buffers[0].free()


def test_a_failed_allocation_names_needed_and_free_memory(gpu: cuda.Context) -> None:
    with driver.memory(3 << 20), gpu.active():
        first = gpu.allocate(1 << 20, "one")
        with pytest.raises(
            EngineError,
            match=r"out of memory on Simulated GPU: a test needs 2\.5 MiB, 2\.0 MiB of 3\.0 MiB",
        ):
            cuda.Buffer(gpu, 5 << 19, "a test")
        first.free()


@pytest.mark.parametrize("integrated", [False, True])
def test_a_buffer_carries_bytes_to_the_gpu_and_back(gpu: cuda.Context, integrated: bool) -> None:
    driver.cuda.simulated_set_integrated(int(integrated))
    facts = gpu.facts
    gpu.facts = cuda.facts()
    try:
        copies = driver.count("copies")
        with gpu.active():
            stream, buffer = gpu.stream(), cuda.Buffer(gpu, 64, "a test")
            buffer.host[:] = np.arange(64)
            buffer.upload(32, stream)
            stream.synchronize()
            if not integrated:
                buffer.host[:] = 0
            buffer.download(16, stream)
            stream.synchronize()
            np.testing.assert_array_equal(buffer.host[:16], np.arange(16))
            assert driver.count("copies") - copies == (0 if integrated else 2)
            assert buffer.address != buffer.host.ctypes.data
            buffer.free()
    finally:
        driver.cuda.simulated_set_integrated(0)
        gpu.facts = facts


def test_copies_wait_for_the_stream(gpu: cuda.Context) -> None:
    """This tests the simulation: otherwise a missing wait would go unnoticed."""
    with gpu.active():
        stream, buffer = gpu.stream(), cuda.Buffer(gpu, 8, "a test")
        buffer.host[:] = 1
        buffer.upload(8, stream)
        buffer.host[:] = 2
        stream.synchronize()
        buffer.download(8, stream)
        assert buffer.host[0] == 2
        stream.synchronize()
        assert buffer.host[0] == 2
        buffer.free()


def test_a_graph_repeats_work_and_a_failed_capture_leaves_the_stream_usable(
    gpu: cuda.Context,
) -> None:
    graphs = cuda.graph_driver()
    assert graphs is not None
    with gpu.active():
        stream, buffer = gpu.stream(), cuda.Buffer(gpu, 8, "a test")

        def spoil() -> None:
            buffer.upload(8, stream)
            gpu.allocate(8, "what a capture forbids")

        with pytest.raises(gpu.driver.Error):
            cuda.Graph(graphs, stream, spoil)
        graph = cuda.Graph(graphs, stream, lambda: buffer.upload(8, stream))
        buffer.host[:] = 3
        graph.launch(stream)
        stream.synchronize()
        buffer.host[:] = 0
        buffer.download(8, stream)
        stream.synchronize()
        assert list(buffer.host) == [3] * 8
        graph.free()
        buffer.free()


def test_a_capture_does_not_disturb_other_threads(gpu: cuda.Context) -> None:
    def allocate() -> None:
        with gpu.active():
            cuda.Buffer(gpu, 8, "another thread's").free()

    with gpu.active():
        stream, buffer = gpu.stream(), cuda.Buffer(gpu, 8, "a test")

        def enqueue() -> None:
            buffer.upload(8, stream)
            thread = threading.Thread(target=allocate)
            thread.start()
            thread.join()

        cuda.Graph(cuda.graph_driver(), stream, enqueue).free()
        buffer.free()
