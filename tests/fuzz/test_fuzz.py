"""Every target for a moment: only typed errors, all kinds of outcome, no growth."""

from __future__ import annotations

import collections
import gc
import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fuzz.__main__ import choose
from fuzz.messages import KINDS, message
from fuzz.targets import TARGETS
from transport.messages import decode_header

EXPECTED = {
    "decode": {"ok", "ProtocolError", "UnknownVersionError"},
    "node": {"ok", "ProtocolError", "UnknownVersionError", "Refusal"},
    "edge": {"ok", "ProtocolError", "UnknownVersionError", "OffloadError", "waits", "Refused"},
    "zap": {"only CURVE clients", "key not authorised"},
    "keys": {"ok", "KeyFileError"},
}


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=120))
@example(data=b"")
def test_targets_raise_only_typed_errors(name: str, data: bytes) -> None:
    TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_every_outcome_is_reached(name: str) -> None:
    """A fuzzer whose inputs all fail at the first byte tests nothing."""
    rng, seen = random.Random(1), collections.Counter[str]()
    for _ in range(300 if name == "keys" else 4_000):
        seen[TARGETS[name](rng.randbytes(rng.randrange(120)))] += 1
    assert seen.keys() >= EXPECTED[name]


def test_every_undamaged_message_is_valid() -> None:
    for kind in KINDS:
        decode_header(message(b"", [kind]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decode", "node", "edge", "zap"])
def test_fuzzing_keeps_no_memory(name: str) -> None:
    rng = random.Random(2)
    inputs = [rng.randbytes(rng.randrange(120)) for _ in range(1_000)]
    target = TARGETS[name]
    for data in inputs:
        target(data)
    growth, rise = [], []
    tracemalloc.start()
    for _ in range(3):  # a leak would show every time; threads of other tests allocate now and then
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for data in inputs:
            target(data)
        gc.collect()
        after, peak = tracemalloc.get_traced_memory()
        growth.append(after - before)
        rise.append(peak - before)
    tracemalloc.stop()
    assert min(growth) < 50_000
    assert min(rise) < 1 << 20


@pytest.mark.process
def test_the_command_reports_its_work(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fuzz", "--engine", "hypothesis", "--seconds", "1"]
    done = subprocess.run(
        [*command, "--target", "decode", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(map(str, Path(__file__).parents[1:3]))},
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["engine"] == "hypothesis"
    assert told["targets"]["decode"]["inputs"] >= 2_000
    assert not told["targets"]["decode"]["failed"]


def test_a_missing_engine_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said: list[str] = []
    assert choose(None, said.append) == "hypothesis"
    assert "pip install atheris" in said[0]
