"""Shared memory: every tensor has its own place, both processes see it, and nothing remains."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cloud_node import shared_memory
from cloud_node.shared_memory import Arena, Layout
from edge_common.errors import EngineError
from engines.bundle import TensorSpec

LAYOUT = Layout(
    inputs=(TensorSpec("pixels", "uint8", ("n", 3, 5)), TensorSpec("window", "int64", ("n",))),
    outputs=(TensorSpec("tokens", "bfloat16", ("n", 7)), TensorSpec("scale", "float32", ("n", 1))),
    rows=3,
    batches=2,
    results=4,
)


@pytest.fixture(params=["memfd", "shm"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of memory in turn."""
    if request.param == "shm":  # as on systems without memfd
        pytest.importorskip("_posixshmem")
        monkeypatch.delattr(os, "memfd_create", raising=False)
    elif not hasattr(os, "memfd_create"):
        pytest.skip("no memfd here")


@pytest.fixture
def arena(system: None) -> Arena:
    return Arena.create(LAYOUT)


def test_every_tensor_has_its_own_place(arena: Arena) -> None:
    tensors = [t for place in arena.batches + arena.results for t in place.values()]
    assert len(tensors) == 2 * 2 + 4 * 2
    for i, tensor in enumerate(tensors):
        assert not tensor.view(np.uint8).any()
        tensor.view(np.uint8)[...] = i + 1
    for i, tensor in enumerate(tensors):
        assert (tensor.view(np.uint8) == i + 1).all()
        assert tensor.ctypes.data % 64 == 0
    arena.close()


def test_types_and_shapes_match_the_specs(arena: Arena) -> None:
    batch, result = arena.batches[1], arena.results[3]
    assert {name: (a.dtype, a.shape) for name, a in (batch | result).items()} == {
        "pixels": (np.uint8, (3, 3, 5)),
        "window": (np.int64, (3,)),
        "tokens": (np.uint16, (3, 7)),
        "scale": (np.float32, (3, 1)),
    }
    arena.close()


@pytest.mark.process
def test_another_process_sees_it_and_answers(arena: Arena) -> None:
    arena.batches[1]["window"][:] = [7, 8, 9]
    code = (
        "import sys, msgspec\n"
        "from cloud_node.shared_memory import Arena, Layout\n"
        "layout = msgspec.json.decode(sys.argv[2], type=Layout)\n"
        "arena = Arena.attach(layout, int(sys.argv[1]))\n"
        "arena.results[2]['tokens'][:, 6] = arena.batches[1]['window']\n"
    )
    import msgspec

    command = [sys.executable, "-c", code, str(arena.fd), msgspec.json.encode(LAYOUT).decode()]
    root = Path(shared_memory.__file__).parents[1]
    subprocess.run(command, pass_fds=[arena.fd], check=True, cwd=root, timeout=60)
    assert arena.results[2]["tokens"][:, 6].tolist() == [7, 8, 9]
    arena.close()


def test_memory_is_released_with_the_last_array(system: None) -> None:
    before = _mapped()
    arena = Arena.create(LAYOUT)
    kept = arena.results[0]["scale"]
    kept[:] = 4
    arena.close()
    arena.close()
    assert arena.fd == -1
    assert kept.tolist() == [[4]] * 3
    assert _mapped() == before + 1
    del kept, arena
    assert _mapped() == before


def test_nothing_remains_after_use() -> None:
    gc.collect()  # collect garbage of other tests first
    fds, mapped = _fds(), _mapped()
    for _ in range(20):
        Arena.create(LAYOUT).close()
    assert (_fds(), _mapped()) == (fds, mapped)


def test_shared_memory_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("_posixshmem")
    monkeypatch.delattr(os, "memfd_create", raising=False)
    arena = Arena.create(LAYOUT)
    assert os.readlink(f"/proc/self/fd/{arena.fd}").endswith(" (deleted)")
    arena.close()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd here")
def test_neither_process_can_change_its_size() -> None:
    arena = Arena.create(LAYOUT)
    for size in (0, 2 * LAYOUT.size):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    arena.close()


def test_memory_of_another_size_is_refused() -> None:
    arena = Arena.create(LAYOUT)
    more = Layout(LAYOUT.inputs, LAYOUT.outputs, rows=999, batches=2, results=4)
    fd = os.dup(arena.fd)
    with pytest.raises(EngineError, match=f"expected {more.size}"):
        Arena.attach(more, fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    arena.close()


@pytest.mark.parametrize("shape", [(), ("n", "m"), ("n", 3, "k")])
def test_rows_without_a_fixed_size_are_refused(shape: tuple[int | str, ...]) -> None:
    layout = Layout((TensorSpec("odd", "uint8", shape),), LAYOUT.outputs, 3, 1, 1)
    with pytest.raises(EngineError, match="odd has shape"):
        Arena.create(layout)


def test_missing_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    fds = _fds()
    huge = Layout(LAYOUT.inputs, LAYOUT.outputs, rows=1 << 50, batches=1, results=1)
    with pytest.raises(EngineError, match="lower max_batch"):
        Arena.create(huge)
    assert _fds() == fds


def _fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def _mapped() -> int:
    text = Path("/proc/self/maps").read_text()
    return sum(
        "memfd:edge-runtime" in line or "/edge-runtime-" in line for line in text.split("\n")
    )
