"""A simulated machine with a GPU and TensorRT, for the parity gate and engine selection.

Plans are files of a few bytes with correct records. Opening one opens the stage's graph in ONNX
Runtime on the CPU, and :attr:`SimulatedMachine.spoil` may change the outputs. CUDA is not simulated
here: the tests of :mod:`engines.trt` do that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_common.errors import EngineError
from engines import cuda, libraries, selection
from engines import plan as plans
from engines.bundle import Bundle
from engines.engine import Engine
from engines.libraries import Library
from engines.ort import OrtEngine
from engines.plan import Plan, PlanRecord

Spoil = Callable[[str, dict[str, np.ndarray]], dict[str, np.ndarray]]

GPU = cuda.Facts("Simulated", "8.7", "540.4.0", "12.6", 8 << 30, True)


class SimulatedMachine:
    """The installed hardware and software. Change the attributes to change the machine.

    Attributes:
        gpu: None means that there is no driver.
        version: of TensorRT. None means that it is not installed.
        spoil: maps stage and outputs to the outputs of the simulated TensorRT.
        opened: stages that it ran, in order.
        open: the number of open engines.
    """

    def __init__(self) -> None:
        self.gpu: cuda.Facts | None = GPU
        self.version: tuple[int, int, int] | None = (10, 13, 3)
        self.spoil: Spoil = lambda stage, outputs: outputs
        self.opened: list[str] = []
        self.open = 0

    @property
    def library(self) -> Library:
        assert self.version is not None
        return Library("tensorrt", self.version, SimpleNamespace())

    def facts(self, ordinal: int = 0) -> cuda.Facts:
        if self.gpu is None:
            raise EngineError("no NVIDIA driver is installed here (simulated)")
        return self.gpu

    def installed(self) -> list[libraries.Flavour]:
        return [] if self.version is None else ["tensorrt"]

    def load(self, flavour: libraries.Flavour) -> Library:
        if self.version is None or flavour != "tensorrt":
            raise EngineError(f"{flavour} is not installed (simulated)")
        return self.library

    def open_plan(
        self, bundle: Bundle, plan: Plan, library: Library, *, ordinal: int = 0
    ) -> Engine:
        plan.read()
        self.opened.append(plan.record.stage)
        return SimulatedTrt(self, bundle, plan.record.stage)

    def build(self, bundle: Bundle, *stages: str, **changes: Any) -> list[Plan]:
        """Write plans of the stages, with records that fit this machine and without a verdict."""
        return [write_plan(bundle, stage, self.library, **changes) for stage in stages]


class SimulatedTrt(Engine):
    def __init__(self, machine: SimulatedMachine, bundle: Bundle, stage: str) -> None:
        self._machine, self._stage = machine, stage
        self._engine = OrtEngine(bundle.stage_path(stage), threads=1, device="cpu")
        self.inputs, self.outputs = self._engine.inputs, self._engine.outputs
        self._closed = False
        machine.open += 1

    def run(
        self, feeds: Mapping[str, np.ndarray], out: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        return self._machine.spoil(self._stage, self._engine.run(feeds, out))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._machine.open -= 1
            self._engine.close()


def write_plan(bundle: Bundle, stage: str, library: Library, **changes: Any) -> Plan:
    """A plan of arbitrary bytes whose record fits ``bundle`` and :data:`GPU`."""
    spec = bundle.stage(stage)
    target = plans.target(library, ["8.7"])
    folder = plans.directory(bundle.path, target)
    folder.mkdir(parents=True, exist_ok=True)
    data = f"not a plan of {stage}".encode()
    values: dict[str, Any] = {
        "stage": stage,
        "model": bundle.manifest.model,
        "form": "attention",
        "precision": bundle.manifest.precision,
        "flavour": library.flavour,
        "version": library.version_text,
        "target": target,
        "plan_sha256": hashlib.sha256(data).hexdigest(),
        "plan_bytes": len(data),
        "stage_sha256": spec.sha256,
        "graph_sha256": spec.files[spec.file],
        "weights_sha256": bundle.manifest.weights_sha256,
        "compute_capabilities": ("8.7",),
        "gpu": GPU.name,
        "driver": GPU.driver,
        "device_memory_bytes": GPU.memory_bytes,
        "profile": {},
        "inputs": spec.inputs,
        "outputs": spec.outputs,
        "flags": {},
        "command": "tests",
        "build_seconds": 0.0,
        "built": "2026-01-01T00:00:00+00:00",
        "read_from": "engine inspector",
        "attention": (),
        "layers": (),
        "activation_bytes": 0,
        "edge_runtime": "0",
    }
    built: Path = folder / f"{stage}.tmp"
    built.write_bytes(data)
    return plans.write(folder, stage, built, PlanRecord(**{**values, **changes}))


def install(monkeypatch: pytest.MonkeyPatch) -> SimulatedMachine:
    """Make :mod:`engines.selection` and :mod:`engines.parity` use a simulated machine."""
    machine = SimulatedMachine()
    monkeypatch.setattr(cuda, "facts", machine.facts)
    monkeypatch.setattr(libraries, "installed", machine.installed)
    monkeypatch.setattr(libraries, "load", machine.load)
    monkeypatch.setattr(selection, "open_plan", machine.open_plan)
    selection._warn_once.cache_clear()
    return machine
