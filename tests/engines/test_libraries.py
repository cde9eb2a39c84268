"""TensorRT-RTX is the real library. TensorRT, whose libraries are not on PyPI, is simulated."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from edge_common.errors import EngineError
from engines import libraries
from engines.libraries import Library

Simulate = Callable[..., None]


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Simulate]:
    """Put simulated libraries on the path in place of any real ones."""
    names = ("tensorrt", "tensorrt_rtx")
    real = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def write(**bodies: str) -> None:
        for name, body in bodies.items():
            (tmp_path / f"{name}.py").write_text(body)
        importlib.invalidate_caches()

    yield write
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(real)


@pytest.fixture(scope="module")
def rtx() -> Library:
    pytest.importorskip("tensorrt_rtx")
    return libraries.load("tensorrt-rtx")


def tensorrt(*version: int) -> Library:
    return Library("tensorrt", version, MagicMock())  # type: ignore[arg-type]


def test_nothing_installed_is_reported(simulate: Simulate) -> None:
    assert libraries.installed() == []
    with pytest.raises(EngineError, match=r"python3-libnvinfer.*pip install tensorrt-rtx-cu13"):
        libraries.choose("auto")
    with pytest.raises(EngineError, match="--system-site-packages"):
        libraries.choose("tensorrt")
    with pytest.raises(EngineError, match=r"pip install tensorrt-rtx-cu13"):
        libraries.choose("tensorrt-rtx")


def test_listing_installed_libraries_imports_nothing(simulate: Simulate) -> None:
    simulate(tensorrt="raise SystemExit", tensorrt_rtx="raise SystemExit")
    assert libraries.installed() == ["tensorrt", "tensorrt-rtx"]


def test_auto_prefers_tensorrt(simulate: Simulate) -> None:
    simulate(tensorrt="__version__ = '10.3.0'", tensorrt_rtx="__version__ = '1.7.1.116'")
    library = libraries.choose("auto")
    assert (library.flavour, library.version, library.name) == (
        "tensorrt",
        (10, 3, 0),
        "TensorRT 10.3.0",
    )
    assert libraries.choose("tensorrt-rtx").name == "TensorRT-RTX 1.7.1"


def test_auto_uses_tensorrt_rtx_if_it_is_the_only_one(simulate: Simulate) -> None:
    simulate(tensorrt_rtx="__version__ = '1.7.1.116'")
    assert libraries.choose("auto").flavour == "tensorrt-rtx"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "raise OSError('libnvinfer.so.10: cannot open\\nmore')",
            r"fails \(OSError: libnvinf[^\n]*",
        ),
        ("raise ImportError('no CUDA')", "ImportError: no CUDA"),
        ("", "version ''"),
        ("__version__ = 'nightly'", "version 'nightly'"),
        ("__version__ = '8.6.1'", "too old, expected 10.3.0"),
        ("__version__ = '10.2.0.19'", "TensorRT 10.2.0 is too old"),
    ],
)
def test_an_unusable_library_is_one_line(simulate: Simulate, body: str, reason: str) -> None:
    simulate(tensorrt=body)
    with pytest.raises(EngineError, match=reason) as caught:
        libraries.load("tensorrt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", ["raise OSError('broken')", ""])
def test_the_remedy_for_a_broken_library_is_a_forced_reinstall(
    simulate: Simulate, body: str
) -> None:
    """A plain install would find nothing to do."""
    simulate(tensorrt=body, tensorrt_rtx=body)
    with pytest.raises(EngineError, match=r": pip install --force-reinstall tensorrt-rtx-cu13$"):
        libraries.load("tensorrt-rtx")
    with pytest.raises(EngineError, match="`sudo apt install --reinstall python3-libnvinfer`"):
        libraries.load("tensorrt")


def test_the_real_library_reports_its_target_gpus(rtx: Library) -> None:
    able = [c for c in ("7.5", "8.6", "8.7", "9.0", "12.0") if libraries.builds_for(rtx, c)]
    assert able == ["7.5", "8.6", "12.0"]
    assert libraries.builds_for(tensorrt(10, 3, 0), "9.0")


def test_the_operator_attention_is_supported_from_10_14_on(rtx: Library) -> None:
    assert not tensorrt(10, 3, 0).parses_attention
    assert not tensorrt(10, 13, 3).parses_attention
    assert tensorrt(10, 14, 1).parses_attention
    assert tensorrt(11, 4, 0).parses_attention
    assert rtx.parses_attention


def test_the_real_library_parses_attention(rtx: Library, tmp_path: Path) -> None:
    from engines.bundle import shipped_bundle

    trt = rtx.module
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(libraries.network_flags(rtx))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(shipped_bundle("fp16") / "stack.onnx"))


def test_networks_are_strongly_typed(rtx: Library) -> None:
    trt = rtx.module
    network = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(libraries.network_flags(rtx))
    assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def test_the_strong_types_flag_is_not_set_from_11_on() -> None:
    for version, expected in (((10, 3, 0), 2), ((10, 16, 1), 2), ((11, 0, 0), 0), ((11, 4, 1), 0)):
        library = tensorrt(*version)
        library.module.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
        assert libraries.network_flags(library) == expected


def test_tensorrt_builds_for_the_local_gpu_only() -> None:
    assert libraries.compute_capabilities(tensorrt(10, 3, 0), "8.7") == ("8.7",)
    with pytest.raises(EngineError, match="finds none here"):
        libraries.compute_capabilities(tensorrt(10, 3, 0), None)


def test_tensorrt_rtx_builds_for_all_but_turing_or_for_turing(rtx: Library) -> None:
    portable = ("8.0", "8.6", "8.9", "12.0", "12.1")
    assert libraries.compute_capabilities(rtx, None) == portable
    assert libraries.compute_capabilities(rtx, "8.9") == portable
    assert libraries.compute_capabilities(rtx, "9.0") == portable  # for other machines
    assert libraries.compute_capabilities(rtx, "7.5") == ("7.5",)


def config_of(rtx: Library) -> tuple[Any, Any]:
    builder = rtx.module.Builder(rtx.module.Logger(rtx.module.Logger.INTERNAL_ERROR))
    return builder, builder.create_builder_config()


def test_configure_applies_the_values_of_the_record(rtx: Library) -> None:
    trt = rtx.module
    _builder, config = config_of(rtx)
    assert config.get_flag(trt.BuilderFlag.TF32)  # otherwise clearing it would prove nothing
    flags = libraries.configure(
        rtx, config, compute_capabilities=("8.6", "12.0"), workspace_mib=256
    )
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 256 << 20
    assert config.num_compute_capabilities == 2
    assert [config.get_compute_capability(index) for index in range(2)] == [
        trt.ComputeCapability.SM86,
        trt.ComputeCapability.SM120,
    ]
    assert flags["TF32"] is False
    assert flags["workspace MiB"] == 256


def test_configure_leaves_the_workspace_at_its_default(rtx: Library) -> None:
    _builder, config = config_of(rtx)
    pool = rtx.module.MemoryPoolType.WORKSPACE
    before = config.get_memory_pool_limit(pool)
    flags = libraries.configure(rtx, config, compute_capabilities=("8.6",))
    assert config.get_memory_pool_limit(pool) == before
    assert flags["workspace MiB"] is None


def test_configure_refuses_a_gpu_unknown_to_the_library(rtx: Library) -> None:
    _builder, config = config_of(rtx)
    with pytest.raises(EngineError, match=r"does not build for .* 9\.0"):
        libraries.configure(rtx, config, compute_capabilities=("9.0",))


def test_configure_sets_no_targets_for_tensorrt() -> None:
    config = MagicMock(spec=["clear_flag", "get_flag", "set_memory_pool_limit"])
    config.get_flag.return_value = False
    config.builder_optimization_level = 3
    libraries.configure(tensorrt(10, 3, 0), config, compute_capabilities=("8.7",))
    assert not hasattr(config, "num_compute_capabilities")


def test_contexts_of_tensorrt_rtx_leave_graphs_to_the_engine_and_compile_at_once(
    rtx: Library,
) -> None:
    """Engines open on a GPU only, so this one is simulated. The names are the real library's."""
    engine = MagicMock()
    assert libraries.make_context(rtx, engine) is engine.create_execution_context.return_value
    (config,) = engine.create_execution_context.call_args.args
    assert config.cuda_graph_strategy == rtx.module.CudaGraphStrategy.DISABLED
    strategies = rtx.module.DynamicShapesKernelSpecializationStrategy
    assert config.dynamic_shapes_kernel_specialization_strategy == strategies.EAGER
    managed = rtx.module.ExecutionContextAllocationStrategy.USER_MANAGED
    config.set_execution_context_allocation_strategy.assert_called_once_with(managed)
    for name in (
        "cuda_graph_strategy",
        "dynamic_shapes_kernel_specialization_strategy",
        "set_execution_context_allocation_strategy",
    ):
        assert hasattr(rtx.module.IRuntimeConfig, name)


def test_contexts_of_tensorrt_need_no_configuration() -> None:
    library, engine = tensorrt(10, 3, 0), MagicMock(spec=["create_execution_context"])
    assert libraries.make_context(library, engine)
    managed = library.module.ExecutionContextAllocationStrategy.USER_MANAGED
    engine.create_execution_context.assert_called_once_with(managed)


def test_activations_use_the_given_memory(rtx: Library) -> None:
    assert hasattr(rtx.module.IExecutionContext, "set_device_memory")
    context = MagicMock(spec=["set_device_memory"])
    libraries.give_memory(context, 0x7000_0000, 4096)
    context.set_device_memory.assert_called_once_with(0x7000_0000, 4096)


def test_only_a_context_that_denies_it_cannot_be_captured(rtx: Library) -> None:
    assert hasattr(rtx.module.IExecutionContext, "is_stream_capturable")
    assert libraries.capturable(object(), 5)  # TensorRT does not say
    for answer in (True, False):
        context = MagicMock(spec=["is_stream_capturable"])
        context.is_stream_capturable.return_value = answer
        assert libraries.capturable(context, 5) is answer


def test_device_memory_is_queried_by_the_name_of_the_version(rtx: Library) -> None:
    assert hasattr(rtx.module.ICudaEngine, "device_memory_size_v2")
    engine = types.SimpleNamespace(device_memory_size_v2=10_042_880)
    assert libraries.device_memory(tensorrt(10, 3, 0), engine) == 10_042_880


def test_the_real_library_reports_a_malformed_plan_without_a_gpu(rtx: Library) -> None:
    runtime = rtx.module.Runtime(rtx.module.Logger(rtx.module.Logger.INTERNAL_ERROR))
    assert libraries.invalidity(rtx, runtime, b"no plan" * 100) == ["malformed engine"]


def test_invalidity_lists_every_cause(rtx: Library) -> None:
    trt = rtx.module
    bits = trt.EngineInvalidityDiagnostics
    both = int(bits.UNSUPPORTED_CC) | int(bits.OLD_CUDA_DRIVER)
    runtime = MagicMock(engine_header_size=64)
    runtime.get_engine_validity.return_value = (trt.EngineValidity.INVALID, both)
    causes = ["unsupported cc", "old cuda driver"]
    assert libraries.invalidity(rtx, runtime, bytes(500)) == causes
    (header,) = runtime.get_engine_validity.call_args.args
    assert len(header) == 64  # not a gigabyte
    for validity in (trt.EngineValidity.VALID, trt.EngineValidity.SUBOPTIMAL):
        runtime.get_engine_validity.return_value = (validity, 0)
        assert libraries.invalidity(rtx, runtime, bytes(500)) is None
    assert libraries.invalidity(tensorrt(10, 3, 0), object(), bytes(500)) is None


def issues(version: tuple[int, int, int], capability: str | None) -> set[str]:
    found = libraries.defects("tensorrt", version, capability)
    return {defect.source.rpartition("/")[2] for defect in found}


@pytest.mark.parametrize(
    ("version", "capability", "expected"),
    [
        ((10, 3, 0), "8.7", {"4723", "4419"}),
        ((10, 4, 0), "8.6", {"4742", "4334"}),
        ((10, 5, 0), "8.9", {"4334"}),
        ((10, 7, 0), "8.9", {"4334"}),
        ((10, 8, 0), "8.9", set()),
        ((10, 13, 3), "11.0", set()),
        ((10, 13, 3), "12.0", {"4837"}),
        ((10, 16, 1), "12.0", {"4837", "4822"}),
        ((10, 16, 1), "12.1", {"4837", "4822"}),
        ((10, 16, 1), "8.7", set()),
        ((11, 4, 0), "12.0", {"4837", "4822"}),
        ((11, 4, 0), "8.7", set()),
        ((11, 4, 0), None, {"4837", "4822"}),
    ],
)
def test_known_defects_of_each_version(
    version: tuple[int, int, int], capability: str | None, expected: set[str]
) -> None:
    assert issues(version, capability) == expected


def test_a_known_defect_names_itself_and_its_source() -> None:
    for version in ((10, 3, 0), (10, 4, 0), (10, 16, 1)):
        for defect in libraries.defects("tensorrt", version, None):
            assert defect.source.startswith("https://github.com/NVIDIA/TensorRT/issues/")
            assert defect.what.isprintable()
            assert set(defect.precisions) <= {"fp32", "fp16", "bf16"}


def test_gpus_unsupported_by_tensorrt_rtx_are_a_known_defect() -> None:
    for capability in ("8.7", "9.0", "10.0", "11.0"):
        (defect,) = libraries.defects("tensorrt-rtx", (1, 7, 1), capability)
        assert capability in defect.what
    for capability in ("7.5", "8.6", "12.0", None):
        assert libraries.defects("tensorrt-rtx", (1, 7, 1), capability) == ()
